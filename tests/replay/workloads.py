"""Small workloads and fleets for the simulator's tests."""

import json
from pathlib import Path

from dynamo.mocker.batching import SchedulerConfig
from dynamo.replay.experiment import Experiment, Outcome
from dynamo.replay.routing import make_routing
from dynamo.replay.simulate import Arrivals, Record, Recorder, Simulation
from dynamo.replay.traces import SyntheticWorkload, TraceRequest
from dynamo.router.config import KvRouterConfig

TRACES = Path(__file__).parents[3] / "shared" / "traces" / "mooncake"


def write_jsonl(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(at_ms: float, input_tokens: int, output_tokens: int, *ids: int, **more: object) -> TraceRequest:
    """A request with blocks of 64 tokens; the last id goes on counting for as long as the prompt is."""
    needed = -(-input_tokens // 64)
    ids = ids[:needed] if len(ids) >= needed else (*ids, *range(ids[-1] + 1, ids[-1] + 1 + needed - len(ids)))
    return TraceRequest(
        arrival_ms=at_ms, input_tokens=input_tokens, output_tokens=output_tokens, ids=ids, block_tokens=64, **more
    )


def simulate(
    requests,
    workers: int = 1,
    policy: str = "round-robin",
    *,
    speedup: float = 1.0,
    concurrency: int | None = None,
    config: KvRouterConfig | None = None,
    event_lag_s: float = 0.0,
    seed: int = 0,
    stepping: bool = False,
    **limits: object,
) -> tuple[Simulation, list[Record]]:
    """Run requests to their end. `stepping` takes every step by itself."""
    limits = SchedulerConfig(**({"max_model_len": 1 << 20} | limits))  # type: ignore[arg-type]
    records: list[Record] = []
    simulation = Simulation(
        Arrivals(requests, speedup=speedup, concurrency=concurrency),
        workers,
        limits,
        make_routing(policy, workers, limits, config=config, event_lag_s=event_lag_s, seed=seed),
        recorder=Recorder(on_record=records.append),
    )
    if stepping:
        for worker in simulation.workers:
            worker.scheduler.steady_steps = lambda: 0  # type: ignore[method-assign]
    simulation.run()
    return simulation, records


def crowd(count: int = 200, *, seed: int = 1, **more: object) -> list[TraceRequest]:
    """Requests that share prefixes and come fast enough to meet."""
    numbers = {
        "input_tokens": 600,
        "output_tokens": 80,
        "request_count": count,
        "request_rate": 20.0,
        "shared_prefix_ratio": 0.6,
        "num_prefix_groups": 8,
        "spread": 0.6,
        "seed": seed,
    }
    return list(SyntheticWorkload(**(numbers | more)).requests())  # type: ignore[arg-type]


def outcome(policy: str = "round-robin", **more: object) -> Outcome:
    """What came of a small run."""
    workload = SyntheticWorkload(
        input_tokens=800,
        output_tokens=20,
        request_count=60,
        request_rate=20,
        shared_prefix_ratio=0.5,
        num_prefix_groups=4,
        spread=0.5,
    )
    return Experiment(synthetic=workload, num_workers=3, policy=policy, sample_interval_ms=100, **more).run()  # type: ignore[arg-type]
