"""Is what was heard of one rank's cache all there was to hear?

A rank's events count up by one. While they do, they are applied as they come; once one is missing, the following are
held until the worker has told what was missed. No input or output here: the feed asks, this decides.
"""

from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Literal

from dynamo.llm.kv_events import RouterEvent
from dynamo.router.types import WorkerKey

HELD_EVENTS = 65_536  # while a worker is asked; with more, the oldest go, and what is then missing is asked for again


class StreamState(StrEnum):
    """How far a router knows a rank's cache."""

    RECOVERING = "recovering"
    """Not all is known yet, or some was missed: the worker is being asked."""
    SYNCED = "synced"
    """All that was said was heard."""
    PARTIAL = "partial"
    """Something was missed for good: what is known is true, but there may be more."""
    REFUSED = "refused"
    """Its events cannot be used."""


_RECOVERING = StreamState.RECOVERING  # looked at for each event


class EventStream:
    """One rank's events, in order. `apply` is called for each once, `reset` before everything is told anew."""

    def __init__(self, worker: WorkerKey, apply: Callable[[RouterEvent], None], reset: Callable[[], None]) -> None:
        self.worker = worker
        self.state = StreamState.RECOVERING
        self.reason = "not asked yet"
        """Why it is not synced."""
        self.expected: int | None = None
        """The number of the next event; None before anything was told."""
        self.recoverable = True
        """Whether the worker can be asked."""
        self.closed = False
        self.gaps = 0
        self.missed_events = 0
        self.duplicates = 0
        self._apply = apply
        self._reset = reset
        self._held: deque[RouterEvent] = deque(maxlen=HELD_EVENTS)

    def is_next(self, event: RouterEvent) -> bool:
        """Whether this is the event that is due, for the caller to apply. Notes it as heard then; else `hear` it."""
        number = event.event.event_id
        if number != self.expected or self.state is _RECOVERING:
            return False
        self.expected = number + 1
        return True

    def hear(self, event: RouterEvent) -> bool:
        """An event has come. Returns whether the worker must be asked for what is missing before it."""
        number = event.event.event_id
        if self.state is _RECOVERING:
            self._held.append(event)
            return False
        assert self.expected is not None
        if number == self.expected:
            self.expected = number + 1
            self._apply(event)
        elif number < self.expected:
            self.duplicates += 1
        else:
            return self._miss(event)
        return False

    def _miss(self, event: RouterEvent) -> bool:
        number, expected = event.event.event_id, self.expected
        assert expected is not None
        self.gaps += 1
        self.missed_events += number - expected
        self.reason = f"events {expected} to {number - 1} are missing"
        if self.recoverable:
            self.state = StreamState.RECOVERING
            self._held.append(event)
            return True
        # What was stored or removed meanwhile is unknown. Knowing less costs hits, knowing wrong costs more.
        self.state = StreamState.PARTIAL
        self.reason += ", and the worker cannot tell them again"
        self._reset()
        self.expected = number + 1
        self._apply(event)
        return False

    def suspect(self, reason: str) -> None:
        """What is known may be wrong: let everything be told anew."""
        if self.recoverable:
            self.state = StreamState.RECOVERING
            self.reason = reason
            self.expected = None

    # --- what the worker told again

    def begin(self, kind: Literal["events", "dump"]) -> None:
        """An answer begins: the events from `expected` on, or all that is held."""
        if kind == "dump":
            self.expected = None
            self._reset()

    def retold(self, kind: Literal["events", "dump"], events: Iterable[RouterEvent]) -> None:
        """A part of the answer."""
        for event in events:
            if kind == "dump":
                self._apply(event)
            elif event.event.event_id == self.expected:
                self.expected += 1
                self._apply(event)

    def end(self, kind: Literal["events", "dump"], next_event_id: int) -> bool:
        """The answer is complete up to `next_event_id`. Returns whether all is known now; else ask again."""
        if kind == "dump":
            self.expected = next_event_id
        if self.expected is None or self.expected < next_event_id:
            self.reason = f"the worker did not tell events {self.expected} to {next_event_id - 1}"
            return False
        return self._catch_up()

    def go_on_alone(self, reason: str) -> None:
        """The worker cannot be asked: take what there is."""
        self.recoverable = False
        first = min((event.event.event_id for event in self._held), default=0)
        self.state = StreamState.PARTIAL if first else StreamState.SYNCED
        self.reason = f"events 0 to {first - 1} are missing, and {reason}" if first else ""
        self.expected = first
        for event in self._take_held():
            self.hear(event)

    def _catch_up(self) -> bool:
        """Apply what was held. Returns whether nothing is missing in it."""
        self.state, self.reason = StreamState.SYNCED, ""
        for event in self._take_held():
            self.hear(event)
        return self.state is StreamState.SYNCED

    def _take_held(self) -> list[RouterEvent]:
        held = sorted(self._held, key=lambda event: event.event.event_id)
        self._held.clear()
        return held
