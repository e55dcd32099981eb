"""How do requests come in?

One `HttpConnection` a client. The bytes are parsed by llhttp (library `httptools`), strictly: what is ambiguous, such
as two lengths of one body, is refused. A handler gets the request when it is whole, so that it has nothing to wait
for; answers go out in the order of the requests (`dynamo.frontend.server` frames them). Why it is done here and not by
a server library: docs/explanation/http-server.md.
"""

import asyncio
import contextlib
import fcntl
import sys
import termios
import zlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol, cast

import httptools

from dynamo.frontend.errors import RequestRefused

IDLE_CONNECTION_S = 620.0  # longer than the 600 s for which cloud load balancers keep an idle connection
STALL_S = 60.0  # a client that sends nothing of an unfinished request for so long is told 408
LINGER_S = 2.0  # to swallow the rest of a refused body, so that the client reads the answer and no reset
LOOK_EVERY_S = 5.0
MAX_HEAD_BYTES = 64 * 1024  # request line and headers together
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class ConnectionListener(Protocol):
    """Who is answering on a connection, and so wants to know what becomes of it."""

    def on_full(self) -> None:
        """What waits to be sent is over the high-water mark: the client is slow."""

    def on_writable(self) -> None:
        """The socket drained below its low-water mark after it had been over the high one."""

    def on_gone(self) -> None:
        """The client closed the connection. Called at most once."""


class Request:
    """One request. `path` and `headers` are as they came, except that the path has lost its query.

    `refusal` says what is wrong with it, if that was seen before it was whole: then it has no body.
    """

    __slots__ = ("body", "connection", "headers", "keep_alive", "method", "path", "refusal", "version")

    def __init__(self, connection: "HttpConnection") -> None:
        self.connection = connection
        self.method = "GET"
        self.path = ""
        self.version = (1, 1)
        self.headers: list[tuple[str, str]] = []
        self.keep_alive = False
        self.body = b""
        self.refusal: RequestRefused | None = None

    def header(self, name: str) -> str | None:
        """The first header of this name, which is given in lower case."""
        for each, value in self.headers:
            if each.lower() == name:
                return value
        return None

    @property
    def transport(self) -> asyncio.Transport | None:
        """Where the answer goes; None once the client has gone."""
        return self.connection.transport


class Sent:
    """What a handler gives back once its answer is written: whether the connection may go on."""

    __slots__ = ("keep_alive",)

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive


_KEEP, _CLOSE = Sent(keep_alive=True), Sent(keep_alive=False)


def sent(keep_alive: bool) -> Sent:
    """The word with which a handler says that it has written its answer."""
    return _KEEP if keep_alive else _CLOSE


Handler = Callable[[Request], Awaitable[Sent]]
"""Answers a request, whatever happens; raises nothing."""


