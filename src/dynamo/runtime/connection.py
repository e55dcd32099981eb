"""How does a caller reach a worker process, and learn what became of each of its requests?

One `Connection` a worker process, shared by all clients of a runtime. Frames are handled in the socket's
callback: decode once, call the sinks, flush each sink touched. The pool owns the connections.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from dynamo.runtime import wire
from dynamo.runtime.address import NATS, split_host_port
from dynamo.runtime.context import CancelLevel, Context
from dynamo.runtime.errors import (
    Cancelled,
    CannotConnect,
    DeadlineExceeded,
    Disconnected,
    DynamoException,
    EngineShutdown,
    InvalidArgument,
    Unknown,
    WorkerOverloaded,
    from_wire,
)
from dynamo.runtime.instances import Target
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.options import env_number
from dynamo.runtime.streams import StreamSink
from dynamo.runtime.tls import RequestTls

if TYPE_CHECKING:
    from dynamo.runtime.nats.transport import Exchange

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0  # DYN_TCP_CONNECT_TIMEOUT, the default users know
PING_INTERVAL_S = 2.0  # DYN_TCP_PING_INTERVAL_SECS
MISSED_PINGS = 3  # so a silent peer is given up after 6 to 8 s
MAX_PATH = 512  # letters; no endpoint's path is longer
MAX_UNSENT_BYTES = 64 << 20  # two largest messages; a peer that leaves more unread is not reading


_NO_GREETING = "if it speaks TLS, set DYN_TCP_TLS_CA_CERT_PATH"
_NO_GREETING_BY_TLS = "it may want a certificate of ours: DYN_TCP_TLS_CLIENT_CERT_PATH, DYN_TCP_TLS_CLIENT_KEY_PATH"


class Call:
    """One request in flight, from the caller's side."""

    __slots__ = ("_connection", "context", "id", "on_flow", "sent_s", "sink", "target")

    def __init__(self, connection: "Connection", id: int, target: Target, sink: StreamSink, context: Context) -> None:  # noqa: A002
        self._connection = connection
        self.id = id
        self.target = target
        self.sink = sink
        self.context = context
        self.on_flow: Callable[[bool], None] | None = None
        self.sent_s = time.perf_counter()  # 0 once the first item has come

    def cancel(self, level: CancelLevel) -> None:
        """Tell the worker. After `kill` the sink hears nothing more."""
        self._connection.cancel(self, level)

    def flow(self, go: bool) -> None:
        """Ask a worker that can wait to wait, or to go on."""
        self._connection.send(wire.FLOW, (self.id, go))

    def data(self, item: object) -> None:
        """One more item of a bidirectional request. Raises InvalidArgument if it cannot be sent."""
        self._connection.send(wire.DATA, (self.id, item))

    def end(self) -> None:
        """No more `data`."""
        self._connection.send(wire.END, (self.id,))


