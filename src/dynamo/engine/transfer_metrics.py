"""How much KV passes between workers, how fast, and how often in vain?

The stems `kv_transfer_success_total`, `_latency_seconds`, `_bytes` and `_speed_gb_s` are those that dashboards of the
field know from one engine; here every engine has them, as `dynamo_component_…`.
"""

from dynamo.runtime.instruments import LabelPairs
from dynamo.runtime.metrics import Metrics

TRANSFER_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
TRANSFER_BYTES = tuple(float(4**i) for i in range(6, 18))  # 4 KiB to 16 GiB
SPEED_GB_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 400.0)


class PrefillMetrics:
    """What the worker that keeps KV counts."""

    def __init__(self, metrics: Metrics, base: LabelPairs) -> None:
        held = metrics.gauge("kv_handles", "KV kept for decode workers, by state", ("state",), base=base)
        self._issued, self._claimed = held.labels("issued"), held.labels("claimed")
        self._ended = metrics.counter("kv_handles_ended_total", "How KV handles ended", ("end",), base=base)
        self._renewed = metrics.counter("kv_lease_renewals_total", "Leases made longer", base=base).labels()
        self._refused = metrics.counter("kv_claims_refused_total", "Claims refused, by reason", ("reason",), base=base)

    def issued(self) -> None:
        """One more handle waits."""
        self._issued.value += 1

    def claimed(self) -> None:
        """A waiting one has a reader."""
        self._issued.value -= 1
        self._claimed.value += 1

    def renewed(self) -> None:
        """Somebody waits for one."""
        self._renewed.value += 1

    def ended(self, how: str, *, claimed: bool) -> None:
        """One is gone."""
        (self._claimed if claimed else self._issued).value -= 1
        self._ended.labels(how).value += 1

    def refused(self, reason: str) -> None:
        """A claim was turned down."""
        self._refused.labels(reason).value += 1


class DecodeMetrics:
    """What the worker that fetches KV counts."""

    def __init__(self, metrics: Metrics, base: LabelPairs) -> None:
        self._success = metrics.counter("kv_transfer_success_total", "Prompts whose KV came over", base=base).labels()
        self._tokens = metrics.counter("kv_transfer_tokens_total", "Prompt tokens that came over", base=base).labels()
        self._takeover = metrics.histogram(
            "kv_takeover_seconds", "From the request to its first token here", bounds=TRANSFER_SECONDS, base=base
        ).labels()
        self._latency = metrics.histogram(
            "kv_transfer_latency_seconds", "Duration of one transfer", bounds=TRANSFER_SECONDS, base=base
        ).labels()
        self._bytes = metrics.histogram(
            "kv_transfer_bytes", "Bytes of one transfer", bounds=TRANSFER_BYTES, base=base
        ).labels()
        self._speed = metrics.histogram(
            "kv_transfer_speed_gb_s", "Speed of one transfer, GB/s", bounds=SPEED_GB_S, base=base
        ).labels()
        self._failed = metrics.counter("kv_transfer_failures_total", "Transfers that the engine gave up", base=base)
        self._recomputed = metrics.counter(
            "kv_transfer_recomputes_total", "Prompts computed here after all, by reason", ("reason",), base=base
        )
        self._differed = metrics.counter(
            "kv_first_token_mismatches_total", "First tokens that came out otherwise than the prefill's", base=base
        ).labels()

    def taken_over(self, tokens: int, seconds: float) -> None:
        """A prompt of which `tokens` came over put out its first token after `seconds`."""
        self._success.value += 1
        self._tokens.value += tokens
        self._takeover.observe(seconds)

    def transferred(self, size: float, seconds: float) -> None:
        """The engine reports one transfer, in bytes and seconds."""
        self._bytes.observe(size)
        self._latency.observe(seconds)
        if seconds > 0:
            self._speed.observe(size / seconds / 1e9)

    def failed(self, count: int = 1) -> None:
        """The engine reports transfers that failed."""
        self._failed.labels().value += count

    def recomputed(self, reason: str) -> None:
        """A prompt is computed here though a prefill worker had done it."""
        self._recomputed.labels(reason).value += 1

    def differed(self) -> None:
        """This engine's first token was another than the one the client has."""
        self._differed.value += 1
