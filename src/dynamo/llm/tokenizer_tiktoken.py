"""How is a tiktoken file (`*.tiktoken`, `tiktoken.model`) loaded and used?

The file holds only the ranks of byte strings. The rest comes from beside it:

- *special tokens*: `added_tokens_decoder` of `tokenizer_config.json`; without it the well-known ones of Qwen-1
  (`<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, `<|extra_0|>`…) and of Llama-3's original release (128 000 ranks).
  Kimi's tokenizer class names every free id of its special range `<|reserved_token_ID|>`.
- *pattern* that splits text before merging: `pat_str` of `tokenizer_config.json`; Kimi's for its tokenizer class;
  else the one of GPT-4, which Llama-3 and Qwen share but for the length of digit groups.
"""

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from dynamo.llm.detokenizer import ByteRules, DecodingRules
from dynamo.llm.split_pattern import places
from dynamo.llm.text_cuts import Cuts, make_cuts
from dynamo.llm.tokenizer_config import AddedTokenSpec, TokenizerConfig
from dynamo.runtime.errors import InvalidArgument

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN_PATTERN = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_PATTERN = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TAIL}"
)
_KIMI_CLASS = "TikTokenTokenizer"  # `tokenizer_class` of Moonshot's models
_KIMI_SPECIAL = 258  # ids after the ranks that its tokenizer reserves
_LLAMA3_RANKS = 128_000
_LLAMA3_SPECIAL = 256


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that starts so is a list of `base64 rank` lines (and not a SentencePiece protobuf)."""
    token, _, rank = head.split(b"\n", 1)[0].strip().partition(b" ")
    try:
        base64.b64decode(token, validate=True)
    except binascii.Error:
        return False
    return bool(token) and rank.isdigit()


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks in a tiktoken file. Raises InvalidArgument naming the file and line where it is broken."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise InvalidArgument(f"cannot read {path}: {e.strerror or e}") from e
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as e:  # binascii.Error is one
            raise InvalidArgument(f"{path}, line {number}: not a base64 token and its rank; fetch it again") from e
    if not ranks:
        raise InvalidArgument(f"{path} is empty; fetch the file again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InvalidArgument(f"{path} has no rank for byte 0x{missing[0]:02x}: it is cut short; fetch it again")
    return ranks


def _llama3_special() -> Iterator[str]:
    yield from ("<|begin_of_text|>", "<|end_of_text|>")
    yield from (f"<|reserved_special_token_{i}|>" for i in range(4))
    yield from ("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>")
    yield from (f"<|reserved_special_token_{i}|>" for i in range(5, _LLAMA3_SPECIAL - 5))


def _qwen_special() -> Iterator[str]:
    yield from ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    yield from (f"<|extra_{i}|>" for i in range(205))


def _special_tokens(path: Path, ranks: dict[bytes, int], config: TokenizerConfig) -> dict[str, int]:
    first = max(ranks.values()) + 1
    special = {spec.content: id_ for id_, spec in config.added.items()}
    if config.raw.get("tokenizer_class") == _KIMI_CLASS:
        taken = set(special.values())
        free = (id_ for id_ in range(first, first + _KIMI_SPECIAL) if id_ not in taken)
        special.update({f"<|reserved_token_{id_}|>": id_ for id_ in free})
    if special:
        return special
    if path.name == "qwen.tiktoken" or config.model_type == "qwen":
        return {token: first + i for i, token in enumerate(_qwen_special())}
    if len(ranks) == _LLAMA3_RANKS:
        return {token: first + i for i, token in enumerate(_llama3_special())}
    return {}


def _pattern(path: Path, config: TokenizerConfig) -> str:
    own = config.raw.get("pat_str")
    if isinstance(own, str) and own:
        return own
    if config.raw.get("tokenizer_class") == _KIMI_CLASS:
        return KIMI_PATTERN
    return QWEN_PATTERN if path.name == "qwen.tiktoken" or config.model_type == "qwen" else GPT4_PATTERN


class TiktokenBackend:
    """A `tiktoken.Encoding`. Special tokens in the text are always recognized, as a rendered prompt needs it."""

    def __init__(self, library: tiktoken.Encoding, pattern: str, config: TokenizerConfig) -> None:
        self._library = library
        self._special = library.special_tokens_set
        self.special_ids = frozenset(library.encode_single_token(token) for token in self._special)
        visible = {id_ for id_, spec in config.added.items() if not spec.special}
        self.special_ids -= visible
        self.vocab_size: int = library.n_vocab
        self.named: dict[str, str] = {}
        self.rules: DecodingRules = ByteRules(self._bytes, self.special_ids)
        # The library knows no flags of special tokens, so whatever the config says of them is not in effect.
        self.cuts: Cuts | None = make_cuts([AddedTokenSpec(token) for token in sorted(self._special)], places(pattern))
        bos = config.named.get("bos_token", "")
        self._opening = [bos_id for bos_id in [self.token_to_id(bos)] if bos_id is not None]
        if not config.raw.get("add_bos_token", False):
            self._opening = []

    @classmethod
    def load(cls, path: Path, config: TokenizerConfig) -> "TiktokenBackend":
        """Raises InvalidArgument naming the file if it is broken or its pattern cannot be compiled."""
        ranks = read_ranks(path)
        special = _special_tokens(path, ranks, config)
        pattern = _pattern(path, config)
        try:
            library = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except Exception as e:
            raise InvalidArgument(f"{path} is not a vocabulary that `tiktoken` can load: {e}") from e
        return cls(library, pattern, config)

    def _bytes(self, token_id: int) -> bytes:
        try:
            found: bytes = self._library.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            return b""
        return found

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode("utf-8")  # the library would replace halves of surrogate pairs silently
        try:
            ids: list[int] = self._library.encode(text, allowed_special=self._special, disallowed_special=())
        except ValueError as e:  # its regular expressions give up on runs of about a million spaces
            raise InvalidArgument(f"the text cannot be split into words: {e}; shorten its runs of white space") from e
        return self._opening + ids if add_special_tokens else ids

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        return [self.encode(piece, add_special_tokens=False) for piece in pieces]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        shown = (id_ for id_ in ids if not (skip_special_tokens and id_ in self.special_ids))
        return b"".join(map(self._bytes, shown)).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        try:
            found: int = self._library.encode_single_token(token)
        except KeyError:
            return None
        return found

    def id_to_token(self, token_id: int) -> str | None:
        found = self._bytes(token_id)
        return found.decode("utf-8", "replace") if found else None
