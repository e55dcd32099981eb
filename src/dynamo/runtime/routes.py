"""What does a worker hold of each request in flight, and of each endpoint that takes requests?

A `Route` is one endpoint of one instance. A `ServerStream` is one request on it: the `ResponseStream` that handlers
push into. Both only queue; `dynamo.runtime.server` reads and writes the socket.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from dynamo.runtime import wire
from dynamo.runtime.context import TIME_IS_OVER, CancelLevel, Context
from dynamo.runtime.errors import Cancelled, DeadlineExceeded, EngineShutdown, to_wire
from dynamo.runtime.streams import PushHandler

if TYPE_CHECKING:
    from dynamo.runtime.server import ServerConnection


class RouteStats(Protocol):
    """Who counts what a route does. All calls are cheap: once a request or once a frame, never once an item."""

    def started(self, request_bytes: int) -> None: ...

    def finished(self, seconds: float, error: str | None) -> None: ...

    def sent(self, response_bytes: int) -> None: ...

    def cancelled(self) -> None: ...


class Route:
    """One endpoint of one instance: who handles its requests, and how many are in flight."""

    def __init__(self, path: str, handler: PushHandler, stats: RouteStats) -> None:
        self.path = path
        self.handler = handler
        self.stats = stats
        self.admitting = True
        self.streams: set[ServerStream] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, stream: "ServerStream") -> None:
        """One more in flight."""
        self.streams.add(stream)
        self._idle.clear()

    def remove(self, stream: "ServerStream") -> None:
        """One less."""
        self.streams.discard(stream)
        if not self.streams:
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Whether nothing is in flight any more, after at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort(self, reason: str) -> None:
        """Kill what is in flight; its callers get EngineShutdown."""
        for stream in tuple(self.streams):
            stream.fail(EngineShutdown(reason))
            stream.context.kill()


class ServerStream:
    """One request in flight, from the worker's side: the `ResponseStream` that handlers get."""

    __slots__ = ("_connection", "_flow", "_started", "answered", "context", "id", "on_data", "open", "route", "timer")

    def __init__(self, connection: "ServerConnection", id: int, route: Route, context: Context) -> None:  # noqa: A002
        self._connection = connection
        self.id = id
        self.route = route
        self.context = context
        self.open = True
        self.on_data: Callable[[msgspec.Raw | None], None] | None = None
        self._flow: asyncio.Future[None] | None = None
        self._started = time.perf_counter()
        self.answered = False
        self.timer: asyncio.TimerHandle | None = None
        left_s = context.time_left()
        if left_s is not None:
            self.timer = connection.loop.call_later(left_s, self._time_is_over)

    def _time_is_over(self) -> None:
        """Nobody waits for the rest, wherever in the worker it is."""
        self.fail(DeadlineExceeded(TIME_IS_OVER))
        self.context.kill()

    @property
    def closed(self) -> bool:
        """Whether the stream ended, failed, or lost its caller."""
        return not self.open

    def send(self, item: object) -> None:
        """Queue one item; it is encoded at the end of this turn of the loop, so do not change it until then."""
        if self.open:
            connection = self._connection
            if not self.answered:
                self.answered = True
                connection.stats.time_to_first_response.observe(time.perf_counter() - self._started)
            connection.streams_out.append(self)
            connection.items_out.append(item)
            if not connection.scheduled:
                connection.scheduled = True
                connection.loop.call_soon(connection.flush)

    def send_now(self, item: object) -> None:
        """Like `send`, for an item that its maker may change afterwards. Raises TypeError if it cannot be sent."""
        self.send(msgspec.Raw(wire.encode(item)))

    def end(self) -> None:
        """Finish the stream."""
        if self.open:
            self._connection.ended_out.append(self.id)
            self._connection.schedule()
            self.close(None)

    def fail(self, error: BaseException) -> None:
        """End the stream with an error."""
        if self.open:
            described = to_wire(error)
            self._connection.errors_out.append((self.id, described))
            self._connection.schedule()
            self.close(described.kind)

    def request_flow(self, go: bool) -> None:
        """Ask the caller of a bidirectional stream to wait, or to go on."""
        self._connection.flow_out.append((self.id, go))
        self._connection.schedule()

    def cancel(self, level: CancelLevel) -> None:
        """The caller stops or kills the request."""
        if not self.context.is_stopped():
            self.route.stats.cancelled()
        if level == "kill":
            self.close(Cancelled.__name__)
            self.context.kill()
        else:
            self.context.stop_generating()

    def close(self, error: str | None) -> None:
        """Nothing is sent any more."""
        if self.open:
            self.open = False
            if self.timer is not None:
                self.timer.cancel()
            self._connection.streams.pop(self.id, None)
            self.route.remove(self)
            self.route.stats.finished(time.perf_counter() - self._started, error)
            if self._connection.records_spans:
                _close_span(self.context, error)
            self.set_flow(True)

    # --- for handlers that can wait

    def set_flow(self, go: bool) -> None:
        """The caller cannot, or can again, take more of this stream."""
        if not go:
            if self._flow is None:
                self._flow = self._connection.loop.create_future()
        elif self._flow is not None:
            flow, self._flow = self._flow, None
            if not flow.done():
                flow.set_result(None)

    @property
    def congested(self) -> bool:
        """Whether what is sent now would only pile up."""
        return self._flow is not None or self._connection.congested is not None

    async def clear(self) -> None:
        """Wait until the caller takes more, or the stream is closed (a caller that is gone closes it)."""
        while self.open:
            waiting = self._flow or self._connection.congested
            if waiting is None:
                return
            await asyncio.shield(waiting)


def _close_span(context: Context, error: str | None) -> None:
    span = context.current_span()
    if error is not None:
        span.set_status("error", error)
    span.close()
