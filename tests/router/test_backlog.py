"""The backlog's columns against its formula, whatever happens to workers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.router.active_load import ActiveLoad, Foreign
from dynamo.router.policies.backlog import Backlog
from dynamo.router.types import WorkerKey

KEYS = [WorkerKey(i) for i in range(3)]
steps = st.lists(
    st.tuples(
        st.sampled_from(["book", "book", "done", "free", "leave", "join", "foreign", "look", "look"]),
        st.integers(0, 8),
        st.floats(0.0, 2.0),
    ),
    max_size=40,
)


def plain(load: ActiveLoad, rate: float, now: float) -> list[float]:
    """The formula."""
    return [
        queued - min(oldest, (now - since) * rate) if queued else 0.0
        for queued, oldest, since in zip(load.prefill_tokens, load.oldest_prefill, load.progress_at, strict=True)
    ]


def by_columns(backlog: Backlog, now: float) -> list[float]:
    return [max(b, a - now * backlog.rate) for b, a in zip(backlog.behind, backlog.ahead, strict=True)]


@given(steps, st.floats(10.0, 1e5))
@settings(deadline=None)
def test_the_columns_give_what_the_formula_gives(steps, rate):
    load, backlog, now = ActiveLoad(), Backlog(), 1e6
    for key in KEYS:
        load.add_worker(key)
    for i, (what, which, wait_s) in enumerate(steps):
        now += wait_s
        key, ids = KEYS[which % 3], list(load.bookings)
        if what == "book" and key in load.position:
            load.book(str(i), key, (), which * 1000, now)
        elif what == "done" and ids:
            load.prefill_done(ids[which % len(ids)], now)
        elif what == "free" and ids:
            load.free(ids[which % len(ids)])
        elif what == "leave":
            load.remove_worker(key)
        elif what == "join":
            load.add_worker(key)
        elif what == "foreign":
            load.set_foreign(key, Foreign(prefill_tokens=which * 10))
        elif what == "look":
            rate *= 1 + which / 1000
            backlog.refresh(load, rate)
            assert backlog.rate == pytest.approx(rate, rel=0.011)
            assert by_columns(backlog, now) == pytest.approx(plain(load, backlog.rate, now), abs=1e-3)


def test_only_what_was_touched_is_computed_anew():
    load, backlog = ActiveLoad(), Backlog()
    for key in KEYS:
        load.add_worker(key)
    assert list(backlog.refresh(load, 100.0)) == [0, 1, 2]
    assert not backlog.refresh(load, 100.5)
    load.book("a", KEYS[1], (), 50, 0.0)
    assert list(backlog.refresh(load, 100.0)) == [1]
    assert list(backlog.refresh(load, 120.0)) == [0, 1, 2]
    load.add_worker(WorkerKey(9))
    assert list(backlog.refresh(load, 120.0)) == [0, 1, 2, 3]


def test_another_fleet_is_not_taken_for_the_same():
    one, two, backlog = ActiveLoad(), ActiveLoad(), Backlog()
    for load in (one, two):
        load.add_worker(KEYS[0])
    one.book("a", KEYS[0], (), 50, 0.0)
    backlog.refresh(one, 100.0)
    backlog.refresh(two, 100.0)
    assert by_columns(backlog, 0.0) == [0.0]
