"""Events over real sockets: what arrives, from whom, and what is said of what does not."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import CannotConnect, InvalidArgument
from dynamo.runtime.events import (
    Event,
    EventPublisher,
    EventScope,
    EventSubscriber,
    Irregularity,
    Listeners,
    SequenceCheck,
    choose_event_plane,
    create_publisher,
    create_subscriber,
    scope_of,
)

SCOPE = "ns.backend.generate"
TOPIC = "kv-events"

# --- helpers


async def take(subscriber: EventSubscriber, count: int) -> list[Event]:
    """The next `count` events, within 10 s."""
    async with asyncio.timeout(10):
        return [await anext(subscriber) for _ in range(count)]


async def heard(publisher: EventPublisher, subscriber: EventSubscriber) -> None:
    """Return once what `publisher` says arrives at `subscriber`; all that was said before has been read."""
    await subscriber.wait_connected()
    async with asyncio.timeout(10):
        reading = asyncio.ensure_future(anext(subscriber))
        while not reading.done():
            last = publisher.publish("are you there?")
            await asyncio.wait([reading], timeout=0.02)
        event = await reading
        while (event.publisher_id, event.sequence) != (publisher.publisher_id, last):
            event = await anext(subscriber)


@contextlib.asynccontextmanager
async def pair(
    runtime: DistributedRuntime, topic: str = TOPIC, scope: str = SCOPE
) -> AsyncIterator[tuple[EventPublisher, EventSubscriber]]:
    publisher = await create_publisher(runtime, scope, topic)
    subscriber = await create_subscriber(runtime, scope, topic)
    await heard(publisher, subscriber)
    yield publisher, subscriber
    await subscriber.close()
    await publisher.close()


def counted(runtime: DistributedRuntime, name: str) -> float:
    """The sum of a counter's series."""
    lines = runtime.metrics.render().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"dynamo_component_{name}{{"))


# --- saying and hearing


async def test_events_arrive_in_order_with_payload_and_time(runtime: DistributedRuntime) -> None:
    async with pair(runtime) as (publisher, subscriber):
        numbers = [publisher.publish({"block": i}) for i in range(100)]
        events = await take(subscriber, 100)
    assert [e.sequence for e in events] == numbers == list(range(numbers[0], numbers[0] + 100))
    assert [e.decode() for e in events] == [{"block": i} for i in range(100)]
    assert {e.publisher_id for e in events} == {publisher.publisher_id}
    assert {e.topic for e in events} == {TOPIC}
    assert events[0].published_at > 1_700_000_000_000


async def test_a_subscriber_hears_every_publisher_of_its_scope(runtime: DistributedRuntime) -> None:
    subscriber = await create_subscriber(runtime, "ns", TOPIC)
    publishers = [await create_publisher(runtime, f"ns.c{i}.e", TOPIC) for i in range(5)]
    await subscriber.wait_connected(5)
    for publisher in publishers:
        await heard(publisher, subscriber)
    for i, publisher in enumerate(publishers):
        publisher.publish(i)
    assert sorted(e.decode() for e in await take(subscriber, 5)) == [0, 1, 2, 3, 4]
    for publisher in publishers:
        await publisher.close()
    await subscriber.close()


async def test_topics_do_not_mix_even_if_one_begins_like_the_other(runtime: DistributedRuntime) -> None:
    async with pair(runtime, "kv") as (short, on_short), pair(runtime, "kv_metrics") as (long, on_long):
        long.publish("long")
        short.publish("short")
        assert [e.decode() for e in await take(on_short, 1)] == ["short"]
        assert [e.decode() for e in await take(on_long, 1)] == ["long"]


async def test_another_endpoints_events_are_not_heard(runtime: DistributedRuntime) -> None:
    other = await create_publisher(runtime, "ns.backend.generate2", TOPIC)
    async with pair(runtime) as (publisher, subscriber):
        assert list(subscriber.publishers) == [publisher.publisher_id]
    await other.close()


