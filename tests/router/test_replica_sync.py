"""Two routers come to the same load, whatever messages are lost between them."""

import asyncio
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router.affinity import SessionAffinity
from dynamo.router.config import KvRouterConfig
from dynamo.router.replica_book import Digest, ReplicaBook, SequenceEvents
from dynamo.router.replica_sync import EVENTS_TOPIC, ReplicaSync
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import Decision, Overlap, RouteRequest, WorkerKey
from dynamo.runtime.events import create_publisher, create_subscriber

ENDPOINT = "dynamo.backend.generate"
DEADLINE_S = 10.0
WORKERS = [WorkerKey(1), WorkerKey(2), WorkerKey(2, 1)]
COLUMNS = ("prefill_tokens", "prefill_requests", "decode_blocks", "requests")


class Nothing:
    """An index in which nobody holds anything."""

    def find(self, sequence_hashes, now):
        return {}


class Router:
    """One router's book and its side of the exchange."""

    def __init__(self, router_id: int = 1, workers=WORKERS) -> None:
        self.scheduler = KvScheduler(16, KvRouterConfig(), Nothing())
        for worker in workers:
            self.scheduler.add_worker(worker)
        self.book = ReplicaBook(self.scheduler, router_id)
        self.sequence = -1

    def route(self, name: str, worker: WorkerKey, path: list[int], tokens: int, tell=None) -> None:
        decision = Decision(
            worker=worker, overlap=Overlap(), new_tokens=tokens, cost=0, hit_rate=0, policy="", reason="", candidates=1
        )
        request = RouteRequest(request_id=name, token_count=16 * len(path) + 5, sequence_hashes=path)
        self.scheduler.book(request, decision, 0.0)
        (tell or self.book).booked(self.scheduler.load.bookings[name], path)

    def first_token(self, name: str) -> None:
        booking = self.scheduler.load.bookings.get(name)
        if booking is not None and booking.prefilling:
            self.scheduler.prefill_done(name, 0.0)
            self.book.prefill_done(booking)

    def free(self, name: str) -> None:
        booking = self.scheduler.free(name)
        if booking is not None:
            self.book.freed(booking)

    def events(self) -> tuple[SequenceEvents, int] | None:
        """The next message, as another process would see it."""
        events = self.book.take_events()
        if events is None:
            return None
        self.sequence += 1
        return msgspec.msgpack.decode(msgspec.msgpack.encode(events), type=SequenceEvents), self.sequence

    def digest(self) -> Digest:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(self.book.digest(self.sequence)), type=Digest)

    def load(self) -> dict[WorkerKey, tuple[int, ...]]:
        load = self.scheduler.load
        return {worker: tuple(getattr(load, name)[i] for name in COLUMNS) for worker, i in load.position.items()}


def deliver(source: Router, target: Router) -> None:
    message = source.events()
    if message is not None:
        target.book.hear(*message, 0.0)


def digests(one: Router, two: Router) -> None:
    """One round: each says what it has open, and what the other asked for arrives."""
    for source, target in ((one, two), (two, one)):
        deliver(source, target)
        target.book.hear_digest(source.digest(), 0.0)
    deliver(one, two)
    deliver(two, one)


def test_what_one_router_books_counts_at_the_other():
    one, two = Router(1), Router(2)
    path = sequence_hashes([1, 2, 3])
    one.route("a", WORKERS[0], path, 40)
    two.route("b", WORKERS[0], path[:2], 20)
    deliver(one, two)
    deliver(two, one)
    assert one.load() == two.load()
    assert one.load()[WORKERS[0]] == (60, 2, 3 + 2, 2)  # the blocks of both prompts count once, their tails each
    one.first_token("a")
    deliver(one, two)
    assert two.load()[WORKERS[0]] == (20, 1, 5, 2)
    one.free("a")
    deliver(one, two)
    assert two.load()[WORKERS[0]] == (20, 1, 3, 1)


def test_the_same_request_id_at_two_routers_is_two_requests():
    one, two = Router(1), Router(2)
    one.route("a", WORKERS[0], [], 40)
    two.route("a", WORKERS[0], [], 20)
    deliver(one, two)
    deliver(two, one)
    one.free("a")
    deliver(one, two)
    assert two.load()[WORKERS[0]][0] == one.load()[WORKERS[0]][0] == 20


steps = st.lists(
    st.tuples(
        st.sampled_from(["route", "route", "first", "free", "leave", "join", "digest"]),
        st.booleans(),
        st.integers(0, 12),
        st.booleans(),
    ),
    max_size=50,
)


