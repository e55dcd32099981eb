"""Who holds the longest prefix of this prompt?

A sequence hash names a block with everything before it, so whoever holds a block can only use it if it holds all the
blocks before. Along a prompt the sets of holders therefore only shrink, and where they do is found by going along the
runs of `run_tree`, or by bisection where they are short: in a few looks, however many blocks there are.

A holder *reaches* a block that it holds, and every block before one that it holds. One that it reaches without
holding it is a hole: its match ends there, though what it holds behind is kept and counts again once the hole is
filled. Engines evict ends first, so holes are rare; they are counted apart and cost nothing while there are none.
"""

import struct
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Generic

from dynamo.llm.block_hash import PAIR, next_sequence_hash, sequence_hashes
from dynamo.router.account import Account, HeldRun
from dynamo.router.holder_slot import H, Slot
from dynamo.router.levels import Level, cut_at_holes, level
from dynamo.router.run_tree import LAST_BITS, Run, RunTree, shared_length

SETS_CACHED = 1024  # decoded sets of holders; at 1,000 holders in each, 8 MB
WALKED_RUNS = 8  # going on to the next run costs two looks of a bisection, which takes ten for 850 blocks ...
WALKED_BLOCKS = 8  # ... and where runs have so many blocks, they are the shorter way
FEW_LEVELS = 4  # with more, it is cheaper to name each holder once than to look all sets up
NONE: frozenset[int] = frozenset()
MAX_HASH = (1 << 64) - 1
MIN_SWEPT = 64  # blocks of a holder that left, taken out with each store; more with larger stores


class UnknownParentError(LookupError):
    """The holder does not hold the block that these blocks follow."""


