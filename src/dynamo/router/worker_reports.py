"""What do workers say of their load, and what of it is to be believed?

A worker knows of requests that this router does not: those of other routers, and what its own ones have generated. The
difference between its report and the book is put beside the book as foreign load. A report is always a little behind
what was just sent or has just ended, so only the least of the last three differences counts. Numbers that cannot be
are clamped, counted, and told in the log.
"""

import logging
from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

from dynamo.llm.kv_events import LoadMetrics
from dynamo.router.active_load import NO_FOREIGN, ActiveLoad, Foreign
from dynamo.router.types import WorkerKey, WorkerLimits
from dynamo.runtime.logs import Rarely

rarely = Rarely(logging.getLogger(__name__))

FRESH_S = 5.0  # a busy worker reports ten times a second; one that says nothing for so long has nothing from others
COMPARED = 3  # reports, 0.3 s of a busy worker: longer than anything is on its way
MAX_TOKENS = 1 << 40  # more prompt tokens than any worker can queue
MAX_BLOCKS = 1 << 32  # where a worker does not say how many it has
MAX_REQUESTS = 1 << 20


class Difference(NamedTuple):
    """What a worker reports less what is booked there. Below zero: its report is behind, or it lies."""

    prefill_tokens: int = 0
    decode_blocks: int = 0
    requests: int = 0


class WorkerReports:
    """The last reports of all workers. Owns the foreign part of the load."""

    def __init__(self, load: ActiveLoad) -> None:
        self._load = load
        self.reports: dict[WorkerKey, LoadMetrics] = {}
        """The last report of each, as far as it can be believed."""
        self.differences: dict[WorkerKey, Difference] = {}
        """By worker, at its last report."""
        self.corrected: Counter[WorkerKey] = Counter()
        """Reports with a number that cannot be."""
        self.unknown = 0
        """Reports of workers that nobody knows."""
        self._recent: dict[WorkerKey, deque[Difference]] = {}
        self._heard_at: dict[WorkerKey, float] = {}

    def hear(self, report: LoadMetrics, now: float) -> None:
        """A worker reports its load."""
        worker = WorkerKey(report.worker_id, report.dp_rank)
        position = self._load.position.get(worker)
        if position is None:
            self.unknown += 1
            return
        report = self._plausible(worker, report, self._load.limits[position])
        self.reports[worker] = report
        before = self._heard_at.get(worker)
        self._heard_at.pop(worker, None)
        self._heard_at[worker] = now  # the last one is heard last
        if before is None or now - before > FRESH_S:
            self._recent[worker] = deque([Difference()] * (COMPARED - 1), maxlen=COMPARED)
        foreign, load = self._load.foreign(worker), self._load
        difference = Difference(
            report.active_prefill_tokens - (load.prefill_tokens[position] - foreign.prefill_tokens),
            report.active_decode_blocks - (load.decode_blocks[position] - foreign.decode_blocks),
            report.running_requests + report.waiting_requests - (load.requests[position] - foreign.requests),
        )
        self.differences[worker] = difference
        recent = self._recent[worker]
        recent.append(difference)
        load.set_foreign(worker, Foreign(*(max(0, min(column)) for column in zip(*recent, strict=True))))

    def _plausible(self, worker: WorkerKey, report: LoadMetrics, limits: WorkerLimits) -> LoadMetrics:
        blocks = limits.total_blocks if limits.total_blocks is not None else MAX_BLOCKS
        if (
            0 <= report.active_decode_blocks <= blocks
            and 0 <= report.kv_used_blocks <= blocks
            and 0 <= report.active_prefill_tokens <= MAX_TOKENS
            and 0 <= report.running_requests <= MAX_REQUESTS
            and 0 <= report.waiting_requests <= MAX_REQUESTS
        ):
            return report
        return self._clamped(worker, report, blocks)

    def _clamped(self, worker: WorkerKey, report: LoadMetrics, blocks: int) -> LoadMetrics:
        greatest: Mapping[str, int] = {
            "active_decode_blocks": blocks,
            "active_prefill_tokens": MAX_TOKENS,
            "kv_used_blocks": blocks,
            "running_requests": MAX_REQUESTS,
            "waiting_requests": MAX_REQUESTS,
        }
        given = {name: getattr(report, name) for name in greatest}
        clamped = {name: min(greatest[name], max(0, value)) for name, value in given.items()}
        self.corrected[worker] += 1
        wrong = ", ".join(f"{name}={given[name]}" for name in given if given[name] != clamped[name])
        rarely.warning(
            f"report {worker}", "worker %x, rank %d reports a load that cannot be (%s); it is clamped", *worker, wrong
        )
        return LoadMetrics(worker.worker_id, worker.dp_rank, **clamped)

    def expire(self, now: float) -> None:
        """Believe no more what was said too long ago. To be called every second or so."""
        while self._heard_at:
            worker, heard_at = next(iter(self._heard_at.items()))
            if now - heard_at <= FRESH_S:
                return
            del self._heard_at[worker]
            self._load.set_foreign(worker, NO_FOREIGN)

    def forget(self, worker: WorkerKey) -> None:
        """A worker is gone."""
        for known in (self.reports, self.differences, self._recent, self._heard_at, self.corrected):
            known.pop(worker, None)
