"""What are the bytes of a streamed answer?

Server-sent events, one chunk of OpenAI's a `data:` line. All of a text chunk but the text is the same through a
stream, so it is made once (`text_frame`) and a token costs one JSON string between two constants. Chunks with more in
them (finish reasons, log-probabilities, tool calls, usage) are encoded whole (`chunk`).
"""

from typing import Any

import msgspec

from dynamo.frontend.bodies import Usage
from dynamo.llm.output import TextDelta

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def json_bytes(value: object) -> bytes:
    """Compact JSON."""
    return _encode(value)


def error_event(body: bytes) -> bytes:
    """An error after the answer has begun: the same body that an early one has, as the last event."""
    return b"event: error\ndata: " + body + b"\n\n"


def annotation_event(name: str, value: object) -> bytes:
    """A fact about the request that the client asked for [A33]: the value is JSON in a string in a comment."""
    text = value if isinstance(value, str) else _encode(value).decode()
    return b"event: " + name.encode() + b"\n: " + _encode(text) + b"\n\n"


class ChunkForm:
    """How the chunks of one answer look: a chat's or a completion's. `created` is in Unix seconds."""

    def __init__(self, *, chat: bool, response_id: str, created: int, model: str) -> None:
        self.chat = chat
        self._head: dict[str, Any] = {"id": response_id}
        self._rest: dict[str, Any] = {
            "created": created,
            "model": model,
            "object": "chat.completion.chunk" if chat else "text_completion",
        }
        self._frames: list[tuple[bytes, bytes]] = []

    def text_frame(self, number: int) -> tuple[bytes, bytes]:
        """What stands before and after the JSON string in a text event of choice `number`."""
        while len(self._frames) <= number:
            marker = "\x00"
            index = len(self._frames)
            delta = TextDelta(marker)
            head, tail = self.chunk([self.choice(index, delta)]).split(_encode(marker))
            self._frames.append((head, tail))
        return self._frames[number]

    def choice(self, number: int, delta: TextDelta, *, role: bool = False) -> dict[str, Any]:
        """One entry of `choices`."""
        if not self.chat:
            return {
                "text": delta.text,
                "index": number,
                "logprobs": delta.logprobs,
                "finish_reason": delta.finish_reason,
            }
        content: dict[str, Any] = {}
        if role:
            content["role"] = "assistant"
        if delta.text or role:
            content["content"] = delta.text
        if delta.tool_calls:
            content["tool_calls"] = delta.tool_calls
        return {"index": number, "delta": content, "finish_reason": delta.finish_reason, "logprobs": delta.logprobs}

    def chunk(
        self,
        choices: list[dict[str, Any]],
        usage: Usage | None = None,
        nvext: dict[str, Any] | None = None,
    ) -> bytes:
        """A whole event."""
        body = {**self._head, "choices": choices, **self._rest}
        if usage is not None:
            body["usage"] = usage
        if nvext:
            body["nvext"] = nvext
        return b"data: " + _encode(body) + b"\n\n"
