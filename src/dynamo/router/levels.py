"""How far do sets of workers match a prompt?

Levels of rising length and shrinking sets. A set is one integer, a bit for each worker.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple


class Level(NamedTuple):
    """The holders in the set `mask` match at least `blocks` blocks of the prompt."""

    blocks: int
    mask: int


level: Callable[[tuple[int, int]], Level] = partial(tuple.__new__, Level)
"""A level from its two numbers, without Python code that counts arguments: it is made for each look."""


def cut_at_holes(levels: Sequence[Level], holes: Sequence[tuple[int, int]]) -> list[Level]:
    """Levels whose sets lose each holder at its first hole. `holes` are (position, who has one), at least one."""
    cut: list[Level] = []
    gone = 0
    ahead = iter(holes)
    position, lacking = next(ahead)
    for blocks, mask in levels:
        while position < blocks:
            _raise(cut, position, mask & ~gone)
            gone |= lacking
            position, lacking = next(ahead, (levels[-1].blocks, 0))
        _raise(cut, blocks, mask & ~gone)
    return cut


def _raise(levels: list[Level], blocks: int, mask: int) -> None:
    """Add that the holders in a set match so many blocks; of two levels with one set the longer stays."""
    if not mask or not blocks or (levels and levels[-1].blocks == blocks):
        return
    if levels and levels[-1].mask == mask:
        levels.pop()
    levels.append(Level(blocks, mask))
