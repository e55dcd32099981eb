"""A subscriber without ZeroMQ, against libzmq's publishers and against servers that say what the test wants."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import zmq
import zmq.asyncio

from dynamo.runtime import zmtp
from dynamo.runtime.zmtp import ZmtpSubscription

TOPIC = b"kv"
GREETING = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1" + b"NULL".ljust(20, b"\0") + b"\0" * 32
READY = b"\4\x19\5READY\x0bSocket-Type\0\0\0\3PUB"
DEADLINE_S = 15.0


class Heard:
    """A subscription to a port, and what it hears."""

    def __init__(self, port: int, max_bytes: int = 1 << 20) -> None:
        self.messages: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.changed = asyncio.Event()
        self.link = ZmtpSubscription("127.0.0.1", port, TOPIC, max_bytes, self.messages.put_nowait, self.changed.set)
        self.link.open()

    async def next(self) -> list[bytes]:
        return await asyncio.wait_for(self.messages.get(), DEADLINE_S)

    async def connected(self, wanted: bool = True) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.link.connected is not wanted:
                self.changed.clear()
                await self.changed.wait()


Start = Callable[..., Heard]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[Heard] = []

    def begin(*words: int) -> Heard:
        started.append(Heard(*words))
        return started[-1]

    yield begin
    for each in started:
        await each.link.close()


class Server:
    """Accepts connections; a test reads from them and writes to them."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def open(self) -> int:
        self._server = await asyncio.start_server(lambda *ends: self.connections.put_nowait(ends), "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def accepted(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(self.connections.get(), DEADLINE_S)

    async def subscribed(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that has said all that comes first."""
        reader, writer = await self.accepted()
        writer.write(GREETING + READY)
        async with asyncio.timeout(DEADLINE_S):
            assert (await reader.readexactly(64))[:12] == GREETING[:11] + b"\0"
            flags, size = await reader.readexactly(2)
            assert flags == 4
            assert (await reader.readexactly(size)).endswith(b"SUB")
            assert await reader.readexactly(5) == b"\0\3\1kv"
        return reader, writer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    one = Server()
    yield one
    one._server.close()


async def test_messages_of_any_size_and_number_of_frames_come_as_they_were_sent(start: Start) -> None:
    socket = zmq.asyncio.Context.instance().socket(zmq.XPUB)
    heard = start(socket.bind_to_random_port("tcp://127.0.0.1"))
    try:
        assert await asyncio.wait_for(socket.recv(), DEADLINE_S) == b"\1kv"
        sent = [[TOPIC, b"", b"x" * size] for size in (0, 1, 255, 256, 70_000, 1_000_000)] + [[TOPIC + b"more"]]
        for message in [*sent, [b"other"], [TOPIC]]:
            await socket.send_multipart(message)
        assert [await heard.next() for _ in range(len(sent) + 1)] == [*sent, [TOPIC]]
    finally:
        socket.close(0)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 65])
async def test_however_the_bytes_are_cut_the_messages_are_the_same(start: Start, server: Server, size: int) -> None:
    heard = start(await server.open())
    _, writer = await server.accepted()
    long = b"y" * 300
    data = GREETING + READY + b"\1\2kv\0\3abc" + b"\2" + len(long).to_bytes(8, "big") + long + b"\0\0"
    for at in range(0, len(data), size):
        heard.link.data_received(data[at : at + size])  # as a socket would, but cut where the test wants
    assert [await heard.next() for _ in range(3)] == [[b"kv", b"abc"], [long], [b""]]
    writer.close()


async def test_a_ping_is_answered_with_what_came_with_it(start: Start, server: Server) -> None:
    start(await server.open())
    reader, writer = await server.subscribed()
    writer.write(b"\4\x0a\4PING\0\x0aabc")
    assert await asyncio.wait_for(reader.readexactly(10), DEADLINE_S) == b"\4\x08\4PONGabc"


async def test_a_silent_publisher_is_asked_and_then_given_up_and_met_again(start: Start, server: Server) -> None:
    heard = start(await server.open())
    reader, _ = await server.subscribed()
    await heard.connected()
    heard.link.beat(60.0)
    assert await asyncio.wait_for(reader.readexactly(9), DEADLINE_S) == b"\4\7\4PING\0\x3c"
    heard.link.beat(0.0)
    assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
    await heard.connected(False)
    await server.subscribed()
    await heard.connected()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n".ljust(64),
        GREETING[:10] + b"\2" + GREETING[11:],
        GREETING.replace(b"NULL\0", b"CURVE"),
        GREETING + READY + b"\2" + (2 << 20).to_bytes(8, "big"),
        GREETING + READY + b"\1\0" * 70,
        GREETING + READY + (b"\3" + (600_000).to_bytes(8, "big") + bytes(600_000)) * 2,
        GREETING + b"\0\2kv",
        GREETING + b"\4\x0a\5ERROR\3bad",
    ],
    ids=[
        "no ZMTP",
        "version 2",
        "encrypted",
        "too large",
        "too many frames",
        "too large together",
        "too early",
        "an error",
    ],
)
async def test_who_says_what_cannot_be_heard_is_hung_up_on_and_tried_again(
    start: Start, server: Server, said: bytes
) -> None:
    heard = start(await server.open())
    reader, writer = await server.accepted()
    writer.write(said)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await asyncio.wait_for(reader.readexactly(1000), DEADLINE_S)
    _, writer = await server.subscribed()
    writer.write(b"\0\2kv")
    assert await heard.next() == [b"kv"]


async def test_who_says_nothing_at_all_is_hung_up_on(
    start: Start, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmtp, "CONNECT_TIMEOUT_S", 0.05)
    start(await server.open())
    reader, _ = await server.accepted()
    assert len(await asyncio.wait_for(reader.read(), DEADLINE_S)) == 64


async def test_a_publisher_that_comes_late_is_heard(start: Start, server: Server) -> None:
    port = await server.open()
    server._server.close()
    await server._server.wait_closed()
    heard = start(port)
    server._server = await asyncio.start_server(lambda *ends: server.connections.put_nowait(ends), "127.0.0.1", port)
    await server.subscribed()
    await heard.connected()


async def test_nothing_is_read_while_it_is_paused(start: Start, server: Server) -> None:
    heard = start(await server.open())
    _, writer = await server.subscribed()
    await heard.connected()
    heard.link.pause(True)
    writer.write((b"\2" + (100_000).to_bytes(8, "big") + b"z" * 100_000) * 400)
    with pytest.raises(TimeoutError):  # the sockets' buffers are full
        await asyncio.wait_for(writer.drain(), 0.5)
    assert heard.messages.empty()
    heard.link.beat(0.0)  # its silence is our own doing
    heard.link.pause(False)
    assert [len((await heard.next())[0]) for _ in range(400)] == [100_000] * 400
