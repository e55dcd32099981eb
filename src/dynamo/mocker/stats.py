"""How well does a rank do? What the real engine would count, under the names that its dashboards query."""

from bisect import bisect_left
from typing import TYPE_CHECKING

from dynamo.runtime.instruments import Counter, Histogram

if TYPE_CHECKING:
    from dynamo.mocker.scheduler import Scheduler
    from dynamo.runtime.metrics import Metrics

# Seconds. The bounds of the real engine's histograms, so that panels made for them fit.
TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BOUNDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class SchedulerStats:
    """What one scheduler has done since it began. Prompt tokens are those computed, not those found in the cache."""

    def __init__(self) -> None:
        self.preemptions = Counter()
        self.prompt_tokens = Counter()
        self.generation_tokens = Counter()
        self.ttft_s = Histogram(TTFT_BOUNDS)
        self.itl_s = Histogram(ITL_BOUNDS)
        self.e2e_s = Histogram(E2E_BOUNDS)
        self._last_step_at: float | None = None

    def step(self, prefill_tokens: int, decodes: int, outputs: int, now: float) -> None:
        """A step ended. The time between two steps is the latency of each token that decoding sequences got."""
        self.prompt_tokens.value += prefill_tokens
        self.generation_tokens.value += outputs
        if self._last_step_at is not None and decodes:
            latency = now - self._last_step_at
            self.itl_s.counts[bisect_left(ITL_BOUNDS, latency)] += decodes
            self.itl_s.sum += latency * decodes
        self._last_step_at = now


def publish(scheduler: "Scheduler", metrics: "Metrics", model: str, dp_rank: int, worker_id: int) -> None:
    """Show a scheduler's numbers as `vllm:*`, one series a rank of a worker. Call it before the first request."""
    stats = scheduler.stats
    labels = (("model_name", model), ("engine", str(dp_rank)), ("worker_id", f"{worker_id:x}"))
    gauges = (
        ("num_requests_running", "Requests that take part in steps", lambda: len(scheduler.running)),
        ("num_requests_waiting", "Requests that wait to start", lambda: len(scheduler.waiting)),
        (
            "kv_cache_usage_perc",
            "Share of the KV blocks in use, 1 is all",
            lambda: scheduler.pool.in_use / scheduler.pool.capacity,
        ),
    )
    for name, help_, read in gauges:
        metrics.gauge(f"vllm:{name}", help_, prefix="", base=labels).labels().set_function(read)
    counter, histogram = metrics.counter, metrics.histogram
    stats.preemptions = counter(
        "vllm:num_preemptions_total", "Sequences pushed out to be computed again", prefix="", base=labels
    ).labels()
    stats.prompt_tokens = counter("vllm:prompt_tokens_total", "Prompt tokens computed", prefix="", base=labels).labels()
    stats.generation_tokens = counter("vllm:generation_tokens_total", "Tokens put out", prefix="", base=labels).labels()
    stats.ttft_s = histogram(
        "vllm:time_to_first_token_seconds",
        "From arrival to the first token",
        bounds=TTFT_BOUNDS,
        prefix="",
        base=labels,
    ).labels()
    stats.itl_s = histogram(
        "vllm:inter_token_latency_seconds", "Between tokens of one sequence", bounds=ITL_BOUNDS, prefix="", base=labels
    ).labels()
    stats.e2e_s = histogram(
        "vllm:e2e_request_latency_seconds", "From arrival to the last token", bounds=E2E_BOUNDS, prefix="", base=labels
    ).labels()
