"""Where will the first token come soonest, and the tokens after it? Times are predicted, and learnt as they come.

    cost = predicted seconds of computing prompts, until this one's turn is over
         * (1 + active requests / 16)
         * how much slower than the others the worker decodes

How long a prompt takes is a straight line over the tokens to compute, queued ones and new ones, learnt from the whole
fleet; a worker that is plainly faster or slower than that has a pace of its own, for prompts and for output. The
line starts from an ordinary GPU's, so no profile is needed. What is queued shrinks as time passes: engines work on the
oldest prompt first, and how fast is just what is learnt.
"""

from typing import ClassVar

from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.line import Line, Pace
from dynamo.router.types import Decoded, Prefilled, View, WorkerKey

FIRST_TOKEN_PRIOR = ((0.0, 0.03), (8192.0, 0.85))  # (tokens, seconds): 10,000 tokens a second after 30 ms
BETWEEN_TOKENS_PRIOR = ((0.0, 0.015), (64.0, 0.03))  # (active requests, seconds)
MAX_TOKEN_S = 0.01  # 100 tokens a second: no engine that is worth routing to is slower
MIN_TOKEN_S = 1e-9  # it is divided by
MAX_REQUEST_S = 0.1
BATCH_THAT_DOUBLES = 16  # active requests; anything from 5 to 80 does about as well on traces, none at all does not


class PredictedLatency:
    """Seconds until the first token, weighed by how many share what comes after it."""

    name: ClassVar[str] = "predicted"
    learns: ClassVar[bool] = True

    def __init__(self, config: KvRouterConfig) -> None:
        del config  # nothing to tune
        self.first_token = Line(FIRST_TOKEN_PRIOR, MAX_TOKEN_S)
        self.between_tokens = Line(BETWEEN_TOKENS_PRIOR, MAX_REQUEST_S)
        self.ignored = 0
        """Observations that made no sense."""
        self._prefill_pace: dict[WorkerKey, Pace] = {}
        self._decode_pace: dict[WorkerKey, Pace] = {}
        self._version = -1
        self._prefill: list[float] = []
        self._both: list[float] = []

    # --- choosing

    def costs(self, view: View) -> list[float]:
        """One cost for each worker, in seconds."""
        fleet = view.fleet
        if fleet.version != self._version:
            self._place(view)
        now, prompt = view.now, view.request.token_count
        token_s = max(self.first_token.slope, MIN_TOKEN_S)
        share = token_s / BATCH_THAT_DOUBLES
        costs = [
            both
            * share
            * (requests + BATCH_THAT_DOUBLES)
            * (queued - min(oldest, (now - since) / (token_s * pace)) + prompt)
            if queued
            else both * share * (requests + BATCH_THAT_DOUBLES) * prompt
            for both, pace, queued, oldest, since, requests in zip(
                self._both,
                self._prefill,
                fleet.prefill_tokens,
                fleet.oldest_prefill,
                fleet.progress_at,
                fleet.requests,
                strict=True,
            )
        ]
        requests, both = fleet.requests, self._both
        last, saved = None, 0.0
        for position, overlap in view.overlaps.items():
            if overlap is not last:  # equal overlaps follow each other
                last, saved = overlap, share * (prompt - view.new_tokens(position))
            costs[position] -= both[position] * saved * (requests[position] + BATCH_THAT_DOUBLES)
        return costs

    def _place(self, view: View) -> None:
        """Put the paces into the order of positions."""
        self._version = view.fleet.version
        one = Pace()
        self._prefill = [self._prefill_pace.get(worker, one).factor for worker in view.fleet.workers]
        decode = [self._decode_pace.get(worker, one).factor for worker in view.fleet.workers]
        self._both = [a * b for a, b in zip(self._prefill, decode, strict=True)]

    def terms(self, view: View, position: int) -> dict[str, float]:
        """The predictions, and what they were made from."""
        fleet, worker, one = view.fleet, view.fleet.workers[position], Pace()
        pace = self._prefill_pace.get(worker, one).factor
        slowness = self._decode_pace.get(worker, one).factor
        token_s = max(self.first_token.slope, MIN_TOKEN_S) * pace
        done = min(fleet.oldest_prefill[position], (view.now - fleet.progress_at[position]) / token_s)
        queued = fleet.prefill_tokens[position] - done if fleet.prefill_tokens[position] else 0
        return {
            "predicted_ttft_s": self.first_token.height + token_s * (queued + view.new_tokens(position)),
            "predicted_tpot_s": self.between_tokens.at(fleet.requests[position] + 1) * slowness,
            "queued_tokens": queued,
            "batch_factor": 1 + fleet.requests[position] / BATCH_THAT_DOUBLES,
            "prefill_pace": pace,
            "decode_pace": slowness,
        }

    # --- learning

    def prefilled(self, result: Prefilled) -> None:
        """Learn how fast prompts are computed."""
        tokens = result.queued_tokens + result.new_tokens
        expected = self.first_token.at(tokens)
        if self.first_token.see(tokens, result.ttft_s):
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
