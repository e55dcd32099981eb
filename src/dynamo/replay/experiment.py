"""What is one run of the simulator, all of it, and what came of it? Plain data, so that another process can do it."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from dynamo.mocker.batching import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.replay.disagg import PooledSimulation
from dynamo.replay.measures import Distribution, Sample
from dynamo.replay.pools import Pools
from dynamo.replay.routing import Routing, make_routing, routing_names
from dynamo.replay.simulate import Arrivals, Goal, Record, Recorder, Simulation, Totals, numbered
from dynamo.replay.traces import SharedPrefixes, SyntheticWorkload, TraceRequest, count_lines, read_trace
from dynamo.replay.worker import SimulatedWorker
from dynamo.router.config import KvRouterConfig
from dynamo.router.split import POLICIES as SPLIT_POLICIES
from dynamo.router.split import SplitPolicy, split_policy

BLOCK_LENGTH = 64  # tokens; also of made-up prompts, so that any engine block size of 2^n fits them


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Each simulated engine. The names and defaults of the mocker; `max_model_len` None is what the cache holds."""

    backend: Literal["vllm"] = "vllm"
    num_gpu_blocks: int = 16384
    block_size: int = 64
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    preemption_mode: Literal["lifo", "fifo"] = "lifo"
    watermark: float = 0.01
    speedup_ratio: float = 1.0
    decode_speedup_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_gpu_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.speedup_ratio <= 0:
            raise ValueError(f"speedup_ratio must be above 0: the virtual clock never waits, got {self.speedup_ratio}")
        if self.decode_speedup_ratio < 0:
            raise ValueError(f"decode_speedup_ratio must not be negative, got {self.decode_speedup_ratio}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be at least 0 and below 1, got {self.watermark}")

    @property
    def scheduler(self) -> SchedulerConfig:
        """The same for the scheduler."""
        return SchedulerConfig(
            num_blocks=self.num_gpu_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len or self.num_gpu_blocks * self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            enable_chunked_prefill=self.enable_chunked_prefill,
            preemption_mode=self.preemption_mode,
            watermark=self.watermark,
        )

    @property
    def timing(self) -> StepTiming:
        """How long steps take."""
        return StepTiming(self.speedup_ratio, self.decode_speedup_ratio)


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
    """A workload (trace files or a synthetic one), a fleet, and who routes. Times in milliseconds."""

    trace_files: list[str] = []
    trace_format: str | None = None
    trace_block_size: int | None = None
    shared_prefix_ratio: float = 0.0
    num_prefix_groups: int = 0
    synthetic: SyntheticWorkload | None = None
    limit: int | None = None
    num_workers: int = 4
    engine: EngineLimits = EngineLimits()
    pools: Pools | None = None
    """Prefill and decode workers, instead of `num_workers` that do both."""
    prefill_engine: EngineLimits | None = None
    """The prefill workers, if they are not like `engine`."""
    split: str | None = None
    """Which prompts travel: a name of `dynamo.router.split`, with the settings of `router`. None is what those say."""
    policy: str = "round-robin"
    router: KvRouterConfig = KvRouterConfig()
    speedup: float = 1.0
    concurrency: int | None = None
    kv_event_lag_ms: float = 0.0
    max_sim_time_ms: float | None = None
    goal: Goal = Goal()
    sample_interval_ms: float = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.trace_files) == (self.synthetic is not None):
            raise ValueError("trace_files: give trace files or a synthetic workload, one of the two")
        if self.policy not in routing_names():
            raise ValueError(f"policy must be one of {', '.join(routing_names())}, got {self.policy!r}")
        if self.split is not None and self.split not in SPLIT_POLICIES:
            raise ValueError(f"split must be one of {', '.join(SPLIT_POLICIES)}, got {self.split!r}")
        if self.split is not None and self.pools is None:
            raise ValueError("split: needs prefill and decode workers")
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.kv_event_lag_ms < 0:
            raise ValueError(f"kv_event_lag_ms must not be negative, got {self.kv_event_lag_ms}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    def requests(self) -> Iterator[TraceRequest]:
        """The workload, read as it is asked for."""
        if self.synthetic is not None:
            return numbered(self.synthetic.requests(), self.limit)
        prefixes = SharedPrefixes(
            self.shared_prefix_ratio, self.num_prefix_groups, seed=self.seed, block_tokens=BLOCK_LENGTH
        )
        trace = read_trace(self.trace_files, self.trace_format, block_tokens=self.trace_block_size, prefixes=prefixes)
        return numbered(trace, self.limit)

    def expected_requests(self) -> int:
        """How many there will be, roughly: for a progress bar."""
        if self.synthetic is not None:
            count = self.synthetic.request_count * self.synthetic.turns_per_session
        else:
            count = count_lines(self.trace_files)
        return min(count, self.limit) if self.limit is not None else count

    def run(
        self,
        *,
        on_record: Callable[[Record], None] | None = None,
        on_sample: Callable[[Sample], None] | None = None,
        on_progress: Callable[[int, float], None] | None = None,
    ) -> "Outcome":
        """Simulate it.

        Raises:
            TraceError: the trace does not say what it must, or asks for what no worker can serve.
            ValueError: settings that do not fit together.
        """
        simulation = self._simulation(
            Recorder(
                goal=self.goal,
                sample_interval_s=self.sample_interval_ms / 1000,
                on_record=on_record,
                on_sample=on_sample,
                on_progress=on_progress,
            )
        )
        began = time.perf_counter()
        until = float("inf") if self.max_sim_time_ms is None else self.max_sim_time_ms / 1000
        totals = simulation.run(until)
        return _outcome(self, simulation, totals, time.perf_counter() - began)

    def _simulation(self, recorder: Recorder) -> Simulation:
        arrivals = Arrivals(self.requests(), speedup=self.speedup, concurrency=self.concurrency)
        limits, timing = self.engine.scheduler, self.engine.timing
        if self.pools is None:
            routing = self._routing(self.num_workers, limits)
            return Simulation(arrivals, self.num_workers, limits, routing, timing=timing, recorder=recorder)
        prefill = self.prefill_engine or self.engine
        return PooledSimulation(
            arrivals,
            self.pools,
            limits,
            self._routing(self.pools.decode_workers, limits, selection=self.router.router_decode_policy),
            self._routing(
                self.pools.prefill_workers,
                prefill.scheduler,
                selection=self.router.router_prefill_policy,
                router_track_active_blocks=False,  # what a prefill worker computed is soon elsewhere [G8]
            ),
            prefill_limits=prefill.scheduler,
            split=self._split(),
            timing=timing,
            prefill_timing=prefill.timing,
            recorder=recorder,
        )

    def _split(self) -> SplitPolicy:
        return split_policy(self.router) if self.split is None else SPLIT_POLICIES[self.split](self.router)

    def _routing(
        self, workers: int, limits: SchedulerConfig, *, selection: str | None = None, **changes: Any
    ) -> Routing:
        return make_routing(
            self.policy,
            workers,
            limits,
            config=self.router.with_overrides(**changes),
            event_lag_s=self.kv_event_lag_ms / 1000,
            seed=self.seed,
            selection=selection,
        )


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run: numbers, curves to plot, and the fleet over time."""

    policy: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, list[tuple[float, float]]]
    """By latency: (milliseconds, share of requests at most that)."""
    samples: list[Sample]
    sample_interval_s: float


def _outcome(experiment: Experiment, simulation: Simulation, totals: Totals, wall_s: float) -> Outcome:
    curves = {"ttft": totals.ttft_s, "tpot": totals.tpot_s, "e2e": totals.e2e_s}
    return Outcome(
        policy=experiment.policy,
        settings=_settings(experiment),
        summary=summarize(experiment, simulation, totals, wall_s),
        curves={name: _curve(distribution) for name, distribution in curves.items()},
        samples=simulation.timeline.samples,
        sample_interval_s=simulation.timeline.interval_s,
    )


def _curve(distribution: Distribution) -> list[tuple[float, float]]:
    return [(value * 1000, share) for value, share in distribution.curve()]


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What a reader of the report wants to know of the run, in the order told."""
    workload: dict[str, Any] = {"trace": ", ".join(Path(path).name for path in experiment.trace_files)}
    if experiment.synthetic is not None:
        workload = {
            name: value for name, value in msgspec.structs.asdict(experiment.synthetic).items() if value is not None
        }
    arrivals = (
        {"concurrency": experiment.concurrency}
        if experiment.concurrency is not None
        else {"speedup": experiment.speedup}
    )
    return {
        **workload,
        **arrivals,
        **_fleet(experiment),
        **{name: value for name, value in msgspec.structs.asdict(experiment.engine).items() if value is not None},
        "kv_event_lag_ms": experiment.kv_event_lag_ms,
        "seed": experiment.seed,
    }


def _fleet(experiment: Experiment) -> dict[str, Any]:
    pools = experiment.pools
    if pools is None:
        return {"num_workers": experiment.num_workers}
    return {
        "num_prefill_workers": pools.prefill_workers,
        "num_decode_workers": pools.decode_workers,
        "split": experiment._split().name,
    }


def _pool_summary(simulation: PooledSimulation) -> dict[str, Any]:
    """What came of the two pools. `hold` is how long blocks stayed at prefill workers after they were computed."""
    seconds = simulation.now
    pools: dict[str, Sequence[SimulatedWorker]]
    pools = {"prefill": simulation.prefill_workers, "decode": simulation.decode_workers}
    return {
        **{
            f"{name}_busy_ratio": sum(worker.busy_s for worker in workers) / (seconds * len(workers))
            if seconds
            else 0.0
            for name, workers in pools.items()
        },
        "local_requests": simulation.kept,
        "remote_requests": simulation.totals.requests - simulation.kept,
        "transferred_tokens": simulation.moved_tokens,
        **simulation.transfers.summary("kv_transfer_ms", 1000),
        **simulation.hold_s.summary("kv_hold_ms", 1000),
    }


def summarize(experiment: Experiment, simulation: Simulation, totals: Totals, wall_s: float) -> dict[str, Any]:
    """One flat dict, under the names that users of ai-dynamo's replay know, in milliseconds."""
    duration = simulation.now
    per_s = 1 / duration if duration else 0.0
    workers = simulation.workers
    cached = totals.cached_tokens / totals.input_tokens if totals.input_tokens else 0.0
    summary: dict[str, Any] = {
        "policy": experiment.policy,
        **_fleet(experiment),
        "num_requests": totals.requests,
        "completed_requests": totals.completed,
        "refused_requests": totals.refused,
        "total_input_tokens": totals.input_tokens,
        "total_output_tokens": totals.output_tokens,
        "committed_prefill_tokens": totals.input_tokens - totals.cached_tokens,
        "duration_ms": duration * 1000,
        "wall_time_ms": wall_s * 1000,
        "realtime_factor": duration / wall_s if wall_s else 0.0,
        "request_throughput_rps": totals.completed * per_s,
        "input_throughput_tok_s": totals.input_tokens * per_s,
        "output_throughput_tok_s": totals.output_tokens * per_s,
        "total_throughput_tok_s": (totals.input_tokens + totals.output_tokens) * per_s,
        "prefix_cache_reused_ratio": cached,
        "first_admission_prefix_cache_reused_ratio": cached,
        "preemptions": sum(int(worker.scheduler.stats.preemptions.value) for worker in workers),
        "engine_steps": sum(worker.steps for worker in workers),
        "busy_ratio": sum(worker.busy_s for worker in workers) * per_s / len(workers),
        "requests_per_worker": totals.per_worker,
        "num_ttft_samples": totals.ttft_s.count,
        "num_tpot_samples": totals.tpot_s.count,
        "num_e2e_latency_samples": totals.e2e_s.count,
    }
    if isinstance(simulation, PooledSimulation):
        summary |= _pool_summary(simulation)
    if experiment.goal.set:
        summary |= {
            "goodput_completed_requests": totals.good,
            "goodput_request_throughput_rps": totals.good * per_s,
            "goodput_output_throughput_tok_s": totals.good_tokens * per_s,
        }
    for name, distribution in (
        ("ttft_ms", totals.ttft_s),
        ("ttst_ms", totals.ttst_s),
        ("tpot_ms", totals.tpot_s),
        ("itl_ms", totals.itl_s),
        ("e2e_latency_ms", totals.e2e_s),
    ):
        summary |= distribution.summary(name, 1000)
    summary |= totals.speed.summary("output_token_throughput_per_user")
    return summary


def record_dict(record: Record) -> dict[str, Any]:
    """One request as plain data, under the names that users know; times in milliseconds."""
    tpot = record.tpot_s
    second = record.second_token_s
    return {
        "uuid": record.request_id,
        "session_id": record.session_id,
        "turn_index": record.turn if record.session_id is not None else None,
        "arrival_time_ms": record.arrived_s * 1000,
        "routed_ms": record.routed_s * 1000,
        "first_admit_ms": record.admitted_s * 1000,
        "first_token_ms": record.first_token_s * 1000,
        "last_token_ms": record.last_token_s * 1000,
        "terminal_time_ms": record.last_token_s * 1000,
        "ttft_ms": record.ttft_s * 1000,
        "ttst_ms": None if second is None else (second - record.first_token_s) * 1000,
        "itl_ms": None if tpot is None else tpot * 1000,
        "e2e_latency_ms": record.e2e_s * 1000,
        "input_length": record.input_tokens,
        "requested_output_length": record.requested_tokens,
        "output_length": record.output_tokens,
        "reused_input_tokens": record.cached_tokens,
        "reported_overlap_tokens": record.overlap_tokens,
        "best_available_overlap_tokens": record.best_overlap_tokens,
        "decode_worker_idx": record.worker,
        "prefill_worker_idx": record.prefill_worker,
        "kv_transfer_ms": None if record.transfer_s is None else record.transfer_s * 1000,
        "terminal_status": "completed",
    }
