"""How do answers go out?

As bytes that are framed here and given straight to the transport, because an answer assembled once costs a tenth of one
modelled header by header (measured: docs/explanation/http-server.md).
"""

import functools
import time
from collections.abc import Iterable
from email.utils import formatdate

from dynamo.frontend.errors import reason_phrase
from dynamo.frontend.http1 import Request, Sent, sent


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
    request: Request,
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
    request: Request,
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