async def test_events_go_straight_to_a_listener(runtime: DistributedRuntime) -> None:
    events: list[Event] = []
    done = asyncio.Event()

    def listen(event: Event) -> None:
        events.append(event)
        if event.decode() == "last":
            done.set()
        raise RuntimeError("a listener that fails does not stop the others' events")

    subscriber = await create_subscriber(runtime, SCOPE, TOPIC, Listeners(on_event=listen))
    publisher = await create_publisher(runtime, SCOPE, TOPIC)
    await subscriber.wait_connected()
    async with asyncio.timeout(10):
        while not events:
            publisher.publish("first")
            await asyncio.sleep(0.02)  # no event tells a publisher that it is heard
        publisher.publish("last")
        await done.wait()
    await subscriber.close()
    await publisher.close()


async def test_publishers_that_come_and_go_are_followed(runtime: DistributedRuntime) -> None:
    joined: asyncio.Queue[int] = asyncio.Queue()
    left: asyncio.Queue[int] = asyncio.Queue()
    listeners = Listeners(on_join=joined.put_nowait, on_leave=left.put_nowait)
    subscriber = await create_subscriber(runtime, SCOPE, TOPIC, listeners)
    publisher = await create_publisher(runtime, SCOPE, TOPIC)
    async with asyncio.timeout(10):
        assert await joined.get() == publisher.publisher_id
        await subscriber.wait_connected()
        assert subscriber.publishers == {publisher.publisher_id: True}
        await publisher.close()
        assert await left.get() == publisher.publisher_id
    assert subscriber.publishers == {}
    await subscriber.close()


async def test_iteration_ends_when_the_subscriber_is_closed(runtime: DistributedRuntime) -> None:
    subscriber = await create_subscriber(runtime, SCOPE, TOPIC)
    reading = asyncio.ensure_future(anext(subscriber))
    await asyncio.sleep(0)
    await subscriber.close()
    await subscriber.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(reading, 10)


async def test_a_slow_iterator_holds_a_bounded_number_and_misses_nothing_the_queues_can_hold(
    runtime: DistributedRuntime,
) -> None:
    async with pair(runtime) as (publisher, subscriber):
        first = publisher.publish(0)
        for i in range(1, 5000):
            publisher.publish(i)
            if i % 100 == 0:
                await asyncio.sleep(0)
        events = await take(subscriber, 5000)
    assert [e.sequence for e in events] == list(range(first, first + 5000))


def test_it_works_on_uvloop() -> None:
    async def main() -> list[Any]:
        runtime = DistributedRuntime(discovery_backend="mem")
        async with pair(runtime) as (publisher, subscriber):
            for i in range(1000):
                publisher.publish(i)
            values = [e.decode() for e in await take(subscriber, 1000)]
        await runtime.close()
        return values

    assert uvloop.run(main()) == list(range(1000))


# --- the wire and the record


async def test_an_event_is_four_frames(runtime: DistributedRuntime) -> None:
    publisher = await create_publisher(runtime, SCOPE, TOPIC, publisher_id=0x1A2B)
    (record,) = (await runtime.discovery.get_prefix("v1/event_channels/")).values()
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.subscribe(b"")
    socket.connect(msgspec.json.decode(record)["transport"]["config"]["endpoint"])
    while not socket.poll(20):
        publisher.publish({"x": 1})
    topic, publisher_id, sequence, frame = socket.recv_multipart()
    assert topic == b"kv-events"
    assert publisher_id == b"\0\0\0\0\0\0\x1a\x2b"
    assert frame[0] == 1
    assert int.from_bytes(frame[1:5], "big") == len(frame) - 5
    envelope = msgspec.msgpack.decode(frame[5:])
    assert list(envelope) == ["publisher_id", "sequence", "published_at", "topic", "payload"]
    assert envelope["publisher_id"] == 0x1A2B
    assert envelope["sequence"] == int.from_bytes(sequence, "big")
    assert msgspec.msgpack.decode(envelope["payload"]) == {"x": 1}
    socket.close(0)
    await publisher.close()


async def test_the_first_event_has_number_zero(runtime: DistributedRuntime) -> None:
    publisher = await create_publisher(runtime, SCOPE, TOPIC)
    assert [publisher.publish(None), publisher.publish(None)] == [0, 1]
    await publisher.close()


