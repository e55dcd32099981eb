"""How well does a rank do? Counts and histograms of one scheduler, cheap enough for every step."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynamo.mocker.scheduler import Step

# Seconds. The bounds that dashboards for the real engine use.
TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BOUNDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Histogram:
    """Counts by bucket. `observe` takes many equal values at once, as all tokens of a step have one latency."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, count of all values up to it), as Prometheus wants them."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class SchedulerStats:
    """What one scheduler has done since it began."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.prompt_tokens = 0  # computed, so without those found in the cache
        self.generation_tokens = 0
        self.ttft_s = Histogram(TTFT_BOUNDS)
        self.itl_s = Histogram(ITL_BOUNDS)
        self.e2e_s = Histogram(E2E_BOUNDS)
        self._last_step_at: float | None = None

    def step(self, step: "Step", outputs: int, now: float) -> None:
        """A step ended. The time between two steps is the latency of each token that decoding sequences got."""
        self.prompt_tokens += step.prefill_tokens
        self.generation_tokens += outputs
        if self._last_step_at is not None and step.decodes:
            self.itl_s.observe(now - self._last_step_at, step.decodes)
        self._last_step_at = now
