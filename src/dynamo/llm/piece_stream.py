"""How are the tokens of piece-based tokenizers (SentencePiece, WordPiece, …) decoded as they come?"""

from collections.abc import Callable, Sequence

from dynamo.llm.detokenizer import DecodingRules, TextTable
from dynamo.llm.piece_steps import Chain, Step, byte_value

_SHORT_PROMPT = 16  # tokens; so few are decoded from the start, longer prompts are entered in their middle
_WINDOW = 16  # tokens of context for decoders that can only be asked as a whole


class PieceRules(DecodingRules):
    """Tokens become pieces (`load`; None for an id without one), and pieces go through a chain of steps."""

    def __init__(self, load: Callable[[int], str | None], special: frozenset[int], chain: Chain) -> None:
        self._load = load
        self._special = special
        self._chain = chain
        self._steady = chain()
        self._all_texts = TextTable(lambda id_: self._text(id_, skip=False))
        self._visible_texts = TextTable(lambda id_: self._text(id_, skip=True))

    def piece(self, token_id: int, skip: bool) -> str | None:
        """The token's piece, None if it has none or is skipped."""
        return None if skip and token_id in self._special else self._load(token_id)

    def _text(self, token_id: int, skip: bool) -> str | None:
        text = self.piece(token_id, skip)
        if text is None:
            return ""
        for step in self._steady:
            text = step.steady_text(text)
            if text is None:
                return None
        return text

    def decoder(self, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> "PieceStream":
        texts = self._visible_texts if skip_special_tokens else self._all_texts
        stream = PieceStream(self, self._chain(), texts, skip_special_tokens)
        stream.enter(prompt_ids)
        return stream

    def token_bytes(self, token_id: int) -> bytes:
        text = self._all_texts[token_id]
        if text is None:
            piece = self._load(token_id) or ""
            byte = byte_value(piece)
            if byte is not None:
                return bytes([byte])
            steps = self._chain()
            for step in steps:
                step.settle()
            text = _run(steps, [piece]) + _end(steps)
        return text.encode("utf-8", "surrogatepass")


def _run(steps: list[Step], pieces: list[str]) -> str:
    for step in steps:
        pieces = step.feed(pieces)
    return "".join(pieces)


def _end(steps: list[Step]) -> str:
    out: list[str] = []
    for step in steps:
        out = step.feed(out) + step.end()
    return "".join(out)


class PieceStream:
    """One stream through the steps. While every step is steady a token's text is looked up."""

    __slots__ = ("_rules", "_skip", "_steady", "_steps", "_texts")

    def __init__(self, rules: PieceRules, steps: list[Step], texts: TextTable, skip: bool) -> None:
        self._rules = rules
        self._steps = steps
        self._texts = texts
        self._skip = skip
        self._steady = False

    def enter(self, prompt_ids: Sequence[int]) -> None:
        """Take the state that a stream has after the prompt; the prompt's text itself is not given again."""
        start = max(0, len(prompt_ids) - _SHORT_PROMPT)
        while start and self._texts[prompt_ids[start]] is None:
            start -= 1  # never into the middle of a run of bytes
        if start:
            for step in self._steps:
                step.settle()
        self._feed(prompt_ids[start:])

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

    def _feed(self, ids: Sequence[int]) -> str:
        pieces = [piece for id_ in ids if (piece := self._rules.piece(id_, self._skip)) is not None]
        text = _run(self._steps, pieces)
        self._steady = all(step.steady for step in self._steps)
        return text

    def finish(self) -> str:
        return _end(self._steps)


class WindowRules(DecodingRules):
    """For decoders that can only be asked as a whole (`decode(ids, skip_special_tokens)`).

    A token's text is what it adds to the text of the tokens before it, of which the last 16 are looked at. That
    equals the text of all tokens at once for every decoder whose memory is not longer than that.
    """

    def __init__(self, decode: Callable[[list[int], bool], str]) -> None:
        self._decode = decode

    def decoder(self, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> "WindowStream":
        return WindowStream(self._decode, skip_special_tokens, list(prompt_ids[-_WINDOW:]))

    def token_bytes(self, token_id: int) -> bytes:
        return self._decode([token_id], False).encode()


class WindowStream:
    """One stream that re-decodes a short window for every push."""

    def __init__(self, decode: Callable[[list[int], bool], str], skip: bool, context: list[int]) -> None:
        self._decode = decode
        self._skip = skip
        self._context = context
        self._open: list[int] = []

    def _added(self, ids: list[int]) -> str:
        before = self._decode(self._context, self._skip) if self._context else ""
        return self._decode(self._context + ids, self._skip)[len(before) :]

    def push(self, ids: list[int]) -> str:
        self._open += ids
        text = self._added(self._open)
        if text.endswith("\ufffd") and len(self._open) < _WINDOW:
            return ""  # perhaps the beginning of a character
        self._context = (self._context + self._open)[-_WINDOW:]
        self._open = []
        return text

    def finish(self) -> str:
        ids, self._open = self._open, []
        return self._added(ids) if ids else ""
