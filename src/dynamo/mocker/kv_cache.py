"""Which blocks does the simulated GPU hold, and who uses them?

A block is either blank (being filled by one sequence) or named by its sequence hash (full, and shared by every
sequence with the same prefix). Named blocks that nobody uses stay in an LRU list until their room is needed.

    capacity = blanks + used (named, referenced) + idle (named, unreferenced) + never touched

The pool is counted, not addressed: a simulation needs no block numbers.
"""

from collections import OrderedDict
from collections.abc import Sequence

from dynamo.llm.kv_events import KvEventData, Removed, Stored, StoredBlock


class BlockPool:
    """Blocks of one data-parallel rank. Owner of all block state; sequences only remember what they hold.

    Every change of the set of named blocks is one event, in order; `take_events` hands them over.
    """

    def __init__(self, capacity: int, *, record_events: bool = True) -> None:
        self.capacity = capacity
        self._blanks = 0
        self._used: dict[int, int] = {}  # sequence hash -> sequences that use it
        # Sequence hash, least recently used first. A plain dict would have to skip its dead entries at every eviction.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.record_events = record_events
        self._events: list[KvEventData] = []

    @property
    def in_use(self) -> int:
        """Blocks that some sequence holds."""
        return self._blanks + len(self._used)

    @property
    def available(self) -> int:
        """Blocks that could be allocated now, counting those that would have to be evicted."""
        return self.capacity - self._blanks - len(self._used)

    def holds(self, name: int) -> bool:
        """Whether a block of this sequence hash is here, used or idle."""
        return name in self._used or name in self._idle

    def match(self, names: Sequence[int], limit: int) -> int:
        """How many of the first `limit` names are held. What is held of a prompt is its beginning, without a hole:
        see `release`."""
        low, high = 0, min(limit, len(names))
        while low < high:
            middle = (low + high) >> 1
            if self.holds(names[middle]):
                low = middle + 1
            else:
                high = middle
        return low

    def _used_of(self, names: Sequence[int], users: int = 1) -> int:
        """How many of these held names have at least so many users: like those held, the first ones."""
        used, low, high = self._used, 0, len(names)
        while low < high:
            middle = (low + high) >> 1
            if used.get(names[middle], 0) >= users:
                low = middle + 1
            else:
                high = middle
        return low

    def count_idle(self, names: Sequence[int]) -> int:
        """How many of these held names nobody uses: taking them makes fewer blocks available."""
        return len(names) - self._used_of(names)

    def acquire(self, names: Sequence[int]) -> None:
        """Use blocks that are held, a prompt's beginning."""
        used, idle = self._used, self._idle
        shared = self._used_of(names)
        for name in names[:shared]:
            used[name] += 1
        for name in names[shared:]:
            del idle[name]
            used[name] = 1

    def allocate(self, count: int) -> None:
        """Take `count` blank blocks, evicting the least recently used idle ones where there is no other room."""
        assert count <= self.available
        self._blanks += count
        overfull = self._blanks + len(self._used) + len(self._idle) - self.capacity
        if overfull > 0:
            self._evict(overfull)

    def _evict(self, count: int) -> None:
        pop = self._idle.popitem
        evicted = [pop(last=False)[0] for _ in range(count)]
        if self.record_events:
            self._events.append(KvEventData(removed=Removed(evicted)))

    def name(self, parent: int | None, names: Sequence[int], contents: Sequence[int]) -> None:
        """Blank blocks became full: name them and share them. `contents` are their local hashes.

        A name that is held already is shared instead, and the blank block is free again.
        """
        self._blanks -= len(names)
        if self._used.keys().isdisjoint(names) and self._idle.keys().isdisjoint(names):
            self._used.update(dict.fromkeys(names, 1))
            if self.record_events:
                self._stored(parent, list(map(StoredBlock, names, contents)))
            return
        run: list[StoredBlock] = []
        for name, content in zip(names, contents, strict=True):
            if self.holds(name):
                self._stored(parent, run)
                run, parent = [], name
                self.acquire((name,))
            else:
                self._used[name] = 1
                run.append(StoredBlock(name, content))
        self._stored(parent, run)

    def _stored(self, parent: int | None, run: list[StoredBlock]) -> None:
        if run and self.record_events:
            self._events.append(KvEventData(stored=Stored(run, parent)))

    def release(self, names: Sequence[int], blanks: int) -> None:
        """Stop using blocks. The end of a prefix becomes the oldest, so it is evicted before what it stands on.

        `names` begin with the first block of a sequence, and whoever uses a block uses all before it.
        """
        self._blanks -= blanks
        used = self._used
        shared = self._used_of(names, 2)
        for name in names[:shared]:
            used[name] -= 1
        freed = names[shared:]
        for name in freed:
            del used[name]
        self._idle.update(dict.fromkeys(reversed(freed)))

    def clear_idle(self) -> int:
        """Forget every block that nobody uses. Returns how many there were."""
        count = len(self._idle)
        if count:
            self._evict(count)
        return count

    def take_events(self) -> list[KvEventData]:
        """What changed since the last call."""
        events = self._events
        if events:
            self._events = []
        return events

    def named(self) -> frozenset[int]:
        """Every sequence hash held, for checks."""
        return frozenset(self._used) | frozenset(self._idle)

    def references(self) -> int:
        """All uses of named blocks plus blanks: the sum of the block tables of all live sequences."""
        return self._blanks + sum(self._used.values())
