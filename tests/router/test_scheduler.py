"""Which worker is chosen, in every situation that decides it."""

import random
from collections import Counter

import pytest

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router.config import KvRouterConfig
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import Decision, Overlap, RouteRequest, RouterOverride, WorkerKey, WorkerLimits
from dynamo.runtime.errors import InvalidArgument, WorkerUnavailable

BLOCK = 16
ONE, TWO, THREE = WorkerKey(1), WorkerKey(2), WorkerKey(3)


class Held:
    """Who holds what, by decree."""

    def __init__(self, held: dict[WorkerKey, Overlap] | None = None) -> None:
        self.held = held or {}

    def find(self, sequence_hashes, now):
        return self.held


class HeldInGroups(Held):
    """The same, told in groups."""

    def groups(self, sequence_hashes, now):
        return [(overlap, (worker,)) for worker, overlap in self.held.items()]


def make(held=None, workers=(ONE, TWO, THREE), source=Held, **settings) -> KvScheduler:
    settings.setdefault("router_policy", "linear")  # whose numbers are easy to follow
    config = KvRouterConfig(**{"router_policy": "linear"} | settings)
    scheduler = KvScheduler(BLOCK, config, source(held), rng=random.Random(5))
    for worker in workers:
        scheduler.add_worker(worker, WorkerLimits(1000, 8192, 64))
    return scheduler


