"""Who waits, who goes next, and that everybody leaves the queue once."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.router.config import KvRouterConfig
from dynamo.router.queue import RouterQueue
from dynamo.router.queue_profile import PolicyClass, QueueProfile, configure, load_profile, parse_profile
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import Overlap, RouteRequest, WorkerKey, WorkerLimits
from dynamo.runtime.errors import RouterQueueLimitExceeded, WorkerUnavailable

BLOCK = 16
ONE, TWO = WorkerKey(1), WorkerKey(2)


class Held:
    """Who holds what, by decree."""

    def __init__(self) -> None:
        self.held: dict[WorkerKey, Overlap] = {}
        self.of: dict[int, dict[WorkerKey, Overlap]] = {}
        """By a prompt's first hash."""

    def find(self, sequence_hashes, now):
        return self.of.get(sequence_hashes[0], self.held) if sequence_hashes else self.held


class Bench:
    """A queue before two workers that are busy with over 1000 queued tokens each, and what becomes of requests."""

    def __init__(self, policy="fcfs", classes=None, buckets=None, workers=(ONE, TWO), **options) -> None:
        self.index = Held()
        self.scheduler = KvScheduler(BLOCK, KvRouterConfig(router_policy="linear"), self.index, rng=random.Random(1))
        for worker in workers:
            self.scheduler.add_worker(worker, WorkerLimits(1000, 500, 64))
        classes = classes or [PolicyClass(queue_policy=policy, prefill_busy_threshold_frac=2.0)]
        profile = QueueProfile(classes, classes[0].policy_family, buckets or [(0, "all")])
        self.queue = RouterQueue(self.scheduler, profile, **options)
        self.sent: list[str] = []
        self.failed: dict[str, Exception] = {}
        self.decisions = {}

    def route(self, name, tokens=100, now=0.0, **more):
        request = RouteRequest(
            request_id=name,
            token_count=tokens,
            sequence_hashes=[hash((name, i)) for i in range(tokens // BLOCK)],
            **more,
        )

        def on_decision(decision) -> None:
            self.sent.append(name)
            self.decisions[name] = decision

        return self.queue.route(request, now, on_decision, lambda e: self.failed.__setitem__(name, e))

    def fill(self, tokens=1001) -> None:
        """Make every worker busy."""
        for worker in self.scheduler.load.workers:
            self.route(f"fill-{worker.worker_id}", tokens, allowed=frozenset([worker]))
        self.sent.clear()


def one_at_a_time(bench: Bench, count: int, now=1.0) -> list[str]:
    """Who goes if the first worker becomes idle `count` times. Each that goes makes it busy again."""
    order = []
    for _ in range(count):
        bench.sent.clear()
        for name in ("fill-1", *order):
            bench.scheduler.free(name)
        bench.queue.pump(now)
        order += bench.sent
    return order


# --- waiting at all


def test_nobody_waits_without_a_threshold():
    bench = Bench(classes=[PolicyClass()])
    bench.fill(10**6)
    bench.route("a")
    assert bench.sent == ["a"]
    assert bench.queue.pending == 0


def test_nobody_waits_while_one_worker_has_room():
    bench = Bench()
    bench.route("fill-1", 1001, allowed=frozenset([ONE]))
    bench.route("a")
    assert bench.decisions["a"].worker == TWO
    assert bench.decisions["a"].queued_ms == 0


def test_a_request_waits_until_a_first_token_makes_room():
    bench = Bench()
    bench.fill()
    bench.route("a")
    assert (bench.sent, bench.queue.pending) == ([], 1)
    bench.queue.pump(0.5)
    assert bench.sent == []
    bench.scheduler.prefill_done("fill-2", 1.5)
    bench.queue.pump(1.5)
    assert (bench.sent, bench.queue.pending) == (["a"], 0)
    assert bench.decisions["a"].worker == TWO
    assert bench.decisions["a"].queued_ms == 1500
    assert bench.scheduler.load.bookings["a"].booked_at == 1.5


def test_a_request_waits_until_an_end_or_a_new_worker_makes_room():
    bench = Bench()
    bench.fill()
    bench.route("a", 1500)
    bench.route("b", 1500)
    bench.scheduler.free("fill-1")
    bench.queue.pump(1.0)
    assert bench.sent == ["a"]
    bench.scheduler.add_worker(WorkerKey(3))
    bench.queue.pump(2.0)
    assert bench.sent == ["a", "b"]


def test_an_absolute_threshold_counts_as_well():
    bench = Bench(classes=[PolicyClass(prefill_busy_threshold=500, prefill_busy_threshold_frac=2.0)])
    bench.fill(501)
    bench.route("a")
    assert bench.queue.pending == 1


def test_a_worker_that_names_no_batch_size_counts_with_a_common_one():
    bench = Bench(workers=())
    bench.scheduler.add_worker(ONE)
    bench.route("a", 2 * 8192 + 1)
    bench.route("b")
    assert (bench.sent, bench.queue.pending) == (["a"], 1)


def test_limits_that_change_count_from_then_on():
    bench = Bench()
    bench.fill()
    bench.route("a")
    bench.scheduler.add_worker(TWO, WorkerLimits(1000, 5000, 64))
    bench.queue.pump(1.0)
    assert bench.sent == ["a"]


# --- order


def test_fcfs_is_in_order_of_arrival_but_for_jumps():
    bench = Bench("fcfs")
    bench.fill()
    for name, now, jump in (("a", 1, 0), ("b", 2, 0), ("c", 3, 1.5), ("d", 4, 2.5)):
        bench.route(name, 1001, now=now, priority_jump=jump)
    assert one_at_a_time(bench, 4, 5.0) == ["a", "c", "d", "b"]  # keys 0, -1, -0.5, -0.5 from the first arrival on


def test_lcfs_is_the_other_way_round():
    bench = Bench("lcfs")
    bench.fill()
    for name, now, jump in (("a", 1, 0), ("b", 2, 0), ("c", 3, -1.5)):
        bench.route(name, 1001, now=now, priority_jump=jump)
    assert one_at_a_time(bench, 3, 5.0) == ["b", "c", "a"]


def test_wspt_prefers_what_is_soon_done_and_what_is_urgent():
    bench = Bench("wspt")
    bench.fill()
    bench.index.of = {hash(("cached", 0)): {ONE: Overlap(60)}}
    bench.route("long", 2000)
    bench.route("short", 1100)
    bench.route("cached", 1500)  # 540 to compute
    bench.route("urgent", 4000, priority_jump=9.0)
    assert one_at_a_time(bench, 4) == ["urgent", "cached", "short", "long"]


@pytest.mark.parametrize("policy", ["fcfs", "lcfs", "wspt"])
def test_strict_priority_comes_before_everything(policy):
    bench = Bench(policy)
    bench.fill()
    for i, name in enumerate("abc"):
        bench.route(name, 1001, now=float(i), priority_jump=100.0)
    bench.route("first", 9000, now=1.0, strict_priority=2)
    bench.route("second", 1001, now=0.5, strict_priority=1)
    assert one_at_a_time(bench, 2, 5.0) == ["first", "second"]


def test_equal_keys_go_in_order_of_arrival():
    bench = Bench("wspt")
    bench.fill()
    for name in "abc":
        bench.route(name, 1001)
    assert one_at_a_time(bench, 3) == ["a", "b", "c"]


def test_one_that_arrives_when_there_is_room_does_not_pass_those_that_wait():
    bench = Bench()
    bench.fill()
    bench.route("a", 1001)
    bench.scheduler.prefill_done("fill-1", 1.0)  # and nobody called pump yet
    bench.route("b", 1001, now=1.0)
    assert bench.sent == ["a"]
    assert bench.queue.pending == 1


# --- constraints


def test_a_request_pinned_to_a_busy_worker_holds_up_nobody_else():
    bench = Bench()
    bench.fill()
    bench.route("pinned", 100, allowed=frozenset([TWO]), strict_priority=9)
    bench.route("free", 100, now=1.0)
    bench.scheduler.prefill_done("fill-1", 2.0)
    bench.queue.pump(2.0)
    assert bench.sent == ["free"]
    bench.scheduler.prefill_done("fill-2", 3.0)
    bench.queue.pump(3.0)
    assert bench.sent == ["free", "pinned"]


def test_a_request_pinned_to_a_busy_worker_waits_though_another_has_room():
    bench = Bench()
    bench.route("fill-1", 1001, allowed=frozenset([ONE]))
    bench.route("pinned", allowed=frozenset([ONE]))
    bench.route("free")
    assert bench.sent == ["fill-1", "free"]


def test_whoever_waits_for_a_worker_that_left_is_told():
    bench = Bench()
    bench.fill()
    for name in "ab":
        bench.route(name, allowed=frozenset([TWO]))
    bench.route("c")
    bench.scheduler.remove_worker(TWO)
    bench.queue.pump(1.0)
    assert set(bench.failed) == {"a", "b"}
    assert isinstance(bench.failed["a"], WorkerUnavailable)
    assert bench.queue.pending == 1
    assert bench.queue.classes["default"].rejected == {"no_worker": 2}


def test_without_any_worker_a_request_fails_at_once():
    bench = Bench(workers=())
    bench.route("a")
    assert isinstance(bench.failed["a"], WorkerUnavailable)


# --- classes


def two_classes(**more) -> Bench:
    classes = [
        PolicyClass(name="gold", policy_family="gold", quantum=3000, prefill_busy_threshold_frac=2.0, **more),
        PolicyClass(name="free", policy_family="free", quantum=1000, prefill_busy_threshold_frac=2.0, **more),
    ]
    return Bench(classes=classes)


def test_classes_share_by_their_quanta_of_uncached_tokens():
    bench = two_classes(request_queue_limit_per_worker=None)
    bench.fill()
    rnd = random.Random(4)
    tokens = {}
    for i in range(400):
        for family in ("gold", "free"):
            name = f"{family}-{i}"
            tokens[name] = rnd.randrange(1001, 3000)
            bench.route(name, tokens[name], policy_class=family)
    spent = Counter()
    for name in one_at_a_time(bench, 200):
        spent[name.split("-")[0]] += tokens[name]
    assert spent["gold"] / spent["free"] == pytest.approx(3, rel=0.1)


def test_a_class_alone_uses_everything_and_saves_up_nothing():
    bench = two_classes()
    bench.fill()
    for i in range(20):
        bench.route(f"free-{i}", 1001, policy_class="free")
    assert len(one_at_a_time(bench, 20)) == 20
    bench.scheduler.free("free-19")
    bench.route("fill-1", 1001)
    for i in range(20):
        bench.route(f"gold-{i}", 1001, policy_class="gold")
        bench.route(f"free-{i}", 1001, policy_class="free")
    went = Counter(name.split("-")[0] for name in one_at_a_time(bench, 16))
    assert went == {"gold": 12, "free": 4}


def test_a_request_much_larger_than_its_quantum_still_goes():
    bench = two_classes()
    bench.fill()
    bench.route("free-large", 1_000_000, policy_class="free")
    for i in range(5):
        bench.route(f"gold-{i}", 1001, policy_class="gold")
    assert one_at_a_time(bench, 6)[-1] == "free-large"
    assert not bench.queue.pending


def test_a_class_waits_by_its_own_threshold():
    classes = [
        PolicyClass(name="patient", policy_family="patient", prefill_busy_threshold_frac=0.5),
        PolicyClass(name="pushy", policy_family="pushy"),
    ]
    bench = Bench(classes=classes)
    bench.fill(300)
    bench.route("a", policy_class="patient")
    bench.route("b", policy_class="pushy")
    bench.route("c", policy_class="nobody named this")
    assert bench.sent == ["b"]
    assert bench.queue.classes["patient"].requests == 2


def test_the_bucket_goes_by_uncached_tokens():
    classes = [
        PolicyClass(name="short", cache_bucket="short", prefill_busy_threshold_frac=2.0),
        PolicyClass(name="long", cache_bucket="long", prefill_busy_threshold_frac=2.0),
    ]
    bench = Bench(classes=classes, buckets=[(0, "short"), (1000, "long")])
    bench.fill()
    bench.index.of = {hash(("cached", 0)): {TWO: Overlap(100)}}
    bench.route("cached", 2000)
    bench.route("long", 2000)
    bench.route("edge", 1000)
    assert bench.queue.classes["short"].requests == 1
    assert bench.queue.classes["short"].cached_tokens == 1600
    assert bench.queue.classes["long"].isl_tokens == 3000


# --- limits


@pytest.mark.parametrize(
    ("limit", "kind", "current"),
    [
        ({"request_queue_limit_per_worker": 1}, "requests", 2),
        ({"raw_isl_token_queue_limit_per_worker": 100}, "raw_isl_tokens", 200),
        ({"cached_token_queue_limit_per_worker": 80}, "cached_tokens", 160),
    ],
)
def test_a_full_queue_refuses_and_says_what_is_full(limit, kind, current):
    bench = Bench(classes=[PolicyClass(prefill_busy_threshold_frac=2.0, **limit)])
    bench.fill()
    bench.index.held = {ONE: Overlap(5)}
    for name in "abc":
        bench.route(name)
    error = bench.failed.pop("c")
    assert not bench.failed
    assert isinstance(error, RouterQueueLimitExceeded)
    assert error.details() == {"policy_class": "default", "limit_kind": kind, "current": current, "limit": current}
    assert bench.queue.classes["default"].rejected == {kind: 1}


def test_one_request_may_wait_however_large_it_is():
    bench = Bench(classes=[PolicyClass(prefill_busy_threshold_frac=2.0, raw_isl_token_queue_limit_per_worker=10)])
    bench.fill()
    bench.route("large", 5000)
    assert bench.queue.pending == 1


def test_a_limit_of_nothing_lets_nobody_wait():
    bench = Bench(classes=[PolicyClass(prefill_busy_threshold_frac=2.0, request_queue_limit_per_worker=0)])
    bench.fill()
    bench.route("a")
    assert "a" in bench.failed


def test_there_is_a_limit_by_default():
    bench = Bench(workers=(ONE,))
    bench.fill()
    for i in range(1025):
        bench.route(str(i), 1)
    assert list(bench.failed) == ["1024"]


# --- leaving otherwise


def test_a_cancelled_request_never_goes():
    bench = Bench()
    bench.fill()
    waiting = bench.route("a")
    bench.route("b")
    assert bench.queue.cancel(waiting)
    assert not bench.queue.cancel(waiting)
    bench.scheduler.prefill_done("fill-1", 1.0)
    bench.queue.pump(1.0)
    assert bench.sent == ["b"]
    assert "a" not in bench.scheduler.load.bookings


def test_cancelling_what_has_gone_changes_nothing():
    bench = Bench()
    assert not bench.queue.cancel(bench.route("a"))


def test_cancelled_requests_are_forgotten():
    bench = Bench(classes=[PolicyClass(prefill_busy_threshold_frac=2.0, request_queue_limit_per_worker=None)])
    bench.fill()
    bench.route("stays")
    for i in range(5000):
        bench.queue.cancel(bench.route(str(i)))
    (lane,) = bench.queue.classes["default"].lanes.values()
    assert len(lane.heap) < 200
    assert len(bench.queue._by_deadline) < 200


def test_nobody_waits_longer_than_the_deadline():
    bench = Bench(timeout_s=10.0)
    bench.fill()
    bench.route("a", now=0.0)
    bench.route("b", now=5.0)
    assert bench.queue.next_deadline() == 10.0
    assert bench.queue.expire(9.9) == 0
    assert bench.queue.expire(10.0) == 1
    error = bench.failed["a"]
    assert isinstance(error, RouterQueueLimitExceeded)
    assert error.details() == {"policy_class": "default", "limit_kind": "wait_seconds", "current": 10, "limit": 10}
    assert "DYN_ROUTER_QUEUE_TIMEOUT_SECS" in error.message
    assert bench.queue.next_deadline() == 15.0
    bench.scheduler.prefill_done("fill-1", 15.0)
    bench.queue.pump(15.0)
    assert "b" in bench.failed
    assert bench.queue.next_deadline() is None


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"refresh_after_s": -1.0}])
def test_times_that_cannot_be_meant_are_refused(options):
    with pytest.raises(ValueError, match="DYN_ROUTER_"):
        Bench(**options)


