"""Is everybody too busy for one more request? [K45]

A worker's rank is busy if any threshold that is set is passed; a worker is if all its ranks are. When all workers that
a request may go to are busy, it is refused at once: its client can try elsewhere, or later.
"""

import logging

from dynamo.router.config import LoadThresholdConfig
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import DEFAULT_BATCH_TOKENS, RouteRequest
from dynamo.runtime.errors import WorkerOverloaded
from dynamo.runtime.logs import Rarely

rarely = Rarely(logging.getLogger(__name__))


class Overload:
    """Holds the load of workers against thresholds, which may be changed at any time (`/busy_threshold`)."""

    def __init__(self, scheduler: KvScheduler, thresholds: LoadThresholdConfig | None = None) -> None:
        self._scheduler = scheduler
        self.thresholds = thresholds or LoadThresholdConfig()
        self.refused = 0

    @property
    def thresholds(self) -> LoadThresholdConfig:
        """What is in force; may be set."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: LoadThresholdConfig) -> None:
        self._thresholds = thresholds
        self.on = not thresholds.off
        """Whether anybody can be too busy."""

    def busy(self, position: int) -> bool:
        """Whether this rank is busy."""
        thresholds, load = self.thresholds, self._scheduler.load
        limits, tokens = load.limits[position], load.prefill_tokens[position]
        share = thresholds.active_decode_blocks_threshold
        if share is not None:
            if limits.total_blocks is None:
                worker = load.workers[position]
                rarely.warning(
                    f"blocks {worker}",
                    "worker %x, rank %d does not say how many KV blocks it has (total_kv_blocks): "
                    "active_decode_blocks_threshold does not apply to it",
                    *worker,
                )
            elif load.decode_blocks[position] > share * limits.total_blocks:
                return True
        most = thresholds.active_prefill_tokens_threshold
        if most is not None and tokens > most:
            return True
        batches = thresholds.active_prefill_tokens_threshold_frac
        return batches is not None and tokens > batches * (limits.max_batched_tokens or DEFAULT_BATCH_TOKENS)

    def busy_workers(self) -> list[int]:
        """The ids of the workers all of whose ranks are busy."""
        if self.thresholds.off:
            return []
        free: set[int] = set()
        busy: dict[int, None] = {}
        for position, worker in enumerate(self._scheduler.load.workers):
            if self.busy(position):
                busy[worker.worker_id] = None
            else:
                free.add(worker.worker_id)
        return [worker_id for worker_id in busy if worker_id not in free]

    def check(self, request: RouteRequest) -> None:
        """Raises:
        WorkerOverloaded: all workers that the request may go to are busy.
        WorkerUnavailable: there are none.
        """
        busy = self.refusal(request)
        if busy is not None:
            self.refused += 1
            raise busy

    def refusal(self, request: RouteRequest) -> WorkerOverloaded | None:
        """What `check` would raise, if not WorkerUnavailable, which this raises too. Counts nothing."""
        if not self.on:
            return None
        eligible = self._scheduler.eligible(request)
        positions = range(len(self._scheduler.load.workers)) if eligible is None else eligible
        if not all(map(self.busy, positions)):
            return None
        return WorkerOverloaded(
            f"all {len(positions)} workers that could take the request are busy "
            f"({', '.join(self._set())}); try again later"
        )

    def _set(self) -> list[str]:
        return [
            f"{name} {value:g}"
            for name in self.thresholds.__struct_fields__
            if (value := getattr(self.thresholds, name)) is not None
        ]
