"""Where do the buckets of a histogram end?

Bounds are spaced evenly on a logarithmic scale between a least and a greatest value, each rounded to two
significant digits so that a reader of a dashboard sees 0.22 and not 0.21837. The first bound is 0: what fell
below every measurable value has a bucket of its own.
"""

import math
import os
from typing import Final, NamedTuple


class BucketRange(NamedTuple):
    """So many bounds from 0 to about `greatest`; the second is one logarithmic step above `least`."""

    least: float
    greatest: float
    bounds: int


# Named by the middle of their variables: DYN_METRICS_<NAME>_MIN, _MAX, _COUNT. Values: facts row O51.
DEFAULT_RANGES: Final = {
    "REQUEST_DURATION": BucketRange(1.0, 512.0, 10),  # seconds
    "INPUT_SEQUENCE": BucketRange(50.0, 128_000.0, 12),  # tokens
    "OUTPUT_SEQUENCE": BucketRange(50.0, 32_000.0, 10),  # tokens
    "TTFT": BucketRange(0.001, 480.0, 18),  # seconds
    "ITL": BucketRange(0.001, 80.0, 20),  # seconds
    "EMBEDDING_LATENCY": BucketRange(0.001, 10.0, 14),  # seconds
}

# Fixed bounds, in seconds. Dashboards made for Dynamo use them, so they are the same here.
WORK_SECONDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
TRANSIT_SECONDS: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0)
FIRST_RESPONSE_SECONDS: Final = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
ROUNDTRIP_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LOOP_DELAY_SECONDS: Final = (0.0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

MAX_BUCKETS: Final = 512  # each bucket is a line of /metrics for every label set


def log_buckets(least: float, greatest: float, count: int) -> tuple[float, ...]:
    """`count` ascending bounds, the first 0, the others `least * (greatest/least) ** (i / (count - 1))`.

    Bounds that are equal after rounding to two significant digits are given once, so fewer may come back.
    Raises ValueError for a range that is empty or not positive, or a count outside 2..512.
    """
    if not (0 < least < greatest) or math.isinf(greatest):
        raise ValueError(f"bucket range {least}..{greatest} must satisfy 0 < MIN < MAX")
    if not 2 <= count <= MAX_BUCKETS:
        raise ValueError(f"bucket count {count} must be between 2 and {MAX_BUCKETS}")
    ratio = greatest / least
    bounds = {0.0} | {float(f"{least * ratio ** (i / (count - 1)):.1e}") for i in range(1, count)}
    return tuple(sorted(bounds))


def buckets_from_env(name: str) -> tuple[float, ...]:
    """The bounds for one of `DEFAULT_RANGES`, changed by `DYN_METRICS_{name}_{MIN,MAX,COUNT}` where set.

    Raises ValueError that names the variable.
    """
    default = DEFAULT_RANGES[name]
    least = _number(f"DYN_METRICS_{name}_MIN", default.least)
    greatest = _number(f"DYN_METRICS_{name}_MAX", default.greatest)
    count = _number(f"DYN_METRICS_{name}_COUNT", default.bounds)
    try:
        if count != int(count):
            raise ValueError(f"bucket count {count} must be a whole number")
        return log_buckets(least, greatest, int(count))
    except ValueError as e:
        raise ValueError(f"DYN_METRICS_{name}_MIN, _MAX, _COUNT: {e}") from None


def _number(variable: str, default: float) -> float:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{variable}: {text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{variable}: {text!r} is not a finite number")
    return value
