"""Where in the tree of all known prompts is a block?

A radix tree over sequence hashes. Its nodes are *runs*, blocks in a row that the same holders reach; a set of holders
is one integer, a bit for each. The tree knows nothing of holders but that the set of a run's children is within its
own. Dictionaries lead from each sequence hash to its run.

Runs keep hashes in arrays and the dictionaries map numbers to numbers, so that Python's garbage collector has nothing
to look at but the runs. There are several, by the hash's last bits, because a dictionary that grows is copied whole,
once in some million blocks: with two million in one piece, nothing else would happen for 90 ms.

Of a long run the inner blocks are *hidden* at first: they are in no dictionary. Who follows a prompt comes in by a
run's first block, and who adds to a run, or evicts it, by its last. Many a prompt is stored and evicted again without
anybody asking for a block between. Where a lookup ends within a run is noted, as what is stored next may follow there;
for the first who asks for another hidden block, all that is hidden is entered.
"""

import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import delitem, setitem

SHARDS = 8  # a power of two; the longest pause is then 8 ms at two million blocks, and storing costs 2 % more
LAST_BITS = SHARDS - 1
LAST_BITS_OF_BYTE = bytes(byte & LAST_BITS for byte in range(256))
FEW = 8  # blocks that are entered one by one sooner than together
HIDDEN_FROM = 16  # blocks of a run; to hide fewer saves nothing
ENDS_NOTED = 4096  # as many lookups may wait for what is stored next; then all are forgotten
LOW_BYTE = 0 if sys.byteorder == "little" else 7  # of a hash in an array


class Run:
    """A node of the tree. Its children follow its last block."""

    __slots__ = ("children", "hidden", "id", "locals", "mask", "parent", "seqs")

    def __init__(self, id_: int, seqs: "array[int]", local_hashes: "array[int] | None", mask: int) -> None:
        self.id = id_
        self.seqs = seqs
        self.locals = local_hashes
        self.mask = mask
        """Who reaches these blocks; 0 for a run that nobody reaches, whose blocks are still to be swept."""
        self.parent: Run = self
        self.children: set[Run] = NO_RUNS
        self.hidden = 0
        """So many blocks, from the second on, are hidden."""

    def adopt(self, child: "Run") -> None:
        """Let a run follow this one."""
        child.parent = self
        if self.children:
            self.children.add(child)
        else:
            self.children = {child}

    def find(self, seq: int) -> int:
        """The position of a block in the run. Raises ValueError."""
        return 0 if self.seqs[0] == seq else self.seqs.index(seq)

    def continues(self, seq: int, after: int) -> bool:
        """Whether a block of this run, `seq`, is followed in it by the block `after`."""
        return self.seqs[-1] != seq and self.seqs[self.find(seq) + 1] == after

    def shared_end(self, seqs: list[int], done: int) -> int:
        """How many blocks, from the run's last one backwards, are those of `seqs` from `done` on."""
        backwards = self.seqs[: -1 - min(len(self.seqs), len(seqs) - done) : -1].tolist()
        ahead = seqs[done : done + len(backwards)]
        if backwards == ahead:
            return len(ahead)
        return next(i for i, (mine, theirs) in enumerate(zip(backwards, ahead, strict=True)) if mine != theirs)

    def any_child_reached(self, bit: int) -> bool:
        """Whether this holder reaches further than the run."""
        return any(child.mask & bit for child in self.children)


NO_RUNS: "set[Run]" = set()
"""The children of all runs that have none. Never added to: see `Run.adopt`."""


