"""How were latencies spread, and how did load move over time, in memory that does not grow with the run?"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

_STEP = 1.001  # bounds of neighbouring buckets: a quantile is right within 0.05 %
_PER_LOG = 1 / math.log(_STEP)
QUANTILES = ((0.5, "median"), (0.75, "p75"), (0.9, "p90"), (0.95, "p95"), (0.99, "p99"))


class Distribution:
    """Numbers at least zero: exact count, mean, spread and bounds; quantiles by logarithmic buckets."""

    __slots__ = ("_buckets", "_squares", "count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.minimum = math.inf
        self.maximum = 0.0
        self._squares = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, value: float, count: int = 1) -> None:
        """Note `value`, `count` times."""
        self.count += count
        self.total += value * count
        self._squares += value * value * count
        if value < self.minimum:
            self.minimum = value
        if value > self.maximum:
            self.maximum = value
        bucket = math.floor(math.log(value) * _PER_LOG) if value > 0 else -(1 << 40)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + count

    @property
    def mean(self) -> float:
        """0 if there is none."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        if not self.count:
            return 0.0
        return math.sqrt(max(0.0, self._squares / self.count - self.mean**2))

    def quantile(self, share: float) -> float:
        """The number that `share` of all are at most."""
        return self.quantiles([share])[0]

    def quantiles(self, shares: Iterable[float]) -> list[float]:
        """One for each of rising `shares`."""
        found: list[float] = []
        if not self.count:
            return [0.0 for _ in shares]
        ordered = iter(sorted(self._buckets.items()))
        bucket, seen = 0, 0
        for share in shares:
            rank = min(self.count, max(1, math.ceil(share * self.count)))
            while seen < rank:
                bucket, inside = next(ordered)
                seen += inside
            middle = math.exp((bucket + 0.5) / _PER_LOG) if bucket > -(1 << 40) else 0.0
            found.append(min(self.maximum, max(self.minimum, middle)))
        return found

    def curve(self, points: int = 200) -> list[tuple[float, float]]:
        """(value, share of all that are at most it), by rising share, for a plot."""
        shares = [i / points for i in range(1, points + 1)]
        return list(zip(self.quantiles(shares), shares, strict=True))

    def summary(self, name: str, scale: float = 1.0) -> dict[str, float]:
        """The usual numbers as `mean_{name}` and so on, multiplied by `scale`; empty if there are none."""
        if not self.count:
            return {}
        numbers = {"mean": self.mean, "min": self.minimum, "max": self.maximum, "std": self.deviation}
        values = self.quantiles(share for share, _ in QUANTILES)
        numbers |= {word: value for (_, word), value in zip(QUANTILES, values, strict=True)}
        return {f"{word}_{name}": value * scale for word, value in numbers.items()}


class Sample(msgspec.Struct, frozen=True):
    """The fleet at one moment, one number a worker."""

    at_s: float
    running: list[int]
    waiting: list[int]
    kv_share: list[float]
    prompt_tokens: int
    """Of all requests started since the sample before."""
    cached_tokens: int


class Timeline:
    """Samples at equal intervals. When there are too many, every second one goes and the interval doubles."""

    def __init__(self, interval_s: float, most: int | None = 600) -> None:
        if not 0 < interval_s < math.inf:
            raise ValueError(f"sample_interval must be above 0, got {interval_s!r}")
        self.interval_s = interval_s
        self.samples: list[Sample] = []
        self.due_at = 0.0
        self._most = most

    def catch_up(self, now: float, take: Callable[[float], Sample]) -> list[Sample]:
        """Take the samples that are due by `now`, of a fleet that has not changed since the last event."""
        fresh: list[Sample] = []
        while self.due_at <= now:
            fresh.append(take(self.due_at))
            self.due_at += self.interval_s
        self.samples += fresh
        if self._most and len(self.samples) > self._most:
            self._thin()
        return fresh

    def _thin(self) -> None:
        samples = self.samples
        if len(samples) % 2:
            samples, odd = samples[:-1], samples[-1:]
        else:
            odd = []
        self.samples = [_joined(one, two) for one, two in zip(samples[::2], samples[1::2], strict=True)] + odd
        self.interval_s *= 2

    def to_dicts(self) -> list[dict[str, Any]]:
        """The samples as plain data."""
        return [msgspec.structs.asdict(sample) for sample in self.samples]


def _joined(one: Sample, two: Sample) -> Sample:
    return msgspec.structs.replace(
        two,
        prompt_tokens=one.prompt_tokens + two.prompt_tokens,
        cached_tokens=one.cached_tokens + two.cached_tokens,
    )