class HttpConnection(asyncio.Protocol):
    """One client connection. `listener` is the answer being written, if any; `writing_paused` says it is slow.

    `request_id` is the id of the request being handled, once it is known.
    """

    __slots__ = (
        "_answering",
        "_begun",
        "_body",
        "_body_bytes",
        "_deaf",
        "_head_bytes",
        "_head_known",
        "_held",
        "_in_head",
        "_open_bytes",
        "_parser",
        "_receiving",
        "_server",
        "_task",
        "_url",
        "_waiting",
        "listener",
        "quiet_looks",
        "request_id",
        "transport",
        "writing_paused",
    )

    def __init__(self, server: "HttpServer") -> None:
        self.listener: ConnectionListener | None = None
        self.request_id: str | None = None
        self.transport: asyncio.Transport | None = None
        self.writing_paused = False
        self.quiet_looks = 0
        """How often the server looked since something came."""
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._receiving: Request | None = None
        self._in_head = False
        self._head_known = False
        self._begun = 0  # requests, in what came last
        self._head_bytes = self._open_bytes = 0
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._waiting: deque[Request] = deque()
        self._answering: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._held = False  # nothing is read
        self._deaf = False  # what comes now is of no more interest

    # --- the socket's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._deaf = True
        self._waiting.clear()
        del self._parser  # which knows us
        self._server.forget(self)
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.on_gone()

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self.listener is not None:
            self.listener.on_full()

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self.listener is not None:
            self.listener.on_writable()

    def data_received(self, data: bytes) -> None:
        self.quiet_looks = 0
        if self._deaf:
            return
        between = self._receiving is None
        self._begun = 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            self._go_on_as_before(data[e.args[0] :])
        except httptools.HttpParserError as e:
            if not self._deaf:
                self._refuse(RequestRefused(400, f"Bad Request: {e}"))
        else:
            if self._in_head and self._begun == between and not self._deaf:  # all of the data is of one open head
                self._open_bytes += len(data)
                if self._open_bytes > MAX_HEAD_BYTES:  # perhaps one endless line, of which the parser has not told yet
                    self._refuse(_head_too_long())

    def eof_received(self) -> bool:
        if self._receiving is not None and not self._deaf:
            self._refuse(RequestRefused(400, "the request broke off"))
            return self.transport is not None and self.transport.can_write_eof()  # stay half open for that answer
        return False

    def _go_on_as_before(self, rest: bytes) -> None:
        """The client offers to speak another protocol, as Java's does with each request; that may be ignored.

        The parser stops behind the headers then. Another one reads on, from a head that says how the body is framed.
        """
        request = self._receiving
        if request is None or self._deaf:
            return
        framing = [pair for pair in request.headers if pair[0].lower() in ("content-length", "transfer-encoding")]
        head = "".join(f"{name}: {value}\r\n" for name, value in framing)
        self._parser = httptools.HttpRequestParser(self)
        self._head_known = True
        self.data_received(f"POST / HTTP/1.1\r\n{head}\r\n".encode("latin-1") + rest)

    # --- the parser's side

    def on_message_begin(self) -> None:
        if self._head_known:
            self._head_known = False
            return
        self._receiving = Request(self)
        self._begun += 1
        self._url = b""
        self._in_head = True
        self._head_bytes = self._open_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        if self._in_head:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._receiving
        if request is not None and self._in_head:  # else it is a trailer, which means nothing here
            self._head_bytes += len(name) + len(value) + 4
            request.headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        request = self._receiving
        if request is None or self._deaf or not self._in_head:
            return
        self._in_head = False
        if self._head_bytes + len(self._url) > MAX_HEAD_BYTES:
            self._refuse(_head_too_long())
            return
        request.method = self._parser.get_method().decode("latin-1")
        request.path = self._url.partition(b"?")[0].decode("latin-1")
        if self._parser.get_http_version() == "1.0":
            request.version = (1, 0)
        request.keep_alive = self._parser.should_keep_alive() and self._server.seeing_off_s is None
        limit = self._server.body_limit
        for name, value in request.headers:
            lower = name.lower()
            if lower == "content-length" and int(value) > limit:
                self._refuse(_body_too_large(limit))
                return
            if lower == "expect" and value.lower() == "100-continue" and self.transport is not None:
                self.transport.write(_CONTINUE)

    def on_body(self, data: bytes) -> None:
        if self._deaf:
            return
        self._body_bytes += len(data)
        if self._body_bytes > self._server.body_limit:
            self._refuse(_body_too_large(self._server.body_limit))
            return
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # see `_go_on_as_before`
        request, self._receiving = self._receiving, None
        if request is None or self._deaf:
            return
        if self._body:
            request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
            encoding = request.header("content-encoding")
            if encoding is not None:
                try:
                    request.body = decompress(request.body, encoding, self._server.body_limit)
                except RequestRefused as e:
                    request.refusal = e
        if not request.keep_alive:
            self._deaf = True
        self._take(request)

    def _refuse(self, refusal: RequestRefused) -> None:
        """Answer what has come of a request, in its turn, and read no further."""
        request = self._receiving
        if request is None:
            request = self._receiving = Request(self)
        request.refusal = refusal
        request.keep_alive = False
        self._body.clear()
        self._deaf = True
        self._take(request)

    # --- one request after another

    def _take(self, request: Request) -> None:
        if self._answering is None:
            self._answering = request
            self._task = asyncio.get_running_loop().create_task(self._answer())
            return
        self._waiting.append(request)
        self._hold(True)  # a client that sends ahead waits; what was read is bounded by one read

    async def _answer(self) -> None:
        keep_alive = False
        try:
            while (request := self._answering) is not None:
                keep_alive = (await self._server.handler(request)).keep_alive
                self._answering = self._waiting.popleft() if keep_alive and self._waiting else None
                if self._held and not self._waiting:
                    self._hold(False)
        finally:
            self._answering = self._task = None
            if not keep_alive:
                self._close()
            elif self._server.seeing_off_s is not None:
                self.close_unless_used(self._server.seeing_off_s)

    def _hold(self, hold: bool) -> None:
        """Read nothing from the client for now, or go on."""
        transport = self.transport
        if hold is self._held or transport is None or transport.is_closing():
            return
        self._held = hold
        if hold:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _close(self) -> None:
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self._receiving is None:
            transport.close()  # once all is written
            return
        self._deaf = True
        if transport.can_write_eof():
            transport.write_eof()
        self._hold(False)
        asyncio.get_running_loop().call_later(LINGER_S, transport.close)

    # --- what the server asks

    @property
    def task(self) -> "asyncio.Task[None] | None":
        """The answering of a request, if one is being answered."""
        return self._task

    def look(self) -> None:
        """Give up on a client that has been silent for too long."""
        self.quiet_looks += 1
        if self._answering is not None or self.transport is None:
            return
        silent_s = self.quiet_looks * LOOK_EVERY_S
        if self._receiving is not None and not self._deaf and silent_s > STALL_S:
            self._refuse(RequestRefused(408, f"the request stalled for {STALL_S:.0f} s"))
        elif silent_s > IDLE_CONNECTION_S:
            self.transport.close()

    def close_unless_used(self, within_s: float) -> None:
        """Close after a while, unless a request has come by then: its answer says that it is the last."""
        asyncio.get_running_loop().call_later(within_s, self._close_unused)

    def _close_unused(self) -> None:
        if self._answering is None and self._receiving is None and self.transport is not None:
            if _unread_bytes(self.transport):  # it came while the loop was busy: its client would see it lost
                self.close_unless_used(0)
            else:
                self.transport.close()

    def close_if_idle(self) -> None:
        """Close, unless a request is being answered: its answer says that it is the last."""
        if self._answering is None and self.transport is not None:
            self.transport.close()


