"""What does a split policy look at, for one prompt and two pools as they stand?

Both pools are asked whom they would take, which changes nothing in either. What a prompt token costs is learnt by the
pools' policies; where a policy does not learn, an ordinary GPU's figures stand in.
"""

from collections.abc import Callable

from dynamo.router.policies.predicted import FIRST_TOKEN_PRIOR, PredictedLatency
from dynamo.router.queue import RouterQueue
from dynamo.router.scheduler import KvScheduler
from dynamo.router.split import Split, SplitPolicy, SplitView
from dynamo.router.types import DEFAULT_BATCH_TOKENS, Decision, RouteRequest

LESSONS = 10  # prompts; with fewer a line is mostly its prior, an ordinary GPU
_PRIOR_S = FIRST_TOKEN_PRIOR[0][1]
_PRIOR_TOKEN_S = (FIRST_TOKEN_PRIOR[1][1] - _PRIOR_S) / FIRST_TOKEN_PRIOR[1][0]


class SplitChoice:
    """Decides for prompts of one model. `transfer_s` says how long the KV of so many tokens travels."""

    def __init__(
        self, policy: SplitPolicy, prefill: RouterQueue, decode: RouterQueue, transfer_s: Callable[[int], float]
    ) -> None:
        self.policy = policy
        self._prefill, self._decode = prefill.scheduler, decode.scheduler
        self._prefill_queue = prefill
        self._transfer_s = transfer_s

    def decide(self, request: RouteRequest, now: float, at_prefill: RouteRequest | None = None) -> Split:
        """Whether a prefill worker is to compute the prompt. `at_prefill` is what its router would be asked, if that is
        not the same. Raises WorkerUnavailable if a pool has none."""
        return self.policy.decide(self.view(request, now, at_prefill))

    def view(self, request: RouteRequest, now: float, at_prefill: RouteRequest | None = None) -> SplitView:
        """What the policy sees."""
        there, here = self._prefill.select(at_prefill or request, now), self._decode.select(request, now)
        fleet = self._decode.load
        at = fleet.position[here.worker]
        limits = fleet.limits[at]
        step_s, token_s = prompt_time(self._prefill, self._decode)
        ahead = self._prefill_queue.tokens_ahead(at_prefill or request, request.token_count - there.new_tokens, now)
        queued = _queued(self._prefill, there, now, token_s) + ahead // len(self._prefill.load.workers)
        prefill_limits = self._prefill.load.limits[self._prefill.load.position[there.worker]]
        return SplitView(
            prompt_tokens=request.token_count,
            decode_new_tokens=here.new_tokens,
            prefill_new_tokens=there.new_tokens,
            prefill_load=queued / (prefill_limits.max_batched_tokens or DEFAULT_BATCH_TOKENS),
            decode_load=fleet.decode_blocks[at] / limits.total_blocks if limits.total_blocks else 0.0,
            prefill_queued_tokens=queued,
            decode_queued_tokens=_queued(self._decode, here, now, token_s),
            decoding=fleet.requests[at] - fleet.prefill_requests[at],
            step_s=step_s,
            token_s=token_s,
            transfer_s=self._transfer_s(request.token_count),
        )


def prompt_time(prefill: KvScheduler, decode: KvScheduler) -> tuple[float, float]:
    """Seconds that any prompt takes, and more for each token: as the prefill workers have shown; as the decode workers
    have, while no more than a few prompts went to those, who else would show nothing before they get some."""
    lines = [each.policy.first_token for each in (prefill, decode) if isinstance(each.policy, PredictedLatency)]
    if not lines:
        return _PRIOR_S, _PRIOR_TOKEN_S
    line = next((line for line in lines if line.seen >= LESSONS), lines[0])
    return max(0.0, line.at(0)), line.slope


def _queued(scheduler: KvScheduler, decision: Decision, now: float, token_s: float) -> int:
    """Tokens to compute before a new prompt's turn: those sent, less what must be done of the oldest by now."""
    fleet = scheduler.load
    at = fleet.position[decision.worker]
    queued = fleet.prefill_tokens[at]
    if not queued or token_s <= 0:
        return queued
    return queued - min(fleet.oldest_prefill[at], int((now - fleet.progress_at[at]) / token_s))
