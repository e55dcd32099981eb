"""What do the pieces of one choice make together?

For an answer in one body, and for what collects while a client does not read.
"""

from collections.abc import Sequence
from typing import Any

from dynamo.frontend.bodies import ToolCall, ToolFunction
from dynamo.llm.logprobs import ChatLogprobs, CompletionLogprobs
from dynamo.llm.output import TextDelta
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.llm.protocols.tools import ToolCallDelta

Logprobs = ChatLogprobs | CompletionLogprobs


class Fold:
    """One choice, as far as it has come. `token_ids` and `facts` are kept only if somebody asked for them."""

    __slots__ = ("_logprobs", "_texts", "facts", "finish_reason", "stop_reason", "token_ids", "tool_calls")

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: list[Logprobs] = []
        self.tool_calls: list[ToolCallDelta] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.token_ids: list[int] = []
        self.facts: dict[str, Any] = {}

    def add(self, delta: TextDelta) -> None:
        """One more piece."""
        if delta.text:
            self._texts.append(delta.text)
        if delta.logprobs is not None:
            self._logprobs.append(delta.logprobs)
        if delta.tool_calls:
            self.tool_calls += delta.tool_calls
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason

    def keep(self, output: EngineOutput) -> None:
        """What only `nvext.extra_fields` can ask for. Of facts that come more than once the last one counts."""
        self.token_ids += output.token_ids
        for name in ("engine_data", "prompt_logprobs"):
            if (value := getattr(output, name)) is not None:
                self.facts[name] = value

    @property
    def text(self) -> str:
        """The whole text."""
        if len(self._texts) == 1:
            return self._texts[0]
        return "".join(self._texts)

    @property
    def logprobs(self) -> Logprobs | None:
        """All log-probabilities as those of one piece."""
        return merged_logprobs(self._logprobs)

    def whole(self) -> tuple[TextDelta, EngineOutput]:
        """Everything as one piece."""
        delta = TextDelta(self.text, self.finish_reason, self.logprobs, 0, self.tool_calls or None, self.stop_reason)
        return delta, EngineOutput(token_ids=self.token_ids, **self.facts)


def merged_logprobs(pieces: Sequence[Logprobs]) -> Logprobs | None:
    """The log-probabilities of successive pieces, all of one form."""
    if not pieces:
        return None
    if isinstance(pieces[0], ChatLogprobs):
        return ChatLogprobs([entry for piece in pieces if isinstance(piece, ChatLogprobs) for entry in piece.content])
    merged = CompletionLogprobs([], [], [], [])
    for piece in pieces:
        assert isinstance(piece, CompletionLogprobs)
        merged.tokens += piece.tokens
        merged.token_logprobs += piece.token_logprobs
        merged.top_logprobs += piece.top_logprobs
        merged.text_offset += piece.text_offset
    return merged


def whole_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    """Tool calls put together from their pieces, in order."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.get(delta.index)
        if call is None:
            call = calls[delta.index] = ToolCall(None, "function", ToolFunction(None, ""))
        call.id = delta.id or call.id
        call.function.name = delta.function.name or call.function.name
        call.function.arguments += delta.function.arguments
    return [calls[index] for index in sorted(calls)]