class HttpServer:
    """The protocol factory of a listening socket, and all its connections.

    Args:
        handler: answers each request.
        body_limit: bytes of a body, also once it is decompressed.
    """

    def __init__(self, handler: Handler, body_limit: int) -> None:
        self.handler = handler
        self.body_limit = body_limit
        self.connections: set[HttpConnection] = set()
        self.seeing_off_s: float | None = None
        """Once set, each request is the last of its connection, and one that is unused for so long is closed."""
        self._empty: asyncio.Event | None = None  # only while somebody waits for it
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def __call__(self) -> HttpConnection:
        return HttpConnection(self)

    def _look(self) -> None:
        for connection in tuple(self.connections):
            connection.look()
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def forget(self, connection: HttpConnection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        if self._empty is not None and not self.connections:
            self._empty.set()

    async def see_off(self, polite_s: float, timeout_s: float) -> None:
        """Let clients go elsewhere, where nobody connects any more; for at most `timeout_s`.

        A client that asks again within `polite_s` of its last answer is answered, and told that its connection ends
        there. Who does not ask is disconnected.
        """
        self.seeing_off_s = polite_s
        for connection in self.connections:
            connection.close_unless_used(polite_s)
        if not self.connections:
            return
        self._empty = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()

    def close_idle(self) -> None:
        """Close the connections that nothing is answered on."""
        for connection in tuple(self.connections):
            connection.close_if_idle()

    async def shutdown(self, timeout_s: float) -> None:
        """Close all connections: those that are answered on after `timeout_s` at most."""
        self._timer.cancel()
        self.close_idle()
        if tasks := [connection.task for connection in self.connections if connection.task is not None]:
            await asyncio.wait(tasks, timeout=timeout_s)
        for connection in tuple(self.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for task in tasks:
            task.cancel()


def _unread_bytes(transport: asyncio.Transport) -> int:
    """What has come and was not read yet."""
    number = transport.get_extra_info("socket").fileno()
    if number < 0:
        return 0
    return int.from_bytes(fcntl.ioctl(number, termios.FIONREAD, bytes(4)), sys.byteorder)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """A body as it was before its `Content-Encoding`. Raises RequestRefused: 415, 413 or 400."""
    name = encoding.strip().lower()
    if name == "identity":
        return body
    bits = _WINDOW_BITS.get(name)
    if bits is None:
        raise RequestRefused(415, f"Content-Encoding {encoding[:40]!r}: use gzip, deflate or none")
    inflate = zlib.decompressobj(bits)
    try:
        whole = inflate.decompress(body, limit + 1)
    except zlib.error as e:
        raise RequestRefused(400, f"the body is not {name} as its Content-Encoding says: {e}") from None
    if len(whole) > limit:
        raise _body_too_large(limit)
    if not inflate.eof:
        raise RequestRefused(400, f"the {name} body breaks off")
    return whole


def _body_too_large(limit: int) -> RequestRefused:
    return RequestRefused(
        413, f"the request body is over the limit of {limit} bytes (DYN_HTTP_BODY_LIMIT_MB)", code="request_too_large"
    )


def _head_too_long() -> RequestRefused:
    return RequestRefused(431, f"the request line and headers are over {MAX_HEAD_BYTES} bytes")
