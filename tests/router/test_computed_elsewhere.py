"""How a decode worker is chosen for a prompt that another worker has computed."""

from typing import Any

import pytest

from dynamo.router.computed_elsewhere import COMPUTED_ELSEWHERE, computed_elsewhere
from dynamo.router.config import KvRouterConfig
from dynamo.router.journey import Journey
from dynamo.router.policies import POLICIES
from dynamo.router.queue import RouterQueue
from dynamo.router.queue_profile import PolicyClass, QueueProfile, load_profile
from dynamo.router.scheduler import KvScheduler
from dynamo.router.transfer_time import REPORT, TransferTime
from dynamo.router.types import Decision, Overlap, RouteRequest, RouterOverride, WorkerKey, WorkerLimits
from dynamo.runtime.errors import RouterQueueLimitExceeded

ONE, TWO = WorkerKey(1), WorkerKey(2)


class HeldByOne:
    """Worker one holds all of every prompt."""

    def find(self, sequence_hashes, now) -> dict[WorkerKey, Overlap]:
        return {ONE: Overlap(device=len(sequence_hashes))}


def queue(profile: QueueProfile | None = None, **settings) -> RouterQueue:
    config = KvRouterConfig(**settings)
    scheduler = KvScheduler(16, config, HeldByOne())
    for worker in (ONE, TWO):
        scheduler.add_worker(worker, WorkerLimits(1000, 1000, 64))
    return RouterQueue(scheduler, profile or load_profile(config))


def request(name: str = "r", **more) -> RouteRequest:
    return RouteRequest(request_id=name, token_count=160, sequence_hashes=list(range(10)), **more)


def computed(**more) -> RouteRequest:
    made = request("computed", **more)
    computed_elsewhere(made)
    return made


def test_its_settings_are_those_that_users_know():
    assert computed().override == RouterOverride(
        overlap_score_credit=0, assume_kv_reuse=False, track_prefill_tokens=False
    )
    assert computed().override is COMPUTED_ELSEWHERE


