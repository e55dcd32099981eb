"""What does a frontend make of a client's bytes?"""

import gzip

from dynamo.frontend.http1 import MAX_HEAD_BYTES, HttpServer, Request, Sent
from dynamo.frontend.server import answer
from fuzz.harness import LOOP, BrokenError, Transport, feed, settle

LIMIT = 1 << 14
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
SEEDS = [
    b"\0" + POST + b"Content-Length: 2\r\n\r\n{}GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x09" + POST + b"Transfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nTrailer: y\r\n\r\n",
    b"\0" + POST + b"Expect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
    b"\0" + POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    b"\0" + POST + b"Content-Encoding: gzip\r\nContent-Length: 40\r\n\r\n" + gzip.compress(b"{}" * 50, mtime=0)[:40],
    b"\0GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nHEAD /x?y=z HTTP/1.1\r\nHost: x\r\n\r\n",
]


async def handler(request: Request) -> Sent:
    """Answers as the frontend does, if the request keeps its promises."""
    if len(request.body) > LIMIT:
        raise BrokenError("a body over the limit")
    if request.refusal is not None:
        return answer(request, request.refusal.status, request.refusal.message.encode())
    if sum(len(name) + len(value) for name, value in request.headers) + len(request.path) > MAX_HEAD_BYTES:
        raise BrokenError("a head over the limit")
    return answer(request, 200, request.body, "text/plain")


async def _start() -> HttpServer:
    return HttpServer(handler, LIMIT)


SERVER = LOOP.run_until_complete(_start())


async def one(data: bytes) -> None:
    """A client connects, says this, and says that it will say no more."""
    connection = SERVER()
    transport = Transport(connection)
    connection.connection_made(transport)
    feed(connection, transport, data)
    if connection._body_bytes > LIMIT + len(data) or len(connection._waiting) > len(data) // 16 + 1:
        raise BrokenError("more is held than came")
    await settle()
    if not transport.over:
        connection.eof_received()
    await settle()
    transport.abort()
    await settle()
    if SERVER.connections:
        raise BrokenError("a connection that is over is still held")
