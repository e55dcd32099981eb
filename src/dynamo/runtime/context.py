"""Is this request still wanted, whose is it, and what travels with it?

A `Context` exists at both ends of a request. Stopping or killing the caller's reaches the worker's as a
CANCEL frame; losing the caller's connection kills the worker's.

- stop: finish early, but in order. The stream still ends with its end mark.
- kill: drop everything now. Implies stop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

from dynamo.runtime.tracing import AttributeValue, SpanProxy, TraceContext, extract, new_trace, new_trace_id, start_span

log = logging.getLogger(__name__)

CancelLevel = Literal["stop", "kill"]

TIMEOUT_HEADER = "x-dynamo-request-timeout-ms"
"""What is left of a request's time: a span, as the clocks of two hosts need not agree."""
TIME_IS_OVER = f"the request's time is over ({TIMEOUT_HEADER}, or the server's limit)"  # whoever notices first says it
SENT_HEADER = "x-frontend-send-ts-ns"  # when the caller sent the request, in ns since 1970 by its clock
_METADATA_PREFIX = "x-dynamo-meta-"


def new_request_id() -> str:
    """A version 4 UUID, at a third of the price of `uuid.uuid4`: one is made for each request."""
    h = new_trace_id()
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{'89ab'[int(h[16], 16) & 3]}{h[17:20]}-{h[20:]}"


