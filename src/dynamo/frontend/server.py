"""How do requests come in, and bytes go out?

aiohttp's low-level server parses HTTP and keeps connections alive; what goes out is bytes that this module frames and
gives straight to the transport, because an answer assembled once costs a tenth of one modelled header by header
(measured: docs/explanation/http-server.md).
"""

import asyncio
import functools
import http
import time
from collections.abc import Awaitable, Callable, Iterable
from email.utils import formatdate
from typing import Any, Protocol, cast

from aiohttp import web
from aiohttp.streams import StreamReader

from dynamo.frontend.errors import RequestRefused, error_answer, reason_phrase

IDLE_CONNECTION_S = 620.0  # longer than the 600 s for which cloud load balancers keep an idle connection
BODY_STALL_S = 60.0  # a client that sends nothing of an unfinished body for so long is told 408


class ConnectionListener(Protocol):
    """Who is answering on a connection, and so wants to know what becomes of it."""

    def on_full(self) -> None:
        """What waits to be sent is over the high-water mark: the client is slow."""

    def on_writable(self) -> None:
        """The socket drained below its low-water mark after it had been over the high one."""

    def on_gone(self) -> None:
        """The client closed the connection. Called at most once."""


class HttpConnection(web.RequestHandler):
    """One client connection. `listener` is the answer being written, if any; `writing_paused` says it is slow.

    `request_id` is the id of the request being handled, once it is known.
    """

    __slots__ = ("listener", "request_id")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.listener: ConnectionListener | None = None
        self.request_id: str | None = None

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp calls this whenever a body was read, and then parses nothing and wakes the transport once more."""
        if getattr(self, "_reading_paused", True):
            super().resume_reading(resume_parser)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.listener is not None:
            self.listener.on_full()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.listener is not None:
            self.listener.on_writable()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.on_gone()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """aiohttp's hook for bytes that are no HTTP request, and for exceptions that nobody else caught."""
        if status >= 500 and exc is not None:
            self.logger.error("error in a request handler", exc_info=exc)
        text = message or http.HTTPStatus(status).phrase
        answer = error_answer(RequestRefused(status, text.splitlines()[0].rstrip(":")))
        response = web.Response(status=status, body=answer.body, content_type="application/json")
        response.force_close()
        return response


Handler = Callable[[web.BaseRequest], Awaitable["Sent"]]


class HttpServer(web.Server):
    """aiohttp's server with `HttpConnection` as its protocol."""

    def __init__(self, handler: Handler) -> None:
        super().__init__(
            cast("Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]", handler),
            access_log=None,
            keepalive_timeout=IDLE_CONNECTION_S,
            lingering_time=2.0,  # seconds to swallow the rest of a refused body, so that the client reads the answer
        )

    def __call__(self) -> HttpConnection:
        return HttpConnection(self, loop=self._loop, **self._kwargs)


class Sent:
    """A response already written. aiohttp wants to prepare and finish responses; for this one nothing is left to do."""

    __slots__ = ("keep_alive",)

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, _request: web.BaseRequest) -> None:
        """Nothing is left to do."""

    async def write_eof(self) -> None:
        """Nothing is left to do."""


_KEEP, _CLOSE = Sent(keep_alive=True), Sent(keep_alive=False)


def sent(keep_alive: bool) -> Sent:
    """The word with which a handler tells aiohttp that it has written its answer."""
    return _KEEP if keep_alive else _CLOSE


class _Date:
    """The `Date` header, made once a second."""

    second = 0
    line = b""

    def now(self) -> bytes:
        second = int(time.time())
        if second != self.second:
            self.second, self.line = second, b"Date: " + formatdate(second, usegmt=True).encode() + b"\r\n"
        return self.line


_date = _Date()


@functools.lru_cache(maxsize=256)  # statuses times content types times what the client speaks
def _first_lines(status: int, content_type: str, framing: str, connection: str) -> bytes:
    """Status line and the headers that are the same for many answers."""
    return (
        f"HTTP/1.1 {status} {reason_phrase(status)}\r\nContent-Type: {content_type}\r\n{connection}{framing}".encode()
    )


def head_bytes(
    request: web.BaseRequest,
    status: int,
    content_type: str,
    length: int | None,
    headers: Iterable[tuple[str, str]] = (),
    *,
    keep_alive: bool,
) -> bytes:
    """Status line and headers. `length=None` means chunked, or until the connection closes for HTTP/1.0.

    Header values must hold no CR or LF: they are constants, or were checked by `dynamo.frontend.headers`.
    """
    old = request.version < (1, 1)
    connection = ""
    if not keep_alive:
        connection = "Connection: close\r\n"
    elif old:
        connection = "Connection: keep-alive\r\n"
    framing = "Transfer-Encoding: chunked\r\n" if length is None and not old else ""
    head = _first_lines(status, content_type, framing, connection)
    if length is not None:
        head += b"Content-Length: %d\r\n" % length
    for name, value in headers:
        head += f"{name}: {value}\r\n".encode("latin-1")
    return head + _date.now() + b"\r\n"


def answer(
    request: web.BaseRequest,
    status: int,
    body: bytes,
    content_type: str = "application/json",
    headers: Iterable[tuple[str, str]] = (),
    *,
    close: bool = False,
) -> Sent:
    """Write a whole answer in one system call. A client that is gone is no error."""
    keep_alive = request.keep_alive and not close
    head = head_bytes(request, status, content_type, len(body), headers, keep_alive=keep_alive)
    transport = request.transport
    if transport is not None and not transport.is_closing():
        transport.write(head if request.method == "HEAD" else head + body)
    return sent(keep_alive)


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """The request's body, at most `limit` bytes.

    Raises:
        RequestRefused: 413 if it is longer, 408 if it stalls, 400 if it breaks off or is badly framed or compressed.
    """
    payload: StreamReader = request.content
    try:
        if payload.is_eof():  # it came with its headers, as nearly all do
            body = payload.read_nowait(-1)
            if len(body) > limit:
                raise _too_large(limit)
            return body
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return await _read_pieces(payload, limit)
    except TimeoutError:
        raise RequestRefused(408, f"the request body stalled for {BODY_STALL_S:.0f} s") from None
    except (web.RequestPayloadError, ConnectionError, OSError) as e:
        raise RequestRefused(400, f"the request body could not be read: {e}") from None


async def _read_pieces(payload: StreamReader, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        async with asyncio.timeout(BODY_STALL_S):
            piece = await payload.readany()
        if not piece:
            return b"".join(pieces)
        size += len(piece)
        if size > limit:
            raise _too_large(limit)
        pieces.append(piece)


def _too_large(limit: int) -> RequestRefused:
    return RequestRefused(
        413, f"the request body is over the limit of {limit} bytes (DYN_HTTP_BODY_LIMIT_MB)", code="request_too_large"
    )
