"""Where the prefix is, until that worker is saturated; then where least is queued (llm-d, 2026-08).

Workers that hold most of the prompt (80 %) are the candidates while their queue of uncached tokens is below a bound;
where there is none, all are. Among candidates the fewest uncached tokens, queued and new, wins.
"""

from typing import ClassVar

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.policy import FixedPolicy
from dynamo.router.types import DEFAULT_BATCH_TOKENS, View

MIN_HIT = 0.8  # share of the prompt a worker must hold to be worth sticking to; the published setting
SATURATED_BATCHES = 4  # engine steps' worth of queued tokens; about a second of prefill at 8192 tokens a step
NOT_STICKY = 1e12  # tokens; sorts every other worker behind the candidates


class StickyUntilSaturated(FixedPolicy):
    """Affinity to the prefix as long as its holder keeps up."""

    name: ClassVar[str] = "sticky"

    def __init__(self, config: KvRouterConfig) -> None:
        del config  # nothing to tune

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in tokens."""
        queued, most_new = view.fleet.prefill_tokens, (1 - MIN_HIT) * view.request.token_count
        new_tokens = view.new_token_column(1)
        costs: list[float] = [tokens + new for tokens, new in zip(queued, new_tokens, strict=True)]
        candidates = [
            position
            for overlap, positions in view.held
            if view.request.token_count - overlap.total * view.block_size <= most_new
            for position in positions
            if new_tokens[position] <= most_new and queued[position] < self._bound(view, position)
        ]
        if candidates:
            kept = {position: costs[position] for position in candidates}
            costs = [cost + NOT_STICKY for cost in costs]
            for position, cost in kept.items():
                costs[position] = cost
        return costs

    @staticmethod
    def _bound(view: View, position: int) -> int:
        return SATURATED_BATCHES * (view.fleet.limits[position].max_batched_tokens or DEFAULT_BATCH_TOKENS)

    def terms(self, view: View, position: int) -> dict[str, float]:
        """What is queued, what is new, and where saturation begins."""
        return {
            "queued_tokens": view.fleet.prefill_tokens[position],
            "new_tokens": view.new_tokens(position),
            "saturated_at_tokens": self._bound(view, position),
        }
