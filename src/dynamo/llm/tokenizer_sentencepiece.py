"""How is a SentencePiece `tokenizer.model` loaded and used?

Special tokens in the text (`bos_token`, `eos_token`, … and `added_tokens_decoder` of `tokenizer_config.json`) are cut
out first; SentencePiece itself never finds its control symbols in text. It then puts its space before every part
between them, or with `"legacy": false` only before a part at the very start, as Hugging Face does.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece

from dynamo.llm.detokenizer import DecodingRules, TextTable
from dynamo.llm.piece_steps import METASPACE
from dynamo.llm.split_pattern import NOWHERE
from dynamo.llm.text_cuts import Cuts, make_cuts
from dynamo.llm.tokenizer_config import AddedTokenSpec, TokenizerConfig
from dynamo.runtime.errors import InvalidArgument

_UNKNOWN_SURFACE = " \u2047 "  # what SentencePiece writes for its unknown symbol
# A protobuf message given twice is merged: `normalizer_spec` (field 3) with `add_dummy_prefix` (field 3) = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


_SPACES = re.compile(r"\s*")


class SentencePieceRules(DecodingRules):
    """Pieces with ▁ for a space, single bytes for what has no piece, and no space before the first word.

    Unlike in `tokenizers`, a run of bytes is judged character by character: what is complete goes out at once, and
    each byte that fits nowhere is one U+FFFD.
    """

    def __init__(
        self,
        surface: Callable[[int], "str | int | None"],
        special: frozenset[int],
        strips_one: bool,
        strips_all: bool,
    ) -> None:
        """`surface(id)`: text with plain spaces, a byte's value, or None for an unknown id."""
        self.surface = surface
        self.special = special
        self.strips_one = strips_one
        self.strips_all = strips_all
        self._all_texts = TextTable(lambda id_: self._text(id_, skip=False))
        self._visible_texts = TextTable(lambda id_: self._text(id_, skip=True))

    def _text(self, token_id: int, skip: bool) -> str | None:
        if skip and token_id in self.special:
            return ""
        found = self.surface(token_id)
        if isinstance(found, int):
            return chr(found) if found < 0x80 else None
        return found or ""

    def decoder(self, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> "SentencePieceStream":
        texts = self._visible_texts if skip_special_tokens else self._all_texts
        stream = SentencePieceStream(self, texts, skip_special_tokens)
        stream.push(list(prompt_ids))
        return stream

    def token_bytes(self, token_id: int) -> bytes:
        found = self.surface(token_id)
        return bytes([found]) if isinstance(found, int) else (found or "").encode()


class SentencePieceStream:
    """One stream; holds at most three bytes of an unfinished character."""

    __slots__ = ("_bytes", "_rules", "_skip", "_started", "_steady", "_texts")

    def __init__(self, rules: SentencePieceRules, texts: TextTable, skip: bool) -> None:
        self._rules = rules
        self._texts = texts
        self._skip = skip
        self._bytes = bytearray()
        self._started = not (rules.strips_one or rules.strips_all)
        self._steady = self._started

    def push(self, ids: list[int]) -> str:
        if self._steady:
            texts = self._texts
            if len(ids) == 1:
                text = texts[ids[0]]
                if text is not None:
                    return text
            else:
                found = [texts[id_] for id_ in ids]
                if None not in found:
                    return "".join(found)  # type: ignore[arg-type]  # no None is in it
        return self._feed(ids)

    def _feed(self, ids: list[int]) -> str:
        out: list[str] = []
        for id_ in ids:
            surface = self._rules.surface(id_)
            if isinstance(surface, int):
                self._bytes.append(surface)
                out.append(self._characters(final=False))
            elif surface is not None:
                out.append(self._characters(final=True))
                self._started = self._started or any(out)
                out.append("" if self._skip and id_ in self._rules.special else self._piece(surface))
        self._started = self._started or any(out)
        self._steady = self._started and not self._bytes
        return "".join(out)

    def _piece(self, surface: str) -> str:
        """The piece's text; before any other text the space that SentencePiece put there goes."""
        if self._started or not surface.startswith(" ") or surface == _UNKNOWN_SURFACE:
            return surface
        # A model that strips all leading spaces goes on stripping until there is text; others take one space.
        self._started = not self._rules.strips_all
        return surface[1:]

    def _characters(self, final: bool) -> str:
        out = ""
        while self._bytes:
            try:
                text, used = codecs.utf_8_decode(self._bytes, "strict", final)
            except UnicodeDecodeError as e:
                out += self._bytes[: e.start].decode() + "\ufffd"
                del self._bytes[: e.start + 1]
            else:
                del self._bytes[:used]
                return out + text
        return out

    def finish(self) -> str:
        return self._characters(final=True)


class SentencePieceBackend:
    """A `SentencePieceProcessor` with the special tokens of the configs around it."""

    def __init__(self, model: bytes, config: TokenizerConfig) -> None:
        self._library = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._size: int = self._library.vocab_size()
        self._added = self._added_tokens(config)
        self._ids = {spec.content: id_ for id_, spec in self._added.items()}
        self._finder = _finder(list(self._added.values()))
        self.vocab_size = max([self._size - 1, *self._added]) + 1
        control = (id_ for id_ in range(self._size) if self._library.is_control(id_))
        self.special_ids = frozenset([*control, *(id_ for id_, spec in self._added.items() if spec.special)])
        # `a  b` normalizes to `▁a▁b` with both settings on, `a▁▁b` with both off.
        normal: str = self._library.normalize("a  b")
        strips_all = METASPACE * 2 not in normal
        self.rules: DecodingRules = SentencePieceRules(
            self._surface, self.special_ids, strips_one=normal.startswith(METASPACE), strips_all=strips_all
        )
        legacy = config.raw.get("legacy")
        self._inner = self._library
        if legacy is False:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        # Words are not told apart from their neighbours here, but parts between special tokens are.
        self.cuts: Cuts | None = make_cuts(
            list(self._added.values()), NOWHERE, special_part=self._inner is self._library
        )
        bos, eos = self._library.bos_id(), self._library.eos_id()
        ends = {"bos_token": bos, "eos_token": eos}
        self.named = {name: self._library.id_to_piece(id_) for name, id_ in ends.items() if id_ >= 0}
        self._opening = [bos] if bos >= 0 and config.raw.get("add_bos_token", True) else []
        self._closing = [eos] if eos >= 0 and config.raw.get("add_eos_token", False) else []

    @classmethod
    def load(cls, path: Path, config: TokenizerConfig) -> "SentencePieceBackend":
        """Raises InvalidArgument naming the file if the library refuses it."""
        try:
            model = path.read_bytes()
        except OSError as e:
            raise InvalidArgument(f"cannot read {path}: {e.strerror or e}") from e
        if not model:  # which the library takes for a model and then has none
            raise InvalidArgument(f"{path} is not a SentencePiece model: it is empty; fetch the file again")
        try:
            return cls(model, config)
        except RuntimeError as e:
            raise InvalidArgument(f"{path} is not a SentencePiece model: {e}; fetch the file again") from e

    def _added_tokens(self, config: TokenizerConfig) -> dict[int, AddedTokenSpec]:
        added = dict(config.added)
        known = {spec.content for spec in added.values()}
        specs = [*(AddedTokenSpec(text) for text in config.named.values()), *config.extra]
        for spec in [*specs, *(AddedTokenSpec(self._library.id_to_piece(id_)) for id_ in self._ends())]:
            id_ = self._own_id(spec.content)
            if spec.content not in known and id_ is not None:
                added[id_] = spec
        return added

    def _ends(self) -> list[int]:
        return [id_ for id_ in (self._library.bos_id(), self._library.eos_id()) if id_ >= 0]

    def _own_id(self, piece: str) -> int | None:
        id_: int = self._library.piece_to_id(piece)
        return id_ if self._library.id_to_piece(id_) == piece else None

    def _surface(self, token_id: int) -> str | int | None:
        spec = self._added.get(token_id)
        library = self._library
        if spec is not None and not (0 <= token_id < self._size and library.is_unknown(token_id)):
            return spec.content
        if not 0 <= token_id < self._size:
            return None
        piece: str = library.id_to_piece(token_id)
        if library.is_byte(token_id):
            return int(piece[3:5], 16)
        if library.is_unknown(token_id):
            return _UNKNOWN_SURFACE
        return piece if library.is_control(token_id) else piece.replace(METASPACE, " ")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode("utf-8")  # the library's own error for halves of surrogate pairs has no type
        ids: list[int] = []
        at = 0
        for found in self._finder.finditer(text):
            id_ = self._ids[found.group()]
            spec = self._added[id_]
            before = text[at : found.start()]
            ids += self._part(before.rstrip() if spec.lstrip else before, at)
            ids.append(id_)
            at = found.end()
            if spec.rstrip:
                at = _after_spaces(text, at)
        ids += self._part(text[at:], at)
        return [*self._opening, *ids, *self._closing] if add_special_tokens else ids

    def _part(self, text: str, at: int) -> list[int]:
        if not text:
            return []
        library = self._library if at == 0 else self._inner
        ids: list[int] = library.encode(text)
        return ids

    def encode_pieces(self, pieces: list[str]) -> list[list[int]]:
        return [self.encode(piece, add_special_tokens=False) for piece in pieces]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        stream = self.rules.decoder(skip_special_tokens, ())
        return stream.push(ids) + stream.finish()

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, self._own_id(token))

    def id_to_token(self, token_id: int) -> str | None:
        spec = self._added.get(token_id)
        if spec is not None:
            return spec.content
        return self._library.id_to_piece(token_id) if 0 <= token_id < self._size else None


def _after_spaces(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    return found.end() if found else at


def _finder(specs: list[AddedTokenSpec]) -> "re.Pattern[str]":
    """Finds added tokens, of several that begin at one place the longest."""
    longest_first = sorted(specs, key=lambda spec: -len(spec.content))
    words = {True: r"(?<!\w){}(?!\w)", False: "{}"}
    patterns = [words[spec.single_word].format(re.escape(spec.content)) for spec in longest_first]
    return re.compile("|".join(patterns) if patterns else r"(?!)")