@given(steps)
@settings(max_examples=200, deadline=None)
def test_after_any_loss_three_digests_bring_agreement(steps):
    routers = one, two = Router(1), Router(2)
    for i, (what, which, number, lost) in enumerate(steps):
        here, there = (one, two) if which else (two, one)
        names = [name for name in here.scheduler.load.bookings if "/" not in name]
        worker = WORKERS[number % len(WORKERS)]
        if what == "route" and worker in here.scheduler.load.position:
            here.route(f"r{i}", worker, sequence_hashes([number % 3, number]), number)
        elif what == "first" and names:
            here.first_token(names[number % len(names)])
        elif what == "free" and names:
            here.free(names[number % len(names)])
        elif what == "leave":
            here.scheduler.remove_worker(worker)
        elif what == "join":
            here.scheduler.add_worker(worker)
            here.book.worker_joined(worker, 0.0)
        elif what == "digest":
            digest = here.digest()
            if not lost:
                there.book.hear_digest(digest, 0.0)
        message = here.events()
        if message is not None and not lost:
            there.book.hear(*message, 0.0)
    for router in routers:
        for worker in WORKERS:
            router.scheduler.add_worker(worker)
            router.book.worker_joined(worker, 0.0)
    for _ in range(3):
        digests(one, two)
    assert one.load() == two.load()
    for router in routers:
        for name in [name for name in router.scheduler.load.bookings if "/" not in name]:
            router.free(name)
    for _ in range(3):
        digests(one, two)
    for router in routers:
        assert router.scheduler.load.idle


def test_a_router_that_starts_late_is_told_everything():
    one, two = Router(1), Router(2)
    one.route("a", WORKERS[0], sequence_hashes([1]), 40)
    one.route("b", WORKERS[1], [], 10)
    one.first_token("b")
    one.events()
    digests(one, two)
    digests(one, two)
    assert two.load() == one.load()
    assert two.book.repaired == 2
    assert two.book.open_elsewhere() == {1: 2}


def test_what_is_on_its_way_is_not_asked_for():
    one, two = Router(1), Router(2)
    one.route("a", WORKERS[0], [], 40)
    deliver(one, two)
    one.route("b", WORKERS[0], [], 10)
    late = one.events()
    two.book.hear_digest(one.digest(), 0.0)  # overtakes the event
    assert not two.digest().wanted
    two.book.hear(*late, 0.0)
    two.book.hear_digest(one.digest(), 0.0)
    assert two.book.repaired == 0
    assert two.load() == one.load()


def test_an_old_digest_drops_nothing_newer():
    one, two = Router(1), Router(2)
    one.route("a", WORKERS[0], [], 40)
    deliver(one, two)
    old = one.digest()
    one.route("b", WORKERS[0], [], 10)
    deliver(one, two)
    two.book.hear_digest(old, 0.0)
    assert two.load() == one.load()


def test_a_router_that_left_takes_its_requests_along():
    one, two = Router(1), Router(2)
    one.route("a", WORKERS[0], sequence_hashes([1]), 40)
    deliver(one, two)
    two.route("b", WORKERS[0], [], 5)
    two.book.router_left(1)
    two.book.router_left(1)
    assert two.load()[WORKERS[0]] == (5, 1, 1, 1)


def test_requests_at_a_worker_not_yet_known_count_once_it_is():
    one, two = Router(1), Router(2, workers=())
    one.route("a", WORKERS[0], sequence_hashes([1]), 40)
    one.route("b", WORKERS[1], [], 10)
    deliver(one, two)
    one.first_token("a")
    one.free("b")
    deliver(one, two)
    for worker in WORKERS:
        two.scheduler.add_worker(worker)
        two.book.worker_joined(worker, 0.0)
    assert two.load() == one.load()


def test_a_worker_that_tells_of_a_first_token_itself_is_heard():
    one = Router(1)
    one.route("a", WORKERS[0], [], 40)
    event = {
        "request_id": "a",
        "worker": {"worker_id": 1, "dp_rank": 0},
        "data": "MarkPrefillCompleted",
        "router_id": 1 << 50,
        "lora_name": None,
    }
    one.book.hear(msgspec.convert({"events": [event]}, SequenceEvents), 0, 0.0)
    assert one.load()[WORKERS[0]] == (0, 0, 1, 1)


def test_the_wire_has_the_shape_that_others_know():
    one = Router(7)
    one.route("a", WORKERS[2], [11], 40)
    one.first_token("a")
    one.free("a")
    events = msgspec.to_builtins(one.book.take_events())["events"]
    assert [event["data"] for event in events[1:]] == ["MarkPrefillCompleted", "Free"]
    add = events[0].pop("data")
    assert add["AddRequest"]["token_sequence"] == [11]
    assert events[0] == {"request_id": "a", "worker": {"worker_id": 2, "dp_rank": 1}, "router_id": 7}


