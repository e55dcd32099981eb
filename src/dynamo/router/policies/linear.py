"""The cost that users of Dynamo 1.6 know: blocks to prefill and blocks to decode, added up [K21-K23].

    cost = scale * max(0, (queued prompt tokens + prompt tokens) / block size - credited overlap)
         + blocks held if the request were added + weight * active requests

Credited overlap is `credit * decay * device + host_weight * host + disk_weight * disk` blocks, where
`decay = 1 / (1 + rate * excess)` and `excess` is how many prompts of this length the worker has queued beyond the
worker that has least.
"""

from dynamo.router.config import KvRouterConfig
from dynamo.router.types import Overlap, View, WorkerKey


class LinearCost:
    """Overlap and load in one sum of blocks."""

    name = "linear"

    def __init__(self, config: KvRouterConfig) -> None:
        self._config = config

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in blocks."""
        fleet, config, override = view.fleet, self._config, view.request.override
        scale, weight = config.prefill_load_scale, config.decode_active_request_weight
        if override is not None:
            scale = scale if override.prefill_load_scale is None else override.prefill_load_scale
            weight = weight if override.decode_active_request_weight is None else override.decode_active_request_weight
        per_token = scale / view.block_size
        base = view.request.token_count * per_token + view.blocks
        if weight:
            costs = [
                base + tokens * per_token + blocks + weight * requests
                for tokens, blocks, requests in zip(
                    fleet.prefill_tokens, fleet.decode_blocks, fleet.requests, strict=True
                )
            ]
        else:
            costs = [
                base + tokens * per_token + blocks
                for tokens, blocks in zip(fleet.prefill_tokens, fleet.decode_blocks, strict=True)
            ]
        for position, shared in view.shared_blocks.items():
            costs[position] -= shared
        for position, overlap in view.overlaps.items():
            blocks_to_prefill = (fleet.prefill_tokens[position] + view.request.token_count) / view.block_size
            costs[position] -= scale * min(blocks_to_prefill, self._credit(view, position, overlap))
        return costs

    def _credit(self, view: View, position: int, overlap: Overlap) -> float:
        config, override = self._config, view.request.override
        credit, rate = config.credit, config.overlap_score_credit_decay
        if override is not None:
            credit = credit if override.overlap_score_credit is None else override.overlap_score_credit
            rate = rate if override.overlap_score_credit_decay is None else override.overlap_score_credit_decay
        if rate:
            queued = view.fleet.prefill_tokens
            excess = (queued[position] - min(queued)) / max(1, view.request.token_count)
            credit /= 1 + rate * excess
        return (
            credit * overlap.device
            + config.host_cache_hit_weight * overlap.host
            + config.disk_cache_hit_weight * overlap.disk
        )

    def terms(self, view: View, position: int) -> dict[str, float]:
        """Blocks to prefill, the credit for overlap, blocks to decode."""
        fleet = view.fleet
        overlap = view.overlaps.get(position, Overlap())
        return {
            "prefill_blocks": (fleet.prefill_tokens[position] + view.request.token_count) / view.block_size,
            "overlap_credit": self._credit(view, position, overlap),
            "potential_decode_blocks": fleet.decode_blocks[position]
            + view.blocks
            - view.shared_blocks.get(position, 0),
            "active_requests": fleet.requests[position],
        }

    def observe(self, worker: WorkerKey, new_tokens: int, ttft_s: float, prefill_tokens_before: int) -> None:
        """This cost does not learn."""
