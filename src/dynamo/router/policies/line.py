"""What is y for this x, judging by what was seen lately? And how much more is it at one place than elsewhere?

`Line` is least squares of a straight line with forgetting, which for two parameters is five running sums. Nonsense
does no harm: what is not a finite positive number is not seen, what is far from the line counts as a little off it,
and slope and height keep within bounds. `Pace` compares one place with the line of all.
"""

import math

MEMORY = 200.0  # observations that count; older ones fade
DISTANCE_MEMORY = 30.0  # so that a real change is no outlier for long
OUTLIER = 4.0  # times the usual distance from the line; farther ones count as being so far
TRUSTED_AFTER = 20.0  # observations before the usual distance is known well enough to call anything an outlier
EARLY_OUTLIER = 10.0  # times what is expected; until then farther ones count as being so far
LEAST_BOUND = 1e-3  # in y's unit, seconds: never so sure that nothing new could be learnt

PACE_MEMORY = 100.0  # observations
PACE_NOISE = 1.5  # workers that are the same differed by up to 1.4 when replaying traces; only more is believed
PACE_TRUSTED_AFTER = 30.0  # observations
PACE_MOST = 10.0  # times faster or slower than the others; more is a mistake


class Line:
    """y = height + slope * x. `prior` is two points it starts from, worth an observation each."""

    __slots__ = ("_count", "_distance", "_max_slope", "_prior", "_sx", "_sxx", "_sxy", "_sy", "height", "slope")

    def __init__(self, prior: tuple[tuple[float, float], tuple[float, float]], max_slope: float) -> None:
        (x1, y1), (x2, y2) = prior
        self._prior = (2.0, x1 + x2, y1 + y2, x1 * x1 + x2 * x2, x1 * y1 + x2 * y2)
        self._max_slope = max_slope
        self._count = self._sx = self._sy = self._sxx = self._sxy = 0.0
        self._distance = 0.0
        self.height = self.slope = 0.0
        self._solve()

    def at(self, x: float) -> float:
        """The y it expects."""
        return self.height + self.slope * x

    @property
    def seen(self) -> float:
        """How many observations count, at most `MEMORY`."""
        return self._count

    def see(self, x: float, y: float) -> bool:
        """Learn from one observation. False if it makes no sense."""
        if not (math.isfinite(x) and math.isfinite(y) and x >= 0 and y >= 0):
            return False
        expected = self.at(x)
        off = y - expected
        if self._count > TRUSTED_AFTER:
            bound = OUTLIER * self._distance + LEAST_BOUND
        else:
            bound = EARLY_OUTLIER * expected + LEAST_BOUND
        off = min(bound, max(-bound, off))
        self._distance += (abs(off) - self._distance) / min(self._count + 1, DISTANCE_MEMORY)
        y = expected + off
        keep = 1 - 1 / MEMORY
        self._count = self._count * keep + 1
        self._sx = self._sx * keep + x
        self._sy = self._sy * keep + y
        self._sxx = self._sxx * keep + x * x
        self._sxy = self._sxy * keep + x * y
        self._solve()
        return True

    def _solve(self) -> None:
        n, sx, sy, sxx, sxy = self._prior
        n, sx, sy = n + self._count, sx + self._sx, sy + self._sy
        sxx, sxy = sxx + self._sxx, sxy + self._sxy
        spread = n * sxx - sx * sx
        slope = (n * sxy - sx * sy) / spread if spread > 0 else 0.0
        self.slope = min(self._max_slope, max(0.0, slope))
        self.height = max(0.0, (sy - self.slope * sx) / n)


class Pace:
    """How many times longer things take here than expected; 1 until the difference is plain."""

    __slots__ = ("_count", "_expected", "_seen", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self._count = self._seen = self._expected = 0.0

    def see(self, seen: float, expected: float) -> None:
        """Compare one observation, both above or at 0 and finite."""
        keep = 1 - 1 / PACE_MEMORY
        self._count = self._count * keep + 1
        self._seen = self._seen * keep + min(seen, PACE_MOST * expected)
        self._expected = self._expected * keep + expected
        if self._count < PACE_TRUSTED_AFTER or self._expected <= 0:
            return
        ratio = min(PACE_MOST, max(1 / PACE_MOST, self._seen / self._expected))
        if ratio > PACE_NOISE:
            self.factor = ratio / PACE_NOISE
        elif ratio * PACE_NOISE < 1:
            self.factor = ratio * PACE_NOISE
        else:
            self.factor = 1.0