def test_what_is_cached_is_looked_up_anew_for_those_that_wait_long():
    bench = Bench("wspt", refresh_after_s=5.0)
    bench.fill()
    bench.route("a", 1500, now=0.0)
    bench.route("b", 2000, now=0.0)
    bench.index.of = {hash(("b", 0)): {TWO: Overlap(100)}}  # computed for somebody else meanwhile
    assert bench.queue.classes["default"].cached_tokens == 0
    bench.scheduler.prefill_done("fill-1", 6.0)
    bench.queue.pump(6.0)
    assert bench.sent[0] == "b"


def test_what_is_cached_is_not_looked_up_anew_unless_asked_for():
    bench = Bench("wspt")
    bench.fill()
    bench.route("a", 1500)
    bench.route("b", 2000)
    bench.index.of = {hash(("b", 0)): {TWO: Overlap(100)}}
    assert one_at_a_time(bench, 1, 60.0 - 1) == ["a"]
    assert bench.decisions["a"].overlap == Overlap()


def test_a_request_is_placed_by_what_is_known_when_it_goes():
    bench = Bench()
    bench.fill()
    bench.route("a", 1500)
    bench.index.held = {TWO: Overlap(90)}
    for name in ("fill-1", "fill-2"):
        bench.scheduler.prefill_done(name, 1.0)
    bench.queue.pump(1.0)
    assert bench.decisions["a"].worker == TWO
    assert bench.decisions["a"].overlap == Overlap(90)