def request(name="r", tokens=160, **more) -> RouteRequest:
    return RouteRequest(
        request_id=name,
        token_count=tokens,
        sequence_hashes=sequence_hashes(list(range(tokens // BLOCK))),
        **more,
    )


def send(scheduler, worker, name, tokens=160, now=0.0, hashes=None, **more) -> None:
    """Book a request at a worker whatever it costs."""
    wanted = request(name, tokens, allowed=frozenset([worker]), **more)
    wanted.sequence_hashes = hashes if hashes is not None else [hash((name, i)) for i in range(tokens // BLOCK)]
    scheduler.book(wanted, scheduler.select(wanted, now), now)


# --- choosing


def test_the_documented_example_goes_to_the_second_worker():
    """K22: ten blocks; overlaps of 2, 5 and 8; 10, 5 and 9 blocks active: 18, 10 and 11, and the new blocks on top."""
    scheduler = make({ONE: Overlap(2), TWO: Overlap(5), THREE: Overlap(8)})
    for worker, blocks in ((ONE, 10), (TWO, 5), (THREE, 9)):
        send(scheduler, worker, f"active-{worker}", blocks * BLOCK)
        scheduler.prefill_done(f"active-{worker}", 0.0)
    decision = scheduler.select(request(), 0.0, explain=True)
    costs = {c["worker_id"]: c["cost"] for c in decision.explanation["candidates"]}
    assert costs == {1: 18 + 10, 2: 10 + 10, 3: 11 + 10}
    assert decision.worker == TWO


@pytest.mark.parametrize("source", [Held, HeldInGroups])
def test_the_holder_of_the_prefix_wins_among_equals(source):
    decision = make({TWO: Overlap(6)}, source=source).select(request(), 0.0)
    assert decision.worker == TWO
    assert decision.overlap == Overlap(6)
    assert decision.new_tokens == 160 - 6 * BLOCK
    assert decision.hit_rate == pytest.approx(0.6)
    assert decision.best_overlap_blocks == 6
    assert decision.reason == "lowest cost"
    assert decision.candidates == 3


def test_a_holder_with_a_long_queue_loses():
    scheduler = make({TWO: Overlap(6)})
    send(scheduler, TWO, "long", 2000)
    decision = scheduler.select(request(), 0.0)
    assert decision.worker != TWO
    assert (decision.overlap.total, decision.best_overlap_blocks) == (0, 6)


@pytest.mark.parametrize("source", [Held, HeldInGroups])
def test_holders_that_nobody_knows_are_ignored(source):
    decision = make({WorkerKey(9): Overlap(10)}, source=source).select(request(), 0.0)
    assert decision.best_overlap_blocks == 0


def test_groups_are_looked_up_anew_after_a_worker_left():
    scheduler = make({ONE: Overlap(2), THREE: Overlap(8)}, source=HeldInGroups)
    assert scheduler.select(request(), 0.0).worker == THREE
    scheduler.remove_worker(ONE)
    assert scheduler.select(request(), 0.0).worker == THREE
    scheduler.remove_worker(THREE)
    assert scheduler.select(request(), 0.0).worker == TWO


def test_blocks_of_active_requests_count_once():
    scheduler = make()
    shared = request("shared")
    send(scheduler, ONE, "same", hashes=shared.sequence_hashes)
    scheduler.prefill_done("same", 0.0)
    send(scheduler, TWO, "other")
    scheduler.prefill_done("other", 0.0)
    scheduler.remove_worker(THREE)
    assert scheduler.select(shared, 0.0).worker == ONE


def test_ties_are_drawn_evenly():
    scheduler = make()
    drawn = Counter(scheduler.select(request(), 0.0).worker for _ in range(600))
    assert all(150 < drawn[worker] < 250 for worker in (ONE, TWO, THREE))
    assert "drawn among 3 equal" in scheduler.select(request(), 0.0).reason


def test_the_same_seed_gives_the_same_choices():
    one, two = make(), make()
    assert [one.select(request(), 0.0).worker for _ in range(50)] == [
        two.select(request(), 0.0).worker for _ in range(50)
    ]


def test_temperature_spreads_by_cost():
    scheduler = make({ONE: Overlap(10), TWO: Overlap(5)}, router_temperature=0.5)
    drawn = Counter(scheduler.select(request(), 0.0).worker for _ in range(2000))
    # costs 10, 15, 20: weights 1, e^-1, e^-2 after scaling to their range and dividing by 0.5
    assert drawn[ONE] / 2000 == pytest.approx(0.665, abs=0.05)
    assert drawn[TWO] / 2000 == pytest.approx(0.245, abs=0.05)
    assert scheduler.select(request(), 0.0).reason == "drawn at temperature 0.5"


def test_temperature_over_equal_costs_is_uniform():
    scheduler = make(router_temperature=1.0)
    drawn = Counter(scheduler.select(request(), 0.0).worker for _ in range(600))
    assert all(150 < count < 250 for count in drawn.values())


# --- per-request settings


def test_an_override_of_the_temperature_holds_for_one_request():
    scheduler = make({ONE: Overlap(10)})
    hot = request(override=RouterOverride(router_temperature=100.0))
    assert {scheduler.select(hot, 0.0).worker for _ in range(100)} == {ONE, TWO, THREE}
    assert {scheduler.select(request(), 0.0).worker for _ in range(20)} == {ONE}


def test_without_credit_overlap_means_nothing():
    scheduler = make({ONE: Overlap(10)})
    send(scheduler, ONE, "a")
    blind = request(override=RouterOverride(overlap_score_credit=0.0))
    assert all(scheduler.select(blind, 0.0).worker != ONE for _ in range(20))


def test_without_reuse_nothing_is_shared():
    scheduler = make(workers=(ONE,))
    for name in "ab":
        wanted = request(name, override=RouterOverride(assume_kv_reuse=False))
        scheduler.book(wanted, scheduler.select(wanted, 0.0), 0.0)
    assert scheduler.load.decode_blocks == [20]


def test_without_tracking_of_prefill_no_tokens_are_queued():
    scheduler = make(workers=(ONE,))
    wanted = request(override=RouterOverride(track_prefill_tokens=False))
    scheduler.book(wanted, scheduler.select(wanted, 0.0), 0.0)
    assert (scheduler.load.prefill_tokens, scheduler.load.requests) == ([0], [1])


def test_blocks_are_not_tracked_where_the_configuration_says_so():
    scheduler = make(workers=(ONE,), router_track_active_blocks=False)
    send(scheduler, ONE, "a")
    assert (scheduler.load.decode_blocks, scheduler.load.prefill_tokens) == ([0], [160])


@pytest.mark.parametrize("tracked", [True, False])
def test_output_blocks_count_only_where_asked_for(tracked):
    scheduler = make(workers=(ONE,), router_track_output_blocks=tracked)
    send(scheduler, ONE, "a")
    scheduler.output_block("a")
    assert scheduler.load.decode_blocks == [11 if tracked else 10]


def test_an_override_is_read_by_any_of_its_names():
    parsed = RouterOverride.parse({"overlap_score_weight": 2, "router_temperature": 0.5, "assume_kv_reuse": False})
    assert parsed == RouterOverride(overlap_score_credit=2, router_temperature=0.5, assume_kv_reuse=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overlap": 1}, "router_config_override.overlap is not one of overlap_score_credit"),
        ({"router_temperature": -1}, "router_temperature must be a number of at least 0, not -1"),
        ({"prefill_load_scale": float("nan")}, "prefill_load_scale must be a number"),
        ({"router_temperature": "hot"}, "Expected `float"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(settings, words):
    with pytest.raises(InvalidArgument, match=words):
        RouterOverride.parse(settings)


# --- who may be chosen


def test_only_workers_that_are_allowed_are_chosen():
    scheduler = make({ONE: Overlap(10)})
    wanted = request(allowed=frozenset([TWO, THREE, WorkerKey(77)]))
    decisions = [scheduler.select(wanted, 0.0) for _ in range(20)]
    assert {decision.worker for decision in decisions} == {TWO, THREE}
    assert decisions[0].candidates == 2
    assert decisions[0].best_overlap_blocks == 0


def test_a_pin_to_one_worker_says_so():
    decision = make().select(request(allowed=frozenset([TWO])), 0.0)
    assert (decision.worker, decision.reason) == (TWO, "the only worker allowed")


def test_data_parallel_ranks_are_workers_of_their_own():
    ranks = [WorkerKey(1, rank) for rank in range(4)]
    scheduler = make({WorkerKey(1, 2): Overlap(5)}, workers=ranks)
    assert scheduler.select(request(), 0.0).worker == WorkerKey(1, 2)
    send(scheduler, WorkerKey(1, 2), "a", 1600)
    assert scheduler.select(request(), 0.0).worker != WorkerKey(1, 2)


def tainted(**taints) -> KvScheduler:
    scheduler = make(workers=())
    for key, (name, words) in zip((ONE, TWO, THREE), taints.items(), strict=False):
        del name
        scheduler.add_worker(key, WorkerLimits(taints=frozenset(words)))
    return scheduler


def test_required_taints_filter():
    scheduler = tainted(a=["gpu", "eu"], b=["gpu"], c=[])
    wanted = request(required_taints=frozenset(["gpu", "eu"]))
    assert scheduler.select(wanted, 0.0).worker == ONE
    wanted = request(required_taints=frozenset(["gpu"]))
    assert {scheduler.select(wanted, 0.0).worker for _ in range(30)} == {ONE, TWO}


def test_preferred_taints_make_a_worker_cheaper_but_not_certain():
    scheduler = tainted(a=["fast"], b=[], c=["slow"])
    wanted = request(preferred_taints={"fast": 0.5, "slow": -0.5})
    decision = scheduler.select(wanted, 0.0, explain=True)
    costs = {c["worker_id"]: c["cost"] for c in decision.explanation["candidates"]}
    assert decision.worker == ONE
    assert costs == {1: pytest.approx(20 * 0.537883, abs=0.01), 2: 20, 3: pytest.approx(20 * 1.462117, abs=0.01)}
    send(scheduler, ONE, "a", 1600)
    assert scheduler.select(wanted, 0.0).worker == TWO


def test_a_preferred_worker_with_a_cost_below_zero_gets_a_lower_one():
    assert tainted(a=["fast"], b=[])._prefer([-10.0, -10.0], {"fast": 1.0}) == [pytest.approx(-17.6, abs=0.1), -10.0]


def test_suspended_workers_get_nothing_new_and_keep_what_they_have():
    scheduler = make({ONE: Overlap(10)})
    send(scheduler, ONE, "a")
    scheduler.suspended.add(ONE)
    assert {scheduler.select(request(), 0.0).worker for _ in range(30)} == {TWO, THREE}
    assert scheduler.load.requests[0] == 1
    scheduler.suspended.clear()
    scheduler.free("a")
    assert scheduler.select(request(), 0.0).worker == ONE


@pytest.mark.parametrize(
    ("prepare", "wanted", "words"),
    [
        (lambda s: [s.remove_worker(w) for w in (ONE, TWO, THREE)], {}, "no worker has joined the router"),
        (lambda s: None, {"allowed": frozenset([WorkerKey(9, 1)])}, "none of 3 workers is 9/1"),
        (lambda s: None, {"required_taints": frozenset(["eu"])}, r"none of 3 workers has the taints \['eu'\]"),
        (lambda s: s.suspended.update((ONE, TWO, THREE)), {}, "none of 3 workers has not failed"),
    ],
)
def test_why_nobody_can_take_a_request_is_told(prepare, wanted, words):
    scheduler = make()
    prepare(scheduler)
    with pytest.raises(WorkerUnavailable, match=words):
        scheduler.select(request(**wanted), 0.0)


# --- explaining


def test_a_decision_explains_itself():
    scheduler = make({ONE: Overlap(4, 2, 1), TWO: Overlap(1)})
    send(scheduler, TWO, "a", 320)
    decision = scheduler.select(request(), 0.0, explain=True)
    explanation = decision.explanation
    assert explanation["policy"] == "linear"
    assert explanation["worker"] == {"worker_id": 1, "dp_rank": 0}
    assert explanation["reason"] == "lowest cost"
    assert explanation["prompt_tokens"] == 160
    assert [candidate["worker_id"] for candidate in explanation["candidates"]] == [1, 3, 2]
    best = explanation["candidates"][0]
    assert best["overlap_blocks"] == {"device": 4, "host": 2, "disk": 1}
    assert best["new_tokens"] == 160 - 7 * BLOCK
    assert best["terms"]["overlap_credit"] == 4 + 0.75 * 2 + 0.25
    assert best["cost"] == decision.cost == pytest.approx(10 - 5.75 + 10)
    assert explanation["candidates"][2]["prefill_tokens"] == 320 - BLOCK
    assert make().select(request(), 0.0).explanation is None


def test_potential_loads_are_those_with_the_request_added():
    scheduler = make({ONE: Overlap(4)}, workers=(ONE, TWO))
    send(scheduler, TWO, "a", 320)
    assert scheduler.potential_loads(request(), 0.0) == [
        {
            "worker_id": 1,
            "dp_rank": 0,
            "potential_prefill_tokens": 96,
            "potential_decode_blocks": 10,
            "active_requests": 0,
        },
        {
            "worker_id": 2,
            "dp_rank": 0,
            "potential_prefill_tokens": 480,
            "potential_decode_blocks": 30,
            "active_requests": 1,
        },
    ]
    assert scheduler.load.bookings.keys() == {"a"}


# --- the life of a request


def test_a_worker_that_leaves_takes_its_requests_along():
    scheduler = make()
    send(scheduler, ONE, "a")
    send(scheduler, TWO, "b")
    assert scheduler.remove_worker(ONE) == ["a"]
    scheduler.prefill_done("a", 1.0)
    scheduler.free("a")
    scheduler.free("b")
    assert scheduler.load.idle


def test_a_leaked_booking_expires():
    scheduler = make(active_request_expiry_secs=10.0)
    send(scheduler, ONE, "old", now=0.0)
    send(scheduler, ONE, "new", now=8.0)
    assert scheduler.expire(11.0) == ["old"]
    assert list(scheduler.load.bookings) == ["new"]


def test_a_booking_can_be_made_of_a_decision_from_elsewhere():
    scheduler = make()
    decision = Decision(
        worker=TWO, overlap=Overlap(), new_tokens=9, cost=0, hit_rate=0, policy="pin", reason="told", candidates=1
    )
    scheduler.book(request(), decision, 0.0)
    assert scheduler.load.prefill_tokens == [0, 9, 0]


def test_an_empty_prompt_is_no_trouble():
    decision = make({ONE: Overlap(1)}).select(request(tokens=0), 0.0, explain=True)
    assert decision.hit_rate == 0.0


def test_two_thousand_workers_join_and_leave_at_once():
    keys = [WorkerKey(i) for i in range(2000)]
    scheduler = make({keys[1234]: Overlap(9)}, workers=keys)
    assert scheduler.select(request(), 0.0).worker == keys[1234]
    for key in keys[:-1]:
        scheduler.remove_worker(key)
    assert scheduler.select(request(), 0.0).worker == keys[-1]
