"""What is known of one holder of blocks, and what does its engine call them?

Most engines call a block by its sequence hash; then no names are kept. Others have names of their own, of which one
names one block, the last that was called so; a block may have several.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

H = TypeVar("H", bound=Hashable)


class Slot(Generic[H]):
    """One holder in a `BlockIndex`."""

    __slots__ = ("aliases", "bit", "blocks", "holder", "holes", "names")

    def __init__(self, holder: H, bit: int) -> None:
        self.holder = holder
        self.bit = bit
        self.blocks = 0
        """How many it holds, holes not counted."""
        self.holes: set[int] = set()
        self.names: dict[int, int] | None = None
        """The engine's name of each block held -> sequence hash; None while they are all the same [K57]."""
        self.aliases: dict[int, int] = {}
        """Sequence hash -> how many names it has beyond one, if any."""

    def call(self, known: dict[int, int], names: list[int], seqs: list[int], new: frozenset[int]) -> list[int]:
        """Note in `known`, its names, what the engine calls blocks, of which `new` have no name yet.

        Returns the blocks that have lost a name by it, to each of which `uncall` applies.
        """
        if len(new) == len(seqs) == len(set(names)) and known.keys().isdisjoint(names):
            known.update(zip(names, seqs, strict=True))
            return []
        unnamed, renamed = set(new), []
        for name, seq in zip(names, seqs, strict=True):
            old = known.get(name)
            if old == seq:
                continue
            known[name] = seq
            if seq in unnamed:
                unnamed.discard(seq)
            else:
                self.aliases[seq] = self.aliases.get(seq, 0) + 1
            if old is not None:
                renamed.append(old)
        return renamed

    def uncall(self, seq: int) -> bool:
        """A name of this block is gone. Returns whether it was the last: then the block is, too."""
        others = self.aliases.get(seq, 0)
        if others > 1:
            self.aliases[seq] = others - 1
        elif others:
            del self.aliases[seq]
        return not others