def test_what_the_client_said_holds():
    own = RouterOverride(router_temperature=0.5, assume_kv_reuse=True)
    assert computed(override=own).override == RouterOverride(
        overlap_score_credit=0, router_temperature=0.5, assume_kv_reuse=True, track_prefill_tokens=False
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_load_alone_decides_whatever_the_policy(policy: str):
    scheduler = queue(router_policy=policy).scheduler
    busy = request("busy")  # so little load that what is cached outweighs it
    scheduler.book(busy, scheduler.select(request(allowed=frozenset((ONE,))), 0.0), 0.0)
    assert scheduler.select(request(), 0.0).worker == ONE
    assert scheduler.select(computed(), 0.0).worker == TWO


def test_a_clients_own_credit_lets_caches_count():
    scheduler = queue(router_policy="linear").scheduler
    assert scheduler.select(computed(override=RouterOverride(overlap_score_credit=1)), 0.0).worker == ONE


def test_it_is_booked_as_if_nothing_were_to_be_computed_or_shared():
    scheduler = queue().scheduler
    for name in ("one", "two"):
        made = request(name)
        computed_elsewhere(made)
        scheduler.book(made, scheduler.select(request(allowed=frozenset((TWO,))), 0.0), 0.0)
    at = scheduler.load.position[TWO]
    assert (scheduler.load.prefill_tokens[at], scheduler.load.decode_blocks[at]) == (0, 20)


def test_it_waits_where_others_are_refused_as_its_client_has_seen_a_token():
    none = PolicyClass(prefill_busy_threshold=10, request_queue_limit_per_worker=0)
    line = queue(QueueProfile([none], "default", [(0, "all")]))
    for number, worker in enumerate((ONE, TWO)):
        busy = request(f"busy {number}", allowed=frozenset((worker,)))
        busy.sequence_hashes = []
        line.scheduler.book(busy, line.scheduler.select(busy, 0.0), 0.0)
    errors: list[Exception] = []
    line.route(request(), 0.0, lambda decision: pytest.fail("it was let go"), errors.append)
    assert isinstance(errors.pop(), RouterQueueLimitExceeded)
    went: list[WorkerKey] = []
    line.route(computed(), 0.0, lambda decision: went.append(decision.worker), errors.append)
    assert (went, errors, line.pending) == ([], [], 1)
    line.scheduler.free("busy 1", 1.0)
    line.pump(1.0)
    assert went == [TWO]


# --- the way of its KV

EAST, RACK = "dynamo.topology/zone=east", "dynamo.topology/rack=7"


def seconds(tokens: int, places: int) -> float:
    """A millisecond a token, half of that in the same zone, a tenth in the same rack."""
    return tokens * (0.001, 0.0005, 0.0001)[places]


def travelling(scheduler: KvScheduler, *places: str, token_s: float = 0.0001, **more) -> Decision:
    made = computed(**more)
    made.journey = Journey(frozenset(places), seconds, token_s)
    return scheduler.select(made, 0.0, explain=True)


def by_worker(decision: Decision) -> dict[int, dict[str, Any]]:
    assert decision.explanation is not None
    return {each["worker_id"]: each for each in decision.explanation["candidates"]}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_that_holds_the_prompt_is_preferred_as_it_need_not_fetch_it(policy: str):
    scheduler = queue(router_policy=policy).scheduler
    decision = travelling(scheduler)
    assert decision.worker == ONE
    found = by_worker(decision)
    assert found[1]["transfer"] == {"held_blocks": 10, "tokens": 1, "ms": 1.0, "places_in_common": []}
    assert found[2]["transfer"] == {"held_blocks": 0, "tokens": 160, "ms": 160.0, "places_in_common": []}
    assert found[1]["cost"] < found[2]["cost"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_way_that_takes_no_time_leaves_the_choice_to_load(policy: str):
    scheduler = queue(router_policy=policy).scheduler
    busy = request("busy")
    scheduler.book(busy, scheduler.select(request(allowed=frozenset((ONE,))), 0.0), 0.0)
    assert travelling(scheduler, token_s=1e9).worker == TWO


@pytest.mark.parametrize("policy", POLICIES)
def test_a_near_worker_is_preferred_as_its_way_is_shorter(policy: str):
    scheduler = queue(router_policy=policy).scheduler
    far, near, next_door = (WorkerKey(id_) for id_ in (3, 4, 5))
    for worker, taints in ((far, ()), (near, (EAST,)), (next_door, (EAST, RACK))):
        scheduler.add_worker(worker, WorkerLimits(1000, 1000, 64, frozenset(taints)))
    some = frozenset((far, near, next_door))
    assert travelling(scheduler, EAST, RACK, allowed=some).worker == next_door
    assert travelling(scheduler, EAST, RACK, allowed=some - {next_door}).worker == near
    found = by_worker(travelling(scheduler, EAST, RACK, allowed=some))
    assert [found[id_]["transfer"]["ms"] for id_ in (3, 4, 5)] == [160.0, 80.0, 16.0]
    assert found[5]["transfer"]["places_in_common"] == [RACK, EAST]


def test_what_is_held_far_away_and_little_that_is_near_are_weighed_by_time():
    scheduler = queue().scheduler  # worker one holds all, and needs 1 ms for the last token
    near = WorkerKey(3)
    scheduler.add_worker(near, WorkerLimits(1000, 1000, 64, frozenset((EAST,))))
    assert travelling(scheduler, EAST).worker == ONE
    assert travelling(scheduler, EAST, allowed=frozenset((TWO, near))).worker == near


def test_a_client_that_gives_credit_itself_is_followed():
    scheduler = queue(router_policy="linear").scheduler
    made = computed(override=RouterOverride(overlap_score_credit=1))
    made.journey = Journey(frozenset(), lambda tokens, places: 1e6 / tokens, 0.001)  # speaks for the other one
    assert scheduler.select(made, 0.0).worker == ONE


def test_ways_are_learnt_by_their_distance():
    times = TransferTime()
    for tokens in range(100, 1100, 50):
        times.see({REPORT: {"tokens": tokens, "seconds": 0.001 + tokens * 1e-6}}, 1)
        times.see({REPORT: {"tokens": tokens, "seconds": 0.001 + tokens * 1e-4}}, 0)
    assert times.seconds(1000, 1) < 0.01 < 0.05 < times.seconds(1000, 0)
    assert times.seconds(1000, 1) < times.seconds(1000) < times.seconds(1000, 0)
    assert times.seconds(1000, 2) == times.seconds(1000)  # nothing is known of that
    assert times.facts()["by_places_in_common"].keys() == {"0", "1"}
