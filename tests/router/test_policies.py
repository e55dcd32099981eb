"""What each policy makes of a situation."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.router.active_load import ActiveLoad
from dynamo.router.config import KvRouterConfig
from dynamo.router.policies import POLICIES, make_policy
from dynamo.router.policies.predicted import PredictedLatency
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import (
    Decoded,
    Overlap,
    Prefilled,
    RouteRequest,
    RouterOverride,
    View,
    WorkerKey,
    WorkerLimits,
)

BLOCK = 16


def view(workers, tokens=160, override=None, batch=8192, now=0.0) -> View:
    """`workers`: (queued tokens, active requests past their prompt, blocks they hold, overlap) each."""
    load, overlaps = ActiveLoad(), {}
    for i, (queued, decoding, blocks, overlap) in enumerate(workers):
        key = WorkerKey(i)
        load.add_worker(key, WorkerLimits(1000, batch, 64))
        for j in range(decoding):
            load.book(f"{i}-{j}", key, (), 0, 0.0, private_blocks=blocks if j == 0 else 0)
            load.prefill_done(f"{i}-{j}")
        if queued:
            load.book(f"{i}-queued", key, (), queued, 0.0)
        if overlap:
            overlaps[i] = overlap if isinstance(overlap, Overlap) else Overlap(overlap)
    return View(
        fleet=load,
        request=RouteRequest(request_id="r", token_count=tokens, sequence_hashes=(), override=override),
        block_size=BLOCK,
        blocks=-(-tokens // BLOCK),
        held=[(overlap, (i,)) for i, overlap in overlaps.items()],
        shared=(),
        most_overlap=max((o.total for o in overlaps.values()), default=0),
        now=now,
    )


def costs(name, workers, config=None, **more) -> list[float]:
    return make_policy(name, KvRouterConfig(**(config or {}))).costs(view(workers, **more))


def test_an_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"router_policy must be one of linear, lmetric, marginal, predicted, sticky.*got 'best'"
    ):
        make_policy("best", KvRouterConfig())


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_prefers_the_holder_among_equals_and_the_idle_among_strangers(name):
    found = costs(name, [(0, 0, 0, 0), (0, 0, 0, 8), (0, 0, 0, 4)])
    assert found.index(min(found)) == 1
    found = costs(name, [(4000, 3, 40, 0), (0, 0, 0, 0), (2000, 1, 10, 0)])
    assert found.index(min(found)) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_explains_its_cost_and_knows_where_it_is_called_from(name):
    policy = make_policy(name, KvRouterConfig())
    assert policy.name == name
    terms = policy.terms(view([(100, 2, 5, 3)]), 0)
    assert terms
    assert all(isinstance(value, int | float) for value in terms.values())


# --- linear


def test_linear_adds_blocks_to_prefill_and_blocks_to_hold():
    assert costs("linear", [(32, 2, 7, 3)]) == [2 + 10 - 3 + 1 * 0 + 7 + 10]


def test_linear_weighs_tiers():
    assert costs("linear", [(0, 0, 0, Overlap(2, 4, 4))]) == [10 - 2 - 0.75 * 4 - 0.25 * 4 + 10]


def test_linear_scales_prefill_and_counts_requests():
    config = {"prefill_load_scale": 2.0, "decode_active_request_weight": 3.0}
    assert costs("linear", [(32, 2, 7, 3)], config) == [2 * (12 - 3) + 7 + 10 + 3 * 3]


def test_the_old_name_of_the_credit_wins():
    assert costs("linear", [(0, 0, 0, 4)], {"overlap_score_weight": 0.5}) == [10 - 2 + 10]


def test_linear_credit_never_makes_prefill_negative():
    assert costs("linear", [(0, 0, 0, 8)], {"overlap_score_credit": 2.0}) == [0 + 10]


def test_linear_credit_decays_with_the_queue_beyond_the_shortest():
    # one prompt's length (160 tokens) more than the least is queued at the first: its credit is halved
    found = costs("linear", [(200, 0, 0, 8), (40, 0, 0, 8)], {"overlap_score_credit_decay": 1.0})
    assert found == [12.5 + 10 - 4 + 10, 2.5 + 10 - 8 + 10]


def test_linear_takes_every_weight_of_an_override():
    override = RouterOverride(
        overlap_score_credit=0.5,
        overlap_score_credit_decay=1.0,
        prefill_load_scale=2.0,
        decode_active_request_weight=1.0,
    )
    assert costs("linear", [(0, 1, 5, 4)], override=override) == [2 * (10 - 2) + 15 + 1]


# --- lmetric


def test_lmetric_multiplies_prefill_and_batch():
    assert costs("lmetric", [(100, 2, 5, 0), (100, 0, 5, 4)]) == [260 * 4, (100 + 96) * 2]


# --- sticky


def test_sticky_stays_while_the_holder_keeps_up():
    found = costs("sticky", [(3000, 5, 50, 9), (0, 0, 0, 0)], batch=1000)
    assert found[0] < found[1]


def test_sticky_leaves_a_saturated_holder():
    found = costs("sticky", [(4000, 5, 50, 9), (0, 0, 0, 0)], batch=1000)
    assert found[0] > found[1]


def test_sticky_takes_a_small_hit_for_none():
    found = costs("sticky", [(50, 0, 0, 2), (0, 0, 0, 0)])
    assert found == [50 + 128, 160]


# --- predicted


def learnt(observations=(), config=None) -> PredictedLatency:
    policy = PredictedLatency(KvRouterConfig(**(config or {})))
    for worker, tokens, ttft_s in observations:
        policy.prefilled(Prefilled(WorkerKey(worker), tokens, 0, 0, 0, ttft_s))
    return policy


def engine(rnd, worker, token_s=2e-4, height_s=0.05, noise=0.1):
    """A prompt's length and how long an engine of that speed takes."""
    tokens = rnd.randrange(100, 20_000)
    return worker, tokens, (height_s + token_s * tokens) * rnd.uniform(1 - noise, 1 + noise)


