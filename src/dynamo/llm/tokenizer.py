"""How does text become token ids, and token ids text, for any model directory?"""

import asyncio
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from dynamo.llm.cache_check import first_difference
from dynamo.llm.detokenizer import ByteRules, IncrementalDecoder
from dynamo.llm.segment_cache import DEFAULT_BYTES, CacheCounts, SegmentCache
from dynamo.llm.tokenizer_backend import Backend
from dynamo.llm.tokenizer_config import TokenizerConfig, read_tokenizer_config
from dynamo.llm.tokenizer_hf import HuggingFaceBackend
from dynamo.llm.tokenizer_sentencepiece import SentencePieceBackend
from dynamo.llm.tokenizer_tiktoken import TiktokenBackend, is_tiktoken
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import env_bool, env_number

# One text never gains from the library's own threads, and a pool per process beside the engine's costs CPU.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

log = logging.getLogger(__name__)

_HEAD_BYTES = 256  # more than a first line of a tiktoken file has
INLINE_CHARS = 8192  # encoding this much takes about 2 ms, what an event loop can bear


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads that encode long text. Their number bounds how many texts are worked on at once."""
    threads = int(env_number("DYN_TOKENIZER_THREADS", min(4, os.cpu_count() or 1)))
    return ThreadPoolExecutor(max_workers=max(1, threads), thread_name_prefix="tokenizer")


class Tokenizer:
    """A model's vocabulary, from whichever file its directory has.

    `named_tokens` maps `bos_token`, `eos_token`, … to their text (what a chat template sees); `eos_ids` are the
    ids that end a sequence: those of `generation_config.json` and `config.json` and the id of the tokenizer's own
    `eos_token`, in this order, each once.

    Decoding follows `tokenizers`: `clean_up_tokenization_spaces` of `tokenizer_config.json` is not applied (as in
    vLLM's streaming detokenizer; Hugging Face's own one-shot `decode` applies it, but not for BPE).
    """

    def __init__(self, backend: Backend, config: TokenizerConfig) -> None:
        self._backend = backend
        self.config = config
        self.named_tokens = {**backend.named, **config.named}
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.special_ids
        own_eos = self.token_id("eos_token")
        self.eos_ids = tuple(dict.fromkeys([*config.eos_ids, *([] if own_eos is None else [own_eos])]))
        self.bos_id = self.token_id("bos_token")
        self._affixes = _affixes(backend)
        self._cache = _make_cache(backend, self.named_tokens) if self._affixes is not None else None

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Load `tokenizer.json`, else a tiktoken file, else a SentencePiece model.

        Raises InvalidArgument naming the file that is missing or broken.
        """
        directory = Path(directory)
        config = read_tokenizer_config(directory)
        return cls(_load_backend(directory, config), config)

    def token_id(self, name: str) -> int | None:
        """The id of a named token such as `bos_token`, None if the model has none."""
        text = self.named_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. Raises InvalidArgument for text that is not valid Unicode.

        Special tokens in the text are recognized. `add_special_tokens` adds those that the tokenizer opens and closes
        a sequence with; a rendered chat has its own.
        """
        try:
            if self._cache is None:
                return self._backend.encode(text, add_special_tokens)
            return self._enclose(self._cache.encode(text), add_special_tokens)
        except (UnicodeError, TypeError) as e:
            raise _not_text(text) from e

    async def encode_async(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """As `encode`; where much of the text is new, another thread works on it, so that the event loop goes on."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        if self._cache is None:
            return await loop.run_in_executor(_pool(), self.encode, text, add_special_tokens)
        try:
            begun = self._cache.begin(text)
            if begun.open_chars <= INLINE_CHARS:
                ids = self._cache.finish(begun)
            else:
                ids = await loop.run_in_executor(_pool(), self._cache.finish, begun)
        except (UnicodeError, TypeError) as e:
            raise _not_text(text) from e
        return self._enclose(ids, add_special_tokens)

    def _enclose(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        if add_special_tokens and self._affixes is not None:
            opening, closing = self._affixes
            return [*opening, *ids, *closing]
        return ids

    @property
    def cache_counts(self) -> CacheCounts | None:
        """How much of the text so far was known, None if this tokenizer has no cache."""
        return None if self._cache is None else self._cache.counts

    @property
    def cache_bytes(self) -> int:
        """An estimate of the memory the cache takes."""
        return 0 if self._cache is None else self._cache.held_bytes

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of all ids at once. Bytes that are not UTF-8 become U+FFFD; unknown ids give nothing."""
        return self._backend.decode(ids, skip_special_tokens)

    def decoder(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder for one stream. Without a prompt its pieces joined are `decode` of all its ids.

        With `prompt_ids` the stream continues that prompt: the space before the first word stays, and a character
        whose first bytes the prompt holds comes out whole.
        """
        return self._backend.rules.decoder(skip_special_tokens, prompt_ids)

    def token_text(self, token_id: int) -> str:
        """One token's text as in the middle of a text, special tokens shown; U+FFFD for a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for in the middle of a text; `b""` for an unknown id."""
        return self._backend.rules.token_bytes(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id whose vocabulary entry is exactly this string."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry as it is stored, None for an unknown id."""
        return self._backend.id_to_token(token_id)


def _not_text(text: object) -> InvalidArgument:
    if isinstance(text, str):
        return InvalidArgument("the text is not valid Unicode: it has half of a surrogate pair; send valid UTF-8")
    return InvalidArgument(f"the text to encode is {type(text).__name__}, not a string")


def _affixes(backend: Backend) -> tuple[list[int], list[int]] | None:
    """What `add_special_tokens` puts before and after every text, None if that is not the same for every text."""
    found = set()
    for text in ("a", "Hello world"):
        bare, full = backend.encode(text, add_special_tokens=False), backend.encode(text, add_special_tokens=True)
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        if len(starts) != 1 or not bare:
            return None
        found.add((tuple(full[: starts[0]]), tuple(full[starts[0] + len(bare) :])))
    if len(found) != 1:
        return None
    opening, closing = found.pop()
    return list(opening), list(closing)


def _make_cache(backend: Backend, named_tokens: dict[str, str]) -> SegmentCache | None:
    """The cache for this tokenizer: None if it is switched off, or not known to keep the tokens the same."""
    limit_bytes = int(env_number("DYN_TOKENIZER_CACHE_BYTES", DEFAULT_BYTES))
    if backend.cuts is None or limit_bytes <= 0 or not env_bool("DYN_TOKENIZER_CACHE", True):
        return None
    # Only where a token's bytes do not depend on its place can they tell words apart.
    token_bytes = backend.rules.token_bytes if isinstance(backend.rules, ByteRules) else None
    special = sorted({*named_tokens.values(), *map(str, map(backend.id_to_token, sorted(backend.special_ids)[:8]))})
    differs = first_difference(
        backend.cuts, lambda text: backend.encode(text, False), backend.encode_pieces, token_bytes, special
    )
    if differs is not None:
        log.warning("tokenizer cache is off: it would change the tokens of %r", differs)
        return None
    return SegmentCache(backend.cuts, backend.encode_pieces, token_bytes, limit_bytes)


def _load_backend(directory: Path, config: TokenizerConfig) -> Backend:
    if not directory.is_dir():
        raise InvalidArgument(f"{directory} is not a directory: give the model's directory")
    path = directory / "tokenizer.json"
    if path.exists():
        return HuggingFaceBackend.load(path, config)
    for path in [*sorted(directory.glob("*.tiktoken")), directory / "tiktoken.model"]:
        if path.exists():
            return TiktokenBackend.load(path, config)
    path = directory / "tokenizer.model"
    if path.exists():
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        # Llama-3's first release has a tiktoken file under this name.
        return (TiktokenBackend if is_tiktoken(head) else SentencePieceBackend).load(path, config)
    raise InvalidArgument(
        f"no tokenizer in {directory}: expected tokenizer.json, *.tiktoken, tiktoken.model or tokenizer.model"
    )
