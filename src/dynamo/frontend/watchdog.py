"""Which answers have been silent for too long, and which have no time left?

One coarse timer a process looks at all answers, so that none of them needs a timer of its own; but for those whose
clients said how long they wait.
"""

import asyncio
from time import perf_counter
from typing import Protocol

from dynamo.runtime.context import TIME_IS_OVER, Context
from dynamo.runtime.errors import DeadlineExceeded, DynamoException


class Watched(Protocol):
    """Something that ends by itself if it is told the time, or with an error if it is told so."""

    def fail(self, error: DynamoException) -> None:
        """End now."""

    def check(self, now: float) -> None:
        """`now` is by `time.perf_counter`."""


class Watchdog:
    """Calls `check` of everything in it every `interval_s` seconds."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._deadlines: dict[Watched, asyncio.TimerHandle] = {}

    def add(self, watched: Watched, context: Context) -> None:
        """Begin to look after this one, and end it at its deadline, if it has one."""
        self._watched.add(watched)
        left_s = context.time_left()
        if left_s is not None:
            over = DeadlineExceeded(TIME_IS_OVER)
            self._deadlines[watched] = asyncio.get_running_loop().call_later(left_s, watched.fail, over)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._tick)

    def remove(self, watched: Watched) -> None:
        """It ended."""
        self._watched.discard(watched)
        if self._deadlines and (deadline := self._deadlines.pop(watched, None)) is not None:
            deadline.cancel()

    def close(self) -> None:
        """Stop."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def watched(self) -> tuple[Watched, ...]:
        """All that are being looked after."""
        return tuple(self._watched)

    def _tick(self) -> None:
        self._timer = None
        now = perf_counter()
        for watched in self.watched:
            watched.check(now)
        if self._watched:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._tick)
