"""How is all that a worker holds told to somebody who knows nothing of it?

As events, like those that led there: runs of blocks, each after the one before it, and then what is missing in them.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from dynamo.llm.kv_events import KvEventData, Removed, StorageTier, Stored, StoredBlock

DUMPED_BLOCKS = 1024  # at most so many in one event: about 50 KB
_U64 = (1 << 64) - 1


class HeldRun(NamedTuple):
    """Blocks in a row. `parent` is the sequence hash before them."""

    parent: int | None
    sequence_hashes: list[int]
    local_hashes: list[int]


class Account(NamedTuple):
    """All that a holder holds: what it reaches, each run after the one before it, without its holes."""

    runs: list[HeldRun]
    holes: frozenset[int]
    names: dict[int, int] | None
    """Sequence hash -> what its engine calls the block; None if the names are the hashes."""
    more_names: dict[int, list[int]]
    """Sequence hash -> further names, for blocks that have any."""


def dumped(tier: StorageTier, account: Account) -> Iterator[tuple[StorageTier, KvEventData]]:
    """The events that tell an account."""
    # A hole is stored like what is around it, under a name that is free, and removed at the end.
    hole_names = _free_names(account)
    names = {} if account.names is None else account.names | hole_names
    for run in account.runs:
        parent = None if run.parent is None else names.get(run.parent, run.parent)
        for start in range(0, len(run.sequence_hashes), DUMPED_BLOCKS):
            seqs = run.sequence_hashes[start : start + DUMPED_BLOCKS]
            contents = run.local_hashes[start : start + DUMPED_BLOCKS]
            called = [names.get(seq, seq) for seq in seqs] if names else seqs
            blocks = [StoredBlock(*block) for block in zip(called, contents, strict=True)]
            yield tier, KvEventData(stored=Stored(blocks, parent))
            if account.more_names:
                parents = [parent, *called]
                for i, seq in enumerate(seqs):
                    for name in account.more_names.get(seq, ()):
                        yield tier, KvEventData(stored=Stored([StoredBlock(name, contents[i])], parents[i]))
            parent = called[-1]
    if account.holes:
        yield tier, KvEventData(removed=Removed(list(hole_names.values())))


def _free_names(account: Account) -> dict[int, int]:
    """Sequence hash -> a name for each hole: the hash itself, unless something else is called so."""
    if account.names is None:
        return {hole: hole for hole in account.holes}
    taken = {*account.names.values(), *chain.from_iterable(account.more_names.values())}
    chosen: dict[int, int] = {}
    for hole in account.holes:
        name = hole
        while name in taken:
            name = (name + 1) & _U64
        chosen[hole] = name
        taken.add(name)
    return chosen
