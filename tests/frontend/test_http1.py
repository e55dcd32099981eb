"""What becomes of a client's bytes: which are a request, and what is said to those that are none."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.frontend import http1
from dynamo.frontend.http1 import HttpServer, Request, Sent
from dynamo.frontend.server import answer
from tests.frontend.front_door import Answer, Wire
from tests.frontend.kv_fleet import eventually

LIMIT = 1000


class Echo:
    """Answers with what it got: method, path and body. Waits for `gate` if there is one."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def __call__(self, request: Request) -> Sent:
        self.seen.append(request)
        self.entered.set()
        if self.gate is not None:
            await self.gate.wait()
        if request.refusal is not None:
            return answer(request, request.refusal.status, request.refusal.message.encode(), "text/plain")
        return answer(request, 200, f"{request.method} {request.path} ".encode() + request.body, "text/plain")


class Door:
    """A listening server, and its address."""

    def __init__(self, echo: Echo, server: HttpServer, port: int) -> None:
        self.echo, self.server, self.port = echo, server, port

    async def send(self, *pieces: bytes) -> Wire:
        """Each piece as a packet of its own, as far as that can be told from here."""
        wire = await Wire.open(self.port)
        for piece in pieces:
            wire.send(piece)
            await wire.writer.drain()
            await asyncio.sleep(0)
        return wire

    async def ask(self, *pieces: bytes) -> Answer:
        wire = await self.send(*pieces)
        got = await wire.read()
        wire.close()
        return got


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    echo = Echo()
    server = HttpServer(echo, LIMIT)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    yield Door(echo, server, listening.sockets[0].getsockname()[1])
    listening.close()
    await server.shutdown(1)


def post(body: bytes, headers: bytes = b"") -> bytes:
    return b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b\r\n%b" % (len(body), headers, body)


async def test_a_request_may_come_byte_by_byte(door: Door) -> None:
    got = await door.ask(*(bytes([byte]) for byte in post(b"hello")))
    assert (got.status, got.body) == (200, b"POST /p hello")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 150), max_size=6), chunks=st.lists(st.binary(min_size=1, max_size=30), max_size=4))
def test_where_packets_end_makes_no_difference(cuts: list[int], chunks: list[bytes]) -> None:
    async def check() -> None:
        echo = Echo()
        server = HttpServer(echo, LIMIT)
        listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        raw = b"POST /p?q=1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"
        edges = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
        door = Door(echo, server, listening.sockets[0].getsockname()[1])
        got = await door.ask(*(raw[a:b] for a, b in pairwise(edges)))
        assert got.body == b"POST /p " + b"".join(chunks)
        listening.close()
        await server.shutdown(1)

    asyncio.run(check())


async def test_requests_sent_ahead_wait_their_turn(door: Door) -> None:
    door.echo.gate = asyncio.Event()
    wire = await door.send(b"".join(post(b"%d" % i) for i in range(20)))
    await door.echo.entered.wait()
    assert len(door.echo.seen) == 1
    door.echo.gate.set()
    assert [(await wire.read()).body for _ in range(20)] == [b"POST /p %d" % i for i in range(20)]
    wire.send(post(b"more"))  # and it is read again
    assert (await wire.read()).body == b"POST /p more"
    wire.close()


async def test_a_connection_ends_after_the_request_that_says_so(door: Door) -> None:
    wire = await door.send(post(b"a", b"Connection: close\r\n") + post(b"b"))
    assert (await wire.read()).headers["connection"] == "close"
    assert await wire.closed()
    assert len(door.echo.seen) == 1


@pytest.mark.parametrize(("ask", "kept"), [(b"", False), (b"Connection: keep-alive\r\n", True)])
async def test_http_1_0_keeps_a_connection_only_if_asked(door: Door, ask: bytes, kept: bool) -> None:
    wire = await door.send(b"GET / HTTP/1.0\r\n" + ask + b"\r\n")
    got = await wire.read()
    assert (got.headers["connection"] == "keep-alive") is kept
    if not kept:
        assert await wire.closed()
    wire.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nContent-Length: 1a\r\n\r\na",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"POST / HTTP/1.1\nHost: x\n\n",
        b"POST / HTTP/1.1\r\nA: b\r\n c: d\r\n\r\n",
        b"GET / HTTP/3.7\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_two_readers_could_read_differently_is_refused(door: Door, raw: bytes) -> None:
    wire = await door.send(raw)
    assert (await wire.read()).status == 400
    assert await wire.closed()
    assert all(request.refusal is not None for request in door.echo.seen)


async def test_garbage_after_a_good_request_is_told_so_after_its_answer(door: Door) -> None:
    wire = await door.send(post(b"a") + b"\x00\x01garbage\r\n\r\n")
    assert (await wire.read()).body == b"POST /p a"
    assert (await wire.read()).status == 400
    assert await wire.closed()


async def test_trailers_are_no_headers(door: Door) -> None:
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTrailer: X-Worker\r\n\r\n"
    assert (await door.ask(head + b"1\r\na\r\n0\r\nX-Worker: 7\r\n\r\n")).status == 200
    assert door.echo.seen[0].header("x-worker") is None


