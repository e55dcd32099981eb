"""One rank's stream: whatever is lost, doubled or late on the way, all is applied once and in order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.llm.kv_events import KvEvent, KvEventData, Removed, RouterEvent
from dynamo.router.event_stream import EventStream, StreamState
from dynamo.router.types import WorkerKey

WORKER = WorkerKey(7)


def event(number: int) -> RouterEvent:
    return RouterEvent(7, KvEvent(number, KvEventData(removed=Removed([number]))))


class Receiver:
    """A stream, and what it applied since it last started anew."""

    def __init__(self) -> None:
        self.applied: list[int] = []
        self.resets = 0
        self.stream = EventStream(WORKER, lambda e: self.applied.append(e.event.event_id), self._reset)

    def _reset(self) -> None:
        self.applied.clear()
        self.resets += 1

    def hear(self, *numbers: int) -> bool:
        return sum(self.stream.hear(event(number)) for number in numbers) > 0

    def tell(self, kind: str, numbers, next_event_id: int) -> bool:
        self.stream.begin(kind)
        self.stream.retold(kind, map(event, numbers))
        return self.stream.end(kind, next_event_id)


def synced(next_event_id: int = 0) -> Receiver:
    receiver = Receiver()
    assert receiver.tell("dump", [], next_event_id)
    return receiver


def test_events_that_follow_each_other_are_applied_as_they_come():
    receiver = synced()
    assert not receiver.hear(0, 1, 2)
    assert receiver.applied == [0, 1, 2]
    assert receiver.stream.state is StreamState.SYNCED


def test_before_the_worker_was_asked_events_are_held():
    receiver = Receiver()
    assert not receiver.hear(3, 4, 5)
    assert receiver.applied == []
    assert receiver.tell("dump", [90, 91], 4)  # a dump's numbers mean nothing
    assert receiver.applied == [90, 91, 4, 5]


def test_a_gap_holds_what_follows_until_it_is_filled():
    receiver = synced()
    receiver.hear(0)
    assert receiver.hear(3)
    assert not receiver.hear(4)
    assert receiver.applied == [0]
    assert receiver.stream.state is StreamState.RECOVERING
    assert receiver.stream.reason == "events 1 to 2 are missing"
    assert receiver.tell("events", [1, 2, 3], 4)
    assert receiver.applied == [0, 1, 2, 3, 4]
    assert (receiver.stream.gaps, receiver.stream.missed_events) == (1, 2)


def test_what_comes_twice_or_late_counts_once():
    receiver = synced()
    receiver.hear(0, 1, 1, 0, 2)
    assert receiver.applied == [0, 1, 2]
    assert receiver.stream.duplicates == 2


def test_a_dump_starts_anew():
    receiver = synced()
    receiver.hear(0, 5)
    assert receiver.tell("dump", [40], 6)
    assert receiver.applied == [40]
    assert receiver.stream.expected == 6


def test_an_answer_that_leaves_a_gap_is_not_enough():
    receiver = synced()
    receiver.hear(0, 5)
    assert not receiver.tell("events", [1, 3], 4)
    assert receiver.applied == [0, 1]
    assert not receiver.tell("events", [2, 3], 4)  # 4 is missing still
    assert receiver.stream.state is StreamState.RECOVERING
    assert receiver.tell("events", [4, 5], 6)
    assert receiver.applied == [0, 1, 2, 3, 4, 5]


def test_a_worker_that_cannot_be_asked_is_heard_from_where_it_is():
    fresh, late = Receiver(), Receiver()
    fresh.hear(0, 1)
    fresh.stream.go_on_alone("it cannot")
    assert (fresh.stream.state, fresh.applied) == (StreamState.SYNCED, [0, 1])
    late.hear(8, 9)
    late.stream.go_on_alone("it cannot")
    assert (late.stream.state, late.applied) == (StreamState.PARTIAL, [8, 9])
    assert late.stream.reason == "events 0 to 7 are missing, and it cannot"


def test_a_gap_of_a_worker_that_cannot_be_asked_starts_anew():
    receiver = Receiver()
    receiver.hear(0)
    receiver.stream.go_on_alone("it cannot")
    assert not receiver.hear(3)
    assert receiver.applied == [3]
    assert receiver.stream.state is StreamState.PARTIAL


def test_a_suspected_stream_is_told_everything():
    receiver = synced()
    receiver.hear(0, 1)
    receiver.stream.suspect("it contradicts itself")
    assert receiver.stream.expected is None
    assert not receiver.hear(2)
    assert receiver.tell("dump", [50], 2)
    assert receiver.applied == [50, 2]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_loss_doubling_and_reordering_ends_with_every_event_applied_once(data):
    total = data.draw(st.integers(0, 40))
    kept = [n for n in range(total) if data.draw(st.booleans())]
    doubled = kept + data.draw(st.lists(st.sampled_from(kept), max_size=8)) if kept else []
    order = data.draw(st.permutations(doubled))
    receiver = synced()
    said = 0
    for number in order:
        said = max(said, number + 1)
        if receiver.hear(number):
            oldest = data.draw(st.integers(0, said))  # the worker may have forgotten some
            expected = receiver.stream.expected
            if expected >= oldest:
                assert receiver.tell("events", range(expected, said), said)
            else:
                assert receiver.tell("dump", range(said), said)
    receiver.tell("events", range(receiver.stream.expected, total), total)  # it fell silent: was that all?
    assert receiver.applied == list(range(total))
    assert receiver.stream.state is StreamState.SYNCED