@pytest.mark.parametrize(
    ("scope", "path", "record"),
    [
        (
            "ns.c.e",
            "namespace/ns/component/c/endpoint/e",
            {"kind": "endpoint", "endpoint": {"namespace": "ns", "component": "c", "name": "e"}},
        ),
        ("ns.c", "namespace/ns/component/c", {"kind": "component", "component": {"namespace": "ns", "name": "c"}}),
        ("ns", "namespace/ns", {"kind": "namespace", "namespace": {"name": "ns"}}),
    ],
)
async def test_the_record_in_discovery(
    runtime: DistributedRuntime, scope: str, path: str, record: dict[str, Any]
) -> None:
    publisher = await create_publisher(runtime, scope, TOPIC, publisher_id=255)
    ((key, value),) = (await runtime.discovery.get_prefix("v1/event_channels/")).items()
    assert key == f"v1/event_channels/{path}/topic/kv-events/ff"
    written = msgspec.json.decode(value)
    endpoint = written["transport"]["config"].pop("endpoint")
    assert endpoint.startswith("tcp://127.0.0.1:")
    assert written == {
        "type": "EventChannel",
        "scope": record,
        "topic": "kv-events",
        "instance_id": 255,
        "transport": {"kind": "Zmq", "config": {}},
    }
    await publisher.close()
    assert await runtime.discovery.get_prefix("v1/event_channels/") == {}


async def test_scopes_can_be_named_by_the_runtimes_objects(runtime: DistributedRuntime) -> None:
    component = runtime.namespace("ns").component("c")
    assert scope_of(component.endpoint("e")) == scope_of("dyn://ns.c.e") == EventScope("ns", "c", "e")
    assert scope_of(component) == EventScope("ns", "c")
    assert scope_of(runtime.namespace("ns")) == EventScope("ns")
    with pytest.raises(ValueError, match=r"a\.b\.c\.d"):
        scope_of("a.b.c.d")


# --- a publisher that says what the test wants


class Forged:
    """A socket that poses as publisher 7 of the scope and topic, and knows when somebody listens."""

    def __init__(self, runtime: DistributedRuntime) -> None:
        self._runtime = runtime
        self._key = EventScope("ns", "backend", "generate").channel_key(TOPIC, 7)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.XPUB)
        self._port = self._socket.bind_to_random_port("tcp://127.0.0.1")

    async def register(self) -> None:
        record = {
            "type": "EventChannel",
            "scope": {},
            "topic": TOPIC,
            "instance_id": 7,
            "transport": {"kind": "Zmq", "config": {"endpoint": f"tcp://127.0.0.1:{self._port}"}},
        }
        await self._runtime.discovery.put(self._key, msgspec.json.encode(record))
        await asyncio.wait_for(self._socket.recv(), 10)  # the subscription

    async def say(self, frames: list[bytes]) -> None:
        await self._socket.send_multipart(frames)

    async def event(self, sequence: int, published_at: int = 1) -> None:
        await self.say(frames(sequence, sequence=sequence, published_at=published_at))

    def close(self) -> None:
        self._socket.close(0)


@pytest.fixture
async def forged(runtime: DistributedRuntime) -> AsyncIterator[Forged]:
    one = Forged(runtime)
    yield one
    one.close()


def frames(number: int = 0, *, publisher: int = 7, head: bytes | None = None, **envelope: Any) -> list[bytes]:
    """The four frames of an event; what is given makes them contradict each other."""
    fields = {"publisher_id": 7, "sequence": number, "published_at": 1, "topic": TOPIC, "payload": b"\xc0"}
    body = msgspec.msgpack.encode({**fields, **envelope})
    head = b"\x01" + len(body).to_bytes(4, "big") if head is None else head
    return [TOPIC.encode(), publisher.to_bytes(8, "big"), number.to_bytes(8, "big"), head + body]


async def listening(runtime: DistributedRuntime) -> tuple[EventSubscriber, asyncio.Queue[Event | Irregularity]]:
    """A subscriber, and all it says, in order."""
    said: asyncio.Queue[Event | Irregularity] = asyncio.Queue()
    listeners = Listeners(on_event=said.put_nowait, on_irregularity=said.put_nowait)
    return await create_subscriber(runtime, SCOPE, TOPIC, listeners), said


