"""Who probably holds a prompt's prefix, where no worker says so?

The router notes where it sent what. A worker then holds a prompt's blocks until they are too old, or too many: those
that were used longest ago go first, and of one prompt the end first. A prompt's end stands for all of its blocks, so
noting one takes time by its runs in the index, and forgetting it one step for each block, once.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

from dynamo.router.block_index import BlockIndex
from dynamo.router.types import Overlap, OverlapSource, WorkerKey

DEFAULT_TTL_S = 120.0  # how long engines under load keep a block, in the peers' experience [K34]
DEFAULT_CAPACITY = 65_536  # blocks of a worker that did not say how many it has
FORGOTTEN_AT_ONCE = 4096  # blocks, 3 ms; after a pause the rest goes with the following calls


class _End:
    """Where a prompt ended that was sent to a worker. It keeps all blocks before it there, until `at`."""

    __slots__ = ("at", "live", "seq", "worker")

    def __init__(self, worker: WorkerKey, seq: int, at: float) -> None:
        self.worker = worker
        self.seq = seq
        self.at = at
        self.live = True


class ApproximateIndex:
    """What workers should hold by what was sent there.

    `ttl_s` is how long a block lasts since it was last used; None for until there is no room. Each worker has room for
    its `capacity` in blocks. Times are seconds of any clock that does not go back.
    """

    def __init__(self, ttl_s: float | None = DEFAULT_TTL_S) -> None:
        if ttl_s is not None and ttl_s <= 0:
            raise ValueError(f"ttl_s: {ttl_s:g} must be above 0")
        self.ttl_s = ttl_s
        self._index: BlockIndex[WorkerKey] = BlockIndex()
        self._ends: dict[WorkerKey, OrderedDict[int, _End]] = {}  # by sequence hash, the oldest first
        self._capacity: dict[WorkerKey, int] = {}
        self._due: deque[_End] = deque()

    def __len__(self) -> int:
        """How many different blocks there are."""
        return len(self._index)

    def blocks(self, worker: WorkerKey) -> int:
        """How many blocks a worker should hold."""
        return self._index.blocks(worker)

    # --- finding

    def find(self, sequence_hashes: Sequence[int], now: float) -> dict[WorkerKey, Overlap]:
        """See `OverlapSource`."""
        found: dict[WorkerKey, Overlap] = {}
        for overlap, workers in self.groups(sequence_hashes, now):
            found.update(dict.fromkeys(workers, overlap))
        return found

    def groups(self, sequence_hashes: Sequence[int], now: float) -> Sequence[tuple[Overlap, Sequence[WorkerKey]]]:
        """See `GroupedOverlapSource`."""
        self.expire(now)
        levels = self._index.reached(sequence_hashes)
        return [(Overlap(blocks), workers) for blocks, workers in self._index.by_level(levels)]

    # --- changing

    def routed(self, worker: WorkerKey, sequence_hashes: Sequence[int], now: float) -> None:
        """A prompt was sent to a worker."""
        self.expire(now)
        if not sequence_hashes:
            return
        ends, seq = self._ends.setdefault(worker, OrderedDict()), sequence_hashes[-1]
        if seq in ends:
            ends.pop(seq).live = False  # it is the youngest now
        end = ends[seq] = _End(worker, seq, now + (self.ttl_s or 0.0))
        self._index.hold(worker, list(sequence_hashes))
        if self.ttl_s is not None:
            self._due.append(end)
        self._make_room(worker, ends)

    def set_capacity(self, worker: WorkerKey, blocks: int | None) -> None:
        """How many blocks a worker has room for; None if it did not say."""
        if blocks is None:
            self._capacity.pop(worker, None)
        else:
            self._capacity[worker] = max(1, blocks)
        self._make_room(worker, self._ends.get(worker, OrderedDict()))

    def _make_room(self, worker: WorkerKey, ends: OrderedDict[int, _End]) -> None:
        over = self._index.blocks(worker) - self._capacity.get(worker, DEFAULT_CAPACITY)
        while over > 0 and ends:
            over -= self._shorten(next(iter(ends.values())), ends, over)

    def _shorten(self, end: _End, ends: OrderedDict[int, _End], limit: int) -> int:
        """Drop up to `limit` blocks that only this end keeps, and the end with the last of them. Returns how many."""
        before = self._index.blocks(end.worker)
        del ends[end.seq]
        rest = self._index.shorten(end.worker, end.seq, limit, ends)
        if rest is None:
            end.live = False
        else:
            end.seq = rest
            ends[rest] = end
            ends.move_to_end(rest, last=False)
        return before - self._index.blocks(end.worker)

    def expire(self, now: float) -> None:
        """Forget what is too old, at most some milliseconds' worth."""
        due, left = self._due, FORGOTTEN_AT_ONCE
        while due and due[0].at <= now and left > 0:
            end = due[0]
            left -= 1
            if end.live:
                left -= self._shorten(end, self._ends[end.worker], left)
            if not end.live:
                due.popleft()

    def remove_worker(self, worker: WorkerKey) -> None:
        """Forget a worker."""
        self._index.remove_holder(worker)
        for end in self._ends.pop(worker, OrderedDict()).values():
            end.live = False
        self._capacity.pop(worker, None)


class PredictingIndex:
    """What workers say they hold, or will soon: `predicted` notes what was just sent there [K35]."""

    def __init__(self, real: OverlapSource, predicted: ApproximateIndex) -> None:
        self.real = real
        self.predicted = predicted

    def find(self, sequence_hashes: Sequence[int], now: float) -> dict[WorkerKey, Overlap]:
        """The larger of both, for each worker."""
        found = self.real.find(sequence_hashes, now)
        for worker, predicted in self.predicted.find(sequence_hashes, now).items():
            found[worker] = _at_least(found.get(worker, NOTHING), predicted.device)
        return found

    def routed(self, worker: WorkerKey, sequence_hashes: Sequence[int], now: float) -> None:
        """A prompt was sent to a worker."""
        self.predicted.routed(worker, sequence_hashes, now)

    def remove_worker(self, worker: WorkerKey) -> None:
        """Forget what was predicted of a worker."""
        self.predicted.remove_worker(worker)


NOTHING = Overlap()


def _at_least(real: Overlap, device: int) -> Overlap:
    """What a worker holds if that many blocks come to its device."""
    if device <= real.device:
        return real
    host_end = max(device, real.device + real.host)
    return Overlap(device, host_end - device, max(host_end, real.total) - host_end)