async def test_header_names_are_found_in_any_case_and_empty_values_too(door: Door) -> None:
    await door.ask(b"GET / HTTP/1.1\r\nX-One: 1\r\nx-EMPTY:\r\nX-one: 2\r\n\r\n")
    request = door.echo.seen[0]
    assert (request.header("x-one"), request.header("x-empty")) == ("1", "")
    assert ("X-One", "1") in request.headers


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 70_000, b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000])
async def test_an_endless_line_is_refused(door: Door, head: bytes) -> None:
    assert (await door.ask(head)).status == 431


async def test_a_long_body_before_the_next_head_is_not_counted_as_one(door: Door) -> None:
    door.server.body_limit = 300_000
    wire = await door.send(post(b"a" * 200_000) + post(b"b")[:20], post(b"b")[20:])
    assert len((await wire.read()).body) > 200_000
    assert (await wire.read()).body == b"POST /p b"
    wire.close()


async def test_too_many_headers_are_refused(door: Door) -> None:
    many = b"".join(b"X-%d: %b\r\n" % (i, b"a" * 100) for i in range(700))
    assert (await door.ask(b"GET / HTTP/1.1\r\n" + many + b"\r\n")).status == 431


async def test_a_request_that_breaks_off_is_told_so(door: Door) -> None:
    wire = await door.send(post(b"hello")[:-2])
    wire.writer.write_eof()
    got = await wire.read()
    assert (got.status, got.body) == (400, b"the request broke off")
    assert await wire.closed()


async def test_a_request_that_stalls_is_told_so(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "STALL_S", 0.0)
    wire = await door.send(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
    assert (await wire.head())[0] == 100
    for connection in door.server.connections:
        connection.look()
    assert (await wire.read()).status == 408
    assert await wire.closed()


async def test_an_idle_connection_is_closed_in_the_end_but_not_a_busy_one(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1, "IDLE_CONNECTION_S", 0.0)
    door.echo.gate = asyncio.Event()
    busy = await door.send(post(b"a"))
    await door.echo.entered.wait()
    for connection in door.server.connections:
        connection.look()
    door.echo.gate.set()
    assert (await busy.read()).status == 200
    for connection in door.server.connections:
        connection.look()
    assert await busy.closed()


async def test_a_client_that_sends_a_refused_body_still_reads_why(door: Door) -> None:
    wire = await door.send(b"POST / HTTP/1.1\r\nContent-Length: 500000\r\n\r\n", *[b"x" * 50_000] * 10)
    assert (await wire.read()).status == 413
    assert await wire.closed()


@pytest.mark.parametrize("name", ["gzip", "deflate"])
async def test_a_compressed_body_is_read(door: Door, name: str) -> None:
    body = (gzip.compress if name == "gzip" else zlib.compress)(b"hello")
    assert (await door.ask(post(body, f"Content-Encoding: {name}\r\n".encode()))).body == b"POST /p hello"


@pytest.mark.parametrize(
    ("body", "name", "status"),
    [
        (gzip.compress(b"a" * 100_000), "gzip", 413),  # a bomb: small until it is opened
        (gzip.compress(b"hello")[:-6], "gzip", 400),
        (b"plain", "gzip", 400),
        (b"plain", "lzma", 415),
    ],
    ids=["bomb", "cut", "plain", "unknown"],
)
async def test_a_compressed_body_that_cannot_be_read_is_refused(
    door: Door, body: bytes, name: str, status: int
) -> None:
    assert (await door.ask(post(body, f"Content-Encoding: {name}\r\n".encode()))).status == status


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"


async def test_an_offer_to_upgrade_is_ignored_and_the_body_read(door: Door) -> None:
    chunked = b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + OFFER + b"\r\n3\r\nabc\r\n0\r\n\r\n"
    raw = post(b"hello", OFFER)
    wire = await door.send(raw[:-3], raw[-3:] + chunked + b"GET /g HTTP/1.1\r\n" + OFFER + b"\r\n" + post(b"next"))
    assert [(await wire.read()).body for _ in range(4)] == [
        b"POST /p hello",
        b"POST /c abc",
        b"GET /g ",
        b"POST /p next",
    ]
    assert door.echo.seen[0].header("upgrade") == "h2c"
    wire.close()


async def test_a_tunnel_is_not_dug(door: Door) -> None:
    assert (await door.ask(b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere\r\n\r\n")).body == (
        b"CONNECT elsewhere:443 "
    )


async def test_a_head_request_gets_no_body(door: Door) -> None:
    wire = await door.send(b"HEAD / HTTP/1.1\r\n\r\n")
    assert (await wire.read(method="HEAD")).status == 200
    wire.send(post(b"a"))
    assert (await wire.read()).body == b"POST /p a"
    wire.close()


async def test_a_shutdown_waits_for_an_answer_and_closes_idle_connections(door: Door) -> None:
    idle = await door.send(post(b"a"))
    await idle.read()
    door.echo.entered.clear()
    door.echo.gate = asyncio.Event()
    busy = await door.send(post(b"b"))
    await door.echo.entered.wait()
    ending = asyncio.create_task(door.server.shutdown(5))
    assert await idle.closed()
    door.echo.gate.set()
    assert (await busy.read()).body == b"POST /p b"
    await ending
    assert await busy.closed()


async def test_a_connection_that_has_gone_leaves_nothing(door: Door) -> None:
    wire = await door.send(post(b"a"))
    await wire.read()
    wire.close()
    await eventually(lambda: not door.server.connections)