@pytest.mark.parametrize("data", ["Explode", {"Nonsense": {}}])
def test_events_of_a_kind_nobody_knows_are_counted(data):
    one = Router(1)
    event = {"request_id": "a", "worker": {"worker_id": 1}, "data": data, "router_id": 2}
    one.book.hear(msgspec.convert({"events": [event]}, SequenceEvents), 0, 0.0)
    assert one.book.invalid == 1
    assert one.scheduler.load.idle


# --- over real sockets


class Peer(Router):
    """A router that speaks over the event plane."""

    def __init__(self, runtime, affinity=None) -> None:
        super().__init__()
        self.changed = asyncio.Event()
        self.sync = ReplicaSync(
            runtime,
            ENDPOINT,
            self.scheduler,
            affinity=affinity,
            on_change=self.changed.set,
            digest_interval_s=0.05,
        )
        self.book = self.sync.book

    async def until(self, condition) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def peers(runtime):
    affinities = [SessionAffinity(60.0), SessionAffinity(60.0)]
    one, two = Peer(runtime, affinities[0]), Peer(runtime, affinities[1])
    await one.sync.start()
    await two.sync.start()
    for subscriber in (*one.sync._subscribers, *two.sync._subscribers):
        await subscriber.wait_connected(2)
    assert one.sync.routers == two.sync.routers == 1
    yield one, two
    await one.sync.close()
    await two.sync.close()


async def test_two_routers_on_the_event_plane_agree(peers):
    one, two = peers
    rnd = random.Random(1)
    for i in range(50):
        path = sequence_hashes([i % 3, i])
        for peer in peers:
            peer.route(f"r{i}", rnd.choice(WORKERS), path, i, tell=peer.sync)
        if i % 3 == 0:
            one.first_token(f"r{i}")
            two.free(f"r{i // 2}")
        await asyncio.sleep(0)
    await one.until(lambda: one.load() == two.load())
    for i in range(50):
        for peer in peers:
            peer.free(f"r{i}")
    await one.until(lambda: one.scheduler.load.idle)
    await two.until(lambda: two.scheduler.load.idle)


async def test_two_routers_converge_after_lost_messages(peers):
    one, two = peers
    one.route("kept", WORKERS[0], [1], 10, tell=one.sync)
    await two.until(lambda: two.load() == one.load())
    one.free("kept")
    one.route("lost", WORKERS[1], [2], 20)
    one.book.take_events()  # nobody hears of the end of one and the begin of the other
    assert two.load() != one.load()
    await two.until(lambda: two.load() == one.load())
    assert two.book.repaired >= 2


async def test_a_router_that_is_killed_leaves_nothing_behind(peers):
    one, two = peers
    one.route("a", WORKERS[0], [1], 10, tell=one.sync)
    await two.until(lambda: not two.scheduler.load.idle)
    await one.sync.close()
    await two.until(lambda: two.scheduler.load.idle)


async def test_sessions_are_bound_at_all_routers(peers):
    one, two = peers
    async with asyncio.timeout(DEADLINE_S):
        number = 0
        while not len(two.sync._affinity):  # ZeroMQ may still be taking note of the subscription
            number += 1
            one.sync._affinity.bind(f"session-{number}", WORKERS[1], 0.0)
            await asyncio.sleep(0.01)
    assert two.sync._affinity.worker(f"session-{number}", 0.0) in (WORKERS[1], None)


async def test_garbage_from_others_is_counted_and_ignored(runtime, peers):
    one, _ = peers
    publisher = await create_publisher(runtime, ENDPOINT, EVENTS_TOPIC)
    async with asyncio.timeout(DEADLINE_S):
        while not one.sync.undecodable:
            publisher.publish({"nonsense": 1})
            await asyncio.sleep(0.01)
    await publisher.close()


async def test_what_others_hear_is_a_message_of_events(runtime, peers):
    one, _ = peers
    subscriber = await create_subscriber(runtime, ENDPOINT, EVENTS_TOPIC)
    await subscriber.wait_connected(2)
    hearing = asyncio.ensure_future(anext(subscriber))
    async with asyncio.timeout(DEADLINE_S):
        number = 0
        while not hearing.done():  # ZeroMQ may still be taking note of the subscription
            one.route(f"r{number}", WORKERS[0], [1], 10, tell=one.sync)
            number += 1
            await asyncio.sleep(0.01)
        (event,) = (await hearing).decode()["events"]
    assert event["request_id"].startswith("r")
    assert event["router_id"] == one.sync.router_id
    await subscriber.close()
