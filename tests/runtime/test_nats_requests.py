"""Requests by way of NATS when NATS, a worker or a caller fails, and messages are lost."""

import asyncio
import signal
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.address import NATS
from dynamo.runtime.errors import CannotConnect, Disconnected, WorkerOverloaded
from dynamo.runtime.instances import parse_instance
from dynamo.runtime.nats.transport import DATA, HEAD, RESET, Exchange
from tests.runtime.etcd_server import Gate
from tests.runtime.nats_server import NatsServer, nats_running
from tests.runtime.plane_helpers import ENDPOINT, SOON_S, Held, WorkerProcess, caller, connect, push, until


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that may be hurt; runtimes made here use it."""
    monkeypatch.setenv("DYN_REQUEST_PLANE", "nats")
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")
    monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "0")
    with nats_running(NatsServer(tmp_path / "nats")) as one:
        monkeypatch.setenv("NATS_SERVER", one.url)
        yield one


@pytest.fixture
async def worker(server: NatsServer) -> AsyncIterator[DistributedRuntime]:
    async with caller() as one:
        yield one


@asynccontextmanager
async def gated(server: NatsServer) -> AsyncIterator[tuple[Gate, DistributedRuntime]]:
    """A caller whose way to NATS can be shut."""
    gate = Gate(server.port)
    await gate.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NATS_SERVER", gate.url.replace("http", "nats"))
        runtime = DistributedRuntime(discovery_backend="mem")
    yield gate, runtime
    await runtime.close()
    await gate.shut()


async def count(request: dict[str, Any]) -> AsyncIterator[int]:
    for i in range(request["n"]):
        yield i
        await asyncio.sleep(request.get("every_s", 0.005))


# --- who is reached how


async def test_the_record_says_where_the_worker_listens(worker: DistributedRuntime) -> None:
    served = await worker.endpoint(ENDPOINT).start_endpoint(count)
    client = await connect(worker)
    [instance] = client.instances()
    inbox = worker.server.host_port.removeprefix(NATS)
    assert inbox.startswith("dynamo.inbox.")
    assert instance.transport_by_kind == {"nats": f"{inbox}/{served.instance_id:x}/test/worker/generate"}


async def test_a_caller_of_the_tcp_plane_reaches_a_worker_of_the_nats_plane_and_the_other_way(
    worker: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.endpoint(ENDPOINT).start_endpoint(count)
    monkeypatch.setenv("DYN_REQUEST_PLANE", "tcp")
    async with caller() as other:
        assert [i async for i in await (await connect(other)).generate({"n": 3}, annotated=False)] == [0, 1, 2]
        await other.endpoint("test.tcp.generate").start_endpoint(count)
        client = await connect(worker, "test.tcp.generate")
        assert [i async for i in await client.generate({"n": 3}, annotated=False)] == [0, 1, 2]


async def test_an_inbox_where_nobody_is_cannot_be_connected_to_and_that_is_known_at_once(
    worker: DistributedRuntime,
) -> None:
    address = worker.endpoint(ENDPOINT).address
    record = (
        b'{"type":"Endpoint","namespace":"test","component":"worker","endpoint":"generate","instance_id":7,'
        b'"transport":{"nats":"dynamo.inbox.00/7/test/worker/generate"}}'
    )
    await worker.discovery.put(address.instance_key(7), record)
    client = await connect(worker)
    started = time.monotonic()
    sink = await push(client, None).finished()
    assert isinstance(sink.error, CannotConnect)
    assert "no process listens there" in str(sink.error)
    assert time.monotonic() - started < 1
    assert client.available_ids() == []


@pytest.mark.parametrize(
    "inbox", ["dynamo.inbox.*", "$SYS.REQ", "dynamo.inbox.a b", "dynamo.inbox.", "dynamo.events.a"]
)
def test_nobody_is_made_to_write_to_another_subject(inbox: str) -> None:
    record = (
        '{"type":"Endpoint","namespace":"n","component":"c","endpoint":"e","instance_id":7,'
        f'"transport":{{"nats":"{inbox}/7/n/c/e"}}}}'
    )
    with pytest.raises(ValueError, match="not a process's inbox"):
        parse_instance("v1/instances/n/c/e/7", record.encode(), lambda _: None)


async def test_without_a_server_the_worker_says_so(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.kill()
    monkeypatch.setenv("NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", "0.2")
    async with caller() as other:
        with pytest.raises(CannotConnect, match=r"cannot connect to NATS at nats://127\.0\.0\.1"):
            await other.endpoint(ENDPOINT).start_endpoint(count)


# --- sizes


async def test_frames_larger_than_the_server_takes_go_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def echo(request: bytes) -> AsyncIterator[bytes]:
        yield request

    monkeypatch.setenv("DYN_REQUEST_PLANE", "nats")
    with nats_running(NatsServer(tmp_path, "max_payload: 1024")) as small:
        monkeypatch.setenv("NATS_SERVER", small.url)
        async with caller() as one:
            await one.endpoint(ENDPOINT).start_endpoint(echo)
            large = bytes(range(256)) * 400
            assert [x async for x in await (await connect(one)).generate(large, annotated=False)] == [large]


async def test_a_caller_that_is_cut_off_makes_the_worker_wait_as_with_a_full_socket(
    server: NatsServer, worker: DistributedRuntime
) -> None:
    size = 64 << 10
    made: list[int] = []

    async def produce(request: None) -> AsyncIterator[bytes]:
        for i in range(500):
            made.append(i)
            yield i.to_bytes(4, "big") + bytes(size)

    await worker.endpoint(ENDPOINT).start_endpoint(produce)
    async with gated(server) as (gate, other):
        client = await connect(other)
        sink = push(client, None)
        await asyncio.wait_for(sink.first.wait(), SOON_S)
        await gate.shut()
        at_most = len(made) + (1 << 20) // size + 2
        before = -1
        while before != len(made):
            before = len(made)
            await asyncio.sleep(0.2)
        assert before <= at_most < 500, "a megabyte may be unread"
        await gate.open()
        await sink.finished()
        assert [int.from_bytes(item[:4], "big") for item in sink.items] == list(range(500))


async def test_requests_to_a_worker_that_does_not_read_are_refused_at_a_bound(
    server: NatsServer, worker: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.runtime.connection.MAX_UNSENT_BYTES", 1 << 20)
    held = Held()
    await worker.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(worker)
    push(client, None)
    await held.wait()
    server.kill()
    sinks = [push(client, bytes(300 << 10)) for _ in range(6)]
    assert isinstance((await sinks[-1].finished()).error, WorkerOverloaded)
    assert not sinks[0].done.is_set()


# --- NATS fails


async def test_a_restart_of_the_server_is_a_pause_and_no_item_is_missing(
    server: NatsServer, worker: DistributedRuntime
) -> None:
    await worker.endpoint(ENDPOINT).start_endpoint(count)
    async with caller() as other:
        client = await connect(other)
        sinks = [push(client, {"n": 300}) for _ in range(20)]
        for _ in range(3):
            await asyncio.sleep(0.2)
            server.restart()
            sinks.append(push(client, {"n": 100}))
        for sink in sinks:
            async with asyncio.timeout(20):
                await sink.done.wait()
        assert [sink.error for sink in sinks] == [None] * 23
        assert [sink.items for sink in sinks] == [list(range(300))] * 20 + [list(range(100))] * 3


async def test_a_request_to_a_worker_that_was_never_connected_waits_out_a_short_outage(
    server: NatsServer, worker: DistributedRuntime
) -> None:
    await worker.endpoint(ENDPOINT).start_endpoint(count)
    async with caller() as other:
        client = await connect(other)
        link = await other.nats()
        server.kill()
        await until(lambda: not link.up)
        sink = push(client, {"n": 5})
        await asyncio.sleep(0.3)
        assert not sink.done.is_set()
        server.start()
        assert (await sink.finished()).items == [0, 1, 2, 3, 4]


async def test_a_process_that_is_cut_off_for_a_moment_loses_nothing(
    server: NatsServer, worker: DistributedRuntime
) -> None:
    await worker.endpoint(ENDPOINT).start_endpoint(count)
    async with gated(server) as (gate, other):
        client = await connect(other)
        sinks = [push(client, {"n": 200}) for _ in range(10)]
        for _ in range(2):
            await asyncio.sleep(0.2)
            await gate.shut()
            await gate.open()
        for sink in sinks:
            assert (await sink.finished()).items == list(range(200))


async def test_an_outage_ends_requests_in_bounded_time_and_is_over_when_it_is_over(
    server: NatsServer, worker: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_PING_INTERVAL_SECS", "0.1")
    monkeypatch.setenv("DYN_TCP_CONNECT_TIMEOUT", "0.5")
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "0.2")
    await worker.endpoint(ENDPOINT).start_endpoint(count)
    async with caller() as other:
        client = await connect(other)
        sink = push(client, {"n": 10**6})
        await asyncio.wait_for(sink.first.wait(), SOON_S)
        server.kill()
        started = time.monotonic()
        await sink.finished()
        assert isinstance(sink.error, Disconnected)
        assert sink.error.migratable
        assert time.monotonic() - started < 2, "three pings were missed"
        await until(lambda: client.available_ids() == [])
        server.start()
        await until(lambda: client.available_ids() != [], timeout_s=10)
        assert (await push(client, {"n": 3}).finished()).items == [0, 1, 2]


# --- a process fails


@pytest.fixture
async def here(server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runtime whose discovery other processes share, and their directory."""
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "kv"))
    runtime = DistributedRuntime(discovery_backend="file")
    yield runtime, tmp_path / "kv"
    await runtime.close()


