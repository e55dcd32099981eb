"""How does output that a forced tool choice constrained become tool calls?

With one tool forced the output is that tool's arguments, and streams through as such. With `required` it is a
list of `{"name", "parameters"}`, which is told apart once it is complete.
"""

import uuid

import msgspec

from dynamo.llm.protocols.tools import ForcedTools, FunctionDelta, ToolCallDelta


class _Call(msgspec.Struct):
    name: str
    parameters: msgspec.Raw


_calls = msgspec.json.Decoder(list[_Call])


def new_call_id() -> str:
    """An id no other call has, in the form clients of the peer see."""
    return f"call-{uuid.uuid4()}"


class GuidedToolCalls:
    """Reads the output of one choice."""

    __slots__ = ("_forced", "_started", "_text")

    def __init__(self, forced: ForcedTools) -> None:
        self._forced = forced
        self._started = False
        self._text = ""

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for a choice that ended by itself: `stop` for a tool forced by name, else `tool_calls`."""
        return "stop" if self._forced.name else "tool_calls"

    def push(self, text: str) -> list[ToolCallDelta]:
        """What can be told of the calls after this text."""
        if self._forced.name is None:
            self._text += text
            return []
        if self._started:
            return [ToolCallDelta(0, FunctionDelta(arguments=text))] if text else []
        self._started = True
        return [ToolCallDelta(0, FunctionDelta(self._forced.name, text), new_call_id(), "function")]

    def finish(self) -> tuple[list[ToolCallDelta], str]:
        """The calls not told yet, and text that is none because the output broke off before its end."""
        if self._forced.name is not None:
            return [], ""
        try:
            calls = _calls.decode(self._text)
        except msgspec.DecodeError:
            return [], self._text
        return [
            ToolCallDelta(i, FunctionDelta(call.name, bytes(call.parameters).decode()), new_call_id(), "function")
            for i, call in enumerate(calls)
        ], ""