# --- callbacks


def test_a_callback_may_free_and_route_in_turn():
    bench = Bench(workers=(ONE,))
    bench.fill()
    went = []

    def fails_at_once(name):
        def on_decision(decision):
            went.append(name)
            bench.scheduler.free(name)
            bench.queue.pump(1.0)

        return on_decision

    for name in "abc":
        request = RouteRequest(request_id=name, token_count=2000, sequence_hashes=[])
        bench.queue.route(request, 0.0, fails_at_once(name), lambda e: None)
    bench.scheduler.free("fill-1")
    bench.queue.pump(1.0)
    assert went == ["a", "b", "c"]
    assert bench.scheduler.load.idle


steps = st.lists(
    st.tuples(
        st.sampled_from(["route", "route", "route", "first", "free", "cancel", "pass", "leave", "join"]),
        st.integers(0, 30),
        st.integers(0, 3),
    ),
    max_size=80,
)


@given(steps, st.sampled_from(["fcfs", "lcfs", "wspt"]))
@settings(max_examples=150, deadline=None)
def test_every_request_ends_exactly_once_and_nothing_is_left(steps, policy):
    classes = [
        PolicyClass(name="a", policy_family="a", queue_policy=policy, quantum=500, prefill_busy_threshold=100),
        PolicyClass(name="b", policy_family="b", prefill_busy_threshold=300, request_queue_limit_per_worker=3),
    ]
    bench = Bench(classes=classes, timeout_s=20.0, refresh_after_s=3.0)
    now, names, outcomes, waiting = 0.0, [], Counter(), {}
    for i, (what, which, kind) in enumerate(steps):
        if what == "route":
            name = f"r{i}"
            names.append(name)
            request = RouteRequest(
                request_id=name,
                token_count=which * 20,
                sequence_hashes=[],
                policy_class="ab"[kind % 2],
                strict_priority=kind // 2,
                priority_jump=float(which),
                allowed=frozenset([ONE]) if which % 5 == 0 else None,
            )
            waiting[name] = bench.queue.route(
                request,
                now,
                lambda decision, name=name: outcomes.update([(name, "sent")]),
                lambda error, name=name: outcomes.update([(name, "failed")]),
            )
        elif what == "first" and names:
            bench.scheduler.prefill_done(names[which % len(names)], now)
            bench.queue.pump(now)
        elif what == "free" and names:
            bench.scheduler.free(names[which % len(names)])
            bench.queue.pump(now)
        elif what == "cancel" and names:
            name = names[which % len(names)]
            if bench.queue.cancel(waiting[name]):
                outcomes[name, "cancelled"] += 1
        elif what == "pass":
            now += which / 3
            bench.queue.expire(now)
        elif what == "leave":
            bench.scheduler.remove_worker(TWO)
            bench.queue.pump(now)
        elif what == "join":
            bench.scheduler.add_worker(TWO, WorkerLimits(1000, 500, 64))
            bench.queue.pump(now)
        assert bench.queue.pending == len(names) - outcomes.total()
    bench.queue.expire(now + 100)
    assert {name for name, _ in outcomes} == set(names)
    assert outcomes.total() == len(names)
    for queue in bench.queue.classes.values():
        assert (queue.requests, queue.isl_tokens, queue.cached_tokens) == (0, 0, 0)
        assert not queue.lanes
    for name in names:
        bench.scheduler.free(name)
    assert bench.scheduler.load.idle


