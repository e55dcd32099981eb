"""How much of a prompt does each worker hold, on which tier?

One block index for all tiers: a worker's device memory is a holder, its host memory another. So one look along the
prompt answers for all of them, and blocks moved to host memory still find the parents they left on the device.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from dynamo.llm.kv_events import KvEventData, Removed, StorageTier, Stored
from dynamo.router.account import dumped
from dynamo.router.block_index import BlockIndex, UnknownParentError
from dynamo.router.levels import Level
from dynamo.router.types import Overlap, WorkerKey

LOWER_TIERS: tuple[StorageTier, ...] = ("host_pinned", "disk", "external")  # nearest first


class LowerTier(NamedTuple):
    """A worker's memory on a tier below the device."""

    worker: WorkerKey
    tier: StorageTier


Holder = WorkerKey | LowerTier  # a worker alone stands for its device memory


class Outcome(StrEnum):
    """What became of an event. The values are those of the metric `kv_cache_events_applied`, but for the second."""

    OK = "ok"
    DUPLICATE = "duplicate_store"
    """All blocks were held already; nothing changed."""
    UNKNOWN_PARENT = "parent_block_not_found"
    """Nothing was stored: an event must have been missed."""
    UNKNOWN_BLOCK = "block_not_found"
    """At least one removed block was not held; the others are removed."""
    INVALID = "invalid_block"
    """The event makes no sense; nothing changed."""


_OK = Outcome.OK  # a member is found in its class by a dictionary and a descriptor, each time
_on_device: Callable[[tuple[int, int, int]], Overlap] = partial(tuple.__new__, Overlap)


