"""How do the items of a worker that speaks OpenAI's language become bytes for the client?

One form for each kind of worker and answer (`dynamo.llm.protocols.passthrough`).
"""

import re
from abc import ABC, abstractmethod
from time import perf_counter
from typing import Any

import msgspec

from dynamo.frontend import sse
from dynamo.frontend.args import Limits
from dynamo.frontend.chunk_fold import ChunkFold
from dynamo.frontend.http1 import Request, Sent, sent
from dynamo.frontend.server import answer, head_bytes
from dynamo.llm.protocols.passthrough import Headers, OpenAIHead
from dynamo.runtime.context import Context
from dynamo.runtime.errors import StreamIncomplete

EVENTS = "text/event-stream"
_STREAM_HEADERS: Headers = [("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")]
_PRINTABLE = re.compile(r"[\t\x20-\x7e]*")  # what a header may hold that comes from elsewhere


class Output:
    """What is written to the client: one whole answer, or a head and pieces."""

    def __init__(self, request: Request, context: Context) -> None:
        self.request = request
        self.own_headers = (("x-request-id", context.id()),)
        self.chunked = request.version >= (1, 1)
        self.committed = False
        self.written_at = perf_counter()

    def whole(self, status: int, body: bytes, content_type: str, more: Headers | tuple[()] = ()) -> Sent:
        """The whole answer."""
        self.committed = True
        return answer(self.request, status, body, content_type, (*self.own_headers, *more))

    def piece(self, data: bytes, status: int = 200, more: Headers | tuple[()] = (), end: bool = False) -> Sent:
        """A piece of a stream of events, after the head if it is the first."""
        keep_alive = self.request.keep_alive and self.chunked
        out = b""
        if not self.committed:
            self.committed = True
            out = head_bytes(self.request, status, EVENTS, None, (*self.own_headers, *more), keep_alive=keep_alive)
        if self.chunked:
            out += b"%x\r\n%b\r\n" % (len(data), data) if data else b""  # an empty chunk would end the body
            out += b"0\r\n\r\n" if end else b""
        else:
            out += data
        self.written_at = perf_counter()
        transport = self.request.transport
        if transport is not None and not transport.is_closing():
            transport.write(out)
        return sent(keep_alive)


class Form(ABC):
    """How the items of one kind of worker become bytes for the client."""

    def __init__(self, output: Output) -> None:
        self._output = output

    @property
    def committed(self) -> bool:
        """Whether the client has got something already."""
        return self._output.committed

    @property
    def has_begun(self) -> bool:
        """Whether what was added last came after the worker's first token."""
        return True

    @abstractmethod
    def add(self, data: Any) -> None:
        """One item. Raises what says that it is none of this form."""

    @abstractmethod
    def flush(self) -> None:
        """All that came with one read was added."""

    @abstractmethod
    def finish(self) -> tuple[Sent, int]:
        """The last bytes; also the status. Raises StreamIncomplete if there was no answer."""

    def break_off(self, error_body: bytes) -> Sent:
        """The last bytes of a stream that failed after it began."""
        return self._output.piece(sse.error_event(error_body), end=True)

    @abstractmethod
    def keep_alive(self, now: float) -> None:
        """Write something if nothing was written for long, where that is ours to do."""


class BytesForm(Form):
    """A head, then bytes. Events go out as they come, anything else as one body."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._head: OpenAIHead | None = None
        self._parts: list[bytes] = []

    def add(self, data: Any) -> None:
        if self._head is None:
            head = self._head = msgspec.convert(data, OpenAIHead)
            if not (200 <= head.status <= 599 and _PRINTABLE.fullmatch(head.content_type)):
                raise ValueError(f"status {head.status}, content type {head.content_type!r}")
            head.headers = [(name, value) for name, value in head.headers if _PRINTABLE.fullmatch(name + value)]
        elif isinstance(data, bytes):
            self._parts.append(data)
        else:
            raise TypeError(f"a {type(data).__name__} where bytes of the body were expected")

    @property
    def has_begun(self) -> bool:
        """The head may come long before the first token."""
        return bool(self._parts)

    @property
    def _streams(self) -> bool:
        return self._head is not None and self._head.status == 200 and self._head.content_type.startswith(EVENTS)

    def flush(self) -> None:
        if self._parts and self._streams:
            self._write(end=False)

    def _write(self, end: bool) -> Sent:
        assert self._head is not None
        parts, self._parts = self._parts, []
        return self._output.piece(b"".join(parts), self._head.status, self._head.headers, end)

    def keep_alive(self, now: float) -> None:
        """What is passed on byte for byte gets no byte of ours."""

    def finish(self) -> tuple[Sent, int]:
        head = self._head
        if head is None:
            raise StreamIncomplete("the worker ended its answer before it began")
        if self._streams:
            return self._write(end=True), head.status
        return self._output.whole(head.status, b"".join(self._parts), head.content_type, head.headers), head.status


class EventsForm(Form):
    """Chunks as maps, for a client that wants a stream."""

    def __init__(self, output: Output, limits: Limits) -> None:
        super().__init__(output)
        self._parts: list[bytes] = []
        self._keep_alive_s = limits.sse_keep_alive_ms / 1e3

    def add(self, data: Any) -> None:
        if not isinstance(data, dict):
            raise TypeError(f"a {type(data).__name__} where a chunk was expected")
        self._parts.append(b"data: " + sse.json_bytes(data) + b"\n\n")

    def flush(self) -> None:
        if self._parts:
            self._output.piece(b"".join(self._parts), 200, _STREAM_HEADERS)
            self._parts.clear()

    def finish(self) -> tuple[Sent, int]:
        self._parts.append(sse.DONE)
        return self._output.piece(b"".join(self._parts), 200, _STREAM_HEADERS, end=True), 200

    def keep_alive(self, now: float) -> None:
        if self._keep_alive_s and self.committed and now - self._output.written_at >= self._keep_alive_s:
            self._output.piece(sse.KEEP_ALIVE)


class OneAnswerForm(Form):
    """Chunks as maps, for a client that wants one body."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._fold = ChunkFold()

    def add(self, data: Any) -> None:
        self._fold.add(data)

    def flush(self) -> None:
        """Nothing leaves before the end."""

    def keep_alive(self, now: float) -> None:
        """A body has no room for it."""

    def finish(self) -> tuple[Sent, int]:
        if self._fold.empty:
            raise StreamIncomplete("the worker ended its answer before it began")
        return self._output.whole(200, sse.json_bytes(self._fold.whole()), "application/json"), 200
