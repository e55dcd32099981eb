"""Who holds what, among the workers of one model and routing group?

Groups know nothing of each other: the same prompt asked for in another group is another question. All workers of a
group have KV blocks of one size.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import zmq
from zmq.asyncio import Context

from dynamo import prometheus_names as names
from dynamo.llm.kv_events import KvEventData, Removed, RouterEvent, StorageTier
from dynamo.router.tier_index import Outcome, TierIndex
from dynamo.router.types import NO_OVERLAP, Overlap, WorkerKey
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.metrics import Metrics
from dynamo.services.engine_listener import EngineListener
from dynamo.services.refusals import conflict

log = logging.getLogger(__name__)

MAX_NAME_CHARS = 512
SWEPT_A_TICK = 20_000  # blocks of workers that left, taken out of memory: 5 ms
TICK_S = 0.5


class GroupKey(NamedTuple):
    """One index, one book of active requests."""

    model_name: str
    routing_group: str = "default"

    def __str__(self) -> str:
        return f"model {self.model_name!r}, routing group {self.routing_group!r}"

    def check(self) -> "GroupKey":
        """Raises InvalidArgument for names that cannot be meant."""
        for field, value in zip(self._fields, self, strict=True):
            if not value or len(value) > MAX_NAME_CHARS:
                raise InvalidArgument(f"{field}: must have 1 to {MAX_NAME_CHARS} characters", field)
        return self


class EventCounts:
    """What became of all KV events. The names are those of a router's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._applied = metrics.counter(
            names.kvrouter.KV_CACHE_EVENTS_APPLIED,
            "KV events that came to the index, by what became of them",
            ["event_type", "status"],
            prefix="dynamo_kvrouter",
            base=(),
        )
        self._warnings = metrics.counter(
            names.kvrouter.KV_CACHE_EVENT_WARNINGS,
            "KV events that are suspicious",
            ["warning_kind"],
            prefix="dynamo_kvrouter",
            base=(),
        )

    def count(self, change: KvEventData, outcome: Outcome) -> None:
        """An event came to an index."""
        kind = "stored" if change.stored is not None else "removed" if change.removed is not None else "cleared"
        duplicate = outcome is Outcome.DUPLICATE
        self._applied.labels(kind, (Outcome.OK if duplicate else outcome).value).inc()
        if duplicate:
            self._warnings.labels("duplicate_store").inc()


class CacheGroup:
    """The index of one group, and the listeners that feed it."""

    def __init__(self, key: GroupKey, block_size: int, counts: EventCounts, context: Context) -> None:
        if block_size < 1:
            raise InvalidArgument(f"block_size: must be at least 1 token, not {block_size}", "block_size")
        self.key = key
        self.block_size = block_size
        self.index = TierIndex(keep_contents=True)
        self.listeners: dict[WorkerKey, EngineListener] = {}
        self._counts = counts
        self._context = context

    def check_block_size(self, block_size: int) -> None:
        """Raises SelectionServiceError if a worker's blocks are not of this group's size."""
        if block_size != self.block_size:
            raise conflict(
                f"block_size: {block_size} is not {self.block_size}, which the workers of {self.key} have; "
                "give all workers of a group the same size"
            )

    # --- workers

    def listen(self, worker: WorkerKey, endpoint: str, replay_endpoint: str | None) -> EngineListener:
        """Hear a rank from now on. Raises InvalidArgument if ZeroMQ does not take the address."""
        try:
            listener = EngineListener(worker, endpoint, replay_endpoint, self.block_size, self.apply, self._context)
        except (zmq.ZMQError, ValueError) as e:
            raise InvalidArgument(f"endpoint: {endpoint!r}: {e}", "endpoint") from None
        self.listeners[worker] = listener
        return listener

    async def leave(self, workers: Iterable[WorkerKey]) -> None:
        """Hear these ranks no more, and forget what they held."""
        gone = [(worker, self.listeners.pop(worker, None)) for worker in workers]
        for worker, listener in gone:
            if listener is not None:
                await listener.close()
            self.index.remove_worker(worker)

    async def close(self) -> None:
        """Hear nobody any more."""
        await asyncio.gather(*(listener.close() for listener in self.listeners.values()))
        self.listeners.clear()

    # --- what they hold

    def apply(self, worker: WorkerKey, tier: StorageTier, change: KvEventData) -> None:
        """A rank's cache has changed."""
        self._counts.count(change, self.index.apply(worker, tier, change))

    def find(self, sequence_hashes: Sequence[int]) -> dict[WorkerKey, Overlap]:
        """What each rank holds of a prompt."""
        return self.index.find(sequence_hashes)

    def restore(self, worker: WorkerKey, events: Iterable[RouterEvent]) -> None:
        """Take what another index said of a rank for what it holds."""
        for event in events:
            self.apply(worker, event.storage_tier, event.event.change)

    def dump(self) -> Iterator[tuple[WorkerKey, StorageTier, KvEventData]]:
        """Changes that make an empty index hold what this one holds. Each worker as it is when its turn comes."""
        for worker in self.index.workers():
            for tier, change in self.index.dump(worker):
                yield worker, tier, change


