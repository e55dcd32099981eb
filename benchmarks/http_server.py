"""Which HTTP library costs the frontend least CPU a request, and a streamed event?

usage: python benchmarks/http_server.py [--requests 4000] [--streams 300] [--events 200]
Each candidate runs in a process of its own on uvloop and answers the same two routes: POST /unary (read a JSON body,
answer 400 bytes) and POST /stream (200 server-sent events of 230 bytes, produced by a 1 ms ticker so that every event
is a write of its own, as tokens are). The load is 64 keep-alive connections. Printed: CPU microseconds of the server
process a request and an event. Candidates whose package is missing are skipped.
Results: docs/explanation/http-server.md.
"""

import argparse
import asyncio
import multiprocessing
import os
import socket
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import uvloop

BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"word " * 50 + b'"}]}'
ANSWER = b'{"id":"chatcmpl-1","choices":[' + b" " * 368 + b"]}"
EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"' + b"x" * 156 + b'"}}]}\n\n'
CONNECTIONS = 64


class Ticker:
    """Calls every listener once a millisecond, as an engine step does."""

    def __init__(self) -> None:
        self.listeners: set[Callable[[], None]] = set()
        asyncio.get_running_loop().call_later(0.001, self._tick)

    def _tick(self) -> None:
        for listener in list(self.listeners):
            listener()
        asyncio.get_running_loop().call_later(0.001, self._tick)


class Counted:
    """Calls `emit` once a tick, `count` times, then resolves."""

    def __init__(self, ticker: Ticker, count: int, emit: Callable[[], None]) -> None:
        self.left, self.emit, self.ticker = count, emit, ticker
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticker.listeners.add(self.tick)

    def tick(self) -> None:
        self.emit()
        self.left -= 1
        if not self.left:
            self.ticker.listeners.discard(self.tick)
            self.done.set_result(None)


CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


