"""What does a program that ran a replay get?"""

from dataclasses import dataclass, field
from typing import Any

from dynamo.replay.measures import Sample


@dataclass(frozen=True)
class PlannerReplayDetails:
    """What a planner in the loop did. There is none in this version, so nothing."""

    metadata: dict[str, Any] = field(default_factory=dict)
    ticks: list[dict[str, Any]] = field(default_factory=list)
    scaling_events: list[Any] = field(default_factory=list)
    lifecycle_operations: list[dict[str, Any]] = field(default_factory=list)
    total_ticks: int = 0
    html_report_path: str | None = None


@dataclass(frozen=True)
class ReplayTelemetryDetails:
    """The fleet at equal intervals of virtual time."""

    sample_interval_ms: float
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ReplayReport:
    """Numbers over all requests (`summary`), and the requests themselves where they were asked for."""

    summary: dict[str, Any]
    per_request: list[dict[str, Any]] | None
    coverage: dict[str, Any]
    planner: PlannerReplayDetails | None
    telemetry: ReplayTelemetryDetails | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data. `telemetry` is left out where it was not asked for."""
        plain: dict[str, Any] = {
            "summary": self.summary,
            "per_request": self.per_request,
            "coverage": self.coverage,
            "planner": None if self.planner is None else vars(self.planner),
        }
        if self.telemetry is not None:
            plain["telemetry"] = vars(self.telemetry)
        return plain


def telemetry_sample(
    sample: Sample, ordinal: int, decode_blocks: list[int], prefill_blocks: list[int]
) -> dict[str, Any]:
    """A sample under the names that users know. Blocks are what each worker has; prefill workers are the last ones."""
    workers = _workers(sample, [*decode_blocks, *prefill_blocks])
    plain: dict[str, Any] = {
        "sample_ordinal": ordinal,
        "kind": "periodic" if ordinal else "baseline",
        "sampled_at_ms": sample.at_s * 1000,
        "decode_scheduler_metrics": workers[: len(decode_blocks)],
        "decode_interval_metrics": {
            "cache_hit_tokens": sample.cached_tokens,
            "cache_total_tokens": sample.prompt_tokens,
        },
    }
    if prefill_blocks:
        prefill = workers[len(decode_blocks) :]
        plain["prefill_scheduler_metrics"] = [worker | {"worker_id": i} for i, worker in enumerate(prefill)]
    return plain


def _workers(sample: Sample, blocks: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "worker_id": worker,
            "dp_rank": 0,
            "active_blocks": round(share * total),
            "total_blocks": total,
            "active_cache_usage": share,
            "running_requests": running,
            "waiting_requests": waiting,
        }
        for worker, (running, waiting, share, total) in enumerate(
            zip(sample.running, sample.waiting, sample.kv_share, blocks, strict=True)
        )
    ]
