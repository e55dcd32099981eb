"""The cost that users of Dynamo 1.6 know: blocks to prefill and blocks to decode, added up [K21-K23].

    cost = scale * max(0, (queued prompt tokens + prompt tokens) / block size - credited overlap)
         + blocks held if the request were added + weight * active requests

Credited overlap is `credit * decay * device + host_weight * host + disk_weight * disk` blocks, where
`decay = 1 / (1 + rate * excess)` and `excess` is how many prompts of this length the worker has queued beyond the
worker that has least.
"""

from typing import ClassVar, NamedTuple

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.policy import FixedPolicy
from dynamo.router.types import Overlap, RouterOverride, View

NO_OVERRIDE = RouterOverride()


class _Weights(NamedTuple):
    """The numbers of the formula, for one request."""

    credit: float
    decay_rate: float
    host: float
    disk: float
    scale: float
    per_request: float

    def credited(self, overlap: Overlap, decay: float = 1.0) -> float:
        """Blocks of prefill that an overlap saves."""
        return self.credit * decay * overlap.device + self.host * overlap.host + self.disk * overlap.disk


class LinearCost(FixedPolicy):
    """Overlap and load in one sum of blocks."""

    name: ClassVar[str] = "linear"

    def __init__(self, config: KvRouterConfig) -> None:
        self._weights = _Weights(
            config.credit,
            config.overlap_score_credit_decay,
            config.host_cache_hit_weight,
            config.disk_cache_hit_weight,
            config.prefill_load_scale,
            config.decode_active_request_weight,
        )

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in blocks."""
        fleet, weights = view.fleet, self._weights_for(view)
        per_token = weights.scale / view.block_size
        base = view.request.token_count * per_token + view.blocks
        if weights.decay_rate or max(weights.credit, weights.host, weights.disk) > 1:  # else no saving is cut off
            saved = [self._saved(view, weights, i) for i in range(len(fleet.workers))]
        else:
            saved = view.overlap_column(weights.credited, 0.0)
        if weights.scale != 1:
            saved = [weights.scale * blocks for blocks in saved]
        shared = view.shared_block_column()
        columns = zip(fleet.prefill_tokens, fleet.decode_blocks, shared, saved, strict=True)
        costs = [base + tokens * per_token + (blocks - together) - less for tokens, blocks, together, less in columns]
        if weights.per_request:
            costs = [
                cost + weights.per_request * requests for cost, requests in zip(costs, fleet.requests, strict=True)
            ]
        return costs

    def _weights_for(self, view: View) -> _Weights:
        override = view.request.override
        if override is None:
            return self._weights
        given = {
            "credit": override.overlap_score_credit,
            "decay_rate": override.overlap_score_credit_decay,
            "scale": override.prefill_load_scale,
            "per_request": override.decode_active_request_weight,
        }
        return self._weights._replace(**{name: value for name, value in given.items() if value is not None})

    @staticmethod
    def _saved(view: View, weights: _Weights, position: int) -> float:
        queued, prompt = view.fleet.prefill_tokens, view.request.token_count
        decay = 1.0
        if weights.decay_rate:
            decay /= 1 + weights.decay_rate * (queued[position] - min(queued)) / max(1, prompt)
        return min((queued[position] + prompt) / view.block_size, weights.credited(view.overlap(position), decay))

    def waiting(self, view: View, position: int, tokens: float) -> float:
        """See `Policy`. Costs are in blocks."""
        return self._weights_for(view).scale * tokens / view.block_size

    def terms(self, view: View, position: int) -> dict[str, float]:
        """Blocks to prefill, the credit for overlap, blocks to decode."""
        fleet, weights = view.fleet, self._weights_for(view)
        return {
            "prefill_blocks": (fleet.prefill_tokens[position] + view.request.token_count) / view.block_size,
            "overlap_credit": self._saved(view, weights, position),
            "potential_decode_blocks": view.potential_decode_blocks(position),
            "active_requests": fleet.requests[position],
        }
