"""Where does a request cost everybody least? Its own wait, and what it adds to the wait of those after it.

    cost = (tokens to compute before this prompt's turn + 2 * tokens to compute for it
            + tokens of context held, by 0.02 where there is room for them and by 1.5 where there is not
            + 2 * tokens of context that its requests read beyond 1.35 times what those of a worker read on average)
         * how many times longer than others the worker takes

A prompt's uncached tokens count twice: once for the request itself, once for whoever comes next and waits behind
them. So a cached prefix is worth a queue of up to twice the tokens that it saves, and no more: a worker that all want
loses by its own queue. Context held slows each token a little; context for which there is no room has to wait for
others to end, which takes longer than to compute it. Requests that share their context hold it once, yet each reads
all of it: what a prefix that everybody begins with does to the few workers that have it is only seen in what is read.
The learning is that of `predicted`.
"""

import math
from collections.abc import Iterable
from itertools import repeat
from typing import ClassVar

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.predicted import MIN_TOKEN_S, ORDINARY, PredictedLatency
from dynamo.router.types import View

# Weights in tokens to compute. Chosen by replay (benchmarks/replay_policies.py), and flat around what was chosen.
NEW = 2.0  # 1.5 to 3 do about as well; 1 reuses less
HELD = 0.02  # 0.005 to 0.05; 0 lets outputs slow down, 1 (the linear cost) lets prompts wait
OVER = 1.5  # above all that a worker has room for
FAIR = 1.35  # times the mean; at 1.25 it moves prompts where all are full, at 1.5 outputs slow down by a quarter
CROWD = 2.0  # 0.5 leaves a prefix of all at three of eight workers, 4 does no better

FEW_WORKERS = 32  # up to so many it is cheaper to ask first whether anybody reads too much


class MarginalCost(PredictedLatency):
    """Tokens to wait for, and tokens that others will wait for."""

    name: ClassVar[str] = "marginal"

    def __init__(self, config: KvRouterConfig) -> None:
        super().__init__(config)
        self._room_version = -1
        self._least_room = 0.0

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in tokens to compute."""
        fleet, backlog, size = view.fleet, self.backlog, view.block_size
        if fleet.version != self._room_version:
            self._room_version = fleet.version
            self._least_room = min((lim.total_blocks or math.inf for lim in fleet.limits), default=math.inf)
        backlog.refresh(fleet, self.tokens_a_second, HELD * size)
        passed = view.now * backlog.rate
        context = fleet.context_blocks
        fair = FAIR * sum(context) / len(context)
        new_tokens: Iterable[float] = repeat(NEW * view.request.token_count)
        if view.held:
            new_tokens = view.new_token_column(NEW)
        columns = zip(backlog.behind, backlog.ahead, new_tokens, context, strict=False)  # nothing held has no end
        if len(context) > FEW_WORKERS or max(context) > fair:
            crowd = CROWD * size
            costs = [
                (behind if behind > (left := ahead - passed) else left)
                + new
                + (crowd * (c - fair) if c > fair else 0.0)
                for behind, ahead, new, c in columns
            ]
        else:
            costs = [(behind if behind > (left := ahead - passed) else left) + new for behind, ahead, new, _ in columns]
        if max(fleet.decode_blocks) + view.blocks > self._least_room:
            self._add_overflow(view, costs)
        if self._paces is not None or fleet.version != self._version:
            costs = self._paced(costs, fleet)
        return costs

    @staticmethod
    def _fair(view: View) -> float:
        """How many blocks a worker's requests may read before more of them cost."""
        return FAIR * sum(view.fleet.context_blocks) / len(view.fleet.context_blocks)

    def _add_overflow(self, view: View, costs: list[float]) -> None:
        """Charge for blocks that a worker has no room for."""
        fleet = view.fleet
        over_by = OVER * view.block_size
        columns = zip(fleet.decode_blocks, view.shared_block_column(), fleet.limits, strict=True)
        for position, (held, shared, limits) in enumerate(columns):
            over = held + view.blocks - shared - (limits.total_blocks or math.inf)
            if over > 0:
                costs[position] += over_by * over

    def waiting(self, view: View, position: int, tokens: float) -> float:
        """See `Policy`. It counts once: nobody comes behind it."""
        return tokens

    def terms(self, view: View, position: int) -> dict[str, float]:
        """The sum's parts in tokens, the prediction, and the pace."""
        fleet, worker = view.fleet, view.fleet.workers[position]
        token_s = max(self.first_token.slope, MIN_TOKEN_S)
        queued = fleet.prefill_tokens[position]
        if queued:
            queued -= min(fleet.oldest_prefill[position], int((view.now - fleet.progress_at[position]) / token_s))
        new, held, room = view.new_tokens(position), view.potential_decode_blocks(position), fleet.limits[position]
        over = max(0, held - room.total_blocks) if room.total_blocks is not None else 0
        pace = self._prefill_pace.get(worker, ORDINARY).factor
        return {
            "queued_tokens": queued,
            "new_tokens": new,
            "held_tokens": fleet.decode_blocks[position] * view.block_size,
            "tokens_without_room": over * view.block_size,
            "crowded_tokens": max(0.0, fleet.context_blocks[position] - self._fair(view)) * view.block_size,
            "pace": self.pace(worker),
            "predicted_ttft_s": self.first_token.at(queued + new) * pace,
        }