class Connection(asyncio.Protocol):
    """One connection to a worker process: of TCP, or what stands for it on NATS."""

    def __init__(self, host_port: str, pool: "ConnectionPool") -> None:
        self.host_port = host_port
        self.calls: dict[int, Call] = {}
        self.closed = False
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._reader = wire.FrameReader(pool.max_message_bytes)
        self._peer_max = pool.max_message_bytes
        self._transport: asyncio.Transport | None = None
        self._greeting: asyncio.Future[None] = self._loop.create_future()
        self._out: list[bytes | bytearray] = []
        self._scheduled = False
        self._next_id = 1
        self._heard = True
        self._missed = 0
        self.retired = False

    @property
    def open(self) -> bool:
        """Whether the worker has greeted us and is still there."""
        return self._greeting.done() and not self.closed

    # --- the caller's side

    def call(
        self, target: Target, request: object, sink: StreamSink, context: Context, headers: dict[str, str] | None = None
    ) -> Call:
        """Send a request. Raises InvalidArgument, WorkerOverloaded, DeadlineExceeded or Cancelled without having sent
        anything."""
        if context.is_stopped():
            raise Cancelled("the request was cancelled before it was sent")
        if context.deadline is not None and context.deadline <= time.monotonic():
            raise DeadlineExceeded("the request's time was over before it was sent")
        if self._unsent_bytes() > MAX_UNSENT_BYTES:
            raise WorkerOverloaded(f"worker {target.instance} at {self.host_port} is not reading what is sent to it")
        call = Call(self, self._next_id, target, sink, context)
        self._next_id += 1
        all_headers = context.to_headers()
        if headers:
            all_headers.update(headers)
        self.send(wire.REQUEST, (call.id, target.path, all_headers, request))
        self.calls[call.id] = call
        target.inflight += 1
        self._pool.stats.inflight.value += 1
        context.watch(call.cancel)
        return call

    def send(self, kind: int, body: object) -> None:
        """Queue one frame; all frames of one turn leave together. Raises InvalidArgument."""
        if self.closed:
            return
        try:
            buffer = wire.frame(kind, body)
        except wire.UNSENDABLE as e:
            raise InvalidArgument(f"the request cannot be encoded: {e}") from e
        wire.check_size(buffer, self._peer_max, "the request")
        self._out.append(buffer)
        self._pool.sockets.bytes_sent.value += len(buffer)
        if not self._scheduled and self._greeting.done():
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def cancel(self, call: Call, level: CancelLevel) -> None:
        """See `Call.cancel`."""
        if self.calls.get(call.id) is not call:
            return
        if level == "kill":
            self._forget(call)
        self.send(wire.CANCEL, (call.id, level))

    def _flush(self) -> None:
        self._scheduled = False
        out = self._out
        if self._transport is None or self._transport.is_closing() or not out:
            return  # what broke tells every call of it in a moment
        self._out = []
        if len(out) == 1:
            self._transport.write(out[0])
        else:
            self._transport.writelines(out)

    def _unsent_bytes(self) -> int:
        queued = sum(map(len, self._out)) if self._out else 0
        return queued + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    def _forget(self, call: Call) -> None:
        del self.calls[call.id]
        call.target.inflight -= 1
        self._pool.stats.inflight.value -= 1
        call.context.unwatch(call.cancel)
        if self.retired and not self.calls:
            self._loop.call_soon(self.close_if_idle)

    # --- the socket's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's has its methods, but not its class
        self._transport = transport
        transport.write(wire.PREAMBLE + wire.frame(wire.HELLO, (self._pool.max_message_bytes, self._pool.process)))

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._pool.sockets.bytes_received.value += len(data)
        touched: dict[int, StreamSink] = {}
        try:
            for kind, body in self._reader.feed(data):
                if kind != wire.HELLO and not self._greeting.done():
                    raise wire.ProtocolError(f"a frame of kind {kind} before its greeting")
                if kind == wire.ITEMS:
                    self._on_items(wire.decode_items(body), touched)
                else:
                    self._on_frame(kind, body, touched)
        except wire.MALFORMED as e:
            log.warning("closing the connection to %s, which does not speak our protocol: %s", self.host_port, e)
            self.fail(Disconnected(f"{self.host_port} sent what is not our protocol: {e}"))
        for sink in {id(sink): sink for sink in touched.values()}.values():  # one sink may have several streams
            try:
                sink.flush()
            except Exception:
                log.exception("a response sink failed to flush")

    def _on_items(self, frame: wire.Items, touched: dict[int, StreamSink]) -> None:
        calls = self.calls
        for stream, item in zip(frame.streams, frame.items, strict=False):
            call = calls.get(stream)
            if call is None:
                continue  # the caller has left
            if call.sent_s:
                self._pool.stats.roundtrip_ttft.observe(time.perf_counter() - call.sent_s)
                call.sent_s = 0.0
            sink = call.sink
            touched[stream] = sink
            try:
                sink.on_item(item)
            except Exception as e:
                log.exception("a response sink failed; its stream is cancelled")
                self._sink_failed(call, e)
        for stream in frame.ended:
            call = calls.get(stream)
            if call is not None:
                touched[stream] = call.sink
                self._forget(call)
                try:
                    call.sink.on_end()
                except Exception:
                    log.exception("a response sink failed at the end of its stream")

    def _on_frame(self, kind: int, body: memoryview, touched: dict[int, StreamSink]) -> None:
        if kind == wire.PONG:
            return
        if kind in (wire.ERROR, wire.REFUSED):
            failed = wire.decode_failed(body)
            call = self.calls.get(failed.stream)
            if call is not None:
                touched[failed.stream] = call.sink
                error = from_wire(failed.error)
                if isinstance(error, EngineShutdown) or (kind == wire.REFUSED and isinstance(error, CannotConnect)):
                    call.target.inhibit()
                self._end_call(call, error)
        elif kind == wire.FLOW:
            flow = wire.decode_flow(body)
            call = self.calls.get(flow.stream)
            if call is not None and call.on_flow is not None:
                call.on_flow(flow.go)
        elif kind == wire.LEAVING:
            paths = wire.decode_paths(body)
            self._pool.leaving(paths)
            for path in paths:  # all together may be more than it takes
                self.send(wire.LEFT, [path[:MAX_PATH]])
        elif kind == wire.HELLO:
            hello = wire.decode_hello(body)
            self._peer_max = min(self._peer_max, hello.max_message_bytes)
            if not self._greeting.done():
                self._greeting.set_result(None)
                self._pool.sockets.connections.value += 1
                self._pool.connected(self)
                self._flush()
        else:
            raise wire.ProtocolError(f"a frame of kind {kind}")

    def _end_call(self, call: Call, error: DynamoException) -> None:
        self._forget(call)
        try:
            call.sink.on_error(error)
        except Exception:
            log.exception("a response sink failed at an error")

    def _sink_failed(self, call: Call, error: Exception) -> None:
        call.cancel("kill")
        try:
            call.sink.on_error(Unknown(f"the receiver of the stream failed: {type(error).__name__}: {error}"))
        except Exception:
            log.exception("a response sink failed at an error")

    def connection_lost(self, exc: Exception | None) -> None:
        why = str(exc or "closed by the worker")
        if self._greeting.done():
            self.fail(Disconnected(f"the connection to {self.host_port} broke: {why}"))
        else:  # nothing was sent yet
            hint = _NO_GREETING_BY_TLS if self._pool.tls is not None else _NO_GREETING
            self.fail(CannotConnect(f"{self.host_port} gave no greeting: {why}; {hint}"))

    def fail(self, error: DynamoException, in_order: bool = False) -> None:
        """End the connection and everything on it. `in_order` lets what is already written out first."""
        if self.closed:
            return
        self.closed = True
        if self._transport is not None:
            if in_order:
                self._transport.close()
            else:
                self._transport.abort()
        if not in_order:
            self._pool.sockets.errors.value += 1
        if not self._greeting.done():
            self._greeting.cancel()
        elif not self._greeting.cancelled():
            self._pool.sockets.connections.value -= 1
        self._pool.connection_failed(self)
        sinks = [call.sink for call in self.calls.values()]
        for call in tuple(self.calls.values()):
            if call.id in self.calls:  # else a sink before it has killed it
                self._end_call(call, type(error)(error.message))  # an exception of its own: each is raised elsewhere
        for sink in sinks:
            try:
                sink.flush()
            except Exception:
                log.exception("a response sink failed to flush")

    def close_if_idle(self) -> None:
        """Close a connection whose worker has left, once nothing is in flight."""
        if self.retired and not self.calls and not self.closed:
            self.close()

    def close(self) -> None:
        """Close in order, from our side."""
        self.retired = True
        self._flush()
        self.fail(Disconnected("the caller's runtime is closing"), in_order=True)

    async def connect(self) -> None:
        """Open the connection and wait for the worker's greeting. Never raises: failure ends all calls."""
        limit_s = self._pool.connect_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._pool.dial(self.host_port, self)
                await self._greeting
        except CannotConnect as e:
            self.fail(CannotConnect(f"cannot connect to {self.host_port}: {e.message}"))
        except TimeoutError:
            self.fail(CannotConnect(f"{self.host_port} did not answer within {limit_s:g} s"))
        except ssl.SSLCertVerificationError as e:
            self.fail(
                CannotConnect(f"{self.host_port}: {e.verify_message} (DYN_TCP_TLS_CA_CERT_PATH, ..._SERVER_NAME)")
            )
        except ssl.SSLError as e:
            self.fail(CannotConnect(f"{self.host_port} does not speak TLS as we do: {e.reason or e}"))
        except OSError as e:
            self.fail(CannotConnect(f"cannot connect to {self.host_port}: {e.strerror or e}"))

    def tick(self) -> None:
        """Every PING_INTERVAL_S: ask for a sign of life, and give up on who gave none three times in a row."""
        if not self._greeting.done() or self.closed:
            return
        self._missed = 0 if self._heard else self._missed + 1
        self._heard = False
        if self._missed >= MISSED_PINGS:
            silent_s = MISSED_PINGS * self._pool.ping_interval_s
            log.warning("worker at %s was silent for %g s; giving the connection up", self.host_port, silent_s)
            self.fail(Disconnected(f"{self.host_port} was silent for {silent_s:g} s"))
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.PING_FRAME)