# --- policy files

FILE = b"""
default_policy_family: standard
uncached_isl_buckets:
  - {min_tokens: 0, bucket: short}
  - {min_tokens: 4096, bucket: long}
policy_classes:
  - {name: s, policy_family: standard, cache_bucket: short, quantum: 100, prefill_busy_threshold_frac: 4}
  - {name: l, policy_family: standard, cache_bucket: long, queue_policy: wspt, prefill_busy_threshold: 7}
  - {name: bs, policy_family: batch, cache_bucket: short, request_queue_limit_per_worker: 5}
  - {name: bl, policy_family: batch, cache_bucket: long}
worker_selection:
  - {name: gentle, parameters: {overlap_score_credit: 0.5, router_temperature: 0.1}}
  - {name: product, type: lmetric}
router:
  router_track_output_blocks: true
"""


def test_a_policy_file_names_classes():
    profile = parse_profile(FILE)
    assert [each.name for each in profile.classes] == ["s", "l", "bs", "bl"]
    assert profile.classify(None, 0).name == "s"
    assert profile.classify("standard", 4095).name == "s"
    assert profile.classify("standard", 4096).name == "l"
    assert profile.classify("batch", 10**9).name == "bl"
    assert profile.classify("made up", 5).name == "s"
    assert profile.queues