# --- messages that are none


@pytest.mark.parametrize(
    "message",
    [
        [TOPIC.encode()],
        [TOPIC.encode(), b"", b"", b""],
        [*frames(), b"more"],
        frames(head=b"\x02\0\0\0\x01"),
        frames(head=b"\x01\0\0\0\x01"),
        frames(sequence=5),
        frames(publisher=8),
        frames(publisher=8, publisher_id=8),  # well-formed, of a publisher that is not in discovery
        frames(payload="text"),
        frames(published_at="now"),
        frames(sequence=-1),
    ],
    ids=[
        "one frame", "empty frames", "five frames", "version", "length", "sequence", "publisher", "unknown publisher",
        "payload", "time", "negative",
    ],
)  # fmt: skip
async def test_a_message_that_is_no_event_is_counted_and_ignored(
    runtime: DistributedRuntime, forged: Forged, message: list[bytes]
) -> None:
    subscriber, said = await listening(runtime)
    await forged.register()
    await forged.say(message)
    for sequence in (0, 1):  # a message that is too short may take the next along
        await forged.event(sequence)
    async with asyncio.timeout(10):
        while not (isinstance(event := await said.get(), Event) and event.sequence == 1):
            pass
    assert counted(runtime, "event_plane_rejected_total") >= 1
    await subscriber.close()


@pytest.mark.parametrize(
    "record",
    [
        b"not json",
        b"{}",
        b'{"type":"EventChannel","scope":{},"topic":"kv-events","instance_id":7,"transport":{"kind":"Nats"}}',
        b'{"type":"EventChannel","scope":{},"topic":"kv-events","instance_id":7,'
        b'"transport":{"kind":"Zmq","config":{"endpoint":"ipc:///etc/passwd"}}}',
        b'{"type":"EventChannel","scope":{},"topic":"kv-events","instance_id":9,'
        b'"transport":{"kind":"Zmq","config":{"endpoint":"tcp://127.0.0.1:1"}}}',
    ],
    ids=["no JSON", "empty", "another plane", "no TCP", "another id"],
)
async def test_a_wrong_record_is_ignored(runtime: DistributedRuntime, record: bytes) -> None:
    await runtime.discovery.put(EventScope("ns", "backend", "generate").channel_key(TOPIC, 7), record)
    async with pair(runtime) as (publisher, subscriber):
        assert list(subscriber.publishers) == [publisher.publisher_id]


# --- what is missing


async def test_a_late_subscriber_is_told_what_was_before_it(runtime: DistributedRuntime, forged: Forged) -> None:
    subscriber, said = await listening(runtime)
    await forged.register()
    await forged.event(12)
    assert await asyncio.wait_for(said.get(), 10) == Irregularity(7, "late", 0, 12)
    assert isinstance(await asyncio.wait_for(said.get(), 10), Event)
    assert counted(runtime, "event_plane_missed_total") == 0  # nobody had asked for them yet
    await subscriber.close()


async def test_a_gap_is_told_before_the_event_that_showed_it(runtime: DistributedRuntime, forged: Forged) -> None:
    subscriber, said = await listening(runtime)
    await forged.register()
    await forged.event(0)
    await forged.event(5)
    await asyncio.wait_for(said.get(), 10)
    gap, event = [await asyncio.wait_for(said.get(), 10) for _ in range(2)]
    assert gap == Irregularity(7, "gap", 1, 5)
    assert gap.missed == 4
    assert isinstance(event, Event)
    assert counted(runtime, "event_plane_missed_total") == 4
    await subscriber.close()


async def test_a_duplicate_is_told_and_not_delivered(runtime: DistributedRuntime, forged: Forged) -> None:
    subscriber, said = await listening(runtime)
    await forged.register()
    for sequence in (0, 1, 2, 1, 3):
        await forged.event(sequence)
    heard_ = [await asyncio.wait_for(said.get(), 10) for _ in range(5)]
    assert heard_[3] == Irregularity(7, "duplicate", 3, 1)
    assert [e.sequence for e in heard_ if isinstance(e, Event)] == [0, 1, 2, 3]
    assert counted(runtime, "event_plane_duplicates_total") == 1
    await subscriber.close()