def cached_tokens(group: CacheGroup, found: dict[WorkerKey, Overlap]) -> dict[str, Any]:
    """How many tokens of a prompt each worker holds, in the words that callers know.

    `scores` are of device memory, by worker and rank. `instances` are by worker: `gpu` is the best rank's device
    memory, `cpu` that with host memory, `disk` that with all tiers.
    """
    size = group.block_size
    scores: dict[str, dict[str, int]] = {}
    by_worker: dict[int, dict[int, Overlap]] = {}
    for worker, overlap in found.items():
        by_worker.setdefault(worker.worker_id, {})[worker.dp_rank] = overlap
        if overlap.device:
            scores.setdefault(str(worker.worker_id), {})[str(worker.dp_rank)] = overlap.device * size
    instances = {str(worker_id): matched(ranks, size) for worker_id, ranks in by_worker.items()}
    return {"scores": scores, "frequencies": [], "instances": instances}


def matched(ranks: dict[int, Overlap], block_size: int) -> dict[str, Any]:
    """One worker's part of `instances`."""
    overlaps = ranks.values() or (NO_OVERLAP,)
    total = max(overlap.total for overlap in overlaps) * block_size
    return {
        "longest_matched": total,
        "gpu": max(overlap.device for overlap in overlaps) * block_size,
        "dp": {str(rank): overlap.device * block_size for rank, overlap in ranks.items()},
        "cpu": max(overlap.device + overlap.host for overlap in overlaps) * block_size,
        "disk": total,
    }


# --- the form of a dump


class _Block(msgspec.Struct, gc=False):
    block_hash: int
    tokens_hash: int
    mm_extra_info: None = None


class _Blocks(msgspec.Struct):
    parent_hash: int | None
    blocks: list[_Block]
    start_position: None = None


class _Stored(msgspec.Struct):
    stored: _Blocks


class _Removed(msgspec.Struct):
    removed: Removed


class _Event(msgspec.Struct):
    event_id: int
    data: _Stored | _Removed | str
    dp_rank: int


class _Dumped(msgspec.Struct):
    """A `RouterEvent` with every field, also those that say nothing: other readers want them all."""

    worker_id: int
    storage_tier: str
    residency_domain: str
    event: _Event


def dumped_event(number: int, worker: WorkerKey, tier: StorageTier, change: KvEventData) -> _Dumped:
    """One element of a dump's `events`."""
    data: _Stored | _Removed | str = "cleared"
    if change.stored is not None:
        blocks = [_Block(block.block_hash, block.tokens_hash) for block in change.stored.blocks]
        data = _Stored(_Blocks(change.stored.parent_hash, blocks))
    elif change.removed is not None:
        data = _Removed(change.removed)
    return _Dumped(worker.worker_id, tier, "worker", _Event(number, data, worker.dp_rank))


async def sweep(groups: Iterable[CacheGroup]) -> None:
    """Free, bit by bit, the memory of workers that left; for ever."""
    while True:
        await asyncio.sleep(TICK_S)
        for group in list(groups):
            group.index.sweep(SWEPT_A_TICK)


def dump_size(group: CacheGroup) -> int:
    """How many blocks all ranks hold together."""
    return sum(chain.from_iterable(group.index.blocks(w).values() for w in group.index.workers()))
