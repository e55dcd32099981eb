"""What would this load be like on that many workers? A simulator of engines and routing on a virtual clock."""

from dynamo.replay.api import TelemetryOptions, run_synthetic_trace_replay, run_trace_replay
from dynamo.replay.report import PlannerReplayDetails, ReplayReport, ReplayTelemetryDetails
from dynamo.replay.traces import TraceError

__all__ = [
    "PlannerReplayDetails",
    "ReplayReport",
    "ReplayTelemetryDetails",
    "TelemetryOptions",
    "TraceError",
    "run_synthetic_trace_replay",
    "run_trace_replay",
]
