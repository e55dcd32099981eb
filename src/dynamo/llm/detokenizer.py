"""Which text does each new token add, so that the pieces joined are the text of all tokens at once?

Two kinds of decoder exist in practice. *Byte-level* ones (GPT-2, Llama-3, Qwen, tiktoken) give every token a run
of bytes; the text is the UTF-8 decoding of all of them (`ByteStream`). The others work on *pieces*: the token's
string goes through a chain of small steps that look at one piece at a time, apart from the first piece of all
and runs of single-byte tokens (`PieceStream`, steps in `dynamo.llm.piece_steps`).

Both look a token up in a table of texts while nothing is pending, which is nearly always.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

MAX_CHAR_BYTES = 4  # the longest UTF-8 sequence

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")  # looked up once, not for each stream


class IncrementalDecoder(Protocol):
    """Turns the tokens of one stream into text, a few at a time."""

    def push(self, ids: list[int]) -> str:
        """The text that became certain with these tokens; never a part of a character."""
        ...

    def finish(self) -> str:
        """What was held back: text whose continuation never came. Nothing may be pushed afterwards."""
        ...


class DecodingRules(ABC):
    """How one tokenizer's tokens become text. Shared by all streams of that tokenizer; its tables fill as used."""

    @abstractmethod
    def decoder(self, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> IncrementalDecoder:
        """A decoder for a new stream that continues after `prompt_ids`."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for in the middle of a text, special tokens shown; `b""` if it is unknown."""


class ByteTable(dict[int, bytes]):
    """Token id → bytes, asked for once each. At most the vocabulary's size."""

    def __init__(self, load: Callable[[int], bytes]) -> None:
        super().__init__()
        self._load = load

    def __missing__(self, token_id: int) -> bytes:
        found = self._load(token_id)
        self[token_id] = found
        return found


class TextTable(dict[int, str | None]):
    """Token id → its text where it always has the same, None where it depends on its neighbours."""

    def __init__(self, load: Callable[[int], str | None]) -> None:
        super().__init__()
        self._load = load

    def __missing__(self, token_id: int) -> str | None:
        found = self._load(token_id)
        self[token_id] = found
        return found


def _whole(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


class ByteRules(DecodingRules):
    """Every token is a run of bytes. `load` gives them, `special` are the ids that can be skipped."""

    def __init__(self, load: Callable[[int], bytes], special: frozenset[int]) -> None:
        self._special = special
        self._all = ByteTable(load)
        self._visible = ByteTable(lambda id_: b"" if id_ in special else self._all[id_])
        self._all_texts = TextTable(lambda id_: _whole(self._all[id_]))
        self._visible_texts = TextTable(lambda id_: _whole(self._visible[id_]))

    def decoder(self, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> "ByteStream":
        data, texts = (self._visible, self._visible_texts) if skip_special_tokens else (self._all, self._all_texts)
        tail = b""
        for id_ in reversed(prompt_ids):
            tail = data[id_] + tail
            if len(tail) >= MAX_CHAR_BYTES:
                break
        return ByteStream(data, texts, tail)

    def token_bytes(self, token_id: int) -> bytes:
        return self._all[token_id]


class ByteStream:
    """Decodes UTF-8 as it comes; bytes that no character can hold become U+FFFD as in a one-shot decode."""

    __slots__ = ("_data", "_pending", "_texts", "_utf8")

    def __init__(self, data: ByteTable, texts: TextTable, tail: bytes) -> None:
        self._data = data
        self._texts = texts
        self._utf8 = _Utf8Decoder("replace")
        # A character that the prompt began is completed by the first tokens.
        self._utf8.decode(tail)
        self._pending = bool(self._utf8.getstate()[0])

    def push(self, ids: list[int]) -> str:
        if not self._pending:
            texts = self._texts
            if len(ids) == 1:
                text = texts[ids[0]]
                if text is not None:
                    return text
            else:
                found = [texts[id_] for id_ in ids]
                if None not in found:
                    return "".join(found)  # type: ignore[arg-type]  # no None is in it
        data = self._data
        text = self._utf8.decode(b"".join([data[id_] for id_ in ids]))
        self._pending = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        self._pending = False
        return self._utf8.decode(b"", final=True)
