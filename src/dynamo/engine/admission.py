"""Who may enter the engine now, who waits, and who is sent elsewhere?

An engine slows down for everybody when it is given far more than it can run. So at most `limit` requests are in
it, at most `queue_limit` wait outside in order of arrival, and the next one is refused with an error on which the
caller may try another worker.
"""

import math
from collections import deque
from typing import Protocol

from dynamo.engine.contract import EngineConfig
from dynamo.runtime.errors import WorkerOverloaded

FALLBACK_LIMIT = 10_000  # requests, for an engine that does not say how many it runs at once


def engine_request_limit(asked: int | None, config: EngineConfig) -> int:
    """The limit asked for, or half as much again as the engine runs at once: then its own queue never runs dry."""
    if asked is not None:
        return asked
    if config.max_num_seqs is None:
        return FALLBACK_LIMIT
    return math.ceil(1.5 * config.max_num_seqs * config.data_parallel_size)


class Applicant(Protocol):
    """A request at the door."""

    inside: bool

    def start(self) -> None:
        """Go to work. May leave again at once."""


class _Count(Protocol):
    value: float


class Admission:
    """Counts the requests in and before the engine. Each `enter` that did not raise is followed by one `leave`.

    `inside`, `queued` and `rejected` are where the counts are shown; several workers of a process share them.
    """

    def __init__(self, limit: int, queue_limit: int, inside: _Count, queued: _Count, rejected: _Count) -> None:
        self.limit = limit
        self.queue_limit = queue_limit
        self.num_inside = 0
        self._queue: deque[Applicant] = deque()
        self._admitting = False
        self._inside, self._queued, self._rejected = inside, queued, rejected

    @property
    def num_queued(self) -> int:
        """Requests waiting outside."""
        return len(self._queue)

    def enter(self, request: Applicant) -> None:
        """Start `request` now if there is room, else when there is.

        Raises:
            WorkerOverloaded: the engine and the queue are full.
        """
        if self.num_inside >= self.limit and len(self._queue) >= self.queue_limit:
            self._rejected.value += 1
            raise WorkerOverloaded(
                f"this worker has {self.num_inside} requests in its engine and {len(self._queue)} waiting, "
                "as many as it takes (--engine-request-limit, --dynamo-request-queue-limit)"
            )
        self._queue.append(request)
        self._queued.value += 1
        self._admit()

    def leave(self, request: Applicant) -> None:
        """`request` ended, in whatever way; the next one enters."""
        if request.inside:
            request.inside = False
            self.num_inside -= 1
            self._inside.value -= 1
            self._admit()
        else:
            self._queue.remove(request)
            self._queued.value -= 1

    def _admit(self) -> None:
        if self._admitting:  # a request that was just started left at once: the loop below goes on
            return
        self._admitting = True
        try:
            while self._queue and self.num_inside < self.limit:
                request = self._queue.popleft()
                self._queued.value -= 1
                request.inside = True
                self.num_inside += 1
                self._inside.value += 1
                request.start()
        finally:
            self._admitting = False
