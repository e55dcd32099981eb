"""How long does one engine step take?

The default curve of the simulated GPU, milliseconds (facts of the mocker that users know):

    prefill(t) = 1.25e-6 t^2 + 7.41e-2 t + 26.2      t = new prompt tokens in the step
    decode(u)  = -5.47 u^2 + 43.88 u + 19.44         u = share of the KV blocks in use, 0..1

A step that does both takes the sum.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTiming:
    """`speedup_ratio` divides every time, `decode_speedup_ratio` decode's once more. 0 means no time at all."""

    speedup_ratio: float = 1.0
    decode_speedup_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("speedup_ratio", "decode_speedup_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, 0 means no waiting")

    @property
    def instant(self) -> bool:
        """Whether no step takes any time."""
        return self.speedup_ratio == 0

    @staticmethod
    def prefill_ms(tokens: int) -> float:
        """Milliseconds to compute `tokens` new prompt tokens, before any speed-up."""
        return 1.25e-6 * tokens * tokens + 7.41e-2 * tokens + 26.2

    @staticmethod
    def decode_ms(kv_share: float) -> float:
        """Milliseconds for one decode step with this share of KV blocks in use, before any speed-up."""
        return -5.47 * kv_share * kv_share + 43.88 * kv_share + 19.44

    def step_s(self, prefill_tokens: int, decodes: int, kv_share: float) -> float:
        """Seconds that a step takes: `prefill_tokens` new prompt tokens and one token for `decodes` sequences."""
        if self.speedup_ratio == 0:
            return 0.0
        ms = self.prefill_ms(prefill_tokens) if prefill_tokens else 0.0
        if decodes and self.decode_speedup_ratio:
            ms += self.decode_ms(kv_share) / self.decode_speedup_ratio
        return ms / self.speedup_ratio / 1000.0
