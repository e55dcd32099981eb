"""How is a `tokenizer.json` loaded and used (library `tokenizers`)?"""

from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from dynamo.llm.detokenizer import ByteRules, DecodingRules
from dynamo.llm.piece_steps import chain_of
from dynamo.llm.piece_stream import PieceRules, WindowRules
from dynamo.llm.text_cuts import Cuts, pipeline_cuts
from dynamo.llm.tokenizer_config import AddedTokenSpec, TokenizerConfig
from dynamo.runtime.errors import InvalidArgument


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way to write any byte as a printable character: itself where printable, else U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; a token with a character outside the alphabet stands for itself."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


class HuggingFaceBackend:
    """A `tokenizers.Tokenizer`, with the special tokens that only `tokenizer_config.json` knows added to it."""

    def __init__(self, library: HfTokenizer, config: TokenizerConfig) -> None:
        # The file may carry the truncation and padding of its training; a prompt must never be cut silently.
        library.no_truncation()
        library.no_padding()
        _add_missing_tokens(library, config)
        self._library = library
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)
        self._added: dict[int, AddedToken] = library.get_added_tokens_decoder()
        special = frozenset(token.content for token in self._added.values() if token.special)
        self.special_ids = frozenset(id_ for id_, token in self._added.items() if token.content in special)
        self.named: dict[str, str] = {}
        self.rules = self._decoding_rules()
        self.cuts = self._find_cuts()

    @classmethod
    def load(cls, path: Path, config: TokenizerConfig) -> "HuggingFaceBackend":
        """Read `tokenizer.json`. Raises InvalidArgument naming the file if the library refuses it."""
        try:
            library = HfTokenizer.from_file(str(path))
        except Exception as e:
            raise InvalidArgument(f"{path} is not a tokenizer that `tokenizers` can load: {e}") from e
        return cls(library, config)

    def _decoding_rules(self) -> DecodingRules:
        decoder = self._library.decoder
        spec: bytes | None = decoder.__getstate__() if decoder is not None else None
        if spec is not None and spec.startswith(b'{"type":"ByteLevel"'):
            return ByteRules(lambda id_: byte_level_bytes(self.id_to_token(id_) or ""), self.special_ids)
        chain = chain_of(spec)
        if chain is None:
            return WindowRules(self.decode)
        return PieceRules(self.id_to_token, self.special_ids, chain)

    def _find_cuts(self) -> Cuts | None:
        library = self._library
        specs = [
            AddedTokenSpec(
                content=token.content,
                special=token.special,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                single_word=token.single_word,
            )
            for token in self._added.values()
        ]
        return pipeline_cuts(
            specs,
            normalizer=library.normalizer.__getstate__() if library.normalizer is not None else None,
            pre_tokenizer=library.pre_tokenizer.__getstate__() if library.pre_tokenizer is not None else None,
            random_merges=bool(getattr(library.model, "dropout", None)),
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch form does not compute offsets, which are a third of the time.
        encoded = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded[0].ids
        return ids

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._library.encode_batch_fast(pieces, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self._library.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._library.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        try:
            found: str | None = self._library.id_to_token(token_id)
        except OverflowError:  # negative, or past 32 bits
            return None
        return found


def _added_token(spec: AddedTokenSpec, special: bool) -> AddedToken:
    return AddedToken(
        spec.content,
        special=special,
        lstrip=spec.lstrip,
        rstrip=spec.rstrip,
        normalized=spec.normalized,
        single_word=spec.single_word,
    )


def _add_missing_tokens(library: HfTokenizer, config: TokenizerConfig) -> None:
    """Add what Hugging Face's loader adds: tokens that the configs name and `tokenizer.json` does not list as added."""
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    for _, spec in sorted(config.added.items()):
        if spec.content not in known:
            library.add_tokens([_added_token(spec, spec.special)])
            known[spec.content] = _added_token(spec, spec.special)
    named = [AddedTokenSpec(text) for text in config.named.values()]
    for spec in [*named, *config.extra]:
        present = known.get(spec.content)
        if present is None:
            present = _added_token(spec, special=True)
        elif not present.special:
            present = AddedToken(
                spec.content,
                special=True,
                lstrip=present.lstrip,
                rstrip=present.rstrip,
                normalized=present.normalized,
                single_word=present.single_word,
            )
        else:
            continue
        library.add_special_tokens([present])
        known[spec.content] = present
