"""New prefill tokens times batch size: no weight to tune (LMetric, arXiv 2603.15202).

    cost = (queued prompt tokens + this prompt's uncached tokens) * (active requests + 1)

The first factor is what a request waits for before its first token, the second what every token after it shares the
engine with.
"""

from dynamo.router.config import KvRouterConfig
from dynamo.router.types import View, WorkerKey


class LMetric:
    """A product of the two loads."""

    name = "lmetric"

    def __init__(self, config: KvRouterConfig) -> None:
        del config  # nothing to tune

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in tokens times requests."""
        fleet, prompt = view.fleet, view.request.token_count
        costs: list[float] = [
            (tokens + prompt) * (requests + 1)
            for tokens, requests in zip(fleet.prefill_tokens, fleet.requests, strict=True)
        ]
        for position in view.overlaps:
            tokens = fleet.prefill_tokens[position] + view.new_tokens(position)
            costs[position] = tokens * (fleet.requests[position] + 1)
        return costs

    def terms(self, view: View, position: int) -> dict[str, float]:
        """The two factors."""
        fleet = view.fleet
        return {
            "prefill_tokens": fleet.prefill_tokens[position] + view.new_tokens(position),
            "batch_size": fleet.requests[position] + 1,
        }

    def observe(self, worker: WorkerKey, new_tokens: int, ttft_s: float, prefill_tokens_before: int) -> None:
        """This cost does not learn."""
