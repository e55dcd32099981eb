"""The book of active requests against a naive one, and that it ends where it began."""

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router.active_load import ActiveLoad, Foreign
from dynamo.router.types import WorkerKey, WorkerLimits

KEYS = [WorkerKey(1), WorkerKey(1, 1), WorkerKey(2), WorkerKey(3)]
COLUMNS = ("prefill_tokens", "prefill_requests", "decode_blocks", "context_blocks", "requests", "oldest_prefill")


class NaiveLoad:
    """The same numbers, summed over open bookings each time."""

    def __init__(self) -> None:
        self.open: dict[str, dict] = {}

    def numbers(self, worker: WorkerKey) -> dict[str, int]:
        here = [booking for booking in self.open.values() if booking["worker"] == worker]
        held = {block for booking in here for block in booking["path"]}
        waiting = [booking for booking in here if booking["prefilling"]]
        return {
            "prefill_tokens": sum(booking["tokens"] for booking in waiting),
            "prefill_requests": len(waiting),
            "decode_blocks": len(held) + sum(booking["private"] for booking in here),
            "context_blocks": sum(len(booking["path"]) + booking["private"] for booking in here),
            "requests": len(here),
            "oldest_prefill": waiting[0]["tokens"] if waiting else 0,
        }

    def shared(self, worker: WorkerKey, path: list[int]) -> int:
        held = {block for booking in self.open.values() if booking["worker"] == worker for block in booking["path"]}
        return next((i for i, block in enumerate(path) if block not in held), len(path))


ids = st.integers(0, 7).map(str)
paths = st.lists(st.integers(1, 3), max_size=6).map(sequence_hashes)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("book"), ids, st.sampled_from(KEYS), paths, st.integers(0, 50), st.integers(0, 2)),
        st.tuples(st.just("book"), ids, st.sampled_from(KEYS), paths, st.integers(0, 50), st.integers(0, 2)),
        st.tuples(st.sampled_from(["prefill_done", "output_block", "free", "free"]), ids),
        st.tuples(st.sampled_from(["join", "leave"]), st.sampled_from(KEYS)),
    ),
    max_size=60,
)


def apply(load: ActiveLoad, naive: NaiveLoad, step) -> None:
    kind, first, *rest = step
    if kind == "join":
        load.add_worker(first)
    elif kind == "leave":
        gone = [name for name, booking in naive.open.items() if booking["worker"] == first]
        assert load.remove_worker(first) == gone
        for name in gone:
            del naive.open[name]
    elif kind == "book":
        worker, path, tokens, private = rest
        if worker not in load.position or first in naive.open:
            with pytest.raises(KeyError):
                load.book(first, worker, path, tokens, 0.0)
            return
        load.book(first, worker, path, tokens, 0.0, private_blocks=private)
        naive.open[first] = {"worker": worker, "path": path, "tokens": tokens, "private": private, "prefilling": True}
    else:
        getattr(load, kind)(first)
        booking = naive.open.get(first)
        if booking is not None:
            if kind == "prefill_done":
                booking["prefilling"] = False
            elif kind == "output_block":
                booking["private"] += 1
            else:
                del naive.open[first]


def shared_by_position(load: ActiveLoad, path: list[int]) -> dict[int, int]:
    shared: dict[int, int] = {}
    for blocks, positions in load.shared_blocks(path):
        assert blocks
        assert not shared or set(positions) < shared.keys()
        shared.update(dict.fromkeys(positions, blocks))
    return shared


def check(load: ActiveLoad, naive: NaiveLoad, path: list[int]) -> None:
    shared = shared_by_position(load, path)
    for worker, position in load.position.items():
        assert load.workers[position] == worker
        numbers = naive.numbers(worker)
        assert {name: getattr(load, name)[position] for name in COLUMNS} == numbers
        assert shared.get(position, 0) == naive.shared(worker, path)


@given(steps, paths)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_history_gives_the_sums_over_open_bookings(steps, path):
    load, naive = ActiveLoad(), NaiveLoad()
    for worker in KEYS[:3]:
        load.add_worker(worker)
    for step in steps:
        apply(load, naive, step)
        check(load, naive, path)
    for name in list(naive.open):
        load.free(name)
    assert_zero(load)


def assert_zero(load: ActiveLoad) -> None:
    assert load.idle
    for name in COLUMNS:
        assert not any(getattr(load, name)), name


def test_nothing_is_left_after_ten_thousand_requests_in_bad_weather():
    rnd = random.Random(7)
    load, open_ids, fates = ActiveLoad(), [], Counter()
    workers = [WorkerKey(i, rank) for i in range(8) for rank in range(2)]
    for worker in workers:
        load.add_worker(worker, WorkerLimits(1000))
    systems = [[rnd.getrandbits(64) for _ in range(20)] for _ in range(4)]
    for i in range(10_000):
        name = f"request-{i}"
        path = sequence_hashes(rnd.choice(systems)[: rnd.randrange(21)] + [rnd.getrandbits(3) for _ in range(5)])
        load.book(name, rnd.choice(load.workers), path, rnd.randrange(2000), i / 100, private_blocks=rnd.randrange(2))
        open_ids.append(name)
        if rnd.random() < 0.7:
            load.prefill_done(rnd.choice(open_ids), i / 100)
        for _ in range(rnd.randrange(3)):
            load.output_block(rnd.choice(open_ids))
        while len(open_ids) > 100:  # some end before their first token, some are freed twice
            gone = open_ids.pop(rnd.randrange(len(open_ids)))
            fates["freed" if load.free(gone) else "gone before"] += 1
            load.free(gone)
        if rnd.random() < 0.005:
            worker = rnd.choice(load.workers)
            fates["lost with its worker"] += len(load.remove_worker(worker))
            if rnd.random() < 0.7:
                load.add_worker(worker)
            else:
                load.add_worker(WorkerKey(100 + i))
        if rnd.random() < 0.002:
            fates["expired"] += len(load.expire(i / 100 - 1.5, i / 100))
    for name in open_ids:
        load.free(name)
    assert_zero(load)
    assert all(fates[fate] > 20 for fate in ("freed", "gone before", "lost with its worker", "expired")), fates