def test_before_anything_is_learnt_an_ordinary_gpu_is_assumed():
    policy = learnt()
    assert policy.first_token.at(0) == pytest.approx(0.03)
    assert policy.first_token.at(8192) == pytest.approx(0.85)


def test_the_speed_of_prefill_is_learnt_from_a_hundred_requests():
    rnd = random.Random(1)
    policy = learnt(engine(rnd, i % 4) for i in range(100))
    for tokens in (5000, 10_000, 20_000):
        assert policy.first_token.at(tokens) == pytest.approx(0.05 + 2e-4 * tokens, rel=0.1)


def test_a_change_of_speed_is_learnt():
    rnd = random.Random(1)
    policy = learnt([*(engine(rnd, 0) for _ in range(500)), *(engine(rnd, 0, 1e-3) for _ in range(600))])
    assert policy.first_token.at(10_000) == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("ttft_s", [float("nan"), float("inf"), -1.0, -float("inf")])
def test_times_that_cannot_be_are_counted_and_not_learnt(ttft_s):
    policy = learnt([(0, 1000, ttft_s)] * 100)
    assert policy.ignored == 100
    assert policy.first_token.at(8192) == pytest.approx(0.85)
    assert not math.isnan(policy.costs(view([(100, 1, 5, 0)]))[0])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-10, 10**12), st.floats()), max_size=80))
@settings(deadline=None)
def test_no_observations_make_costs_anything_but_finite_and_above_zero(observations):
    policy = learnt(observations)
    for worker, tokens, seconds in observations:
        policy.decoded(Decoded(WorkerKey(worker), tokens, seconds, 3, 5))
    found = policy.costs(view([(100, 1, 5, 0), (0, 0, 0, 9), (10**6, 50, 500, 1)], now=1e6))
    assert all(math.isfinite(cost) and cost > 0 for cost in found)


def test_an_outlier_now_and_then_changes_little():
    rnd = random.Random(1)
    policy = learnt((0, 1000, 3600.0) if i % 20 == 19 else engine(rnd, 0) for i in range(400))
    assert policy.first_token.at(10_000) == pytest.approx(2.05, rel=0.25)


