"""How do pieces of vocabulary become text, step by step, for tokenizers that are not byte-level?

Each step is the streaming form of one `decoders.*` type of the `tokenizers` library: what it gives for a list of
pieces equals what the library gives for the same list, however the list is cut into calls of `feed`.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Protocol

METASPACE = "\u2581"  # ▁, stands for a space in SentencePiece vocabularies
_BYTE = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")  # the library's number parser also takes a plus sign


class Step(Protocol):
    """Pieces in, pieces out; may hold some back. One object serves one stream."""

    steady: bool
    """True while `feed([piece])` gives exactly `[steady_text(piece)]` for pieces where that is not None."""

    def feed(self, pieces: list[str]) -> list[str]: ...

    def end(self) -> list[str]: ...

    def settle(self) -> None:
        """Behave from now on as in the middle of a text."""
        ...

    def steady_text(self, piece: str) -> str | None:
        """What the piece becomes in the middle of a text, or None if that depends on what comes next."""
        ...


def byte_value(piece: str) -> int | None:
    """The byte that a piece like `<0x0A>` stands for, None for other pieces."""
    found = _BYTE.fullmatch(piece)
    return int(found[1], 16) if found else None


Chain = Callable[[], list[Step]]
"""Makes the steps of a new stream."""


class EachPiece:
    """A function of one piece alone; the very first piece of the stream may have its own."""

    def __init__(self, rest: Callable[[str], str], first: Callable[[str], str] | None = None) -> None:
        self._rest = rest
        self._first = first
        self.steady = first is None

    def feed(self, pieces: list[str]) -> list[str]:
        if self.steady or not pieces or self._first is None:
            return [self._rest(piece) for piece in pieces]
        self.steady = True
        return [self._first(pieces[0]), *(self._rest(piece) for piece in pieces[1:])]

    def end(self) -> list[str]:
        return []

    def settle(self) -> None:
        self.steady = True

    def steady_text(self, piece: str) -> str | None:
        return self._rest(piece)


class ByteRun:
    """Runs of `<0xE2>`-like pieces become the text they encode, or one U+FFFD a byte if the run is not UTF-8.

    A run is judged as a whole, so it waits for its end: a later byte can spoil what looked like a character.
    """

    def __init__(self) -> None:
        self._run = bytearray()
        self.steady = True

    def feed(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            byte = byte_value(piece)
            if byte is not None:
                self._run.append(byte)
            else:
                out += self.end()
                out.append(piece)
        self.steady = not self._run
        return out

    def end(self) -> list[str]:
        run, self._run = self._run, bytearray()
        self.steady = True
        if not run:
            return []
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)

    def settle(self) -> None:
        pass

    def steady_text(self, piece: str) -> str | None:
        return piece if byte_value(piece) is None else None


class StripStart:
    """Takes up to `count` characters `char` off the start of the whole text (the pieces were fused before)."""

    def __init__(self, char: str, count: int) -> None:
        self._char = char
        self._left = count
        self.steady = count == 0

    def feed(self, pieces: list[str]) -> list[str]:
        text = "".join(pieces)
        cut = 0
        while not self.steady and cut < len(text):
            if text[cut] == self._char:
                cut += 1
                self._left -= 1
                self.steady = self._left == 0
            else:
                self.steady = True
        return [text[cut:]]

    def end(self) -> list[str]:
        return []

    def settle(self) -> None:
        self.steady = True

    def steady_text(self, piece: str) -> str | None:
        return piece


class WordEnd:
    """A mark such as `</w>` becomes a space, except in the last piece of all, where it vanishes."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._last: str | None = None
        self.steady = True

    def feed(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            if self._last is not None:
                out.append(self._last.replace(self._mark, " "))
                self._last = None
            if self._mark in piece:
                self._last = piece
            else:
                out.append(piece)
        self.steady = self._last is None
        return out

    def end(self) -> list[str]:
        last, self._last = self._last, None
        return [] if last is None else [last.replace(self._mark, "")]

    def settle(self) -> None:
        pass

    def steady_text(self, piece: str) -> str | None:
        return None if self._mark in piece else piece


def _tidy(text: str) -> str:
    """The library's WordPiece clean-up: no space before punctuation and English contractions."""
    for old, new in _TIDIED:
        text = text.replace(old, new)
    return text


_TIDIED = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    *((f" {end}", end) for end in ("'s", "'ve", "'re")),
)


def _word_piece(prefix: str, cleanup: bool) -> Step:
    tidy: Callable[[str], str] = _tidy if cleanup else str

    def rest(piece: str) -> str:
        return tidy(piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}")

    return EachPiece(rest, first=tidy)


def _metaspace(mark: str, strip_first: bool) -> Step:
    def rest(piece: str) -> str:
        return piece.replace(mark, " ")

    return EachPiece(rest, first=(lambda piece: piece.replace(mark, "")) if strip_first else None)


def _replace(old: str, new: str) -> Step:
    return EachPiece(lambda piece: piece.replace(old, new))


def spaced() -> list[Step]:
    """A tokenizer without a decoder: its pieces joined by single spaces."""
    return [EachPiece(lambda piece: f" {piece}", first=str)]


def _step(spec: dict[str, Any], fused: bool) -> Callable[[], Step] | None:
    """The step for one decoder spec, or None where there is no streaming form."""
    kind = spec["type"]
    if kind == "Strip" and fused and not spec["stop"]:
        return lambda: StripStart(spec["content"], spec["start"])
    if kind == "Replace" and "String" in spec["pattern"]:
        old = spec["pattern"]["String"]
        # In fused text a longer pattern could lie across two pieces.
        return (lambda: _replace(old, spec["content"])) if old and not (fused and len(old) > 1) else None
    if fused:
        return None
    if kind == "ByteFallback":
        return ByteRun
    if kind == "Metaspace":
        scheme = spec.get("prepend_scheme") or ("always" if spec.get("add_prefix_space", True) else "never")
        return lambda: _metaspace(spec["replacement"], strip_first=scheme != "never")
    if kind == "WordPiece":
        return lambda: _word_piece(spec["prefix"], spec["cleanup"])
    if kind == "BPEDecoder":
        return lambda: WordEnd(spec["suffix"])
    return None


def chain_of(decoder: bytes | None) -> Chain | None:
    """The steps that stand for a decoder, given as the library's own JSON; None if some part has no streaming form."""
    if decoder is None:
        return spaced
    spec = json.loads(decoder)
    makers: list[Callable[[], Step]] = []
    fused = False
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        if part["type"] == "Fuse":
            fused = True
            continue
        maker = _step(part, fused)
        if maker is None:
            return None
        makers.append(maker)
    return lambda: [make() for make in makers]