class RunTree:
    """All runs. With `keep_contents` they keep local hashes too (8 bytes a block)."""

    def __init__(self, keep_contents: bool) -> None:
        self.keep_contents = keep_contents
        self.root = Run(0, array("Q"), None, 0)
        self.runs: list[Run] = [self.root]
        """By id. A sequence hash that is not in `ids` has id 0: nobody reaches the root either."""
        self.ids: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        """By the last bits of a sequence hash: sequence hash -> id of its run."""
        self._free_ids: list[int] = []
        self.hiding: set[Run] = set()
        """Runs with hidden blocks."""
        self._ends: dict[int, int] = {}
        """Hidden blocks that a lookup ended at -> the id that their run had then."""
        self.left: list[Run] = []
        """Runs that nobody reaches, whose blocks are still in `ids`: see `sweep`."""
        self._reached = 0

    def __len__(self) -> int:
        """How many blocks somebody reaches."""
        return self._reached

    def run_of(self, seq: int) -> Run:
        """The run of a block; the root, or a run with an empty set, if nobody reaches it."""
        run = self.runs[self.ids[seq & LAST_BITS].get(seq, 0)]
        if not run.mask and self.hiding:  # it may be hidden, or be so in another run than in one that was left
            noted = self.runs[self._ends.get(seq, 0)]
            if noted.hidden and seq in noted.seqs:
                return noted
            self.show_all()
            run = self.runs[self.ids[seq & LAST_BITS].get(seq, 0)]
        return run

    def note_end(self, run: Run, seq: int) -> None:
        """A lookup ended at this block of a run: find it without showing all, if anybody asks for it."""
        if run.hidden:
            if len(self._ends) >= ENDS_NOTED:
                self._ends.clear()
            self._ends[seq] = run.id

    def run_from(self, seq: int) -> Run:
        """As `run_of`, for a block that is the first of its run if it is in any: of a prompt, or after a run's last."""
        return self.runs[self.ids[seq & LAST_BITS].get(seq, 0)]

    def show_all(self) -> None:
        """Let nothing be hidden."""
        while self.hiding:
            self._show(next(iter(self.hiding)))

    def _show(self, run: Run) -> None:
        if run.hidden:
            inner = run.seqs[1 : 1 + run.hidden]
            self._enter(inner, inner, run)
            run.hidden = 0
            self.hiding.discard(run)

    def _end_at(self, run: Run) -> None:
        """The run has become shorter: let its last block be entered."""
        if run.hidden and run.hidden >= len(run.seqs) - 1:
            run.hidden = max(0, len(run.seqs) - 2)
            if not run.hidden:
                self.hiding.discard(run)
            if run.seqs:
                last = run.seqs[-1]
                self.ids[last & LAST_BITS][last] = run.id

    def attach(
        self, parent: Run, last: int | None, seqs: list[int], local_hashes: list[int], bit: int, hides: bool = True
    ) -> None:
        """Add blocks that nobody has, after the block `last` of `parent`, for one holder.

        `hides`: not where the caller keeps `seqs`, as the dictionaries then need no numbers of their own.
        """
        if last is not None and parent.seqs[-1] != last:
            parent = self.split(parent, parent.find(last) + 1)[0]
        packed = array("Q", seqs)
        if parent.mask == bit and not parent.children:
            run = parent
            before = len(run.seqs)
            run.seqs.extend(packed)
            if run.locals is not None:
                run.locals.fromlist(local_hashes)
        else:
            run, before = self._add(packed, array("Q", local_hashes) if self.keep_contents else None, bit), 0
            parent.adopt(run)
        self._reached += len(seqs)
        if not hides or len(seqs) < HIDDEN_FROM or before > run.hidden + 2:
            self._enter(seqs, packed, run)
        else:
            self._enter_ends(run, before)

    def append(self, bit: int, last: int, seq: int, local_hash: int) -> bool:
        """`attach` of one block, if `last` ends a run of this holder alone that nothing follows. Returns whether."""
        ids = self.ids
        run = self.runs[ids[last & LAST_BITS].get(last, 0)]
        if run.mask != bit or run.children or run.seqs[-1] != last:
            return False
        own = ids[seq & LAST_BITS]
        if seq in own:
            return False
        run.seqs.append(seq)
        if run.locals is not None:
            run.locals.append(local_hash)
        own[seq] = run.id
        self._reached += 1
        return True

    def _enter_ends(self, run: Run, before: int) -> None:
        """Let the first and the last block lead to a run, which has grown from `before` blocks, and hide all others.

        Of those before, all but the first and the last were hidden.
        """
        seqs, ids = run.seqs, self.ids
        first, last = seqs[0], seqs[-1]
        ids[first & LAST_BITS][first] = ids[last & LAST_BITS][last] = run.id
        if before > 1:
            inner = seqs[before - 1]
            del ids[inner & LAST_BITS][inner]
        run.hidden = len(seqs) - 2
        self.hiding.add(run)

    def _enter(self, seqs: Iterable[int], packed: "array[int]", run: Run) -> None:
        """Let the blocks' hashes, given twice, lead to this run."""
        if len(packed) <= FEW:  # a decoded block, or a short prompt
            ids, run_id = self.ids, run.id
            for seq in seqs:
                ids[seq & LAST_BITS][seq] = run_id
            return
        last_bits = packed.tobytes()[LOW_BYTE::8].translate(LAST_BITS_OF_BYTE)
        deque(map(setitem, map(self.ids.__getitem__, last_bits), seqs, repeat(run.id)), maxlen=0)  # all of it in C

    def _add(self, seqs: "array[int]", local_hashes: "array[int] | None", mask: int) -> Run:
        if self._free_ids:
            run = Run(self._free_ids.pop(), seqs, local_hashes, mask)
            self.runs[run.id] = run
        else:
            run = Run(len(self.runs), seqs, local_hashes, mask)
            self.runs.append(run)
        return run

    def split(self, run: Run, length: int) -> tuple[Run, Run]:
        """Cut a run after `length` blocks. The longer part stays what it was; the shorter is entered anew."""
        self._show(run)
        if 2 * length <= len(run.seqs):
            head, tail = self._add(run.seqs[:length], run.locals and run.locals[:length], run.mask), run
            run.parent.children.discard(run)
            run.parent.adopt(head)
            del run.seqs[:length]
            if run.locals is not None:
                del run.locals[:length]
            entered = head
        else:
            head, tail = run, self._add(run.seqs[length:], run.locals and run.locals[length:], run.mask)
            tail.children = head.children
            for child in tail.children:
                child.parent = tail
            del run.seqs[length:]
            if run.locals is not None:
                del run.locals[length:]
            entered = tail
        head.children = NO_RUNS
        head.adopt(tail)
        self._enter(entered.seqs, entered.seqs, entered)
        return head, tail

    def reach(self, run: Run, length: int, bit: int) -> Run:
        """Add a holder to the first `length` blocks of a run, whose parent it reaches. Returns the run they are in."""
        parent, mask = run.parent, run.mask | bit
        if parent.mask == mask and len(parent.children) == 1:  # as when a long run is followed piece by piece
            return self._move_up(run, length)
        if length < len(run.seqs):
            run = self.split(run, length)[0]
        run.mask = mask
        return run

    def _move_up(self, run: Run, length: int) -> Run:
        """Move the first `length` blocks of a run to the end of its parent, which has no other child."""
        self._show(run)
        parent, moved = run.parent, run.seqs[:length]
        parent.seqs.extend(moved)
        if parent.locals is not None and run.locals is not None:
            parent.locals.extend(run.locals[:length])
        self._enter(moved, moved, parent)
        if length < len(run.seqs):
            del run.seqs[:length]
            if run.locals is not None:
                del run.locals[:length]
            return parent
        parent.children = run.children
        for child in parent.children:
            child.parent = parent
        run.mask = 0
        self._free(run)
        return parent

    def drop_end(self, run: Run, bit: int, seqs: list[int], done: int) -> int:
        """Drop blocks from the end of a run backwards, as far as they are those of `seqs` from `done` on.

        Returns how many; 0 too if others reach the run, or anybody what follows it.
        """
        count = run.shared_end(seqs, done) if run.mask == bit and not run.children else 0
        if not count:
            return 0
        start = len(run.seqs) - count
        dropped = run.seqs[max(start, 1 + run.hidden) if run.hidden else start :]
        if run.hidden and not start:
            dropped.append(run.seqs[0])
        last_bits = dropped.tobytes()[LOW_BYTE::8].translate(LAST_BITS_OF_BYTE)
        deque(map(delitem, map(self.ids.__getitem__, last_bits), dropped), maxlen=0)
        self._reached -= count
        del run.seqs[-count:]
        if run.locals is not None:
            del run.locals[-count:]
        self._end_at(run)
        if not run.seqs:
            run.mask = 0
            run.parent.children.discard(run)
            self._free(run)
        return count

    def drop_last(self, run: Run, bit: int) -> Run:
        """Take a holder out of the last block of a run. Returns the run of the block before, maybe the root."""
        if run.mask == bit:
            seq = run.seqs.pop()
            del self.ids[seq & LAST_BITS][seq]
            self._reached -= 1
            if run.locals is not None:
                run.locals.pop()
            self._end_at(run)
            if run.seqs:
                return run
            run.mask = 0
            run.parent.children.discard(run)
            self._free(run)
            return run.parent
        if len(run.seqs) == 1:
            run.mask ^= bit
            return run.parent
        others = run.mask ^ bit
        child = next(iter(run.children)) if len(run.children) == 1 else None
        if child is not None and child.mask == others:  # as when a long run is dropped block by block
            self._show(run)
            self._show(child)
            seq = run.seqs.pop()
            child.seqs.insert(0, seq)
            if run.locals is not None and child.locals is not None:
                child.locals.insert(0, run.locals.pop())
            self.ids[seq & LAST_BITS][seq] = child.id
            return run
        head, tail = self.split(run, len(run.seqs) - 1)
        tail.mask = others
        return head

    def _free(self, run: Run) -> None:
        self.runs[run.id] = self.root
        self._free_ids.append(run.id)

    def reached(self, bit: int) -> list[Run]:
        """The runs that a holder reaches, each after its parent."""
        found: list[Run] = []
        waiting = [run for run in self.root.children if run.mask & bit]
        while waiting:
            run = waiting.pop()
            found.append(run)
            waiting.extend(child for child in run.children if child.mask & bit)
        return found

    def told(self, bit: int) -> Iterator[tuple[int | None, list[int], list[int]]]:
        """Of the same runs: the block before each, its blocks, and their local hashes where they are kept."""
        for run in self.reached(bit):
            before = run.parent.seqs[-1] if run.parent is not self.root else None
            yield before, run.seqs.tolist(), run.locals.tolist() if run.locals is not None else []

    # --- leaving

    def leave(self, bit: int) -> None:
        """Take a holder out of everything. Takes time by runs; the blocks that nobody reaches then await `sweep`."""
        for run in self.reached(bit):
            if run.mask != bit:
                run.mask ^= bit
                continue
            run.mask = 0
            run.parent.children.discard(run)
            run.parent = self.root
            run.children = NO_RUNS
            run.hidden = 0
            self.hiding.discard(run)
            self.left.append(run)
            self._reached -= len(run.seqs)

    def sweep(self, limit: int) -> None:
        """Take out up to `limit` blocks that nobody reaches."""
        while self.left and limit > 0:
            run = self.left[-1]
            part = run.seqs[-limit:]
            del run.seqs[-limit:]
            limit -= len(part)
            for seq in part:
                ids = self.ids[seq & LAST_BITS]
                if ids.get(seq) == run.id:  # else somebody has stored it again
                    del ids[seq]
            if not run.seqs:
                self.left.pop()
                self._free(run)


def shared_length(run: "array[int]", start: int, seqs: Sequence[int], done: int) -> int:
    """How many blocks two sequences share from `start` and `done` on, given that they share one."""
    longest = min(len(run) - start, len(seqs) - done)
    if run[start + longest - 1] == seqs[done + longest - 1]:  # one equal hash means that all before are equal
        return longest
    low, high = 1, longest - 1
    while low < high:
        middle = (low + high + 1) >> 1
        if run[start + middle - 1] == seqs[done + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
