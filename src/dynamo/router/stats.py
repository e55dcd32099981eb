"""What has a router counted? Plain numbers, for whoever shows them (facts rows O15, O21 to O25, O33).

Requests leave their numbers in lists. `settle` sorts them into the counts, many at a time, before anybody looks: in
the middle of other work each would cost three times as much.
"""

from dynamo.router.types import NO_OVERLAP, Decision
from dynamo.runtime.buckets import buckets_from_env
from dynamo.runtime.instruments import Histogram

RATE_BUCKETS = tuple(i / 20 for i in range(21))
BLOCK_BUCKETS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
TIMED_EVERY = 64  # requests; looking at the clock for each would cost a tenth of what is measured
HASHING_TIMED_EVERY = 512  # for that a prompt is hashed whole, which else nobody may ask for
OVERHEAD_MS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0)


class RouterStats:
    """One model's numbers, of all requests up to the last `settle`; histograms in the unit of their name.

    To be settled every second or so.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.requests = 0
        """Requests that wanted a worker."""
        self.requests_started = 0
        """Requests that were sent to one."""
        self.errors = 0
        self.leaked_bookings = 0
        """Bookings that nobody closed, and that expired."""
        self.time_to_first_token_seconds = Histogram(buckets_from_env("TTFT"))
        self.inter_token_latency_seconds = Histogram(buckets_from_env("ITL"))
        self.input_sequence_tokens = Histogram(buckets_from_env("INPUT_SEQUENCE"))
        self.output_sequence_tokens = Histogram(buckets_from_env("OUTPUT_SEQUENCE"))
        self.kv_hit_rate = Histogram(RATE_BUCKETS)
        self.best_eligible_cached_tokens = 0
        """Prompt tokens that the worker which held most had cached, and ..."""
        self.selected_cached_tokens = 0
        """... that the chosen one had, as far as the router knew, and ..."""
        self.worker_reused_tokens = 0
        """... that it said it had."""
        self.non_max_overlap_selections = 0
        """Choices of a worker that held less than another."""
        self.overlap_blocks_lost = Histogram(BLOCK_BUCKETS)
        # Of every 512th request:
        self.block_hashing_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self.seq_hashing_ms = Histogram(OVERHEAD_MS_BUCKETS)
        # Of every 64th:
        self.find_matches_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self.scheduling_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self.total_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self._until_timed = 1
        # What requests have left.
        self.prompts: list[int] = []
        """Tokens of each prompt that wanted a worker."""
        self.decisions: list[tuple[Decision, int]] = []
        """Each request that was sent, and its prompt's tokens."""
        self.first_tokens: list[float] = []
        """Seconds to each first token."""
        self.ends: list[tuple[int, float | None, int]] = []
        """Of each that ended in order: tokens made, seconds between two where there are, prompt tokens that the
        worker said it had."""

    def is_timed(self) -> bool:
        """Whether it is time to look at the clock while hashing."""
        self._until_timed -= 1
        if self._until_timed:
            return False
        self._until_timed = HASHING_TIMED_EVERY
        return True

    def settle(self) -> None:
        """Count what requests have left."""
        prompts, self.prompts = self.prompts, []
        self.input_sequence_tokens.observe_all(prompts)
        decisions, self.decisions = self.decisions, []
        self.requests_started += len(decisions)
        self.kv_hit_rate.observe_all([decision.hit_rate for decision, _ in decisions])
        for decision, tokens in decisions:
            if decision.best_overlap_blocks or decision.overlap is not NO_OVERLAP:
                self._count_cached(decision, tokens)
        first_tokens, self.first_tokens = self.first_tokens, []
        self.time_to_first_token_seconds.observe_all(first_tokens)
        ends, self.ends = self.ends, []
        self.output_sequence_tokens.observe_all([tokens for tokens, _, _ in ends])
        self.inter_token_latency_seconds.observe_all([seconds for _, seconds, _ in ends if seconds is not None])
        self.worker_reused_tokens += sum(reused for _, _, reused in ends)

    def _count_cached(self, decision: Decision, prompt_tokens: int) -> None:
        held = decision.overlap.total
        best = max(decision.best_overlap_blocks, held)
        self.best_eligible_cached_tokens += min(best * self._block_size, prompt_tokens)
        self.selected_cached_tokens += min(held * self._block_size, prompt_tokens)
        if best > held:
            self.non_max_overlap_selections += 1
            self.overlap_blocks_lost.observe(best - held)
