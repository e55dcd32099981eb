"""Tiers: a prompt's start on the device, then what host memory and disk add to it; and the account of it all."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.llm.block_hash import sequence_hashes
from dynamo.llm.kv_events import KvEventData, Removed, Stored, StoredBlock
from dynamo.router.tier_index import LOWER_TIERS, Outcome, TierIndex
from dynamo.router.types import Overlap, WorkerKey
from tests.router.index_model import entered

WORKERS = (WorkerKey(1), WorkerKey(1, 1), WorkerKey(2))
TIERS = ("device", *LOWER_TIERS)
ONE, TWO = WorkerKey(1), WorkerKey(2)


def stored(names, local_hashes, parent=None) -> KvEventData:
    return KvEventData(stored=Stored([StoredBlock(*pair) for pair in zip(names, local_hashes, strict=True)], parent))


def removed(*names) -> KvEventData:
    return KvEventData(removed=Removed(list(names)))


class NaiveTiers:
    """Names of blocks by worker and tier; a parent may be on any tier of the worker."""

    def __init__(self) -> None:
        self.held = {(worker, tier): {} for worker in WORKERS for tier in TIERS}

    def apply(self, worker, tier, data) -> None:
        known = self.held[worker, tier]
        if data.stored:
            parent = data.stored.parent_hash
            places = [known, *(self.held[worker, other] for other in TIERS)]
            above = next((place[parent] for place in places if parent in place), None)
            if parent is not None and above is None:
                return
            contents = [block.tokens_hash for block in data.stored.blocks]
            for block, seq in zip(data.stored.blocks, sequence_hashes(contents, above), strict=True):
                known[block.block_hash] = seq
        elif data.removed:
            for name in data.removed.block_hashes:
                known.pop(name, None)
        else:
            known.clear()

    def find(self, sequence) -> dict:
        found = {}
        for worker in WORKERS:
            lengths, at = [], 0
            for tier in TIERS:
                blocks = set(self.held[worker, tier].values())
                start = at
                while at < len(sequence) and sequence[at] in blocks:
                    at += 1
                lengths.append(at - start)
            if at:
                found[worker] = Overlap(lengths[0], lengths[1], lengths[2] + lengths[3])
        return found


names = st.integers(1, 8)
locals_ = st.lists(st.integers(1, 2), min_size=1, max_size=5)


@st.composite
def change(draw):
    kind = draw(st.sampled_from(["store", "store", "store", "own", "remove", "remove", "clear"]))
    where = draw(st.sampled_from(WORKERS)), draw(st.sampled_from(TIERS))
    if kind == "store":
        path = draw(locals_)
        called = draw(st.lists(names, min_size=len(path), max_size=len(path)))
        return *where, stored(called, path, draw(st.none() | names))
    if kind == "own":
        path = draw(locals_)
        return *where, stored(sequence_hashes(path), path)
    if kind == "remove":
        return *where, removed(*draw(st.lists(names | st.sampled_from(sequence_hashes([1, 2, 1])), max_size=3)))
    return *where, KvEventData(cleared=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=st.lists(change(), max_size=25), paths=st.lists(locals_, min_size=1, max_size=5))
def test_any_stream_on_any_tiers_ends_where_a_naive_index_does_and_can_be_told_on(events, paths):
    index, naive = TierIndex(keep_contents=True), NaiveTiers()
    for worker, tier, data in events:
        index.apply(worker, tier, data)
        naive.apply(worker, tier, data)
        for path in paths:
            sequence = sequence_hashes(path)
            assert index.find(sequence) == naive.find(sequence)
    copy = TierIndex()
    for worker in WORKERS:
        for tier, data in index.dump(worker):
            assert copy.apply(worker, tier, data) in (Outcome.OK, Outcome.DUPLICATE)  # the latter: one more name
        assert copy.blocks(worker) == index.blocks(worker)
        for tier in TIERS:  # what is removed by any of its names is gone from both
            for name in naive.held[worker, tier]:
                assert copy.apply(worker, tier, removed(name)) is Outcome.OK
    assert len(copy) == 0


def test_host_memory_extends_the_device_and_disk_extends_both():
    index, path = TierIndex(), [1, 2, 3, 4, 5, 6]
    seqs = sequence_hashes(path)
    index.apply(ONE, "device", stored(seqs[:2], path[:2]))
    index.apply(ONE, "host_pinned", stored(seqs[:4], path[:4]))
    index.apply(ONE, "disk", stored(seqs, path))
    index.apply(TWO, "host_pinned", stored(seqs[:3], path[:3]))
    assert index.find(seqs) == {ONE: Overlap(2, 2, 2), TWO: Overlap(0, 3, 0)}
    assert index.find(seqs[:3]) == {ONE: Overlap(2, 1, 0), TWO: Overlap(0, 3, 0)}


def test_what_moved_to_host_memory_finds_the_parent_it_left_on_the_device():
    index, path = TierIndex(), [1, 2, 3, 4]
    seqs = sequence_hashes(path)
    index.apply(ONE, "device", stored(seqs, path))
    assert index.apply(ONE, "host_pinned", stored(seqs[2:], path[2:], seqs[1])) is Outcome.OK
    index.apply(ONE, "device", removed(*seqs[:1:-1]))
    assert index.find(seqs) == {ONE: Overlap(2, 2, 0)}
    assert index.blocks(ONE) == {"device": 2, "host_pinned": 2}


def test_clearing_a_tier_leaves_the_others():
    index, path = TierIndex(), [1, 2]
    seqs = sequence_hashes(path)
    for tier in ("device", "host_pinned"):
        index.apply(ONE, tier, stored(seqs, path))
    index.apply(ONE, "device", KvEventData(cleared=True))
    assert index.find(seqs) == {ONE: Overlap(0, 2, 0)}
    index.apply(ONE, "host_pinned", KvEventData(cleared=True))
    assert index.find(seqs) == {}
    index.apply(ONE, "device", stored(seqs, path))
    assert index.find(seqs) == {ONE: Overlap(2, 0, 0)}


def test_a_rank_that_leaves_takes_its_blocks_and_no_others():
    index, path = TierIndex(), [1, 2]
    seqs = sequence_hashes(path)
    for worker in WORKERS:
        index.apply(worker, "device", stored(seqs, path))
        index.apply(worker, "disk", stored(seqs, path))
    index.remove_worker(ONE)
    assert set(index.find(seqs)) == {WorkerKey(1, 1), TWO}
    assert ONE not in index.workers()
    assert index.blocks(ONE) == {}


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (stored([1], [1]), Outcome.OK),
        (stored([9], [9]), Outcome.DUPLICATE),
        (stored([1], [1], 77), Outcome.UNKNOWN_PARENT),
        (stored([1], [-1]), Outcome.INVALID),
        (removed(9), Outcome.OK),
        (removed(9, 8), Outcome.UNKNOWN_BLOCK),
        (KvEventData(cleared=True), Outcome.OK),
        (KvEventData(), Outcome.INVALID),
    ],
)
def test_every_event_has_an_outcome(data, outcome):
    index = TierIndex()
    index.apply(ONE, "device", stored([9], [9]))
    assert index.apply(ONE, "device", data) is outcome


def test_a_long_run_is_told_in_several_events():
    index, path = TierIndex(keep_contents=True), list(range(3000))
    index.apply(ONE, "device", stored(sequence_hashes(path), path))
    sizes = [len(data.stored.blocks) for _, data in index.dump(ONE)]
    assert sizes == [1024, 1024, 952]


def test_a_dump_is_of_its_moment():
    index, path = TierIndex(keep_contents=True), [1, 2, 3]
    index.apply(ONE, "device", stored(sequence_hashes(path), path))
    dump = index.dump(ONE)
    index.clear(ONE)
    assert len(list(dump)) == 1


def test_two_thousand_workers_that_join_and_leave_at_once_leave_nothing_behind():
    index, path = TierIndex(), list(range(40))
    seqs = sequence_hashes(path)
    for _ in range(2):
        for i in range(2000):
            worker, length = WorkerKey(i), 20 + i % 20
            index.apply(worker, "device", stored(seqs[:length], path[:length]))
            own = [*path[:20], 10_000 + i]
            index.apply(worker, "device", stored(sequence_hashes(own)[20:], own[20:], seqs[19]))
        found = index.find(seqs)
        assert len(found) == 2000
        assert found[WorkerKey(7)] == Overlap(27)
        for i in range(2000):
            index.remove_worker(WorkerKey(i))
        assert index.find(seqs) == {}
        assert len(index) == 0
    while index.sweep(10_000):
        pass
    assert not entered(index.index)
    assert not index.workers()