class TierIndex:
    """The blocks of all workers on all tiers. With `keep_contents` it can `dump` what it holds."""

    def __init__(self, *, keep_contents: bool = False) -> None:
        self.index: BlockIndex[Holder] = BlockIndex(keep_contents=keep_contents)
        self._lower: dict[WorkerKey, list[LowerTier]] = {}  # the lower tiers that a worker has used, nearest first
        self._lower_mask = 0

    def __len__(self) -> int:
        """How many different blocks there are, counting one that many workers hold once."""
        return len(self.index)

    # --- finding

    def find(self, sequence_hashes: Sequence[int], now: float = 0.0) -> dict[WorkerKey, Overlap]:
        """What each worker holds of a prompt from its start; only those that hold anything. `now` does not matter."""
        found: dict[WorkerKey, Overlap] = {}
        for overlap, workers in self.groups(sequence_hashes, now):
            found.update(dict.fromkeys(workers, overlap))
        return found

    def groups(self, sequence_hashes: Sequence[int], now: float = 0.0) -> Sequence[tuple[Overlap, Sequence[WorkerKey]]]:
        """As `find`, those together that hold equally much; of several groups a worker is in, the last one counts."""
        index = self.index
        levels = index.reached(sequence_hashes)
        if not levels:
            return ()
        if levels[0].mask & self._lower_mask:
            return [(overlap, (worker,)) for worker, overlap in self._find_on_tiers(sequence_hashes, levels).items()]
        if index.has_holes:
            levels = index.levels(sequence_hashes)
        by_level: Callable[[list[Level]], Any] = index.by_level  # there are no lower tiers in these levels
        return [(_on_device((blocks, 0, 0)), workers) for blocks, workers in by_level(levels)]

    def _find_on_tiers(self, sequence_hashes: Sequence[int], levels: list[Level]) -> dict[WorkerKey, Overlap]:
        index = self.index
        ends: dict[Holder, int] = {}
        for blocks, holders in index.by_level(levels):
            ends.update(dict.fromkeys(holders, blocks))
        holes = index.holes_in(sequence_hashes, levels)
        positions = [position for position, _ in holes]

        def extend(holder: Holder, start: int) -> int:
            """How many blocks from `start` on a holder has without a hole."""
            end = ends.get(holder, 0)
            bit = index.bit(holder) if holes else 0
            for i in range(bisect_left(positions, start), len(holes)):
                if holes[i][1] & bit:
                    return max(0, min(end, positions[i]) - start)
            return max(0, end - start)

        found: dict[WorkerKey, Overlap] = {}
        for worker in dict.fromkeys(h.worker if isinstance(h, LowerTier) else h for h in ends):
            device = extend(worker, 0)
            host = disk = 0
            for place in self._lower.get(worker, ()):
                more = extend(place, device + host + disk)
                if place.tier == "host_pinned":
                    host += more
                else:
                    disk += more
            if device or host or disk:
                found[worker] = Overlap(device, host, disk)
        return found

    # --- changing

    def apply(self, worker: WorkerKey, tier: StorageTier, data: KvEventData) -> Outcome:
        """What a worker said has happened. Never raises: an event that makes no sense is an outcome."""
        stored = data.stored
        if stored is not None:
            blocks, parent = stored.blocks, stored.parent_hash
            if tier == "device" and len(blocks) == 1 and parent is not None:
                block = blocks[0]
                if self.index.append(worker, parent, block.block_hash, block.tokens_hash):
                    return _OK
            try:
                return _OK if self.store(worker, tier, stored) else Outcome.DUPLICATE
            except UnknownParentError:
                return Outcome.UNKNOWN_PARENT
            except ValueError:
                return Outcome.INVALID
        if data.removed is not None:
            return Outcome.UNKNOWN_BLOCK if self.remove(worker, tier, data.removed) else Outcome.OK
        if data.cleared is not None:
            self.clear(worker, tier)
            return Outcome.OK
        return Outcome.INVALID

    def store(self, worker: WorkerKey, tier: StorageTier, stored: Stored) -> int:
        """Returns how many of the blocks are new there. Raises as `BlockIndex.store`."""
        blocks = stored.blocks
        names = [block.block_hash for block in blocks]
        local_hashes = [block.tokens_hash for block in blocks]
        holder = worker if tier == "device" else self._lower_tier(worker, tier)
        parent = stored.parent_hash
        if parent is None or worker not in self._lower:
            return self.index.store(holder, parent, names, local_hashes)
        places: list[Holder] = [holder, worker, *self._lower[worker]]
        for place in places:
            above = self.index.sequence_hash(place, parent)
            if above is not None:
                return self.index.store_after(holder, above, names, local_hashes)
        raise UnknownParentError(f"{worker} does not hold the parent block {parent} on any tier")

    def _lower_tier(self, worker: WorkerKey, tier: StorageTier) -> LowerTier:
        place = LowerTier(worker, tier)
        if place not in self.index:
            self.index.add(place)
            places = self._lower.setdefault(worker, [])
            if place not in places:
                places.append(place)
                places.sort(key=lambda place: LOWER_TIERS.index(place.tier))
            self._lower_mask |= self.index.bit(place)
        return place

    def remove(self, worker: WorkerKey, tier: StorageTier, removed: Removed) -> int:
        """Returns how many of the blocks were not there."""
        holder = worker if tier == "device" else LowerTier(worker, tier)
        return self.index.remove(holder, removed.block_hashes)

    def clear(self, worker: WorkerKey, tier: StorageTier | None = None) -> None:
        """Everything of a worker on a tier, or on all, is gone."""
        for place in self._places(worker):
            if tier in (None, _tier(place)):
                self._forget(place)

    def remove_worker(self, worker: WorkerKey) -> None:
        """Forget a worker with all its blocks. Others of its ranks stay."""
        for place in self._places(worker):
            self._forget(place)
        self._lower.pop(worker, None)

    def _places(self, worker: WorkerKey) -> list[Holder]:
        return [worker, *self._lower.get(worker, ())]

    def _forget(self, place: Holder) -> None:
        self._lower_mask &= ~self.index.bit(place)
        self.index.remove_holder(place)

    def sweep(self, limit: int) -> bool:
        """See `BlockIndex.sweep`."""
        return self.index.sweep(limit)

    # --- giving an account

    def workers(self) -> list[WorkerKey]:
        """The workers that hold, or held, anything."""
        return list(dict.fromkeys(h.worker if isinstance(h, LowerTier) else h for h in self.index.holders()))

    def blocks(self, worker: WorkerKey) -> dict[StorageTier, int]:
        """How many blocks a worker holds, by tier; only tiers with any."""
        counts = {_tier(place): self.index.blocks(place) for place in self._places(worker)}
        return {tier: count for tier, count in counts.items() if count}

    def dump(self, worker: WorkerKey) -> Iterator[tuple[StorageTier, KvEventData]]:
        """Changes that make an empty index hold what this one holds of a worker now, whatever changes meanwhile.

        Raises ValueError for an index that keeps no contents.
        """
        accounts = [(_tier(place), self.index.account(place)) for place in self._places(worker)]
        return chain.from_iterable(dumped(tier, account) for tier, account in accounts)


def _tier(place: Holder) -> StorageTier:
    return place.tier if isinstance(place, LowerTier) else "device"