class ConnectionPool:
    """All connections of one runtime to workers. `exchange` gives the way to those that are reached by NATS."""

    def __init__(
        self,
        process: str,
        metrics: Metrics,
        exchange: "Callable[[], Awaitable[Exchange]] | None" = None,
        tls: RequestTls | None = None,
    ) -> None:
        self.process = process
        self.tls = tls
        self._exchange = exchange
        self.stats = metrics.request_plane
        self.sockets = metrics.transport
        self.max_message_bytes = wire.max_message_bytes()
        self.connect_timeout_s = env_number("DYN_TCP_CONNECT_TIMEOUT", CONNECT_TIMEOUT_S)
        self.ping_interval_s = env_number("DYN_TCP_PING_INTERVAL_SECS", PING_INTERVAL_S)
        self.on_connected: list[Callable[[str], None]] = []
        self.on_connection_failed: list[Callable[[str], None]] = []
        self.on_leaving: list[Callable[[list[str]], None]] = []
        self._connections: dict[str, Connection] = {}
        self._uses: dict[str, int] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def get(self, host_port: str) -> Connection:
        """The connection to a worker process; a new one begins to connect, and takes calls at once."""
        connection = self._connections.get(host_port)
        if connection is None:
            connection = self._connections[host_port] = Connection(host_port, self)
            loop = asyncio.get_running_loop()
            task = loop.create_task(connection.connect(), name=f"connect {host_port}")
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)
            if self._timer is None:
                self._timer = loop.call_later(self.ping_interval_s, self._tick, loop)
        return connection

    async def dial(self, host_port: str, connection: Connection) -> None:
        """Make the connection. Raises CannotConnect, OSError; the caller bounds the time."""
        if not host_port.startswith(NATS):
            host, port = split_host_port(host_port)
            await asyncio.get_running_loop().create_connection(lambda: connection, host, port, **self._encryption(host))
        elif self._exchange is None:
            raise CannotConnect("there is no way to NATS here")
        else:
            exchange = await self._exchange()
            await exchange.dial(host_port.removeprefix(NATS), connection)

    def _encryption(self, host: str) -> dict[str, Any]:
        """What a new connection is told of TLS."""
        if self.tls is None:
            return {}
        settings = self.tls.settings
        return {
            "ssl": self.tls.callers.context(),
            "server_hostname": settings.server_name or host,
            "ssl_handshake_timeout": settings.handshake_s,
        }

    def probe(self, host_port: str) -> None:
        """Connect if we are not; listeners hear whether it went well, at once if it has."""
        connection = self.get(host_port)
        if connection.open:
            self.connected(connection)

    def use(self, host_port: str, used: bool) -> None:
        """Count who needs an address; one that nobody needs is closed when nothing is in flight on it."""
        count = self._uses.get(host_port, 0) + (1 if used else -1)
        connection = self._connections.get(host_port)
        if count > 0:
            self._uses[host_port] = count
            if connection is not None:
                connection.retired = False
            return
        self._uses.pop(host_port, None)
        if connection is not None:
            connection.retired = True
            connection.close_if_idle()

    def connected(self, connection: Connection) -> None:
        """A worker process has greeted us."""
        for listener in self.on_connected:
            listener(connection.host_port)

    def connection_failed(self, connection: Connection) -> None:
        """Forget a connection; the next call makes a new one."""
        if self._connections.get(connection.host_port) is connection:
            del self._connections[connection.host_port]
        if not connection.retired:
            for listener in self.on_connection_failed:
                listener(connection.host_port)

    def leaving(self, paths: list[str]) -> None:
        """A worker said that these instances take no more requests."""
        for listener in self.on_leaving:
            listener(paths)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self.ping_interval_s, self._tick, loop)
        for connection in tuple(self._connections.values()):
            connection.tick()

    async def close(self) -> None:
        """Close everything; what is in flight ends with Disconnected."""
        if self._timer is not None:
            self._timer.cancel()
        for task in tuple(self._connecting):
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in tuple(self._connections.values()):
            connection.close()
