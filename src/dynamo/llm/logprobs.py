"""How are log-probabilities told to a client, and when may each go out?

A token's entry leaves with the token's text: while a stop string might still swallow the text, the entry waits,
and goes where the text goes.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec

from dynamo.llm.protocols.engine import TopLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; vLLM's server prints this too


class Vocabulary(Protocol):
    """What a token id stands for."""

    def token_text(self, token_id: int) -> str:
        """The token as text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The token as bytes, which need not be whole characters."""
        ...


class TopTokenLogprob(msgspec.Struct):
    """One alternative, as OpenAI's chat API has it."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """One token of the answer, as OpenAI's chat API has it."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopTokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """`choices[].logprobs` of a chat answer."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """`choices[].logprobs` of a completion: parallel lists, offsets in characters from the start of the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Entry(msgspec.Struct):
    """One token: its alternatives, best first, and the characters `start..end` of the text it made."""

    token_id: int
    logprob: float | None
    top: list[TopLogprob]
    start: int
    end: int


class LogprobFormat(msgspec.Struct, frozen=True):
    """What a request wants to see: `count` alternatives a token, in the chat or the completion form."""

    vocabulary: Vocabulary
    count: int
    chat: bool
    as_token_ids: bool = False

    def name(self, token_id: int) -> str:
        """The token's name in an answer: its text, or `token_id:N` [N14]."""
        return f"token_id:{token_id}" if self.as_token_ids else self.vocabulary.token_text(token_id)

    def format(self, entries: Sequence[Entry]) -> ChatLogprobs | CompletionLogprobs:
        """The entries in the request's form."""
        return self._chat(entries) if self.chat else self._completion(entries)

    def _chat(self, entries: Sequence[Entry]) -> ChatLogprobs:
        return ChatLogprobs(
            [
                TokenLogprob(
                    self.name(entry.token_id),
                    _printable(entry.logprob or 0.0),
                    list(self.vocabulary.token_bytes(entry.token_id)),
                    [
                        TopTokenLogprob(
                            self.name(top.token_id),
                            _printable(top.logprob),
                            list(self.vocabulary.token_bytes(top.token_id)),
                        )
                        for top in entry.top[: self.count]
                    ],
                )
                for entry in entries
            ]
        )

    def _completion(self, entries: Sequence[Entry]) -> CompletionLogprobs:
        return CompletionLogprobs(
            [self.name(entry.token_id) for entry in entries],
            [None if entry.logprob is None else _printable(entry.logprob) for entry in entries],
            [self._alternatives(entry) for entry in entries],
            [entry.start for entry in entries],
        )

    def _alternatives(self, entry: Entry) -> dict[str, float] | None:
        """The best `count` and the chosen token, so up to `count` + 1, as OpenAI's completions have it."""
        if entry.logprob is None:
            return None
        shown = {self.name(top.token_id): _printable(top.logprob) for top in entry.top[: self.count]}
        shown.setdefault(self.name(entry.token_id), _printable(entry.logprob))
        return shown


def _printable(logprob: float) -> float:
    """A number JSON has; NaN counts as the lowest."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


class PendingLogprobs:
    """Entries of one choice whose text is not out yet. Owned by its `ChoiceDecoder`."""

    __slots__ = ("_entries", "_written")

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._written = 0  # characters of text made so far, out or not

    def add(self, token_id: int, logprob: float | None, top: Sequence[TopLogprob], length: int) -> None:
        """The next token, which made `length` characters."""
        start = self._written
        self._written = start + length
        ordered = sorted(top, key=lambda each: -each.logprob)
        self._entries.append(Entry(token_id, logprob, ordered, start, self._written))

    def skip(self, length: int) -> None:
        """Text that belongs to no token, or came after the last."""
        self._written += length

    def release(self, visible: int) -> list[Entry]:
        """Entries whose text lies wholly in the first `visible` characters."""
        released = []
        while self._entries and self._entries[0].end <= visible:
            released.append(self._entries.popleft())
        return released

    def release_last(self, visible: int) -> list[Entry]:
        """At the end of the text: entries with any text in the first `visible` characters; the others are dropped.

        A token without text of its own (the first bytes of a character) counts with the token after it.
        """
        released = []
        while self._entries:
            entry = self._entries.popleft()
            if entry.start < visible or entry.end <= visible:
                released.append(entry)
        return released