async def aiohttp_application(sock: socket.socket, events: int) -> None:
    from aiohttp import web

    ticker = Ticker()

    async def unary(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=ANSWER, content_type="application/json")

    async def stream(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        Counted(ticker, events, lambda: queue.put_nowait(EVENT))
        for _ in range(events):
            await response.write(await queue.get())
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/unary", unary)
    app.router.add_post("/stream", stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, sock).start()


async def aiohttp_low_level(sock: socket.socket, events: int) -> None:
    from aiohttp import web

    ticker = Ticker()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        if request.path == "/unary":
            return web.Response(body=ANSWER, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        transport = request.transport
        assert transport is not None
        await Counted(ticker, events, lambda: transport.write(CHUNK)).done
        await response.write_eof()
        return response

    server = web.Server(handle, access_log=None)
    await asyncio.get_running_loop().create_server(server, sock=sock)


class Sent:
    """A response that the handler has already written."""

    keep_alive = True

    async def prepare(self, _request: Any) -> None:
        """Nothing is left to do."""

    async def write_eof(self) -> None:
        """Nothing is left to do."""


async def aiohttp_raw(sock: socket.socket, events: int) -> None:
    from aiohttp import web

    ticker, sent = Ticker(), Sent()
    unary_head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)
    stream_head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def handle(request: web.BaseRequest) -> Any:
        payload = request.content
        if payload.is_eof():
            payload.read_nowait(-1)
        else:
            await payload.read()
        transport = request.transport
        assert transport is not None
        if request.path == "/unary":
            transport.write(unary_head + ANSWER)
            return sent
        transport.write(stream_head)
        await Counted(ticker, events, lambda: transport.write(CHUNK)).done
        transport.write(b"0\r\n\r\n")
        return sent

    server = web.Server(handle, access_log=None)
    await asyncio.get_running_loop().create_server(server, sock=sock)


async def uvicorn_asgi(sock: socket.socket, events: int) -> None:
    import uvicorn

    ticker = Ticker()
    json_type = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]

    async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/unary":
            await send({"type": "http.response.start", "status": 200, "headers": json_type})
            await send({"type": "http.response.body", "body": ANSWER})
            return
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        Counted(ticker, events, lambda: queue.put_nowait(EVENT))
        for _ in range(events):
            await send({"type": "http.response.body", "body": await queue.get(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", http="httptools")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)


async def httptools_protocol(sock: socket.socket, events: int) -> None:
    """Not a library but the floor under all of them: a protocol written by hand, with no task a request."""
    import httptools

    ticker = Ticker()
    unary_head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)
    stream_head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.parser = httptools.HttpRequestParser(self)
            self.headers: dict[bytes, bytes] = {}

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def on_url(self, url: bytes) -> None:
            self.url, self.body = url, []

        def on_header(self, name: bytes, value: bytes) -> None:
            self.headers[name.lower()] = value

        def on_body(self, body: bytes) -> None:
            self.body.append(body)

        def on_message_complete(self) -> None:
            if self.url == b"/unary":
                self.transport.write(unary_head + b"".join(self.body) * 0 + ANSWER)
                return
            write = self.transport.write
            write(stream_head)
            counted = Counted(ticker, events, lambda: write(CHUNK))
            counted.done.add_done_callback(lambda _: write(b"0\r\n\r\n"))

    await asyncio.get_running_loop().create_server(Protocol, sock=sock)


async def ours(sock: socket.socket, events: int) -> None:
    """What the frontend uses, with the checks that the floor lacks: order, limits, stalls, refusals."""
    from dynamo.frontend.http1 import HttpServer, Request, Sent, sent
    from dynamo.frontend.server import answer, head_bytes

    ticker = Ticker()

    async def handle(request: Request) -> Sent:
        if request.path == "/unary":
            return answer(request, 200, ANSWER)
        transport = request.transport
        assert transport is not None
        transport.write(head_bytes(request, 200, "text/event-stream", None, keep_alive=True))
        await Counted(ticker, events, lambda: transport.write(CHUNK)).done
        transport.write(b"0\r\n\r\n")
        return sent(keep_alive=True)

    await asyncio.get_running_loop().create_server(HttpServer(handle, 1 << 20), sock=sock)


CANDIDATES = {
    "aiohttp web.Application": aiohttp_application,
    "aiohttp web.Server": aiohttp_low_level,
    "aiohttp web.Server, bytes to the transport": aiohttp_raw,
    "uvicorn (httptools), raw ASGI": uvicorn_asgi,
    "dynamo.frontend.http1 (httptools)": ours,
    "httptools, nothing but the bytes": httptools_protocol,
}


def serve(name: str, sock: socket.socket, events: int, pipe: Connection) -> None:
    """Run one candidate until told to stop; report CPU seconds whenever asked."""

    async def main() -> None:
        try:
            await CANDIDATES[name](sock, events)
        except ImportError as e:
            pipe.send(str(e))
            return
        pipe.send("ready")
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

        def asked() -> None:
            if pipe.recv() == "cpu":
                pipe.send(time.process_time())
            else:
                stopped.set()

        loop.add_reader(pipe.fileno(), asked)
        await stopped.wait()

    uvloop.run(main())


async def load(port: int, path: str, requests: int) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    left = [head.encode() + BODY] * requests

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left:
            writer.write(left.pop())
            answer = await reader.readuntil(b"\r\n\r\n")
            if b"hunked" in answer:
                while await reader.readuntil(b"\r\n") != b"0\r\n":
                    pass
                await reader.readuntil(b"\r\n")
            else:
                await reader.readexactly(len(ANSWER))
        writer.close()

    async with asyncio.timeout(300):
        await asyncio.gather(*(client() for _ in range(CONNECTIONS)))


def measure(name: str, requests: int, streams: int, events: int) -> str:
    """CPU microseconds a request and an event of one candidate, as a table row."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1024)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=serve, args=(name, sock, events, theirs))
    process.start()
    answer = ours.recv()
    if answer != "ready":
        process.join()
        return f"| {name} | skipped: {answer} | |"
    port = sock.getsockname()[1]

    def cpu() -> float:
        ours.send("cpu")
        return float(ours.recv())

    uvloop.run(load(port, "/unary", 200))
    costs = []
    for path, count, per in (("/unary", requests, requests), ("/stream", streams, streams * events)):
        before = cpu()
        uvloop.run(load(port, path, count))
        costs.append((cpu() - before) / per * 1e6)
    ours.send("stop")
    process.join(10)
    if process.is_alive():
        os.kill(process.pid or 0, 9)
    return f"| {name} | {costs[0]:.0f} | {costs[1]:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--events", type=int, default=200)
    args = parser.parse_args()
    print("| server | µs a request | µs an event |\n|---|---|---|")
    for name in CANDIDATES:
        print(measure(name, args.requests, args.streams, args.events), flush=True)


if __name__ == "__main__":
    main()
