"""Where sessions stay, and when they move."""

import pytest

from dynamo.router.affinity import SessionAffinity
from dynamo.router.types import WorkerKey

ONE, TWO = WorkerKey(1), WorkerKey(2)


def test_a_session_stays_where_its_first_request_went():
    affinity = SessionAffinity(10.0)
    assert affinity.worker("s", 0.0) is None
    affinity.bind("s", ONE, 0.0)
    affinity.bind("s", TWO, 1.0)
    assert affinity.worker("s", 2.0) == ONE
    assert affinity.worker("other", 2.0) is None


def test_a_session_lasts_as_long_as_it_is_used():
    affinity = SessionAffinity(10.0)
    affinity.bind("used", ONE, 0.0)
    affinity.bind("idle", ONE, 0.0)
    for now in (9.0, 18.0, 27.0):
        assert affinity.worker("used", now) == ONE
    assert affinity.worker("idle", 27.0) is None
    assert affinity.worker("used", 37.1) is None
    assert len(affinity) == 0


def test_sessions_move_only_when_their_worker_is_gone():
    affinity = SessionAffinity(10.0)
    affinity.bind("a", ONE, 0.0)
    affinity.bind("b", ONE, 0.0)
    affinity.bind("c", TWO, 0.0)
    assert affinity.forget(ONE) == 2
    assert affinity.forget(ONE) == 0
    assert affinity.moved == 2
    affinity.bind("a", TWO, 1.0)
    assert affinity.worker("a", 1.0) == TWO
    assert affinity.worker("c", 1.0) == TWO


def test_a_session_that_ended_is_forgotten():
    affinity = SessionAffinity(10.0)
    affinity.bind("a", ONE, 0.0)
    affinity.end("a")
    affinity.end("never there")
    assert affinity.worker("a", 0.0) is None
    assert affinity.forget(ONE) == 0


def test_memory_is_bounded_and_the_idlest_goes_first():
    affinity = SessionAffinity(10.0, max_sessions=3)
    for i, name in enumerate("abc"):
        affinity.bind(name, ONE, float(i))
    affinity.worker("a", 4.0)
    affinity.bind("d", ONE, 5.0)
    assert [name for name in "abcd" if affinity.worker(name, 5.0)] == ["a", "c", "d"]


def test_others_are_told_of_new_bindings_only():
    told = []
    affinity = SessionAffinity(10.0, on_bind=lambda *binding: told.append(binding))
    affinity.bind("a", ONE, 0.0)
    affinity.bind("a", ONE, 1.0)
    affinity.adopt("b", TWO, 1.0)
    assert told == [("a", ONE)]


def test_two_routers_that_bound_a_session_at_once_agree():
    here, there = SessionAffinity(10.0), SessionAffinity(10.0)
    here.bind("a", ONE, 0.0)
    there.bind("a", TWO, 0.0)
    here.adopt("a", TWO, 0.1)
    there.adopt("a", ONE, 0.1)
    assert here.worker("a", 1.0) == there.worker("a", 1.0) == ONE
    assert there.forget(TWO) == 0


@pytest.mark.parametrize(("ttl_s", "mode"), [(0, "hard"), (float("nan"), "hard"), (1, "firm")])
def test_settings_that_cannot_be_meant_are_refused(ttl_s, mode):
    with pytest.raises(ValueError, match="session_affinity_"):
        SessionAffinity(ttl_s, mode)
