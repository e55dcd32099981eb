"""Events by way of NATS: what is kept for who was away, what is missing, and what is no event."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import CannotConnect
from dynamo.runtime.event_channel import HEAD
from dynamo.runtime.events import (
    Event,
    EventPublisher,
    EventScope,
    EventSubscriber,
    Irregularity,
    Listeners,
    create_publisher,
    create_subscriber,
)
from dynamo.runtime.nats.channel import PART, Assembler, in_parts, pattern_of, subject_of
from tests.runtime.nats_server import NatsServer, nats_running
from tests.runtime.plane_helpers import SOON_S, until
from tests.runtime.test_events import counted, heard, take

SCOPE = "ns.backend.generate"
KEPT, LIVE = "kv-events", "kv_metrics"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server that may be hurt; runtimes made here use it."""
    monkeypatch.setenv("DYN_EVENT_PLANE", "nats")
    with nats_running(NatsServer(tmp_path / "nats")) as one:
        monkeypatch.setenv("NATS_SERVER", one.url)
        yield one


@pytest.fixture
async def drt(server: NatsServer) -> AsyncIterator[DistributedRuntime]:
    runtime = DistributedRuntime(discovery_backend="mem")
    yield runtime
    await runtime.close()


class Ear:
    """Hears all that a subscriber says, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.irregularities: list[Irregularity] = []
        self.listeners = Listeners(on_event=self._hear, on_irregularity=self.irregularities.append)

    def _hear(self, event: Event) -> None:
        self.events.append(event.decode())


async def ear(drt: DistributedRuntime, topic: str) -> tuple[Ear, EventSubscriber]:
    one = Ear()
    return one, await create_subscriber(drt, SCOPE, topic, one.listeners)


# --- durable topics


async def test_who_starts_late_hears_what_was_said_before(drt: DistributedRuntime) -> None:
    publisher = await create_publisher(drt, SCOPE, KEPT)
    for i in range(1000):
        publisher.publish(i)
    subscriber = await create_subscriber(drt, SCOPE, KEPT)
    publisher.publish("live")
    events = await take(subscriber, 1001)
    assert [e.decode() for e in events] == [*range(1000), "live"]
    await subscriber.close()
    await publisher.close()


async def test_who_starts_very_late_hears_the_last_and_is_told_that_there_was_more(
    drt: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.runtime.nats.durable.REPLAYED_EVENTS", 10)
    publisher = await create_publisher(drt, SCOPE, KEPT, publisher_id=7)
    for i in range(25):
        publisher.publish(i)
    await confirmed(publisher)
    one, subscriber = await ear(drt, KEPT)
    await until(lambda: one.events == list(range(15, 25)))
    assert one.irregularities == [Irregularity(7, "late", 0, 15)]
    await subscriber.close()
    await publisher.close()


async def confirmed(publisher: EventPublisher) -> None:
    """The server has all that was published."""
    await until(lambda: not publisher._kept)  # type: ignore[attr-defined]


async def test_nothing_of_a_durable_topic_is_lost_by_restarts_of_the_server(
    server: NatsServer, drt: DistributedRuntime
) -> None:
    publisher = await create_publisher(drt, SCOPE, KEPT)
    one, subscriber = await ear(drt, KEPT)
    said = 0
    for _ in range(3):
        for _ in range(100):
            publisher.publish(said)
            said += 1
            await asyncio.sleep(0.001)
        server.kill()
        for _ in range(50):  # while there is no server
            publisher.publish(said)
            said += 1
        server.start()
    await until(lambda: len(one.events) >= said, timeout_s=15)
    assert one.events == list(range(said))
    assert [i for i in one.irregularities if i.kind != "duplicate"] == []
    await confirmed(publisher)
    await subscriber.close()
    await publisher.close()


async def test_who_leaves_at_any_moment_of_starting_is_gone(drt: DistributedRuntime) -> None:
    for i in range(40):
        subscriber = await create_subscriber(drt, SCOPE, KEPT)
        await asyncio.sleep(0.0005 * (i % 20))  # in the middle of whatever it says to the server then
        async with asyncio.timeout(SOON_S):
            await subscriber.close()


async def test_a_server_that_has_lost_its_streams_gets_them_again(
    server: NatsServer, drt: DistributedRuntime, tmp_path: Path
) -> None:
    publisher = await create_publisher(drt, SCOPE, KEPT)
    one, subscriber = await ear(drt, KEPT)
    publisher.publish("before")
    await until(lambda: one.events == ["before"])
    server.kill()
    shutil.rmtree(tmp_path / "nats" / "store")
    publisher.publish("meanwhile")
    server.start()
    await until(lambda: one.events == ["before", "meanwhile"], timeout_s=10)
    publisher.publish("after")
    await until(lambda: one.events == ["before", "meanwhile", "after"])
    assert one.irregularities == []
    await subscriber.close()
    await publisher.close()


async def test_a_consumer_that_the_server_has_lost_is_made_again(
    drt: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.runtime.nats.durable.HEARTBEAT_S", 0.2)
    monkeypatch.setattr("dynamo.runtime.nats.durable.SILENCE_S", 0.5)
    publisher = await create_publisher(drt, SCOPE, KEPT)
    one, subscriber = await ear(drt, KEPT)
    publisher.publish(0)
    await until(lambda: one.events == [0])
    js = (await drt.nats()).jetstream()
    [consumer] = await js.consumers_info("dynamo-ns-kv-events")
    await js.delete_consumer("dynamo-ns-kv-events", consumer.name)
    publisher.publish(1)
    await until(lambda: one.events == [0, 1])
    assert one.irregularities == []
    await subscriber.close()
    await publisher.close()


async def test_events_of_publishers_that_are_gone_are_kept_and_not_believed(drt: DistributedRuntime) -> None:
    gone = await create_publisher(drt, SCOPE, KEPT)
    gone.publish("of the dead")
    await gone.close()
    lives = await create_publisher(drt, SCOPE, KEPT)
    subscriber = await create_subscriber(drt, SCOPE, KEPT)
    lives.publish("of the living")
    assert [e.decode() for e in await take(subscriber, 1)] == ["of the living"]
    await subscriber.close()
    await lives.close()


async def test_events_that_come_before_their_publisher_is_in_discovery_wait_for_it(drt: DistributedRuntime) -> None:
    one, subscriber = await ear(drt, KEPT)
    publisher = await create_publisher(drt, SCOPE, KEPT)
    key = EventScope("ns", "backend", "generate").channel_key(KEPT, publisher.publisher_id)
    record = (await drt.discovery.get_prefix(key))[key]
    await drt.discovery.delete(key)
    await until(lambda: not subscriber.publishers)
    publisher.publish("early")
    await confirmed(publisher)
    assert one.events == []
    await drt.discovery.put(key, record)
    await until(lambda: one.events == ["early"])
    await subscriber.close()
    await publisher.close()


async def test_a_stream_that_an_operator_made_otherwise_is_left_as_it_is(drt: DistributedRuntime) -> None:
    from nats.js.api import StorageType, StreamConfig

    js = (await drt.nats()).jetstream()
    await js.add_stream(
        StreamConfig(
            name="dynamo-ns-kv-events",
            subjects=["dynamo.events.ns.*.*.kv-events.*"],
            storage=StorageType.MEMORY,
            max_msgs=5,
        )
    )
    publisher = await create_publisher(drt, SCOPE, KEPT)
    for i in range(10):
        publisher.publish(i)
    await confirmed(publisher)
    info = await js.stream_info("dynamo-ns-kv-events")
    assert (info.config.storage, info.state.messages) == (StorageType.MEMORY, 5)
    await publisher.close()


async def test_few_permissions_are_enough_for_events_and_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    may = '{ publish: ["dynamo.>", "$JS.API.>", "$JS.FC.>"], subscribe: ["dynamo.>"] }'
    users = f'authorization {{ users = [ {{ user: "u", password: "p", permissions: {may} }} ] }}'
    monkeypatch.setenv("DYN_EVENT_PLANE", "nats")
    monkeypatch.setenv("DYN_REQUEST_PLANE", "nats")
    with nats_running(NatsServer(tmp_path, users)) as strict:
        monkeypatch.setenv("NATS_SERVER", f"nats://u:p@127.0.0.1:{strict.port}")
        drt = DistributedRuntime(discovery_backend="mem")
        one, subscriber = await ear(drt, KEPT)
        publisher = await create_publisher(drt, SCOPE, KEPT)
        for i in range(3000):  # enough for the server to ask whether we keep up
            publisher.publish(i)
        await until(lambda: one.events == list(range(3000)))
        await confirmed(publisher)

        async def echo(request: int) -> AsyncIterator[int]:
            yield request

        await drt.endpoint(SCOPE).start_endpoint(echo)
        client = await drt.endpoint(SCOPE).client()
        await client.wait_for_instances(SOON_S)
        assert [x async for x in await client.generate(7, annotated=False)] == [7]
        await subscriber.close()
        await publisher.close()
        await drt.close()
    assert "refused" not in caplog.text


@pytest.mark.parametrize(("wanted", "fine"), [("auto", True), ("false", True), ("true", False)])
async def test_without_jetstream_events_are_not_kept_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: str, fine: bool
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE", "nats")
    monkeypatch.setenv("DYN_NATS_JETSTREAM", wanted)
    with nats_running(NatsServer(tmp_path, jetstream=False)) as plain:
        monkeypatch.setenv("NATS_SERVER", plain.url)
        drt = DistributedRuntime(discovery_backend="mem")
        if fine:
            subscriber = await create_subscriber(drt, SCOPE, KEPT)
            publisher = await create_publisher(drt, SCOPE, KEPT)
            await heard(publisher, subscriber)
            assert ("no JetStream: start it with -js" in caplog.text) is (wanted == "auto")
            await subscriber.close()
            await publisher.close()
        else:
            with pytest.raises(CannotConnect, match=r"DYN_NATS_JETSTREAM is set, but .*has no JetStream"):
                await create_publisher(drt, SCOPE, KEPT)
        await drt.close()


async def test_a_wrong_word_for_jetstream_is_named(drt: DistributedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_NATS_JETSTREAM", "perhaps")
    with pytest.raises(ValueError, match="DYN_NATS_JETSTREAM: 'perhaps' is not one of auto, true, false"):
        await create_publisher(drt, SCOPE, KEPT)


# --- topics that are not kept


async def test_what_is_said_while_the_server_is_away_leaves_when_it_is_back_and_a_gap_is_told(
    server: NatsServer, drt: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE_HWM", "5")
    one, subscriber = await ear(drt, LIVE)
    publisher = await create_publisher(drt, SCOPE, LIVE, publisher_id=7)
    publisher.publish("first")
    await until(lambda: one.events == ["first"])
    server.kill()
    link = await drt.nats()
    await until(lambda: not link.up)
    assert subscriber.publishers == {7: False}
    for i in range(1, 11):
        publisher.publish(i)
    server.start()
    await until(lambda: one.events == ["first", 6, 7, 8, 9, 10])
    assert one.irregularities == [Irregularity(7, "gap", 1, 6)]
    assert counted(drt, "event_plane_overflows_total") == 5
    assert counted(drt, "event_plane_missed_total") == 5
    assert subscriber.publishers == {7: True}
    publisher.publish("on")
    await until(lambda: one.events[-1] == "on")
    await subscriber.close()
    await publisher.close()


async def test_a_reader_that_does_not_read_misses_events_and_is_told(
    drt: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE_HWM", "20")
    irregularities: list[Irregularity] = []
    subscriber = await create_subscriber(drt, SCOPE, LIVE, Listeners(on_irregularity=irregularities.append))
    monkeypatch.delenv("DYN_EVENT_PLANE_HWM")
    publisher = await create_publisher(drt, SCOPE, LIVE, publisher_id=7)
    one, witness = await ear(drt, LIVE)
    for i in range(50):
        publisher.publish(i)
    await until(lambda: len(one.events) == 50)
    assert [e.decode() for e in await take(subscriber, 20)] == list(range(20))
    publisher.publish(50)
    assert [e.decode() for e in await take(subscriber, 1)] == [50]
    assert irregularities == [Irregularity(7, "gap", 20, 50)]
    for subscriber_ in (subscriber, witness):
        await subscriber_.close()
    await publisher.close()


# --- subjects, sizes, and what is no event


@pytest.mark.parametrize("topic", [KEPT, LIVE])
async def test_an_event_larger_than_the_server_takes_goes_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topic: str
) -> None:
    monkeypatch.setenv("DYN_EVENT_PLANE", "nats")
    with nats_running(NatsServer(tmp_path, "max_payload: 2048")) as small:
        monkeypatch.setenv("NATS_SERVER", small.url)
        drt = DistributedRuntime(discovery_backend="mem")
        one, subscriber = await ear(drt, topic)
        publisher = await create_publisher(drt, SCOPE, topic)
        large = bytes(range(256)) * 100
        for payload in ("small", large, "small"):
            publisher.publish(payload)
        await until(lambda: one.events == ["small", large, "small"])
        assert one.irregularities == []
        await subscriber.close()
        await publisher.close()
        await drt.close()


@given(st.binary(max_size=3000).map(lambda body: HEAD.pack(1, len(body)) + body), st.integers(50, 3000))
def test_parts_make_the_whole_again(frame: bytes, limit: int) -> None:
    parts, assembler = in_parts(frame, limit), Assembler()
    assert all(len(part) <= limit for part in parts)
    assert [assembler.add(part) for part in parts] == [None] * (len(parts) - 1) + [frame]


def test_a_frame_with_a_part_missing_is_dropped_and_the_next_is_not() -> None:
    parts, assembler = in_parts(bytes([1]) * 100, 50), Assembler()
    assert [assembler.add(part) for part in (parts[0], parts[2], b"\x01whole")] == [None, None, b"\x01whole"]
    assert [assembler.add(part) for part in parts][-1] == bytes([1]) * 100


@pytest.mark.parametrize("name", ["*", ">", "a*", "ä", "a>b", "$SYS"])
async def test_names_that_mean_something_to_nats_mean_nothing(drt: DistributedRuntime, name: str) -> None:
    one, subscriber = await ear_in(drt, f"{name}.c.e")
    other, elsewhere = await ear_in(drt, "x.c.e")
    publisher = await create_publisher(drt, f"{name}.c.e", KEPT)
    publisher.publish("here")
    await until(lambda: one.events == ["here"])
    assert other.events == []
    for closing in (subscriber, elsewhere, publisher):
        await closing.close()


async def ear_in(drt: DistributedRuntime, scope: str) -> tuple[Ear, EventSubscriber]:
    one = Ear()
    return one, await create_subscriber(drt, scope, KEPT, one.listeners)


def test_subjects_have_one_form_for_all_scopes() -> None:
    assert subject_of(EventScope("n", "c", "e"), KEPT, 255) == "dynamo.events.n.c.e.kv-events.ff"
    assert subject_of(EventScope("n"), KEPT, 255) == "dynamo.events.n.%.%.kv-events.ff"
    assert pattern_of(EventScope("n", "c"), KEPT) == "dynamo.events.n.c.*.kv-events.*"
    assert pattern_of(EventScope("n", "*"), KEPT) == "dynamo.events.n.%2A.*.kv-events.*"


async def test_the_record_in_discovery(drt: DistributedRuntime) -> None:
    publisher = await create_publisher(drt, SCOPE, KEPT, publisher_id=255)
    ((key, value),) = (await drt.discovery.get_prefix("v1/event_channels/")).items()
    assert key == "v1/event_channels/namespace/ns/component/backend/endpoint/generate/topic/kv-events/ff"
    assert msgspec.json.decode(value)["transport"] == {
        "kind": "Nats",
        "config": {"subject": "dynamo.events.ns.backend.generate.kv-events.ff"},
    }
    await publisher.close()
    assert await drt.discovery.get_prefix("v1/event_channels/") == {}


@pytest.mark.parametrize(
    "record",
    [
        b"not json",
        b'{"type":"EventChannel","scope":{},"topic":"kv_metrics","instance_id":9,"transport":{"kind":"Nats"}}',
        b'{"type":"EventChannel","scope":{},"topic":"kv_metrics","instance_id":7,"transport":{"kind":"Zmq"}}',
    ],
    ids=["no JSON", "another id", "another plane"],
)
async def test_a_wrong_record_is_ignored(drt: DistributedRuntime, record: bytes) -> None:
    await drt.discovery.put(EventScope("ns", "backend", "generate").channel_key(LIVE, 7), record)
    one, subscriber = await ear(drt, LIVE)
    publisher = await create_publisher(drt, SCOPE, LIVE)
    publisher.publish(1)
    await until(lambda: one.events == [1])
    assert list(subscriber.publishers) == [publisher.publisher_id]
    await subscriber.close()
    await publisher.close()


def frame(**envelope: Any) -> bytes:
    fields = {"publisher_id": 7, "sequence": 0, "published_at": 1, "topic": LIVE, "payload": b"\xc0"}
    body = msgspec.msgpack.encode({**fields, **envelope})
    return HEAD.pack(1, len(body)) + body


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x01",
        b"\x03" + frame()[1:],
        frame()[:-1],
        frame(publisher_id=8),
        frame(topic=KEPT),
        frame(sequence=-1),
        PART.pack(2, 0, 1)[:3],
        PART.pack(2, 0, 1) + b"\x01",
    ],
)
async def test_a_message_that_is_no_event_is_counted_and_ignored(drt: DistributedRuntime, message: bytes) -> None:
    scope = EventScope("ns", "backend", "generate")
    one, subscriber = await ear(drt, LIVE)
    publisher = await create_publisher(drt, SCOPE, LIVE, publisher_id=7)
    (await drt.nats()).publish(subject_of(scope, LIVE, 7), message)
    publisher.publish("fine")
    await until(lambda: one.events == ["fine"])
    assert counted(drt, "event_plane_rejected_total") == 1
    await subscriber.close()
    await publisher.close()


async def test_closing_waits_for_the_last_words(drt: DistributedRuntime) -> None:
    publisher = await create_publisher(drt, SCOPE, KEPT)
    publisher.publish("last")
    await asyncio.wait_for(publisher.close(), SOON_S)
    info = await (await drt.nats()).jetstream().stream_info("dynamo-ns-kv-events")
    assert info.state.messages == 1