async def test_a_killed_worker_is_noticed_within_seconds(here: tuple[DistributedRuntime, Path]) -> None:
    runtime, store = here
    with WorkerProcess(store, "serve") as process:
        await process.line()
        client = await connect(runtime)
        sink = push(client, {"n": 10**6, "every_s": 0.01})
        await asyncio.wait_for(sink.first.wait(), 10)
        process.process.kill()
        started = time.monotonic()
        await sink.finished()
        assert isinstance(sink.error, Disconnected)
        assert time.monotonic() - started < 4.5, "a ping within 2 s finds nobody, and for another second"
        assert client.available_ids() == []


async def test_a_killed_caller_frees_its_requests(here: tuple[DistributedRuntime, Path]) -> None:
    _, store = here
    with WorkerProcess(store, "serve") as process:
        await process.line()
        with WorkerProcess(store, "call") as other:
            assert await other.line() == "streaming"
            other.process.kill()
            started = time.monotonic()
            assert await process.line() == "killed of-the-caller"
            assert time.monotonic() - started < 3, "what is sent to it finds nobody, for a second"


async def test_a_stopped_worker_is_given_up_and_comes_back(
    here: tuple[DistributedRuntime, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_PING_INTERVAL_SECS", "0.1")
    monkeypatch.setenv("DYN_TCP_CONNECT_TIMEOUT", "0.3")
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "0.1")
    _, store = here
    async with caller("file") as runtime:
        with WorkerProcess(store, "serve") as process:
            await process.line()
            client = await connect(runtime)
            sink = push(client, {"n": 10**6})
            await asyncio.wait_for(sink.first.wait(), 10)
            process.process.send_signal(signal.SIGSTOP)
            assert isinstance((await sink.finished()).error, Disconnected)
            await until(lambda: client.available_ids() == [])
            process.process.send_signal(signal.SIGCONT)
            await until(lambda: client.available_ids() != [], timeout_s=10)
            assert (await push(client, {"n": 3}).finished()).items == [0, 1, 2]


async def test_sigterm_leaves_in_order(here: tuple[DistributedRuntime, Path]) -> None:
    runtime, store = here
    defaults = {
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "5", "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "30"
    }  # fmt: skip
    with WorkerProcess(store, "serve", **defaults) as process:
        await process.line()
        client = await connect(runtime)
        sink = push(client, {"n": 30, "every_s": 0.02})
        await asyncio.wait_for(sink.first.wait(), 10)
        started = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        await until(lambda: client.available_ids() == [])
        assert (await sink.finished()).items == list(range(30))
        assert await process.wait() == 0
        assert time.monotonic() - started < 4, "callers confirmed that they know, so the grace of 5 s was not needed"


# --- messages are lost, or are none


class LossyNet:
    """A NATS that loses the messages it is told to, by their place in the order of sending."""

    def __init__(self, lost: set[int]) -> None:
        self.links: dict[str, LossyLink] = {}
        self._queue: deque[tuple[str, bytes, str]] = deque()
        self._lost = lost
        self._sent = 0

    def send(self, subject: str, data: bytes, reply: str) -> None:
        if self._sent not in self._lost:
            self._queue.append((subject, data, reply))
        self._sent += 1

    def run(self) -> None:
        while self._queue:
            subject, data, reply = self._queue.popleft()
            link = self.links[subject.rpartition(".")[0]]
            handler = link.routes.get(subject.rpartition(".")[2]) or link.on_stranger
            handler(Heard(subject, reply, data))


class Heard:
    headers = None

    def __init__(self, subject: str, reply: str, data: bytes) -> None:
        self.subject, self.reply, self.data = subject, reply, data


class LossyLink:
    """One process's end of it."""

    max_payload = HEAD.size + 10
    up_since = 0.0

    def __init__(self, net: LossyNet, token: str) -> None:
        self.inbox = f"dynamo.inbox.{token}"
        self.routes: dict[str, Any] = {}
        self.on_up: list[Any] = []
        self.on_stranger: Any = None
        self._net = net
        net.links[self.inbox] = self

    def publish(self, subject: str, data: bytes, reply: str = "", headers: None = None) -> bool:
        self._net.send(subject, data, reply)
        return True


class Keeper(asyncio.Protocol):
    """Keeps what it reads."""

    def __init__(self) -> None:
        self.read = bytearray()
        self.transport: Any = None
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.read += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True


@given(
    lost=st.sets(st.integers(1, 60), max_size=25),
    writes=st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=60)), min_size=1, max_size=20),
)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_in_order_whatever_is_lost(lost: set[int], writes: list[tuple[bool, bytes]]) -> None:
    async def scenario() -> None:
        net = LossyNet(lost)
        near, far = (Exchange(LossyLink(net, token)) for token in ("aa", "bb"))  # type: ignore[arg-type]
        ends = Keeper(), Keeper()
        far.listen(lambda: ends[1])
        dialling = asyncio.ensure_future(near.dial("dynamo.inbox.bb", ends[0]))
        await asyncio.sleep(0)
        ends[0].transport.write(b"hello")  # the first message, which is not among the lost ones
        net.run()
        ends[1].transport.write(b"hello")
        net.run()
        sent = bytearray(b"hello"), bytearray(b"hello")
        for from_far, data in writes:
            ends[from_far].transport.write(data)
            sent[from_far].extend(data)
            net.run()
        for _ in range(70):  # pings: each may be lost, and after a quarter of a second what is missing is asked for
            for end, mine in zip(ends, sent, strict=True):
                end.transport._asked = (-1, 0.0)
                end.transport.write(b".")
                mine.extend(b".")
                net.run()
        assert (ends[1].read, ends[0].read) == sent
        await dialling
        assert ends[0].transport.get_write_buffer_size() <= 60, "what was read is kept no longer"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"hello, world, this is not yours",
        HEAD.pack(DATA, 1, 0),
        HEAD.pack(DATA, 0, 7) + b"DYN1\x01",
        HEAD.pack(DATA, 0, 0) + b"GET / HTTP/1.1\r\n",
        HEAD.pack(RESET, 0, 0),
        HEAD.pack(99, 0, 0),
    ],
    ids=lambda data: repr(data[:24]),
)
async def test_a_strangers_message_harms_nobody(worker: DistributedRuntime, data: bytes) -> None:
    await worker.endpoint(ENDPOINT).start_endpoint(count)
    link = await worker.nats()
    link.publish(f"{link.inbox}.stranger", data, "test.stranger")
    client = await connect(worker)
    assert [i async for i in await client.generate({"n": 2}, annotated=False)] == [0, 1]
    await until(lambda: len(worker.server.connections) == 1)


async def test_a_connection_that_the_other_side_does_not_know_any_more_is_over(worker: DistributedRuntime) -> None:
    held = Held()
    await worker.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(worker)
    sink = push(client, None)
    await held.wait()
    exchange = await worker.nats_exchange()
    for name in [name for name in exchange.link.routes if "-" in name]:
        exchange.forget(name)  # as if the worker had given it up while it was cut off
    await sink.finished()
    assert isinstance(sink.error, Disconnected)