@pytest.mark.parametrize("path", [[5, 5, 5], [1, 2, 1, 2], [9]])
def test_hashes_that_do_not_chain_leave_nothing_behind(path):
    load = ActiveLoad()
    load.add_worker(WorkerKey(1))
    load.book("a", WorkerKey(1), [1, 2, 3], 10, 0.0)
    load.book("b", WorkerKey(1), path, 10, 0.0)
    load.book("c", WorkerKey(1), [1, 9, 3], 10, 0.0)
    for name in ("a", "c", "b"):
        load.free(name)
    assert_zero(load)


def test_a_fork_that_nobody_uses_any_more_is_forgotten():
    load, trunk = ActiveLoad(), sequence_hashes(list(range(100, 164)))
    load.add_worker(WorkerKey(1))
    load.book("trunk", WorkerKey(1), trunk, 0, 0.0)
    for i in range(1, 64):
        load.book(f"fork-{i}", WorkerKey(1), sequence_hashes([*range(100, 100 + i), 7]), 0, 0.0)
    for i in range(1, 64):
        load.free(f"fork-{i}")
    end = load.bookings["trunk"].end
    assert list(end.path[end.start : end.end]) == trunk
    assert not end.children


def test_what_a_worker_holds_moves_with_its_position():
    load, path = ActiveLoad(), sequence_hashes([1, 2, 3])
    for worker in KEYS:
        load.add_worker(worker)
    load.book("a", KEYS[3], path, 5, 0.0)
    load.book("b", KEYS[3], path[:2], 5, 0.0)
    version = load.version
    load.remove_worker(KEYS[0])
    assert load.version != version
    assert shared_by_position(load, path) == {load.position[KEYS[3]]: 3}
    load.free("a")
    assert shared_by_position(load, path) == {load.position[KEYS[3]]: 2}
    load.free("b")
    assert_zero(load)


def test_joining_again_keeps_what_is_booked_and_takes_new_limits():
    load = ActiveLoad()
    load.add_worker(WorkerKey(1), WorkerLimits(10))
    load.book("a", WorkerKey(1), [1], 5, 0.0)
    load.add_worker(WorkerKey(1), WorkerLimits(20))
    load.add_worker(WorkerKey(1))
    assert load.limits == [WorkerLimits(20)]
    assert load.requests == [1]


def test_a_request_near_its_expected_end_counts_for_less():
    load = ActiveLoad()
    load.add_worker(WorkerKey(1))
    load.book("a", WorkerKey(1), [1, 2], 100, 0.0, private_blocks=1, expected_blocks=4)
    seen = []
    for _ in range(5):
        load.output_block("a")
        seen.append(load.decode_blocks[0])
    assert seen == [2 + 2, 2 + 2, 2 + 1, 2 + 0, 2 + 0]  # (1 + n) * (1 - n/4), rounded, beside the two of the prompt
    load.free("a")
    assert_zero(load)


def test_what_others_sent_is_added_and_taken_back():
    load = ActiveLoad()
    load.add_worker(WorkerKey(1))
    load.book("a", WorkerKey(1), [1], 5, 0.0)
    load.set_foreign(WorkerKey(1), Foreign(100, 20, 3))
    load.set_foreign(WorkerKey(2), Foreign(1, 1, 1))
    assert (load.prefill_tokens, load.decode_blocks, load.requests) == ([105], [21], [4])
    load.set_foreign(WorkerKey(1), Foreign(0, 1, 0))
    load.free("a")
    assert (load.prefill_tokens, load.decode_blocks, load.requests) == ([0], [1], [0])
    load.set_foreign(WorkerKey(1), Foreign())
    assert_zero(load)


def test_the_oldest_prompt_and_its_progress_are_known():
    load = ActiveLoad()
    load.add_worker(WorkerKey(1))
    load.book("a", WorkerKey(1), [1], 500, 10.0)
    load.book("b", WorkerKey(1), [2], 300, 11.0)
    assert (load.oldest_prefill, load.progress_at) == ([500], [10.0])
    load.prefill_done("a", 12.0)
    assert (load.oldest_prefill, load.progress_at) == ([300], [12.0])
    load.free("b")
    assert load.oldest_prefill == [0]


def test_only_bookings_older_than_the_limit_expire():
    load = ActiveLoad()
    load.add_worker(WorkerKey(1))
    for i in range(4):
        load.book(str(i), WorkerKey(1), [], 1, float(i))
    assert load.expire(2.0, 10.0, alive=lambda name: name == "0") == ["1"]
    assert list(load.bookings) == ["2", "3", "0"]
    assert load.expire(10.0, 10.0) == ["2", "3"]
    assert load.bookings["0"].booked_at == 10.0


def test_two_thousand_workers_leave_in_seconds_with_all_they_have():
    rnd = random.Random(3)
    load, system = ActiveLoad(), [rnd.getrandbits(64) for _ in range(30)]
    workers = [WorkerKey(i) for i in range(2000)]
    for worker in workers:
        load.add_worker(worker)
        for j in range(4):
            path = sequence_hashes(system + [rnd.getrandbits(64) for _ in range(10)])
            load.book(f"{worker.worker_id}-{j}", worker, path, 10, 0.0)
    rnd.shuffle(workers)
    assert sum(len(load.remove_worker(worker)) for worker in workers) == 8000
    assert not load.workers
    assert load.idle