async def test_a_publisher_that_begins_anew_is_told(runtime: DistributedRuntime, forged: Forged) -> None:
    subscriber, said = await listening(runtime)
    await forged.register()
    for sequence in (0, 1, 2, 0, 1):
        await forged.event(sequence)
    heard_ = [await asyncio.wait_for(said.get(), 10) for _ in range(6)]
    assert heard_[3] == Irregularity(7, "restart", 0, 0)
    assert [e.sequence for e in heard_ if isinstance(e, Event)] == [0, 1, 2, 0, 1]
    await subscriber.close()


def event(sequence: int, at_ms: int) -> Event:
    return Event(7, sequence, at_ms, TOPIC, b"")


def test_a_restart_whose_first_events_were_missed_is_known_by_its_time() -> None:
    check = SequenceCheck()
    assert check.check(event(0, 1000)) is None
    assert check.check(event(1, 1001)) is None
    assert check.check(event(2, 1001)) is None
    assert check.check(event(1, 5000)) == Irregularity(7, "restart", 0, 1)
    assert check.check(event(2, 5000)) is None


@given(st.sets(st.integers(0, 60)))
def test_what_is_missed_and_what_is_heard_add_up(lost: set[int]) -> None:
    check = SequenceCheck()
    missed = heard_ = 0
    for sequence in range(62):
        if sequence in lost:
            continue
        irregularity = check.check(event(sequence, sequence))
        heard_ += 1
        missed += irregularity.missed if irregularity else 0
    assert heard_ + missed == 62


# --- what cannot be said


async def test_a_payload_that_cannot_be_encoded_is_refused_and_takes_no_number(runtime: DistributedRuntime) -> None:
    publisher = await create_publisher(runtime, SCOPE, TOPIC)
    with pytest.raises(InvalidArgument, match="kv-events"):
        publisher.publish(object())
    with pytest.raises(InvalidArgument, match="limit"):
        publisher.publish(b"x" * (32 << 20))
    assert publisher.publish(1) == 0
    await publisher.close()


async def test_another_thread_may_not_publish(runtime: DistributedRuntime) -> None:
    publisher = await create_publisher(runtime, SCOPE, TOPIC)
    with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
        await asyncio.to_thread(publisher.publish, 1)
    await publisher.close()


async def test_a_closed_publisher_says_so(runtime: DistributedRuntime) -> None:
    publisher = await create_publisher(runtime, SCOPE, TOPIC)
    await publisher.close()
    await publisher.close()
    with pytest.raises(RuntimeError, match="closed"):
        publisher.publish(1)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DYN_ZMQ_BROKER_ENABLED", "true"),
        ("DYN_ZMQ_BROKER_URL", "tcp://broker:5555"),
        ("DYN_EVENT_PLANE_HWM", "0"),
        ("DYN_EVENT_PLANE_HWM", "many"),
    ],
)
async def test_a_plane_or_variable_that_is_not_supported_is_named(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=variable):
        await create_publisher(runtime, SCOPE, TOPIC)


