"""How long does one engine step take?

The default curves of the simulated GPU, milliseconds, as the mocker of ai-dynamo 1.6.1 has them (measured by replaying
single requests and batches through it, see docs/explanation/replay.md):

    prefill(t) = 4.209989e-7 t^2 + 1.518344e-2 t + 16.50142      t = new prompt tokens in the step
    decode(u)  = -25.74 u^2 + 54.01 u + 5.74                     u = context of the decoding sequences, as a share of
                                                                 the tokens that fit the KV cache, at most 1
A step that does both takes the sum.
"""

from dataclasses import dataclass

_SQUARE, _LINEAR, _BASE = -25.74, 54.01, 5.74  # of the decode curve


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
        return 4.209989e-7 * tokens * tokens + 1.518344e-2 * tokens + 16.50142

    @staticmethod
    def decode_ms(share: float) -> float:
        """Milliseconds for one decode step over contexts that fill this share of the cache, before any speed-up."""
        share = min(1.0, share)  # contexts that share blocks can add up to more than the cache
        return _SQUARE * share * share + _LINEAR * share + _BASE

    def step_s(self, prefill_tokens: int, decodes: int, share: float) -> float:
        """Seconds that a step takes: `prefill_tokens` new prompt tokens and one token for `decodes` sequences."""
        if self.speedup_ratio == 0:
            return 0.0
        ms = self.prefill_ms(prefill_tokens) if prefill_tokens else 0.0
        if decodes and self.decode_speedup_ratio:
            ms += self.decode_ms(share) / self.decode_speedup_ratio
        return ms / self.speedup_ratio / 1000.0

    def decode_run_s(self, steps: int, share: float, growth: float) -> float:
        """Seconds for `steps` decode steps in a row, the first at `share`, each further at `growth` more.

        The sum of a quadratic over an arithmetic progression, so it costs the same for any number of steps.
        """
        ratio = self.speedup_ratio * self.decode_speedup_ratio
        if ratio == 0:
            return 0.0
        rising = steps  # of which the rest find the cache full
        if share > 1:
            rising = 0
        elif share + (steps - 1) * growth > 1:
            rising = int((1 - share) / growth) + 1
        sum_i = rising * (rising - 1) / 2
        sum_ii = sum_i * (2 * rising - 1) / 3
        ms = (
            rising * (_BASE + share * (_LINEAR + _SQUARE * share))
            + (_LINEAR + 2 * _SQUARE * share) * growth * sum_i
            + _SQUARE * growth * growth * sum_ii
            + (steps - rising) * (_BASE + _LINEAR + _SQUARE)
        )
        return ms / ratio / 1000.0

    def decode_steps_within(self, seconds: float, most: int, share: float, growth: float) -> int:
        """How many of `most` such steps have ended after `seconds`."""
        low, high, spent, whole = 0, most, 0.0, self.decode_run_s(most, share, growth)
        if whole <= seconds:
            return most
        while high - low > 1:  # `low` steps have ended by then, `high` have not
            # Steps get longer, but slowly: dividing what is left of the time evenly is nearly right.
            middle = low + int((high - low) * (seconds - spent) / (whole - spent)) + 1
            middle = min(max(middle, low + 1), high - 1)
            took = self.decode_run_s(middle, share, growth)
            if took <= seconds:
                low, spent = middle, took
            else:
                high, whole = middle, took
        return low
