"""How a decode worker is chosen for a prompt that another worker has computed."""

import pytest

from dynamo.router.computed_elsewhere import COMPUTED_ELSEWHERE, computed_elsewhere
from dynamo.router.config import KvRouterConfig
from dynamo.router.policies import POLICIES
from dynamo.router.queue import RouterQueue
from dynamo.router.queue_profile import PolicyClass, QueueProfile, load_profile
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import Overlap, RouteRequest, RouterOverride, WorkerKey, WorkerLimits
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
