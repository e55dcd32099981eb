"""The default cost: what a request costs everybody, in tokens to compute."""

import random

import msgspec
import pytest

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router.active_load import ActiveLoad
from dynamo.router.config import DEFAULT_POLICY, KvRouterConfig
from dynamo.router.policies import make_policy
from dynamo.router.policies.marginal import CROWD, FAIR, HELD, NEW, OVER, MarginalCost
from dynamo.router.types import Prefilled, View, WorkerKey, WorkerLimits
from tests.router.test_policies import BLOCK, costs, view


def test_the_default_policy_is_one_that_there_is():
    assert make_policy(DEFAULT_POLICY, KvRouterConfig()).name == DEFAULT_POLICY


def test_uncached_tokens_count_twice_and_held_context_a_little():
    assert costs("marginal", [(100, 1, 5, 4), (0, 1, 4, 0)]) == [
        100 + NEW * 96 + HELD * BLOCK * 5,
        NEW * 160 + HELD * BLOCK * 4,
    ]


@pytest.mark.parametrize(("queued", "winner"), [(2 * 64 - 10, 0), (2 * 64 + 10, 1)])
def test_a_cached_prefix_is_worth_a_queue_of_twice_what_it_saves(queued, winner):
    found = costs("marginal", [(queued, 0, 0, 4), (0, 1, 0, 0)])
    assert found.index(min(found)) == winner


def test_a_prompt_for_which_there_is_no_room_waits_for_others_to_end():
    roomy, full = costs("marginal", [(0, 1, 990, 0), (0, 1, 995, 0)])  # of 1000 blocks; the prompt needs 10
    assert full - roomy == pytest.approx(5 * BLOCK * (HELD + OVER))


def test_blocks_that_others_hold_already_need_no_more_room():
    one = view([(0, 1, 995, 0), (0, 1, 995, 0)])
    shared = View(
        **{name: getattr(one, name) for name in one.__struct_fields__ if name != "shared"}, shared=[(8, (1,))]
    )
    without, with_shared = MarginalCost(KvRouterConfig()).costs(shared)
    assert without - with_shared == pytest.approx(5 * BLOCK * OVER)


def test_what_is_queued_shrinks_as_time_passes():
    policy = MarginalCost(KvRouterConfig())
    found = [policy.costs(view([(8000, 0, 0, 0)], now=now))[0] for now in (0.0, 0.4, 99.0)]
    assert found == [8000 + NEW * 160, pytest.approx(4000 + NEW * 160, rel=0.01), NEW * 160]


def test_context_that_requests_share_counts_for_each_that_reads_it():
    """The worker that holds the prefix of all takes no more than its share and a little."""
    load = ActiveLoad()
    for i in range(4):
        load.add_worker(WorkerKey(i), WorkerLimits(10_000, 8192, 64))
    for i in range(9):
        load.book(f"{i}", WorkerKey(0), sequence_hashes(range(100)), 0, 0.0)
        load.prefill_done(f"{i}")
    assert (load.decode_blocks[0], load.context_blocks[0]) == (100, 900)
    situation = msgspec.structs.replace(view([(0, 0, 0, 0)] * 4), fleet=load)
    crowded, *others = MarginalCost(KvRouterConfig()).costs(situation)
    assert crowded == pytest.approx(NEW * 160 + HELD * BLOCK * 100 + CROWD * BLOCK * (900 - FAIR * 900 / 4))
    assert others == [NEW * 160] * 3


def test_a_slow_worker_costs_more():
    rnd = random.Random(1)
    policy = MarginalCost(KvRouterConfig())
    for i in range(800):
        tokens = rnd.randrange(100, 20_000)
        token_s = 6e-4 if i % 4 == 3 else 2e-4
        policy.prefilled(Prefilled(WorkerKey(i % 4), tokens, 0, 0, 0, 0.05 + token_s * tokens))
    fast, _, _, slow = policy.costs(view([(500, 1, 5, 0)] * 4))
    assert slow > 1.1 * fast


def test_the_terms_add_up_to_the_cost():
    policy = MarginalCost(KvRouterConfig())
    situation = view([(3000, 2, 995, 4), (0, 0, 0, 0)], now=0.1)
    for position, cost in enumerate(policy.costs(situation)):
        terms = policy.terms(situation, position)
        total = terms["queued_tokens"] + NEW * terms["new_tokens"] + HELD * terms["held_tokens"]
        total += OVER * terms["tokens_without_room"] + CROWD * terms["crowded_tokens"]
        assert cost == pytest.approx(total, abs=1)
        assert terms["predicted_ttft_s"] > 0