class BlockIndex(Generic[H]):
    """Which holders have which blocks, kept from what they say was stored and removed, in any order.

    With `keep_contents` the local hashes are kept too (8 bytes a block more), so that it can give an `account`.
    """

    def __init__(self, *, keep_contents: bool = False) -> None:
        self._tree = RunTree(keep_contents)
        self._slots: dict[H, Slot[H]] = {}
        self._by_bit: list[Slot[H] | None] = []
        self._free_bits: list[int] = []
        self._holes: dict[int, int] = {}  # sequence hash -> who has a hole there
        self._sets: dict[int, tuple[H, ...]] = {}

    # --- what is in it

    def __len__(self) -> int:
        """How many different blocks somebody reaches."""
        return len(self._tree)

    def __contains__(self, holder: H) -> bool:
        return holder in self._slots

    def holders(self) -> list[H]:
        """Everybody who was added or has stored something, and has not been removed."""
        return list(self._slots)

    def blocks(self, holder: H) -> int:
        """How many blocks a holder holds; 0 for an unknown one."""
        slot = self._slots.get(holder)
        return slot.blocks if slot is not None else 0

    def holes(self, holder: H) -> frozenset[int]:
        """The sequence hashes of blocks that a holder lacks before some that it holds."""
        slot = self._slots.get(holder)
        return frozenset(slot.holes) if slot is not None else frozenset()

    @property
    def has_holes(self) -> bool:
        """Whether any holder has a hole."""
        return bool(self._holes)

    def bit(self, holder: H) -> int:
        """The set of this holder alone; 0 for an unknown one."""
        slot = self._slots.get(holder)
        return slot.bit if slot is not None else 0

    def by_level(self, levels: Sequence[Level]) -> list[tuple[int, tuple[H, ...]]]:
        """(blocks, holders) for levels; of several that a holder is in, the last one counts."""
        if len(levels) <= FEW_LEVELS:  # their sets are often the same, and known
            return [(blocks, self._sets.get(mask) or self._members(mask)) for blocks, mask in levels]
        return [
            (blocks, tuple(self._holders_in(mask & ~further)))
            for (blocks, mask), (_, further) in pairwise((*levels, Level(0, 0)))
        ]

    def _members(self, mask: int) -> tuple[H, ...]:
        if len(self._sets) >= SETS_CACHED:
            self._sets.clear()
        members = self._sets[mask] = tuple(self._holders_in(mask))
        return members

    def _holders_in(self, mask: int) -> Iterator[H]:
        while mask:
            lowest = mask & -mask
            slot = self._by_bit[lowest.bit_length() - 1]
            assert slot is not None
            yield slot.holder
            mask ^= lowest

    # --- finding

    def find(self, sequence: Sequence[int]) -> dict[H, int]:
        """How many leading blocks of a sequence each holder holds, for those that hold any."""
        found: dict[H, int] = {}
        for blocks, holders in self.by_level(self.levels(sequence)):
            found.update(dict.fromkeys(holders, blocks))
        return found

    def levels(self, sequence: Sequence[int]) -> list[Level]:
        """How many leading blocks of a sequence holders hold: levels of rising length and shrinking sets."""
        levels = self.reached(sequence)
        if levels and self._holes:
            holes = self.holes_in(sequence, levels)
            if holes:
                return cut_at_holes(levels, holes)
        return levels

    def reached(self, sequence: Sequence[int]) -> list[Level]:
        """As `levels`, as if there were no holes.

        Goes along the runs, of which most prompts have few; if they are short, bisects what is left.
        """
        levels: list[Level] = []
        if not sequence:
            return levels
        runs, ids, seq = self._tree.runs, self._tree.ids, sequence[0]
        run_id = ids[seq & LAST_BITS].get(seq)
        if run_id is None:
            return levels
        run, count, done, walked = runs[run_id], len(sequence), 0, 0
        mask = run.mask
        while run.mask and walked < WALKED_RUNS + done // WALKED_BLOCKS:
            walked += 1
            length = shared_length(run.seqs, 0, sequence, done)
            done += length
            if done == count or length < len(run.seqs):  # children follow a whole run, so nothing else does
                levels.append(level((done, mask)))
                if length < len(run.seqs):
                    self._tree.note_end(run, sequence[done - 1])
                return levels
            seq = sequence[done]
            run = runs[ids[seq & LAST_BITS].get(seq, 0)]
            if run.mask != mask:
                levels.append(level((done, mask)))
                mask = run.mask
        if mask and self._tree.hiding:
            self._tree.show_all()
        ahead = [(count, 0)]  # positions looked at already, with what was found, the nearest last
        while mask:
            position, further = ahead[-1]
            if further == mask:
                done = position
                ahead.pop()
            elif position - done == 1:
                levels.append(Level(position, mask))
                done, mask = position, further
                ahead.pop()
            else:
                middle = (done + position) >> 1
                seq = sequence[middle]
                ahead.append((middle, runs[ids[seq & LAST_BITS].get(seq, 0)].mask))
        return levels

    def holes_in(self, sequence: Sequence[int], levels: list[Level]) -> list[tuple[int, int]]:
        """(position, who lacks the block there) in the part of a sequence that `levels` reach, by position."""
        if not levels or not self._holes:
            return []
        reached = sequence[: levels[-1].blocks]
        holed = self._holes.keys() & reached  # in C, and nearly always nothing
        if not holed:
            return []
        lacking = ((i, self._holes[seq] & levels[0].mask) for i, seq in enumerate(reached) if seq in holed)
        return [(i, mask) for i, mask in lacking if mask]

    # --- storing

    def add(self, holder: H) -> None:
        """Know a holder before it has stored anything."""
        self._slot(holder)

    def _slot(self, holder: H) -> Slot[H]:
        slot = self._slots.get(holder)
        if slot is None:
            if not self._free_bits:
                self._free_bits.append(len(self._by_bit))
                self._by_bit.append(None)
            number = self._free_bits.pop()
            slot = self._slots[holder] = self._by_bit[number] = Slot(holder, 1 << number)
        return slot

    def sequence_hash(self, holder: H, name: int) -> int | None:
        """The sequence hash of the block that a holder holds under its engine's `name`; None if it holds none."""
        slot = self._slots.get(holder)
        return None if slot is None else self._resolve(slot, name)

    def _resolve(self, slot: Slot[H], name: int) -> int | None:
        if slot.names is not None:
            return slot.names.get(name)
        if self._tree.run_of(name).mask & slot.bit and name not in slot.holes:
            return name
        return None

    def store(self, holder: H, parent: int | None, names: list[int], local_hashes: list[int]) -> int:
        """A holder has stored blocks in a row, the first after the block that its engine calls `parent`.

        Returns how many of them it did not hold before.

        Raises:
            UnknownParentError: it does not hold `parent`; nothing was stored.
            ValueError: a local hash is not an unsigned 64-bit number; nothing was stored.
        """
        slot = self._slots.get(holder) or self._slot(holder)
        above = None
        if parent is not None:
            above = self._resolve(slot, parent)
            if above is None:
                raise UnknownParentError(f"{holder} does not hold the parent block {parent}")
        return self._store(slot, above, names, local_hashes)

    def append(self, holder: H, parent: int, name: int, local_hash: int) -> bool:
        """As `store` of one block behind the last one of a run that is this holder's alone: what decoding makes.

        False where it is anything else, or may be: then nothing was stored, and it is for `store`.
        """
        slot = self._slots.get(holder)
        if slot is None or slot.holes or self._tree.left or not 0 <= local_hash <= MAX_HASH:
            return False
        names = slot.names
        above = parent if names is None else names.get(parent)
        if above is None or (names is not None and name in names):
            return False
        seq = next_sequence_hash(above, local_hash)
        if (names is None and seq != name) or not self._tree.append(slot.bit, above, seq, local_hash):
            return False
        if names is not None:
            names[name] = seq
        slot.blocks += 1
        return True

    def store_after(self, holder: H, above: int | None, names: list[int], local_hashes: list[int]) -> int:
        """As `store`, after the block with the sequence hash `above`, which anybody must reach."""
        return self._store(self._slot(holder), above, names, local_hashes)

    def _store(self, slot: Slot[H], above: int | None, names: list[int], local_hashes: list[int]) -> int:
        count = len(names)
        if not count or count != len(local_hashes):
            if count or local_hashes:
                raise ValueError(f"blocks: {count} names for {len(local_hashes)} local hashes")
            return 0
        try:
            seqs = sequence_hashes(local_hashes, above)
            if above is None:
                PAIR.pack(0, seqs[0])  # the first of all is its own sequence hash: nothing has looked at it yet
        except (struct.error, OverflowError, TypeError) as e:
            raise ValueError(f"tokens_hash: not an unsigned 64-bit number: {e}") from e
        if slot.names is None and names != seqs:
            slot.names = self._own_names(slot)
        tree, fresh = self._tree, 0
        if above is None and not tree.run_from(seqs[0]).mask:  # a prompt that nobody has the beginning of
            tree.attach(tree.root, None, seqs, local_hashes, slot.bit, slot.names is None)
        else:
            fresh = self._reach(slot, above, seqs, local_hashes)
        added = count - fresh
        if slot.holes or slot.names is not None:
            filled = self._fill_all(slot, seqs[:fresh]) if fresh and slot.holes else NONE
            added += len(filled)
            if slot.names is not None:
                for old in slot.call(slot.names, names, seqs, filled.union(seqs[fresh:])):
                    self._unname(slot, old)
        slot.blocks += added
        if self._tree.left:
            self.sweep(2 * count + MIN_SWEPT)
        return added

    def hold(self, holder: H, seqs: list[int]) -> int:
        """A holder has the blocks of these sequence hashes, of a prompt from its start. Returns how many are new to it.

        For an index without names, contents and holes: `shorten` undoes it.
        """
        if not seqs:
            return 0
        slot = self._slot(holder)
        added = len(seqs) - self._reach(slot, None, seqs, [])
        slot.blocks += added
        if self._tree.left:
            self.sweep(2 * len(seqs) + MIN_SWEPT)
        return added

    def _reach(self, slot: Slot[H], above: int | None, seqs: list[int], local_hashes: list[int]) -> int:
        """Let a holder reach `seqs`. Returns the position from which on they are new to it."""
        tree, bit = self._tree, slot.bit
        parent = tree.root if above is None else tree.run_of(above)
        if above is not None and not parent.mask & bit:
            parent = self._reach_back(slot, parent, above)
        run = tree.run_from(seqs[0])
        if not run.mask and above is not None and parent.continues(above, seqs[0]):
            run = parent
        if not run.mask:  # nobody has any of them
            tree.attach(parent, above, seqs, local_hashes, bit, slot.names is None)
            return 0
        done, fresh, count = 0, len(seqs), len(seqs)
        while run.mask:
            start = run.find(seqs[done])
            length = shared_length(run.seqs, start, seqs, done)
            if not run.mask & bit:
                if start:  # it would reach the run if it reached a part of it, but for two blocks with one hash
                    run = tree.split(run, start)[1]
                run = tree.reach(run, length, bit)
                fresh = min(fresh, done)
            parent = run
            done += length
            if done == count:
                return fresh
            run = tree.run_from(seqs[done])
        tree.attach(parent, seqs[done - 1], seqs[done:], local_hashes[done:], bit, slot.names is None)
        return min(fresh, done)

    def _reach_back(self, slot: Slot[H], run: Run, seq: int) -> Run:
        """Let a holder reach a block that it does not hold, and all before it: holes, every one."""
        end = run.find(seq) + 1
        if end < len(run.seqs):
            run = self._tree.split(run, end)[0]
        ancestor = run
        while ancestor is not self._tree.root and not ancestor.mask & slot.bit:
            ancestor.mask |= slot.bit
            for hole in ancestor.seqs:
                self._dig(slot, hole)
            ancestor = ancestor.parent
        return run

    def shorten(self, holder: H, end: int, limit: int, ends: Container[int]) -> int | None:
        """Drop a holder's block `end` and those before it, until something else follows or one of `ends` is reached.

        Drops at most `limit`; returns the block that would have been next then, else None.
        """
        slot, tree = self._slots.get(holder), self._tree
        run = tree.run_of(end)
        if slot is None:
            return None
        while run.mask & slot.bit and run.seqs[-1] == end and not run.any_child_reached(slot.bit):
            if limit <= 0:
                return end
            limit -= 1
            slot.blocks -= 1
            run = tree.drop_last(run, slot.bit)
            if not run.mask & slot.bit:
                break
            end = run.seqs[-1]
            if end in ends:
                break
        return None

    # --- names

    def _own_names(self, slot: Slot[H]) -> dict[int, int]:
        """The names of a holder whose blocks were all called by their sequence hashes so far."""
        return {seq: seq for run in self._tree.reached(slot.bit) for seq in run.seqs if seq not in slot.holes}

    def _unname(self, slot: Slot[H], seq: int) -> None:
        if slot.uncall(seq):
            self._release(slot, seq)

    # --- removing

    def remove(self, holder: H, names: Iterable[int]) -> int:
        """A holder has dropped blocks; those that follow them stay. Returns how many of the names it did not hold."""
        slot = self._slots.get(holder)
        if slot is None:
            return sum(1 for _ in names)
        if slot.names is None:
            return self._remove_seqs(slot, names if isinstance(names, list) else list(names))
        unknown = 0
        for name in names:
            seq = slot.names.pop(name, None)
            if seq is None:
                unknown += 1
            else:
                self._unname(slot, seq)
        return unknown

    def _remove_seqs(self, slot: Slot[H], seqs: list[int]) -> int:
        """As `remove`, by sequence hashes. Engines evict ends first, so most go many at a time."""
        tree, bit, unknown, done = self._tree, slot.bit, 0, 0
        while done < len(seqs):
            run = tree.run_of(seqs[done])
            together = 0 if slot.holes else tree.drop_end(run, bit, seqs, done)
            slot.blocks -= together
            if not together and run.mask & bit and seqs[done] not in slot.holes:
                self._release(slot, seqs[done])
            elif not together:
                unknown += 1
            done += together or 1
        return unknown

    def _release(self, slot: Slot[H], seq: int) -> None:
        """A holder holds this block no longer. If it holds one behind it, that leaves a hole."""
        run, bit = self._tree.run_of(seq), slot.bit
        slot.blocks -= 1
        if run.seqs[-1] != seq or (run.children and run.any_child_reached(bit)):
            self._dig(slot, seq)
            return
        run = self._tree.drop_last(run, bit)
        while slot.holes and run.mask & bit and run.seqs[-1] in slot.holes and not run.any_child_reached(bit):
            self._fill(slot, run.seqs[-1])  # there is nothing behind it any more
            run = self._tree.drop_last(run, bit)

    def _dig(self, slot: Slot[H], seq: int) -> None:
        slot.holes.add(seq)
        self._holes[seq] = self._holes.get(seq, 0) | slot.bit

    def _fill(self, slot: Slot[H], seq: int) -> None:
        slot.holes.discard(seq)
        mask = self._holes[seq] & ~slot.bit
        if mask:
            self._holes[seq] = mask
        else:
            del self._holes[seq]

    def _fill_all(self, slot: Slot[H], seqs: Iterable[int]) -> frozenset[int]:
        """Fill the holes among these blocks; returns them."""
        filled = frozenset(slot.holes.intersection(seqs))
        for seq in filled:
            self._fill(slot, seq)
        return filled

    # --- leaving

    def clear(self, holder: H) -> None:
        """A holder has dropped everything."""
        if holder in self._slots:
            self.remove_holder(holder)
            self._slot(holder)

    def remove_holder(self, holder: H) -> None:
        """Forget a holder. Takes time by its runs; the blocks that only it held go bit by bit, in `sweep`."""
        slot = self._slots.pop(holder, None)
        if slot is None:
            return
        self._fill_all(slot, tuple(slot.holes))
        self._tree.leave(slot.bit)
        number = slot.bit.bit_length() - 1
        self._by_bit[number] = None
        self._free_bits.append(number)
        self._sets.clear()

    def sweep(self, limit: int) -> bool:
        """Free the memory of up to `limit` blocks of holders that left. Returns whether there are more.

        Storing does so too, so this is only for whoever wants the memory back sooner.
        """
        self._tree.sweep(limit)
        return bool(self._tree.left)

    # --- giving an account

    def account(self, holder: H) -> Account:
        """What a holder holds now, as a copy.

        Raises ValueError for an index that keeps no contents.
        """
        tree = self._tree
        if not tree.keep_contents:
            raise ValueError("keep_contents: this index has no local hashes; make it with keep_contents=True")
        slot = self._slots.get(holder)
        if slot is None:
            return Account([], frozenset(), None, {})
        runs = [HeldRun(*told) for told in tree.told(slot.bit)]
        if slot.names is None:
            return Account(runs, frozenset(slot.holes), None, {})
        names = {seq: name for name, seq in slot.names.items()}
        more: dict[int, list[int]] = {}
        if slot.aliases:
            for name, seq in slot.names.items():
                if names[seq] != name:
                    more.setdefault(seq, []).append(name)
        return Account(runs, frozenset(slot.holes), names, more)
