"""The index that notes what was sent where, against a naive one that keeps a time for each block."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router import approximate as module
from dynamo.router.approximate import ApproximateIndex, PredictingIndex
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import Overlap, WorkerKey

ONE, TWO = WorkerKey(1), WorkerKey(2)
TTL_S = 10.0
CAPACITY = 6


class Naive:
    """When each block of each worker was last used."""

    def __init__(self, ttl_s, capacity) -> None:
        self.ttl_s, self.capacity = ttl_s, capacity
        self.used = {ONE: {}, TWO: {}}

    def routed(self, worker, seqs, now) -> None:
        self.expire(now)
        used = self.used[worker]
        used.update({seq: (now, -depth) for depth, seq in enumerate(seqs)})
        if self.capacity:
            for seq in sorted(used, key=used.get)[: max(0, len(used) - self.capacity)]:
                del used[seq]

    def expire(self, now) -> None:
        if self.ttl_s is not None:
            for used in self.used.values():
                for seq in [seq for seq, (at, _) in used.items() if at + self.ttl_s <= now]:
                    del used[seq]

    def find(self, seqs, now) -> dict:
        self.expire(now)
        lengths = {
            worker: next((i for i, seq in enumerate(seqs) if seq not in used), len(seqs))
            for worker, used in self.used.items()
        }
        return {worker: Overlap(length) for worker, length in lengths.items() if length}


paths = st.lists(st.integers(1, 2), min_size=1, max_size=5)
routes = st.lists(st.tuples(st.sampled_from([ONE, TWO]), paths, st.integers(1, 5)), max_size=30)


@pytest.mark.parametrize(("ttl_s", "capacity"), [(TTL_S, None), (None, CAPACITY), (TTL_S, CAPACITY)])
def test_blocks_last_as_long_as_they_are_young_and_there_is_room(ttl_s, capacity):
    @settings(max_examples=200, deadline=None)
    @given(routes=routes, asked=st.lists(paths, min_size=1, max_size=4))
    def run(routes, asked):
        index, naive, now = ApproximateIndex(ttl_s), Naive(ttl_s, capacity), 0.0
        for worker in (ONE, TWO):
            index.set_capacity(worker, capacity)
        for worker, path, pause in routes:
            now += pause
            index.routed(worker, sequence_hashes(path), now)
            naive.routed(worker, sequence_hashes(path), now)
            for other in asked:
                assert index.find(sequence_hashes(other), now) == naive.find(sequence_hashes(other), now)
            assert {w: index.blocks(w) for w in (ONE, TWO)} == {w: len(used) for w, used in naive.used.items()}
        if ttl_s is not None:
            index.expire(now + ttl_s)
            assert len(index) == 0
            assert not index._due

    run()


def test_a_prompt_that_is_used_again_lasts_from_then_on():
    index, seqs = ApproximateIndex(TTL_S), sequence_hashes([1, 2, 3])
    index.routed(ONE, seqs, 0.0)
    index.routed(ONE, seqs[:2], 6.0)
    assert index.find(seqs, 9.9) == {ONE: Overlap(3)}
    assert index.find(seqs, 10.0) == {ONE: Overlap(2)}
    assert index.find(seqs, 16.0) == {}


def test_an_expiry_of_much_takes_several_calls(monkeypatch):
    monkeypatch.setattr(module, "FORGOTTEN_AT_ONCE", 100)
    index = ApproximateIndex(TTL_S)
    for i in range(10):
        index.routed(ONE, sequence_hashes([i, *range(99)]), 0.0)
    calls = 0
    while len(index):
        before = len(index)
        index.expire(TTL_S)
        assert before - len(index) <= 100
        calls += 1
    assert calls == 11  # an end counts as one


def test_a_worker_that_leaves_takes_its_blocks():
    index, seqs = ApproximateIndex(TTL_S), sequence_hashes([1, 2, 3])
    index.routed(ONE, seqs, 0.0)
    index.routed(TWO, seqs[:1], 0.0)
    index.remove_worker(ONE)
    assert index.find(seqs, 1.0) == {TWO: Overlap(1)}
    assert index.find(seqs, TTL_S) == {}
    index.routed(ONE, seqs, 20.0)
    assert index.find(seqs, 20.0) == {ONE: Overlap(3)}


def test_a_worker_of_unknown_size_holds_a_bounded_number(monkeypatch):
    monkeypatch.setattr(module, "DEFAULT_CAPACITY", 50)
    index = ApproximateIndex(None)
    for i in range(30):
        index.routed(ONE, sequence_hashes([i, *range(9)]), 0.0)
    assert index.blocks(ONE) == 50
    assert index.find(sequence_hashes([29, *range(9)]), 0.0) == {ONE: Overlap(10)}
    index.set_capacity(ONE, 5)
    assert index.blocks(ONE) == 5


def test_no_prompt_and_no_time_to_live():
    with pytest.raises(ValueError, match="ttl_s: 0 must be above 0"):
        ApproximateIndex(0)
    index = ApproximateIndex()
    index.routed(ONE, [], 0.0)
    assert index.find([], 0.0) == {}


@pytest.mark.parametrize(
    ("real", "predicted", "expected"),
    [
        ((4, 0, 0), 2, Overlap(4)),
        ((2, 0, 0), 4, Overlap(4)),
        ((0, 0, 0), 3, Overlap(3)),
        ((1, 2, 1), 2, Overlap(2, 1, 1)),
        ((1, 1, 1), 3, Overlap(3)),
        ((1, 1, 2), 3, Overlap(3, 0, 1)),
    ],
)
def test_a_prediction_counts_where_it_is_more_than_what_is_known(real, predicted, expected):
    index = PredictingIndex(TierIndex(), ApproximateIndex(TTL_S))
    path = [1, 2, 3, 4, 5, 6]
    seqs = sequence_hashes(path)
    device, host, disk = real
    index.real.index.hold(ONE, seqs[:device])
    for tier, end in (("host_pinned", device + host), ("disk", device + host + disk)):
        if end > device:
            index.real.index.hold(index.real._lower_tier(ONE, tier), seqs[:end])
    index.routed(ONE, seqs[:predicted], 0.0)
    index.routed(TWO, seqs[:1], 0.0)
    assert index.find(seqs, 1.0) == {ONE: expected, TWO: Overlap(1)}
    index.remove_worker(ONE)
    index.remove_worker(TWO)
    assert index.find(seqs, 1.0) == ({ONE: Overlap(*real)} if any(real) else {})
