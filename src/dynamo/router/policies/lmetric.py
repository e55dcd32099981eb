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
        columns = zip(view.fleet.prefill_tokens, view.new_token_column(1), view.fleet.requests, strict=True)
        return [(queued + new) * (batch + 1) for queued, new, batch in columns]

    def waiting(self, view: View, position: int, tokens: float) -> float:
        """See `Policy`. Costs are in tokens times requests."""
        return tokens * (view.fleet.requests[position] + 1)

    def terms(self, view: View, position: int) -> dict[str, float]:
        """The two factors."""
        return {
            "prefill_tokens": view.fleet.prefill_tokens[position] + view.new_tokens(position),
            "batch_size": view.fleet.requests[position] + 1,
        }