def test_a_plane_that_nobody_knows_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE", "kafka")
    with pytest.raises(ValueError, match=r"'kafka' is not one of zmq, nats \(DYN_EVENT_PLANE\)"):
        choose_event_plane()


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "lo"])
async def test_a_publisher_binds_and_advertises_the_host_it_is_told(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE_HOST", host)
    async with pair(runtime) as (publisher, subscriber):
        assert subscriber.publishers == {publisher.publisher_id: True}
    assert await runtime.discovery.get_prefix("v1/event_channels/") == {}


async def test_a_host_that_cannot_be_bound_is_named(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE_HOST", "192.0.2.77")
    with pytest.raises(CannotConnect, match="DYN_EVENT_PLANE_HOST"):
        await create_publisher(runtime, SCOPE, TOPIC)


# --- across processes

PUBLISHER = """
import asyncio, sys
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.events import create_publisher

async def main():
    runtime = DistributedRuntime(discovery_backend="file")
    publisher = await create_publisher(runtime, "ns.backend.generate", "kv-events", publisher_id=int(sys.argv[1]))
    size = int(sys.argv[2])
    while True:
        publisher.publish({"n": publisher.sequence, "fill": b"x" * size})
        await asyncio.sleep(0.005)

asyncio.run(main())
"""

SUBSCRIBER = """
import asyncio, sys
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.events import Listeners, create_subscriber

async def main():
    runtime = DistributedRuntime(discovery_backend="file")
    lost = asyncio.Event()
    def irregular(what):
        if what.kind == "gap":
            print("gap", what.missed, flush=True)
            lost.set()
    heard = asyncio.Event()
    listeners = Listeners(on_event=lambda _: heard.set(), on_irregularity=irregular)
    subscriber = await create_subscriber(runtime, "ns.backend.generate", "kv-events", listeners)
    await heard.wait()
    print("heard", flush=True)
    await lost.wait()

asyncio.run(main())
"""


@pytest.fixture
async def shared_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DistributedRuntime]:
    """A runtime whose discovery other processes share."""
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "kv"))
    runtime = DistributedRuntime(discovery_backend="file")
    yield runtime
    await runtime.close()


def start(code: str, *words: str, **variables: str) -> subprocess.Popen[str]:
    env = {**os.environ, **variables}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=env, stdout=subprocess.PIPE, text=True)


async def test_publishers_of_other_processes_are_heard_and_their_death_is_noticed(
    shared_runtime: DistributedRuntime,
) -> None:
    left: asyncio.Queue[int] = asyncio.Queue()
    subscriber = await create_subscriber(shared_runtime, SCOPE, TOPIC, Listeners(on_leave=left.put_nowait))
    one, two = start(PUBLISHER, "11", "10"), start(PUBLISHER, "12", "10")
    try:
        async with asyncio.timeout(60):
            ids: set[int] = set()
            while ids != {11, 12}:
                ids.add((await anext(subscriber)).publisher_id)
            one.kill()
            assert await left.get() == 11
            before = [await anext(subscriber) for _ in range(50)]
            assert before[-1].publisher_id == 12
            after = start(PUBLISHER, "13", "10")
            try:
                while (await anext(subscriber)).publisher_id != 13:
                    pass
            finally:
                after.kill()
                after.wait(10)
    finally:
        for process in (one, two):
            process.kill()
            process.wait(10)
    await subscriber.close()


async def test_a_stopped_subscriber_neither_blocks_its_publisher_nor_goes_without_notice(
    shared_runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE_HWM", "20")
    publisher = await create_publisher(shared_runtime, SCOPE, TOPIC)
    healthy = await create_subscriber(shared_runtime, SCOPE, TOPIC)
    await heard(publisher, healthy)
    stopped = start(SUBSCRIBER)
    assert stopped.stdout is not None
    try:
        saying = asyncio.ensure_future(asyncio.to_thread(stopped.stdout.readline))
        while not saying.done():
            publisher.publish("small")
            await asyncio.wait([saying], timeout=0.02)
        assert (await saying) == "heard\n"
        stopped.send_signal(signal.SIGSTOP)
        await heard(publisher, healthy)  # so that from here on it has read all that was said
        loop = asyncio.get_running_loop()
        longest_s = 0.0
        for _ in range(600):  # 600 * 64 KiB: far more than the sockets' buffers and the queue of 20 hold
            began = loop.time()
            publisher.publish(b"x" * 65536)
            longest_s = max(longest_s, loop.time() - began)
            await take(healthy, 1)
        assert longest_s < 5.0  # a call that waited for the stopped process would never return
        assert counted(shared_runtime, "event_plane_overflows_total") >= 1
        assert counted(shared_runtime, "event_plane_missed_total") == 0  # the healthy subscriber lost nothing
        stopped.send_signal(signal.SIGCONT)
        saying = asyncio.ensure_future(asyncio.to_thread(stopped.stdout.readline))
        async with asyncio.timeout(20):
            while not saying.done():
                publisher.publish("small")
                await asyncio.wait([saying], timeout=0.02)
        assert (await saying).startswith("gap ")
    finally:
        stopped.kill()
        stopped.wait(10)
    await healthy.close()
    await publisher.close()