def test_workers_alike_keep_the_pace_of_all():
    rnd = random.Random(1)
    policy = learnt(engine(rnd, i % 4, noise=0.3) for i in range(800))
    found = policy.costs(view([(500, 1, 5, 0)] * 4))
    assert len(set(found)) == 1


def test_a_worker_three_times_slower_costs_more():
    rnd = random.Random(1)
    policy = learnt(engine(rnd, i % 4, 6e-4 if i % 4 == 3 else 2e-4) for i in range(800))
    fast, _, _, slow = policy.costs(view([(500, 1, 5, 0)] * 4))
    assert 1.1 < slow / fast < 3
    policy.forget(WorkerKey(3))
    found = policy.costs(view([(500, 1, 5, 0)] * 4))
    assert found[3] == pytest.approx(found[0], rel=0.05)


def test_a_worker_that_decodes_slowly_costs_more():
    policy = learnt()
    for i in range(400):
        policy.decoded(Decoded(WorkerKey(i % 4), 101, 1.0 if i % 4 < 3 else 8.0, 4, 100))
    fast, _, _, slow = policy.costs(view([(500, 1, 5, 0)] * 4))
    assert slow > 1.3 * fast
    assert policy.terms(view([(500, 1, 5, 0)] * 4), 3)["decode_pace"] > 1.3


def test_what_is_queued_shrinks_with_time_until_the_oldest_prompt_is_done():
    policy = learnt()
    terms = [policy.terms(view([(8000, 0, 0, 0)], now=now), 0)["queued_tokens"] for now in (0.0, 0.4, 0.8, 99.0)]
    assert terms == [8000, pytest.approx(4000, rel=0.01), pytest.approx(0, abs=50), 0]
    first, later = (policy.costs(view([(8000, 0, 0, 0)], now=now))[0] for now in (0.0, 99.0))
    assert later == pytest.approx(first * 160 / 8160)


def test_a_batch_of_sixteen_doubles_the_cost():
    found = costs("predicted", [(0, 0, 0, 0), (0, 16, 0, 0)])
    assert found[1] == pytest.approx(2 * found[0])


def test_cached_tokens_take_no_time():
    found = costs("predicted", [(0, 0, 0, 0), (0, 0, 0, 5)])
    assert found[1] == pytest.approx(found[0] / 2)
    found = costs("predicted", [(320, 3, 0, 0), (320, 3, 0, 5)])
    assert found[1] == pytest.approx(found[0] * 400 / 480)


def test_a_scheduler_with_a_learning_policy_tells_it_how_requests_fared():
    policy = learnt()
    scheduler = KvScheduler(BLOCK, KvRouterConfig(), NobodyHolds(), policy=policy)
    scheduler.add_worker(WorkerKey(1))
    told: list[object] = []
    policy.prefilled = policy.decoded = told.append
    for name, now in (("a", 0.0), ("b", 1.0)):
        request = RouteRequest(request_id=name, token_count=160, sequence_hashes=[])
        scheduler.book(request, scheduler.select(request, now), now)
    scheduler.prefill_done("a", 2.0)
    scheduler.prefill_done("a", 3.0)
    scheduler.free("b")
    scheduler.free("a", 4.0, 21)
    assert told == [Prefilled(WorkerKey(1), 160, 0, 0, 0, 2.0), Decoded(WorkerKey(1), 21, 2.0, 1, 10)]


def test_a_policy_learns_from_a_hundred_requests_a_second_at_most():
    policy = learnt()
    scheduler = KvScheduler(BLOCK, KvRouterConfig(), NobodyHolds(), policy=policy)
    scheduler.add_worker(WorkerKey(1))
    told: list[object] = []
    policy.prefilled = told.append
    for i in range(1000):
        request = RouteRequest(request_id=str(i), token_count=160, sequence_hashes=[])
        scheduler.book(request, scheduler.select(request, i / 1000), i / 1000)
        scheduler.prefill_done(str(i), i / 1000 + 0.1)
    assert 90 <= len(told) <= 100


class NobodyHolds:
    """An index of nothing."""

    def find(self, sequence_hashes, now):
        return {}