class Context:
    """One request's identity, metadata, trace and wish to go on.

    `metadata` is a plain `dict[str, str]` that every hop passes on. Not thread-safe: use it on its loop.
    """

    __slots__ = (
        "__weakref__",
        "_first_token_callbacks",
        "_id",
        "_killed",
        "_parent",
        "_place",
        "_span",
        "_stopped",
        "_watchers",
        "_x_request_id",
        "deadline",
        "first_token_ns",
        "metadata",
    )

    def __init__(self, id: str | None = None, metadata: Mapping[str, str] | None = None) -> None:  # noqa: A002
        self._id = id or new_request_id()
        self.metadata: dict[str, str] = dict(metadata) if metadata else {}
        self.first_token_ns: int | None = None
        self.deadline: float | None = None
        """When the whole request must be over, by `time.monotonic`; None: whenever it is. Whoever serves it ends it
        then; `set_timeout` sets it."""
        self._stopped = False
        self._killed = False
        self._watchers: list[Callable[[CancelLevel], None]] = []
        self._first_token_callbacks: list[Callable[[], None]] = []
        self._parent: TraceContext | None = None
        self._place: TraceContext | None = None
        self._span: SpanProxy | None = None
        self._x_request_id: str | None = None

    def __repr__(self) -> str:
        state = "killed" if self._killed else "stopped" if self._stopped else "running"
        return f"Context({self._id!r}, {state})"

    def id(self) -> str:
        """The request id, the same at every hop."""
        return self._id

    # --- time

    def set_timeout(self, seconds: float) -> None:
        """Let the whole request be over in so many seconds from now. It travels with the request to every hop."""
        self.deadline = time.monotonic() + seconds

    def time_left(self) -> float | None:
        """Seconds until the deadline, below 0 after it; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    # --- cancellation

    def is_stopped(self) -> bool:
        """Whether the caller wants no more (true as well once killed)."""
        return self._stopped

    def is_killed(self) -> bool:
        """Whether the caller is gone or wants everything dropped at once."""
        return self._killed

    def stop_generating(self) -> None:
        """Ask the worker to finish early. The stream still ends in order."""
        if not self._stopped:
            self._stopped = True
            self._tell("stop")

    def kill(self) -> None:
        """Drop the request at both ends, now."""
        if not self._killed:
            self._killed = self._stopped = True
            self._tell("kill")

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when stop or kill arrives, here or over the wire; at once if it already has."""
        if self._stopped:
            callback()
            return

        def once(_level: CancelLevel) -> None:
            self.unwatch(once)
            callback()

        self._watchers.append(once)

    def watch(self, callback: Callable[[CancelLevel], None]) -> None:
        """Call `callback("stop")` and `callback("kill")` as they come (a kill may come without a stop)."""
        self._watchers.append(callback)

    def unwatch(self, callback: Callable[[CancelLevel], None]) -> None:
        """Forget a callback given to `watch`; unknown ones are ignored."""
        if callback in self._watchers:
            self._watchers.remove(callback)

    def _tell(self, level: CancelLevel) -> None:
        for watcher in tuple(self._watchers):
            try:
                watcher(level)
            except Exception:
                log.exception("a callback failed that was to hear of the %s of request %s", level, self._id)

    def async_killed_or_stopped(self) -> "asyncio.Future[bool]":
        """A future that becomes True when the request is stopped or killed."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def resolve() -> None:
            if not future.done():
                future.set_result(True)

        self.on_stop(resolve)
        return future

    def detached(self, id: str | None = None) -> "Context":  # noqa: A002 - the name users know
        """A context with the same metadata and trace whose cancellation is its own."""
        other = Context(id, self.metadata)
        other._parent = self.place
        other._x_request_id = self._x_request_id
        other.deadline = self.deadline
        return other

    # --- first token

    def notify_first_token(self) -> None:
        """Say that the first token exists, for those who measure or wait for it. Later calls do nothing."""
        if self.first_token_ns is None:
            self.first_token_ns = time.monotonic_ns()
            for callback in self._first_token_callbacks:
                callback()
            self._first_token_callbacks.clear()

    def on_first_token(self, callback: Callable[[], None]) -> None:
        """Call `callback` once at the first `notify_first_token`; at once if it was already called."""
        if self.first_token_ns is not None:
            callback()
        else:
            self._first_token_callbacks.append(callback)

    # --- tracing (W3C trace context)

    @property
    def place(self) -> TraceContext:
        """This hop's span in the caller's trace, or in one begun here."""
        if self._place is None:
            self._place = new_trace() if self._parent is None else self._parent.child()
        return self._place

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return self.place.trace_id

    @property
    def span_id(self) -> str:
        """16 hex digits: this hop's own span."""
        return self.place.span_id

    @property
    def parent_span_id(self) -> str | None:
        """16 hex digits: the caller's span, if it sent one."""
        return self._parent.span_id if self._parent is not None else None

    def set_trace(self, headers: Mapping[str, str]) -> None:
        """Continue the trace of `headers` (lower-case names): traceparent, tracestate, x-request-id."""
        self._parent = extract(headers)
        self._place = None
        self._span = None
        self._x_request_id = headers.get("x-request-id")

    def trace_headers(self) -> dict[str, str]:
        """What to send to the next hop so that it continues this trace."""
        headers = self.place.headers()
        headers["x-request-id"] = self._x_request_id or self._id
        return headers

    def current_span(self) -> SpanProxy:
        """The span of this hop's whole work."""
        if self._span is None:
            self._span = SpanProxy(self.place)
        return self._span

    def record_span(self, name: str) -> SpanProxy:
        """Begin to record this hop's whole work, where spans are recorded. Whoever calls this closes the span."""
        self._span = start_span(name, self._parent, {"request.id": self._id}, span_id=self.place.span_id)
        return self._span

    def start_span(self, name: str, attrs: Mapping[str, AttributeValue] | None = None) -> SpanProxy:
        """Begin a piece of this hop's work. Close it, or use it as a context manager."""
        return start_span(name, self.place, attrs)

    # --- the wire

    def to_headers(self) -> dict[str, str]:
        """Everything of this context that travels with a request."""
        headers = self.trace_headers()
        headers["request-id"] = self._id
        headers[SENT_HEADER] = str(time.time_ns())
        if self.deadline is not None:
            headers[TIMEOUT_HEADER] = str(max(0, int((self.deadline - time.monotonic()) * 1000)))
        for name, value in self.metadata.items():
            headers[_METADATA_PREFIX + name] = value
        return headers

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> "Context":
        """The worker's context for a request that came with `headers`."""
        cut = len(_METADATA_PREFIX)
        metadata = {name[cut:]: value for name, value in headers.items() if name.startswith(_METADATA_PREFIX)}
        context = cls(headers.get("request-id"), metadata)
        context.set_trace(headers)
        left_ms = headers.get(TIMEOUT_HEADER)
        if left_ms is not None and left_ms.isdecimal():
            context.set_timeout(int(left_ms) / 1000)
        return context
