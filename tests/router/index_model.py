"""What a block index must say, told in the plainest way: a dictionary of names for each holder, and walking."""

from itertools import pairwise

from dynamo.llm.block_hash import sequence_hashes
from dynamo.router.run_tree import SHARDS


class NaiveIndex:
    """The same calls as `BlockIndex`, each as its docstring says it."""

    def __init__(self) -> None:
        self.held: dict[object, dict[int, int]] = {}  # holder -> name -> sequence hash

    def store(self, holder, parent, names, local_hashes) -> bool:
        """Whether the parent was known."""
        known = self.held.setdefault(holder, {})
        above = known.get(parent)
        if parent is not None and above is None:
            return False
        for name, seq in zip(names, sequence_hashes(local_hashes, above), strict=True):
            known[name] = seq
        return True

    def remove(self, holder, names) -> int:
        known = self.held.get(holder, {})
        return sum(known.pop(name, None) is None for name in names)

    def clear(self, holder) -> None:
        if holder in self.held:
            self.held[holder] = {}

    def remove_holder(self, holder) -> None:
        self.held.pop(holder, None)

    def find(self, sequence) -> dict[object, int]:
        found = {}
        for holder, known in self.held.items():
            blocks = set(known.values())
            length = next((i for i, seq in enumerate(sequence) if seq not in blocks), len(sequence))
            if length:
                found[holder] = length
        return found


def check_consistency(index, naive) -> None:
    """Hold an index's own structure to its promises, and what it says it holds to what it should hold."""
    tree = index._tree
    reached = {}
    for run in tree.runs[1:]:
        if run is tree.root or not run.mask:
            continue
        assert run.seqs
        assert run in run.parent.children
        assert run.parent is tree.root or run.mask & ~run.parent.mask == 0
        assert all(child.parent is run for child in run.children)
        assert run.locals is None or len(run.locals) == len(run.seqs)
        assert (run in tree.hiding) == bool(run.hidden)
        assert run.hidden <= max(0, len(run.seqs) - 2)
        for i, seq in enumerate(run.seqs):
            assert (tree.ids[seq % SHARDS].get(seq) == run.id) == (not 1 <= i <= run.hidden)
            assert seq not in reached
            reached[seq] = run.mask
    assert all(run.mask and tree.runs[run.id] is run for run in tree.hiding)
    assert len(index) == len(reached)
    assert set(index.holders()) == set(naive.held)
    holes = {}
    for holder, known in naive.held.items():
        bit, blocks = index.bit(holder), set(known.values())
        mine = {seq for seq, mask in reached.items() if mask & bit}
        assert mine - index.holes(holder) == blocks
        assert index.holes(holder) <= mine
        assert index.blocks(holder) == len(blocks)
        for run in tree.reached(bit):  # a hole is before something that is held
            assert run.any_child_reached(bit) or run.seqs[-1] in blocks
        for hole in index.holes(holder):
            holes[hole] = holes.get(hole, 0) | bit
    assert index._holes == holes


def entered(index) -> set[int]:
    """All blocks that are in memory, reached or not. Lets nothing be hidden."""
    index._tree.show_all()
    return {seq for ids in index._tree.ids for seq in ids}


def check_levels(levels) -> None:
    """Levels rise, and their sets shrink."""
    for (low, wide), (high, narrow) in pairwise(levels):
        assert low < high
        assert narrow != wide
        assert narrow & ~wide == 0