def test_a_policy_file_changes_the_router_and_names_selections():
    profile = parse_profile(FILE)
    config = configure(KvRouterConfig(), profile, "gentle")
    assert (config.router_track_output_blocks, config.overlap_score_credit, config.router_temperature) == (
        True,
        0.5,
        0.1,
    )
    assert configure(KvRouterConfig(), profile, "product").router_policy == "lmetric"
    assert configure(KvRouterConfig(), profile, None).overlap_score_credit == 1.0
    with pytest.raises(ValueError, match=r"none named 'x' in the policy file; it has \['gentle', 'product'\]"):
        configure(KvRouterConfig(), profile, "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[", "not YAML"),
        (b"just words", "must be a mapping"),
        (b"policy_clases: []", "policy_clases is not known; did you mean policy_classes"),
        (b"policy_classes: [{name: a, quantun: 5}]", r"policy_classes\[0\].quantun is not known; did you mean quantum"),
        (b"policy_classes: [{name: a, quantum: 0}]", "quantum must be at least 1"),
        (b"policy_classes: [{name: a, quantum: many}]", "Expected `int`"),
        (b"policy_classes: [{name: a, queue_policy: best}]", "queue_policy must be one of fcfs, lcfs, wspt"),
        (b"policy_classes: [{name: a, prefill_busy_threshold_frac: .nan}]", "prefill_busy_threshold_frac must be"),
        (b"policy_classes: [{name: a, request_queue_limit_per_worker: -1}]", "request_queue_limit_per_worker must be"),
        (b"policy_classes: [{name: a}, {name: a, policy_family: b}]", "the name 'a' is given twice"),
        (b"policy_classes: [{name: a}, {name: b}]", "two classes of family 'default' have the bucket 'all'"),
        (b"policy_classes: [{name: a, cache_bucket: x}]", "cache_bucket 'x' is not among the buckets"),
        (b"default_policy_family: x", "default_policy_family: 'x' is the family of no class"),
        (b"uncached_isl_buckets: [{min_tokens: 5, bucket: a}]", "must start at 0 and rise"),
        (
            b"uncached_isl_buckets: [{min_tokens: 0, bucket: a}, {min_tokens: 9, bucket: b}]\n"
            b"policy_classes: [{name: x, cache_bucket: a}]",
            "family 'default' has no class for the bucket 'b'",
        ),
        (b"router: {router_nonsense: 1}", "router.router_nonsense is not a setting"),
        (b"worker_selection: [{name: a, parameters: {speed: 1}}]", "worker_selection 'a': speed is not one of"),
    ],
)
def test_a_policy_file_that_cannot_be_meant_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_profile(text)


def test_settings_of_a_policy_file_are_checked_like_others():
    profile = parse_profile(b"router: {router_ttl_secs: -1}")
    with pytest.raises(ValueError, match="router_ttl_secs must be above 0"):
        configure(KvRouterConfig(), profile, None)


def test_a_policy_file_is_read_from_where_the_configuration_says(tmp_path):
    path = tmp_path / "policy.yaml"
    config = KvRouterConfig(router_policy_config=str(path))
    with pytest.raises(ValueError, match=r"router_policy_config: .*policy.yaml cannot be read: No such file"):
        load_profile(config)
    path.write_bytes(b"policy_clases: []")
    with pytest.raises(ValueError, match=r"router_policy_config: .*policy.yaml: policy_clases"):
        load_profile(config)
    path.write_bytes(FILE)
    assert len(load_profile(config).classes) == 4


def test_without_a_file_there_is_one_class_of_the_routers_settings():
    (only,) = load_profile(KvRouterConfig(router_queue_threshold=3.0, router_queue_policy="lcfs")).classes
    assert (only.name, only.queue_policy, only.prefill_busy_threshold_frac) == ("default", "lcfs", 3.0)
    assert not load_profile(KvRouterConfig()).queues
