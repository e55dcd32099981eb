"""What would it cost each decode worker to fetch the KV of a prompt that another worker has computed? (G8, K48)

It fetches what it does not hold. How long that takes depends on how far it is from the prefill worker: the places that
both are in, a zone or a rack, say how far. As policies weigh what is to be computed, those seconds count as the tokens
that could be computed in them.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from dynamo.router.types import View


class Journey(msgspec.Struct, frozen=True):
    """The way of one prompt's KV. `places` are taints: where the prefill worker is."""

    places: frozenset[str]
    seconds: Callable[[int, int], float]
    """For so many tokens, between workers with so many places in common."""
    token_s: float
    """How long computing a token takes."""

    def tokens_column(self, view: View) -> list[float]:
        """By position, how many tokens could be computed while it fetches what it lacks. `view` says who holds what."""
        known: dict[tuple[int, frozenset[str]], float] = {}
        column = []
        for missing, limits in zip(view.new_token_column(1), view.fleet.limits, strict=False):
            key = missing, limits.taints
            if key not in known:
                known[key] = self.seconds(missing, len(self.places & limits.taints)) / self.token_s
            column.append(known[key])
        return column

    def explain(self, view: View, position: int) -> dict[str, Any]:
        """The fetch of one worker, for people."""
        missing = view.new_tokens(position)
        common = self.places & view.fleet.limits[position].taints
        return {
            "held_blocks": view.overlap(position).total,
            "tokens": missing,
            "ms": round(self.seconds(missing, len(common)) * 1000, 3),
            "places_in_common": sorted(common),
        }
