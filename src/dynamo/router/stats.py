"""What has a router counted? Plain numbers, for whoever shows them (facts rows O15, O21 to O25, O33)."""

from dynamo.router.types import Decision
from dynamo.runtime.buckets import buckets_from_env
from dynamo.runtime.instruments import Histogram

RATE_BUCKETS = tuple(i / 20 for i in range(21))
BLOCK_BUCKETS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
TIMED_EVERY = 64  # requests; looking at the clock for each would cost a tenth of what is measured, hashing anew half
OVERHEAD_MS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0)


class RouterStats:
    """One model's numbers. Histograms in the unit of their name; the rest are counts since the start."""

    def __init__(self) -> None:
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
        # Of every 64th request:
        self.block_hashing_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self.seq_hashing_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self.find_matches_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self.scheduling_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self.total_ms = Histogram(OVERHEAD_MS_BUCKETS)
        self._until_timed = {"hash": 1, "find": 1}

    def is_timed(self, what: str) -> bool:
        """Whether it is time to look at the clock again."""
        left = self._until_timed[what] = self._until_timed[what] - 1
        if left:
            return False
        self._until_timed[what] = TIMED_EVERY
        return True

    def decided(self, decision: Decision, prompt_tokens: int, block_size: int) -> None:
        """A request is sent."""
        self.requests_started += 1
        self.kv_hit_rate.observe(decision.hit_rate)
        held = decision.overlap.total
        best = max(decision.best_overlap_blocks, held)
        self.best_eligible_cached_tokens += min(best * block_size, prompt_tokens)
        self.selected_cached_tokens += min(held * block_size, prompt_tokens)
        if best > held:
            self.non_max_overlap_selections += 1
            self.overlap_blocks_lost.observe(best - held)
