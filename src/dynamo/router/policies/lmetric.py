"""New prefill tokens times batch size: no weight to tune (LMetric, arXiv 2603.15202).

    cost = (queued prompt tokens + this prompt's uncached tokens) * (active requests + 1)

The first factor is what a request waits for before its first token, the second what every token after it shares the
engine with.
"""

from typing import ClassVar

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.policy import FixedPolicy
from dynamo.router.types import View


class LMetric(FixedPolicy):
    """A product of the two loads."""

    name: ClassVar[str] = "lmetric"

    def __init__(self, config: KvRouterConfig) -> None:
        del config  # nothing to tune

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in tokens times requests."""
        queued, requests, prompt = view.fleet.prefill_tokens, view.fleet.requests, view.request.token_count
        costs: list[float] = [(tokens + prompt) * (batch + 1) for tokens, batch in zip(queued, requests, strict=True)]
        last, new = None, 0
        for position, overlap in view.overlaps.items():
            if overlap is not last:  # equal overlaps follow each other
                last, new = overlap, view.new_tokens(position)
            costs[position] = (queued[position] + new) * (requests[position] + 1)
        return costs

    def terms(self, view: View, position: int) -> dict[str, float]:
        """The two factors."""
        return {
            "prefill_tokens": view.fleet.prefill_tokens[position] + view.new_tokens(position),
            "batch_size": view.fleet.requests[position] + 1,
        }
