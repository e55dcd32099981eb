"""Which blocks does the simulated GPU hold, and who uses them?

A block is either blank (being filled by one sequence) or named by its sequence hash (full, and shared by every
sequence with the same prefix). Named blocks that nobody uses stay in an LRU list until their room is needed.

    capacity = blanks + used (named, referenced) + idle (named, unreferenced) + never touched

The pool is counted, not addressed: a simulation needs no block numbers.
"""

from collections.abc import Iterable, Sequence

from dynamo.llm.kv_events import KvEventData, Removed, Stored, StoredBlock


class BlockPool:
    """Blocks of one data-parallel rank. Owner of all block state; sequences only remember what they hold.

    Every change of the set of named blocks is one event, in order; `take_events` hands them over.
    """

    def __init__(self, capacity: int, *, record_events: bool = True) -> None:
        self.capacity = capacity
        self._blanks = 0
        self._used: dict[int, int] = {}  # sequence hash -> sequences that use it
        self._idle: dict[int, None] = {}  # sequence hash, least recently used first
        self._record = record_events
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
        """How many of the first `limit` names are held, without a hole."""
        used, idle = self._used, self._idle
        for i in range(min(limit, len(names))):
            name = names[i]
            if name not in used and name not in idle:
                return i
        return min(limit, len(names))

    def count_idle(self, names: Iterable[int]) -> int:
        """How many of these held names nobody uses: taking them makes fewer blocks available."""
        return sum(name in self._idle for name in names)

    def acquire(self, names: Iterable[int]) -> None:
        """Use blocks that are held."""
        used, idle = self._used, self._idle
        for name in names:
            if name in used:
                used[name] += 1
            else:
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
        evicted = []
        for name in self._idle:
            evicted.append(name)
            if len(evicted) == count:
                break
        for name in evicted:
            del self._idle[name]
        if self._record:
            self._events.append(KvEventData(removed=Removed(evicted)))

    def name(self, parent: int | None, names: Sequence[int], contents: Sequence[int]) -> None:
        """Blank blocks became full: name them and share them. `contents` are their local hashes.

        A name that is held already is shared instead, and the blank block is free again.
        """
        self._blanks -= len(names)
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
        if run and self._record:
            self._events.append(KvEventData(stored=Stored(run, parent)))

    def release(self, names: Sequence[int], blanks: int) -> None:
        """Stop using blocks. The end of a prefix becomes the oldest, so it is evicted before what it stands on."""
        self._blanks -= blanks
        used, idle = self._used, self._idle
        for name in reversed(names):
            users = used[name] - 1
            if users:
                used[name] = users
            else:
                del used[name]
                idle[name] = None

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
