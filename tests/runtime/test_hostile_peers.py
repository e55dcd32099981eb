"""Whatever connects, and whatever it sends or fails to read, the process and its other callers are unharmed."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.runtime import DistributedRuntime, wire
from dynamo.runtime import server as server_module
from dynamo.runtime.errors import Disconnected, WorkerUnavailable
from tests.runtime.plane_helpers import ENDPOINT, SOON_S, Held, caller, connect, dial, push, until

HELLO = wire.PREAMBLE + bytes(wire.frame(wire.HELLO, (wire.DEFAULT_MAX_MESSAGE_BYTES, "test")))


def framed(kind: int, body: bytes) -> bytes:
    """A frame whose body need not be msgpack."""
    return (len(body) + 1).to_bytes(4, "big") + bytes([kind]) + body


@pytest.fixture
async def worker(runtime: DistributedRuntime) -> DistributedRuntime:
    async def echo(request: Any) -> AsyncIterator[Any]:
        yield request

    await runtime.endpoint(ENDPOINT).start_endpoint(echo)
    return runtime


async def closed(reader: asyncio.StreamReader) -> bytes:
    """Everything until the worker closes the connection."""
    async with asyncio.timeout(SOON_S):
        try:
            return await reader.read(-1)
        except ConnectionResetError:
            return b""


async def serves(worker: DistributedRuntime) -> bool:
    client = await connect(worker)
    return [item async for item in await client.generate("ping", annotated=False)] == ["ping"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"DYN2\x01" + bytes(20),
        HELLO + b"\xff\xff\xff\xff" + bytes(100),
        HELLO + (33 << 20).to_bytes(4, "big"),
        HELLO + bytes(4),
        HELLO + bytes(wire.frame(200, [])),
        HELLO + bytes(wire.frame(wire.ITEMS, ([1], [2], []))),
        HELLO + bytes(wire.frame(wire.REQUEST, {"not": "an array"})),
        HELLO + bytes(wire.frame(wire.REQUEST, (1, "path", {}))),
        HELLO + bytes(wire.frame(wire.REQUEST, (-1, 2, 3, 4))),
        HELLO + framed(wire.REQUEST, b"\xc1\xc1\xc1\xc1"),
        HELLO + framed(wire.REQUEST, b"\x94\x01\xa1\xff\x80\x01"),
        HELLO + framed(wire.REQUEST, b"\x94\x01\xa1p\x80" + b"\x91" * 200_000 + b"\x01"),
        HELLO + bytes(wire.frame(wire.CANCEL, (1, 5))),
        HELLO + bytes(wire.frame(wire.HELLO, ("x",))),
        HELLO + bytes(wire.frame(wire.HELLO, (wire.DEFAULT_MAX_MESSAGE_BYTES, "x"))),
        wire.PREAMBLE + bytes(wire.frame(wire.HELLO, (wire.MAX_GREETING_BYTES - 1, "x"))),
        wire.PREAMBLE + (wire.MAX_GREETING_BYTES + 1).to_bytes(4, "big"),
        wire.PREAMBLE + bytes(wire.frame(wire.PING, ())),
        wire.PREAMBLE + bytes(wire.frame(wire.REQUEST, (1, "path", {}, None))),
    ],
    ids=lambda data: repr(data[:40]),
)
async def test_what_is_not_our_protocol_closes_its_connection_only(worker: DistributedRuntime, data: bytes) -> None:
    reader, writer = await dial(worker)
    writer.write(data)
    await closed(reader)
    writer.close()
    assert await serves(worker)


async def test_it_is_logged_in_one_line(worker: DistributedRuntime, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reader, writer = await dial(worker)
    writer.write(HELLO + b"\xff" * 10_000)
    await closed(reader)
    writer.close()
    assert caplog.text.count("does not speak our protocol") == 1


@given(data=st.binary(max_size=400), greet=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_never_harm_the_worker(data: bytes, greet: bool) -> None:
    async def scenario() -> None:
        worker = DistributedRuntime(discovery_backend="mem")
        try:
            await worker.endpoint(ENDPOINT).start_push_endpoint(Held())
            _, writer = await dial(worker)
            writer.write((HELLO if greet else b"") + data)
            writer.write_eof()
            await asyncio.sleep(0)
            client = await connect(worker)
            sink = push(client, "ping")
            served = worker.served[0]
            await until(lambda: len(served.route.streams) == 1)
            next(iter(served.route.streams)).end()
            await sink.finished()
            writer.close()
        finally:
            await worker.close()

    asyncio.run(scenario())


async def test_a_caller_that_takes_only_short_frames_gets_all_ends(runtime: DistributedRuntime) -> None:
    count, limit = 2000, wire.MAX_GREETING_BYTES
    held = Held()
    served = await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    reader, writer = await dial(runtime)
    writer.write(wire.PREAMBLE + wire.frame(wire.HELLO, (limit, "short")))
    for stream in range(count):
        writer.write(wire.frame(wire.REQUEST, (stream, served.route.path, {}, None)))
    for each in await held.wait(count):
        each.end()
    got, ended = wire.FrameReader(limit), list[int]()
    async with asyncio.timeout(SOON_S):
        while len(ended) < count and (data := await reader.read(65536)):
            for kind, body in got.feed(data):
                ended += wire.decode_items(body).ended if kind == wire.ITEMS else []
    assert ended == list(range(count))
    writer.close()


async def test_a_truncated_frame_holds_nobody_up(worker: DistributedRuntime) -> None:
    _, writer = await dial(worker)
    writer.write(HELLO + bytes(wire.frame(wire.REQUEST, (1, "x", {}, "y")))[:-3])
    assert await serves(worker)
    writer.close()


async def test_requests_and_cancels_of_unknown_things_are_harmless(worker: DistributedRuntime) -> None:
    reader, writer = await dial(worker)
    for kind, body in (
        (wire.CANCEL, (99, "kill")),
        (wire.DATA, (99, "x")),
        (wire.END, (99,)),
        (wire.FLOW, (99, False)),
        (wire.LEFT, ["no such path"]),
        (wire.PING, ()),
    ):
        writer.write(wire.frame(kind, body))
    writer.write(b"")
    reader2, writer2 = await dial(worker)
    writer2.write(HELLO)
    for kind, body in ((wire.CANCEL, (99, "kill")), (wire.LEFT, ["no such path"]), (wire.PING, ())):
        writer2.write(wire.frame(kind, body))
    got = wire.FrameReader()
    kinds: list[int] = []
    async with asyncio.timeout(SOON_S):
        while wire.PONG not in kinds:
            kinds += [kind for kind, _ in got.feed(await reader2.read(65536))]
    for each in (writer, writer2):
        each.close()
    await closed(reader)
    assert await serves(worker)


async def test_one_stream_number_twice_is_a_protocol_error(runtime: DistributedRuntime) -> None:
    held = Held()
    served = await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    reader, writer = await dial(runtime)
    request = bytes(wire.frame(wire.REQUEST, (1, served.route.path, {}, None)))
    writer.write(HELLO + request + request)
    await closed(reader)
    writer.close()
    await until(lambda: held.stopped == ["kill"])


async def test_a_caller_that_never_reads_is_dropped_at_a_bound(
    runtime: DistributedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    held = Held()
    served = await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    reader, writer = await dial(runtime)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(HELLO + bytes(wire.frame(wire.REQUEST, (1, served.route.path, {}, None))))
    [stream] = await held.wait()
    sent_mib = 0
    while not stream.closed:
        stream.send(bytes(1 << 20))
        sent_mib += 1
        await asyncio.sleep(0)
        assert sent_mib < 200
    assert sent_mib >= server_module.MAX_UNSENT_BYTES >> 20
    assert held.stopped == ["kill"]
    assert "bytes unread" in caplog.text
    writer.close()


async def test_a_silent_caller_is_dropped(runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "TICK_S", 0.05)
    monkeypatch.setattr(server_module, "SILENCE_S", 0.2)
    held = Held()
    served = await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    reader, writer = await dial(runtime)
    writer.write(HELLO + bytes(wire.frame(wire.REQUEST, (1, served.route.path, {}, None))))
    await held.wait()
    await closed(reader)
    writer.close()
    assert held.stopped == ["kill"]


async def test_who_says_a_little_now_and_then_but_never_who_it_is_is_dropped(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "TICK_S", 0.05)
    monkeypatch.setattr(server_module, "SILENCE_S", 0.2)
    await runtime.endpoint(ENDPOINT).start_push_endpoint(Held())
    reader, writer = await dial(runtime)
    writer.write(wire.PREAMBLE + (100).to_bytes(4, "big"))
    ended = asyncio.ensure_future(closed(reader))
    for _ in range(99):
        if ended.done():
            break
        writer.write(b"x")
        await asyncio.wait([ended], timeout=0.05)
    assert ended.done()
    writer.close()


# --- the caller's side


async def impostor(runtime: DistributedRuntime, answer: bytes) -> asyncio.Server:
    """A server that is in discovery and says `answer` to whoever connects."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    address = runtime.endpoint(ENDPOINT).address
    record = (
        '{"namespace":"test","component":"worker","endpoint":"generate","instance_id":7,'
        f'"transport":{{"tcp":"127.0.0.1:{port}/{address.wire_path(7)}"}}}}'
    )
    await runtime.discovery.put(address.instance_key(7), record.encode())
    return server


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        HELLO + b"\xff\xff\xff\xff",
        HELLO + bytes(wire.frame(wire.ITEMS, ([1, 2, 3], "x", []))),
        HELLO + bytes(wire.frame(wire.ERROR, (1, {"kind": 5}))),
        HELLO + bytes(wire.frame(wire.REQUEST, ())),
        HELLO + framed(wire.ITEMS, b"\xc1\xc1\xc1\xc1"),
        wire.PREAMBLE + bytes(wire.frame(wire.ITEMS, ([1], [2], [1]))),
    ],
    ids=lambda data: repr(data[:40]),
)
async def test_a_worker_that_sends_garbage_loses_its_requests_at_once(
    runtime: DistributedRuntime, answer: bytes
) -> None:
    server = await impostor(runtime, answer)
    client = await connect(runtime)
    sink = await push(client, None).finished()
    assert isinstance(sink.error, Disconnected)
    with pytest.raises(WorkerUnavailable):
        client.pick()
    server.close()


async def test_an_error_of_an_unknown_kind_still_ends_its_stream(runtime: DistributedRuntime) -> None:
    answer = HELLO + bytes(wire.frame(wire.ERROR, (1, {"kind": "FromTheFuture", "message": "m", "details": {"x": 1}})))
    server = await impostor(runtime, answer)
    client = await connect(runtime)
    sink = push(client, None)
    await sink.finished()
    assert "m" in str(sink.error)
    server.close()


async def test_a_worker_that_falls_silent_is_given_up(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_PING_INTERVAL_SECS", "0.05")
    server = await impostor(runtime, HELLO)
    async with caller() as other:
        client = await connect(other)
        sink = await push(client, None).finished()
        assert isinstance(sink.error, Disconnected)
        assert "silent" in str(sink.error)
    server.close()
