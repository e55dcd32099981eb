"""How many tokens would a worker compute before a new prompt's turn, as time passes?

    backlog = queued tokens - min(tokens of the oldest prompt, seconds since it was begun * tokens a second)

Engines compute prompts in order, so the oldest is partly done. As two lines, of which the larger counts, `behind` and
`ahead - now * rate`, this changes for a worker only when something happens to it: a decision among a thousand workers
takes two numbers of each, and computes anew those of the few that were touched.
"""

from collections.abc import Collection
from typing import Final

from dynamo.router.types import Fleet

RATE_TOLERANCE: Final = 0.01  # how far the rate may drift before all columns are computed anew
NOTHING: Final = float("-inf")


class Backlog:
    """The two columns, by position. Owns `Fleet.touched`."""

    def __init__(self) -> None:
        self.behind: list[float] = []
        """Tokens after those of the oldest prompt."""
        self.ahead: list[float] = []
        """All queued tokens, and what would have been computed since the clock's zero; -inf where nothing is queued."""
        self.rate = 0.0
        """Tokens a second that `ahead` is made with."""
        self._fleet: Fleet | None = None
        self._version = -1

    def refresh(self, fleet: Fleet, rate: float, per_block: float = 0.0) -> Collection[int]:
        """Bring the columns up to date, each with `per_block` tokens added for a block that the worker's requests hold.

        Returns the positions that may have changed.
        """
        positions: Collection[int] = fleet.touched
        if rate != self.rate and abs(rate - self.rate) > RATE_TOLERANCE * self.rate:
            self._fleet = None
        if fleet is not self._fleet or fleet.version != self._version:
            self._fleet, self._version, self.rate = fleet, fleet.version, rate
            positions = range(len(fleet.workers))
            self.behind = [0.0] * len(positions)
            self.ahead = [NOTHING] * len(positions)
        behind, ahead, blocks = self.behind, self.ahead, fleet.decode_blocks
        queues, oldest = fleet.prefill_tokens, fleet.oldest_prefill
        for at in positions:
            queued, held = queues[at], per_block * blocks[at]
            behind[at] = queued - oldest[at] + held
            ahead[at] = queued + fleet.progress_at[at] * self.rate + held if queued else NOTHING
        fleet.touched = set()
        return positions
