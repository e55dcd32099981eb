"""Which numbers of a run does a reader look at first?"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynamo.replay.experiment import Outcome


class Column(msgspec.Struct, frozen=True):
    """A number of the summary, how it is written, and which of several is best."""

    title: str
    key: str
    form: str = "{:.0f}"
    scale: float = 1.0
    best: Callable[[Sequence[float]], float] | None = min


COLUMNS = (
    Column("policy", "policy", "{}", best=None),
    Column("split", "split", "{}", best=None),
    Column("requests", "completed_requests", "{:d}", best=None),
    Column("TTFT ms", "mean_ttft_ms"),
    Column("p50", "median_ttft_ms"),
    Column("p99", "p99_ttft_ms"),
    Column("TPOT ms", "mean_tpot_ms", "{:.2f}"),
    Column("p99", "p99_tpot_ms", "{:.1f}"),
    Column("E2E ms", "mean_e2e_latency_ms"),
    Column("p99", "p99_e2e_latency_ms"),
    Column("reuse %", "prefix_cache_reused_ratio", "{:.1f}", 100, max),
    Column("local", "local_requests", "{:d}", best=None),
    Column("req/s", "request_throughput_rps", "{:.2f}", best=max),
    Column("good/s", "goodput_request_throughput_rps", "{:.2f}", best=max),
    Column("x real time", "realtime_factor", best=None),
)


def cell(column: Column, value: Any) -> str:
    """A number as it is written; empty where there is none."""
    if value is None:
        return ""
    return column.form.format(value * column.scale if isinstance(value, float) else value)


def table(outcomes: Sequence[Outcome]) -> str:
    """Lines of text, a row a run. Columns that no run has are left out."""
    columns = [c for c in COLUMNS if any(outcome.summary.get(c.key) is not None for outcome in outcomes)]
    rows = [[column.title for column in columns]]
    rows += [[cell(column, outcome.summary.get(column.key)) for column in columns] for outcome in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first, *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]))
    return "\n".join(lines)
