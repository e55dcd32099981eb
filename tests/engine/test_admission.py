"""Who enters, who waits, who is refused."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dynamo.engine.admission import Admission
from dynamo.runtime.errors import WorkerOverloaded
from dynamo.runtime.instruments import Counter, Gauge


class Guest:
    """Starts by noting so; one that is `brief` leaves the moment it starts."""

    def __init__(self, admission: Admission, started: list["Guest"], brief: bool = False) -> None:
        self.inside = False
        self._admission, self._started, self._brief = admission, started, brief

    def start(self) -> None:
        self._started.append(self)
        if self._brief:
            self._admission.leave(self)


@given(
    st.integers(1, 4),
    st.integers(0, 4),
    st.lists(st.one_of(st.tuples(st.just("enter"), st.booleans()), st.tuples(st.just("leave"), st.integers(0, 20)))),
)
def test_counts_and_order_hold_under_any_interleaving(limit, queue_limit, actions):
    inside, queued, rejected = Gauge(), Gauge(), Counter()
    admission = Admission(limit, queue_limit, inside, queued, rejected)
    started: list[Guest] = []
    present: list[Guest] = []
    entered: list[Guest] = []
    refused = 0
    for action, value in actions:
        if action == "enter":
            guest = Guest(admission, started, brief=value)
            full = admission.num_inside == limit and admission.num_queued == queue_limit
            if full:
                with pytest.raises(WorkerOverloaded):
                    admission.enter(guest)
                refused += 1
            else:
                admission.enter(guest)
                entered.append(guest)
                present.append(guest)
        elif present:
            guest = present.pop(value % len(present))
            admission.leave(guest)
            if guest not in started:
                entered.remove(guest)
        present = [guest for guest in present if guest.inside or guest not in started]
        waiting = [guest for guest in present if not guest.inside]
        assert admission.num_inside == inside.value == sum(guest.inside for guest in present) <= limit
        assert admission.num_queued == queued.value == len(waiting) <= queue_limit
        assert not waiting or admission.num_inside == limit
        assert rejected.value == refused
    assert started == entered[: len(started)]


def test_a_queue_of_requests_that_leave_at_once_needs_no_stack():
    admission = Admission(1, 10_000, Gauge(), Gauge(), Counter())
    started: list[Guest] = []
    first = Guest(admission, started)
    admission.enter(first)
    for _ in range(10_000):
        admission.enter(Guest(admission, started, brief=True))
    admission.leave(first)
    assert len(started) == 10_001
    assert admission.num_inside == admission.num_queued == 0
