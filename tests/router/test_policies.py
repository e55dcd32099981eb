"""What each policy makes of a situation."""

import pytest

from dynamo.router.active_load import ActiveLoad
from dynamo.router.config import KvRouterConfig
from dynamo.router.policies import POLICIES, make_policy
from dynamo.router.types import Overlap, RouteRequest, RouterOverride, View, WorkerKey, WorkerLimits

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
        overlaps=overlaps,
        shared_blocks={},
        most_overlap=max((o.total for o in overlaps.values()), default=0),
        now=now,
    )


def costs(name, workers, config=None, **more) -> list[float]:
    return make_policy(name, KvRouterConfig(**(config or {}))).costs(view(workers, **more))


def test_an_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="router_policy must be one of linear, lmetric, sticky.*got 'best'"):
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
