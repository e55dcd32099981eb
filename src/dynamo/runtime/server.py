"""How does a worker process take requests and answer them?

One listener a process, many routes (an endpoint of one instance each). A `ServerConnection` is one caller
process. Whatever the handlers send in one turn of the loop is encoded once and leaves in one frame a caller.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import msgspec

from dynamo.runtime import wire
from dynamo.runtime.address import NATS, join_host_port
from dynamo.runtime.context import SENT_HEADER, Context
from dynamo.runtime.errors import (
    CannotConnect,
    DeadlineExceeded,
    DiscoveryError,
    EngineShutdown,
    InvalidArgument,
    WireError,
    WorkerOverloaded,
    to_wire,
)
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.options import env_number
from dynamo.runtime.routes import Route, RouteStats, ServerStream
from dynamo.runtime.streams import PushHandler
from dynamo.runtime.tls import RequestTls
from dynamo.runtime.tracing import configure_tracing

if TYPE_CHECKING:
    from dynamo.runtime.nats.transport import Exchange

log = logging.getLogger(__name__)

HIGH_WATER_BYTES = 1 << 20  # handlers that can wait do so while this much is unsent to their caller
MAX_UNSENT_BYTES = 64 << 20  # two largest messages; a caller that leaves more unread is dropped
MAX_STREAMS = 65536  # requests in flight from one caller process
MAX_CONNECTIONS = 4096  # caller processes
SILENCE_S = 8.0  # callers ping every 2 s; one that is silent for this long is gone
TICK_S = 2.0
CLOSE_S = 1.0  # at the very end, callers get this long to read what is already written


class ServerConnection(asyncio.Protocol):
    """One caller process."""

    def __init__(self, server: "RequestServer") -> None:
        self.loop = asyncio.get_running_loop()
        self.streams: dict[int, ServerStream] = {}
        self.streams_out: list[ServerStream] = []
        self.items_out: list[object] = []
        self.ended_out: list[int] = []
        self.errors_out: list[tuple[int, WireError]] = []
        self.refused_out: list[tuple[int, WireError]] = []
        self.flow_out: list[tuple[int, bool]] = []
        self.scheduled = False
        self.congested: asyncio.Future[None] | None = None
        self.greeted = False
        self.left: set[str] = set()
        self.records_spans = server.records_spans
        self.stats = server.metrics.work_handler
        self._sockets = server.metrics.transport
        self._server = server
        self._reader = wire.FrameReader(server.max_message_bytes)
        self._peer_max = server.max_message_bytes
        self._transport: asyncio.Transport | None = None
        self._peer = "?"
        self._heard = True
        self._missed = 0

    # --- the socket's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's has its methods, but not its class
        self._transport = transport
        self._peer = str(transport.get_extra_info("peername"))
        if len(self._server.connections) >= MAX_CONNECTIONS:
            self.drop(f"there are already {MAX_CONNECTIONS} callers")
            return
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._server.add(self)
        hello = wire.frame(wire.HELLO, (self._server.max_message_bytes, self._server.process))
        transport.write(wire.PREAMBLE + hello)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._sockets.bytes_received.value += len(data)
        try:
            for kind, body in self._reader.feed(data):
                if not self.greeted and kind != wire.HELLO:
                    raise wire.ProtocolError(f"a frame of kind {kind} before its greeting")
                self._on_frame(kind, body)
        except wire.MALFORMED as e:
            self.drop(f"it does not speak our protocol: {e}")

    def _on_frame(self, kind: int, body: memoryview) -> None:
        if kind == wire.REQUEST:
            self._on_request(wire.decode_request(body), len(body))
        elif kind == wire.PING:
            self._write(wire.PONG_FRAME)
        elif kind == wire.CANCEL:
            cancel = wire.decode_cancel(body)
            stream = self.streams.get(cancel.stream)
            if stream is not None:
                stream.cancel("kill" if cancel.level == "kill" else "stop")
        elif kind == wire.DATA:
            data = wire.decode_data(body)
            stream = self.streams.get(data.stream)
            if stream is not None and stream.on_data is not None:
                stream.on_data(data.item)
        elif kind == wire.END:
            stream = self.streams.get(wire.decode_end(body).stream)
            if stream is not None and stream.on_data is not None:
                stream.on_data(None)
        elif kind == wire.FLOW:
            flow = wire.decode_flow(body)
            stream = self.streams.get(flow.stream)
            if stream is not None:
                stream.set_flow(flow.go)
        elif kind == wire.HELLO:
            if self.greeted:
                raise wire.ProtocolError("a second greeting")
            self._peer_max = min(self._peer_max, wire.decode_hello(body).max_message_bytes)
            self.greeted = True
            if self._server.leaving:
                self.ask_to_leave(self._server.leaving)
        elif kind == wire.LEFT:
            self.left.update(wire.decode_paths(body))
            self._server.on_left()
        else:
            raise wire.ProtocolError(f"a frame of kind {kind}")

    def _on_request(self, request: wire.Request, size: int) -> None:
        if request.stream in self.streams:
            raise wire.ProtocolError(f"a second request on stream {request.stream}")
        route = self._server.routes.get(request.path)
        if route is None:
            self._refuse(request, CannotConnect(f"no endpoint {request.path} here: it has left, or never came"))
            return
        if not (route.admitting and self._server.admitting):
            self.stats.enqueue_rejected.value += 1
            self._refuse(request, EngineShutdown(f"{request.path} is shutting down"))
            return
        if len(self.streams) >= MAX_STREAMS:
            self._refuse(request, WorkerOverloaded(f"{MAX_STREAMS} requests of this caller are already in flight"))
            return
        sent_ns = request.headers.get(SENT_HEADER, "")
        if sent_ns.isdigit():
            self.stats.network_transit.observe(max(0.0, (time.time_ns() - int(sent_ns)) / 1e9))
        context = Context.from_headers(request.headers)
        left_s = context.time_left()
        if left_s is not None and left_s <= 0:
            self._refuse(request, DeadlineExceeded("the request's time was over before it came"))
            return
        if self.records_spans:
            context.record_span(f"handle {route.path}")
        stream = ServerStream(self, request.stream, route, context)
        self.streams[request.stream] = stream
        route.add(stream)
        route.stats.started(size)
        try:
            route.handler(request.payload, stream)
        except Exception as e:
            log.exception("the handler of %s failed", request.path)
            stream.fail(e)

    def _refuse(self, request: wire.Request, error: Exception) -> None:
        self.refused_out.append((request.stream, to_wire(error)))
        self.schedule()

    def pause_writing(self) -> None:
        if self.congested is None:
            self.congested = self.loop.create_future()

    def resume_writing(self) -> None:
        if self.congested is not None:
            if not self.congested.done():
                self.congested.set_result(None)
            self.congested = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.remove(self)
        self.resume_writing()
        streams = tuple(self.streams.values())
        for stream in streams:
            stream.cancel("kill")

    # --- the handlers' side

    def schedule(self) -> None:
        """Flush at the end of this turn of the loop."""
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send all that was queued in this turn, in one write."""
        self.scheduled = False
        parts: list[bytes | bytearray] = []
        if self.items_out or self.ended_out:
            streams, items, ended = self.streams_out, self.items_out, self.ended_out
            self.streams_out, self.items_out, self.ended_out = [], [], []
            self._frame_items(streams, items, ended, parts)
        if self.errors_out:
            errors, self.errors_out = self.errors_out, []
            parts.extend(wire.frame(wire.ERROR, error) for error in errors)
        if self.refused_out:
            refused, self.refused_out = self.refused_out, []
            parts.extend(wire.frame(wire.REFUSED, refusal) for refusal in refused)
        if self.flow_out:
            flows, self.flow_out = self.flow_out, []
            parts.extend(wire.frame(wire.FLOW, flow) for flow in flows)
        if parts:
            self._write(parts[0] if len(parts) == 1 else b"".join(parts))

    def _frame_items(
        self, streams: list[ServerStream], items: list[object], ended: list[int], parts: list[bytes | bytearray]
    ) -> None:
        try:
            buffer = wire.frame(wire.ITEMS, ([stream.id for stream in streams], items, ended))
        except wire.UNSENDABLE:
            self._frame_items(*self._without_unsendable(streams, items, ended), parts)
            return
        if len(buffer) - 4 <= self._peer_max:
            parts.append(buffer)
            if streams:
                count_sent(streams, len(buffer))
        elif len(items) > 1:
            middle = len(items) // 2
            self._frame_items(streams[:middle], items[:middle], [], parts)
            self._frame_items(streams[middle:], items[middle:], [], parts)
            failed = {stream for stream, _ in self.errors_out}
            self._frame_items([], [], [stream for stream in ended if stream not in failed], parts)
        elif not items:  # each of these ends is shorter than any limit
            middle = len(ended) // 2
            self._frame_items([], [], ended[:middle], parts)
            self._frame_items([], [], ended[middle:], parts)
        else:
            large = streams[0]
            self.errors_out.append((large.id, _too_large(self._peer_max)))
            large.close(InvalidArgument.__name__)
            self._frame_items([], [], [stream for stream in ended if stream != large.id], parts)

    def _without_unsendable(
        self, streams: list[ServerStream], items: list[object], ended: list[int]
    ) -> tuple[list[ServerStream], list[object], list[int]]:
        """One item spoilt the frame: encode each by itself, and fail only the streams whose items cannot be sent."""
        good: list[ServerStream] = []
        encoded: list[object] = []
        spoilt: set[int] = set()
        for stream, item in zip(streams, items, strict=True):
            try:
                encoded.append(msgspec.Raw(wire.encode(item)))
                good.append(stream)
            except wire.UNSENDABLE as e:
                log.exception("an item of %s cannot be sent", stream.route.path)
                spoilt.add(stream.id)
                self.errors_out.append((stream.id, to_wire(e)))
                stream.close(type(e).__name__)
        return good, encoded, [stream for stream in ended if stream not in spoilt]

    def _write(self, data: bytes | bytearray) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(data)
        self._sockets.bytes_sent.value += len(data)
        if self.congested is not None and transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.drop(f"it left {transport.get_write_buffer_size()} bytes unread")

    def ask_to_leave(self, paths: Iterable[str]) -> None:
        """Ask the caller for no more requests to these."""
        self._write(wire.frame(wire.LEAVING, list(paths)))

    def tick(self) -> None:
        """Every TICK_S: give up a caller that was silent for SILENCE_S, or took that long to say who it is."""
        self._missed = 0 if self._heard and self.greeted else self._missed + 1
        self._heard = False
        if self._missed * TICK_S >= SILENCE_S:
            self.drop(f"it was silent for {SILENCE_S:g} s" if self.greeted else "it has not greeted")

    def drop(self, reason: str) -> None:
        """Close the connection at once, and say why; quietly if it never was a caller, like a port probe."""
        log.log(logging.WARNING if self.greeted else logging.INFO, "dropping the caller %s: %s", self._peer, reason)
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close in order."""
        if self._transport is not None:
            self._transport.close()


def count_sent(streams: list[ServerStream], frame_bytes: int) -> None:
    """Count a frame for its routes: exactly when they are one, else by their number of items."""
    first = streams[0].route
    if all(stream.route is first for stream in streams):
        first.stats.sent(frame_bytes)
        return
    share = frame_bytes // len(streams)
    for stream in streams:
        stream.route.stats.sent(share)


def _too_large(limit: int) -> WireError:
    return to_wire(
        InvalidArgument(f"one item of the response is over the limit of {limit} bytes (DYN_TCP_MAX_MESSAGE_SIZE)")
    )


class RequestServer:
    """The listener of one process: on a port, or with `exchange` in its inbox on NATS."""

    def __init__(
        self,
        process: str,
        metrics: Metrics,
        exchange: "Callable[[], Awaitable[Exchange]] | None" = None,
        tls: RequestTls | None = None,
    ) -> None:
        self.process = process
        self._tls = tls
        self._make_exchange = exchange
        self._exchange: Exchange | None = None
        self.metrics = metrics
        self.routes: dict[str, Route] = {}
        self.connections: set[ServerConnection] = set()
        self.admitting = True
        self.leaving: set[str] = set()
        self.records_spans = configure_tracing()
        self.max_message_bytes = wire.max_message_bytes()
        self.host_port = ""
        """Where callers reach this: `host:port`, or `nats:` and the inbox."""
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()  # several workers of one process may start at once
        self._timer: asyncio.TimerHandle | None = None
        self._left = asyncio.Event()

    async def start(self) -> None:
        """Listen on DYN_TCP_RPC_HOST (127.0.0.1), DYN_TCP_RPC_PORT (0: any), or on NATS. Raises CannotConnect."""
        async with self._starting:
            if self.host_port:
                return
            if self._make_exchange is None:
                await self._listen()
            else:
                self._exchange = await self._make_exchange()
                self._exchange.listen(lambda: ServerConnection(self))
                self.host_port = NATS + self._exchange.link.inbox
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(TICK_S, self._tick, loop)

    async def _listen(self) -> None:
        host = os.environ.get("DYN_TCP_RPC_HOST") or "127.0.0.1"
        port = int(env_number("DYN_TCP_RPC_PORT", 0))
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: ServerConnection(self), host, port, backlog=1024, **self._encryption()
            )
        except OSError as e:
            raise CannotConnect(
                f"cannot listen on {join_host_port(host, port)} (DYN_TCP_RPC_HOST, DYN_TCP_RPC_PORT): {e.strerror or e}"
            ) from e
        bound_host, bound_port = self._server.sockets[0].getsockname()[:2]
        self.host_port = join_host_port(advertised_host(bound_host), bound_port)

    def _encryption(self) -> dict[str, Any]:
        """What the listener is told of TLS. Raises CannotConnect rather than listen in the clear where TLS is used."""
        if self._tls is None:
            return {}
        if self._tls.listener is None:
            raise CannotConnect(
                "TLS is used on the request plane, and this process has no certificate for those who connect to it: "
                "set DYN_TCP_TLS_CERT_PATH and DYN_TCP_TLS_KEY_PATH"
            )
        return {"ssl": self._tls.listener.door(), "ssl_handshake_timeout": self._tls.settings.handshake_s}

    def add_route(self, path: str, handler: PushHandler, stats: RouteStats) -> Route:
        """Take requests for `path`. Raises DiscoveryError if it is taken."""
        if path in self.routes:
            raise DiscoveryError(f"{path} is already served by this process")
        route = self.routes[path] = Route(path, handler, stats)
        return route

    def remove_route(self, route: Route) -> None:
        """Take no more requests for a route."""
        if self.routes.get(route.path) is route:
            del self.routes[route.path]

    def leave(self, path: str) -> None:
        """Ask all callers, also those still to come, for no more requests to `path`."""
        self.leaving.add(path)
        for connection in self.connections:
            connection.left.discard(path)
            connection.ask_to_leave([path])

    def stay(self, path: str) -> None:
        """Requests to `path` are welcome again; discovery tells the callers."""
        self.leaving.discard(path)

    async def all_left(self, timeout_s: float) -> None:
        """Wait until every caller has heard what is leaving, or has gone; at most `timeout_s`.

        Who has not greeted has sent nothing yet, and hears it with our answer to the greeting.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not all(c.left >= self.leaving for c in self.connections if c.greeted):
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            log.warning("not all callers confirmed within %g s that this worker is leaving", timeout_s)

    def on_left(self) -> None:
        """A caller confirmed, or went."""
        self._left.set()

    def add(self, connection: ServerConnection) -> None:
        """A caller came."""
        self.connections.add(connection)

    def remove(self, connection: ServerConnection) -> None:
        """A caller went."""
        self.connections.discard(connection)
        self._left.set()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(TICK_S, self._tick, loop)
        for connection in tuple(self.connections):
            connection.tick()

    async def close(self) -> None:
        """Stop listening and close all connections. What is in flight is killed."""
        self.admitting = False
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            self._server.close()
        if self._exchange is not None:
            self._exchange.stop_listening()
        for connection in self.connections:
            connection.flush()
            connection.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                while self.connections:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            for connection in tuple(self.connections):
                connection.drop("it does not read its last answers")


def advertised_host(bound: str) -> str:
    """The host that others can reach us by: DYN_TCP_RPC_ADVERTISE_HOST, else the bound one, else our address."""
    named = os.environ.get("DYN_TCP_RPC_ADVERTISE_HOST")
    if named:
        return named
    if bound not in ("0.0.0.0", "::", ""):  # noqa: S104 - recognised, not bound
        return bound
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: chooses a route, sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
