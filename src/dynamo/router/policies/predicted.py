"""Where will the first token come soonest, and the tokens after it? Times are predicted, and learnt as they come.

    cost = tokens to compute until this prompt's turn is over * (active requests + 16)
         * how many times longer than others the worker takes, for prompts and for output

How long a prompt takes is a straight line over the tokens to compute, queued ones and new ones, learnt from the whole
fleet; a worker that is plainly faster or slower than that has a pace of its own. The line starts from an ordinary
GPU's, so no profile is needed. What is queued shrinks as time passes: engines work on the oldest prompt first, and how
fast is just what is learnt.
"""

from typing import ClassVar

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.backlog import Backlog
from dynamo.router.policies.line import Line, Pace
from dynamo.router.types import Decoded, Fleet, Prefilled, View, WorkerKey

FIRST_TOKEN_PRIOR = ((0.0, 0.03), (8192.0, 0.85))  # (tokens, seconds): 10,000 tokens a second after 30 ms
BETWEEN_TOKENS_PRIOR = ((0.0, 0.015), (64.0, 0.03))  # (active requests, seconds)
MAX_TOKEN_S = 0.01  # 100 tokens a second: no engine that is worth routing to is slower
MIN_TOKEN_S = 1e-9  # it is divided by
MAX_REQUEST_S = 0.1
ORDINARY = Pace()
SOFTENING = 16  # requests; anything from 5 to 80 does about as well on traces, 0 (LMetric) and no batch at all do not


class PredictedLatency:
    """Time until the first token, weighed by how many share what comes after it."""

    name: ClassVar[str] = "predicted"
    learns: ClassVar[bool] = True

    def __init__(self, config: KvRouterConfig) -> None:
        del config  # nothing to tune
        self.first_token = Line(FIRST_TOKEN_PRIOR, MAX_TOKEN_S)
        self.tokens_a_second = self._rate()
        """How fast the fleet computes prompts."""
        self.between_tokens = Line(BETWEEN_TOKENS_PRIOR, MAX_REQUEST_S)
        self.backlog = Backlog()
        self.ignored = 0
        """Observations that made no sense."""
        self._prefill_pace: dict[WorkerKey, Pace] = {}
        self._decode_pace: dict[WorkerKey, Pace] = {}
        self._version = -1
        self._paces: list[float] | None = None
        """By position; None while all are 1."""

    # --- choosing

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in tokens times requests: what matters is only which is lowest."""
        fleet, backlog = view.fleet, self.backlog
        backlog.refresh(fleet, self.tokens_a_second)
        passed = view.now * backlog.rate
        columns = zip(fleet.requests, backlog.behind, backlog.ahead, view.new_token_column(1), strict=True)
        costs = [
            (batch + SOFTENING) * ((behind if behind > (left := ahead - passed) else left) + new)
            for batch, behind, ahead, new in columns
        ]
        return self._paced(costs, fleet)

    def _paced(self, costs: list[float], fleet: Fleet) -> list[float]:
        paces = self.paces(fleet)
        return costs if paces is None else [cost * pace for cost, pace in zip(costs, paces, strict=True)]

    def _rate(self) -> float:
        return 1 / max(self.first_token.slope, MIN_TOKEN_S)

    def paces(self, fleet: Fleet) -> list[float] | None:
        """By position, how many times longer a worker takes; None while all are alike."""
        if fleet.version != self._version:
            self._place(fleet)
        return self._paces

    def _place(self, fleet: Fleet) -> None:
        """Put the paces into the order of positions."""
        self._version = fleet.version
        self._paces = None
        if any(pace.factor != 1 for paces in (self._prefill_pace, self._decode_pace) for pace in paces.values()):
            self._paces = [self.pace(worker) for worker in fleet.workers]

    def pace(self, worker: WorkerKey) -> float:
        """How many times longer this worker takes, for prompts and for output together."""
        return self._prefill_pace.get(worker, ORDINARY).factor * self._decode_pace.get(worker, ORDINARY).factor

    def waiting(self, view: View, position: int, tokens: float) -> float:
        """See `Policy`. Costs are in tokens times requests."""
        return tokens * (view.fleet.requests[position] + SOFTENING)

    def terms(self, view: View, position: int) -> dict[str, float]:
        """The predictions, and what they were made from."""
        fleet, worker = view.fleet, view.fleet.workers[position]
        prefill_pace = self._prefill_pace.get(worker, ORDINARY).factor
        decode_pace = self._decode_pace.get(worker, ORDINARY).factor
        token_s = max(self.first_token.slope, MIN_TOKEN_S)
        done = min(fleet.oldest_prefill[position], (view.now - fleet.progress_at[position]) / token_s)
        queued = fleet.prefill_tokens[position] - done if fleet.prefill_tokens[position] else 0
        return {
            "predicted_ttft_s": self.first_token.at(queued + view.new_tokens(position)) * prefill_pace,
            "predicted_tpot_s": self.between_tokens.at(fleet.requests[position] + 1) * decode_pace,
            "queued_tokens": queued,
            "batch": fleet.requests[position] + SOFTENING,
            "prefill_pace": prefill_pace,
            "decode_pace": decode_pace,
        }

    # --- learning

    def prefilled(self, result: Prefilled) -> None:
        """Learn how fast prompts are computed."""
        tokens = result.queued_tokens + result.new_tokens
        expected = self.first_token.at(tokens)
        if self.first_token.see(tokens, result.ttft_s):
            self.tokens_a_second = self._rate()
            self._note(self._prefill_pace, result.worker, result.ttft_s, expected)
        else:
            self.ignored += 1

    def decoded(self, result: Decoded) -> None:
        """Learn how fast tokens follow each other."""
        if result.output_tokens < 2:
            return
        seen = result.decode_s / (result.output_tokens - 1)
        expected = self.between_tokens.at(result.requests)
        if self.between_tokens.see(result.requests, seen):
            self._note(self._decode_pace, result.worker, seen, expected)
        else:
            self.ignored += 1

    def _note(self, paces: dict[WorkerKey, Pace], worker: WorkerKey, seen: float, expected: float) -> None:
        pace = paces.get(worker)
        if pace is None:
            pace = paces[worker] = Pace()
        before = pace.factor
        pace.see(seen, expected)
        if pace.factor != before:
            self._version = -1

    def forget(self, worker: WorkerKey) -> None:
        """A worker is gone."""
        self._prefill_pace.pop(worker, None)
        self._decode_pace.pop(worker, None)
        self._version = -1
