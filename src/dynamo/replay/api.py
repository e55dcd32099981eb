"""How does a program replay a trace?

The functions and arguments of ai-dynamo's `dynamo.replay`. What this version does not simulate (a planner in the loop,
foreign performance models, replay in real time) is refused by name.
"""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import msgspec

from dynamo.replay.experiment import EngineLimits, Experiment, record_dict
from dynamo.replay.measures import Sample
from dynamo.replay.pools import Pools
from dynamo.replay.report import ReplayReport, ReplayTelemetryDetails, telemetry_sample
from dynamo.replay.routing import BASELINES
from dynamo.replay.simulate import Goal, Record
from dynamo.replay.traces import FORMATS, SyntheticWorkload
from dynamo.router.config import KvRouterConfig

StrPath = str | os.PathLike[str]
Sampled = Callable[[dict[str, Any]], None]

_NOT_YET = {
    "ais_perf_config": "only the default timing curves are simulated",
    "planner_config": "no planner is simulated",
    "agentic_lanes": "agentic traces are not read",
    "execution_model": "agentic traces are not read",
    "weka_nested_timestamp_basis": "agentic traces are not read",
}


@dataclass(frozen=True)
class TelemetryOptions:
    """What to do with samples of the fleet: keep them, hand each to `callback`, or write each to a JSONL file.

    `capture_in_memory` None keeps them where neither of the others is asked for.
    """

    sample_interval_ms: float = 1000.0
    capture_in_memory: bool | None = None
    callback: Sampled | None = None
    jsonl_path: StrPath | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sample_interval_ms < float("inf"):
            raise ValueError(f"sample_interval_ms must be above 0, got {self.sample_interval_ms!r}")

    @property
    def kept(self) -> bool:
        """Whether samples end up in the report."""
        if self.capture_in_memory is None:
            return self.callback is None and self.jsonl_path is None
        return self.capture_in_memory


def run_trace_replay(
    trace_files: Sequence[StrPath] | StrPath,
    *,
    extra_engine_args: Mapping[str, Any] | None = None,
    prefill_engine_args: Mapping[str, Any] | None = None,
    decode_engine_args: Mapping[str, Any] | None = None,
    router_config: KvRouterConfig | None = None,
    num_workers: int = 1,
    replay_concurrency: int | None = None,
    replay_mode: str = "offline",
    router_mode: str = "round_robin",
    arrival_speedup_ratio: float = 1.0,
    trace_block_size: int | None = None,
    trace_format: str = "mooncake",
    trace_shared_prefix_ratio: float = 0.0,
    trace_num_prefix_groups: int = 0,
    report_jsonl_path: StrPath | None = None,
    max_sim_time_ms: float | None = None,
    sla_ttft_ms: float | None = None,
    sla_itl_ms: float | None = None,
    sla_e2e_ms: float | None = None,
    capture_per_request: bool = False,
    telemetry_options: TelemetryOptions | None = None,
    kv_event_lag_ms: float | None = None,
    seed: int = 0,
    model_name: str | None = None,
    num_prefill_workers: int = 1,
    num_decode_workers: int = 1,
    split_policy: str | None = None,
    first_from_decode: bool = False,
    performance_model_metadata: Mapping[str, Any] | None = None,
    benchmark_granularity: int = 8,
    capture_planner_details: bool = True,
    **unsupported: Any,
) -> ReplayReport:
    """Simulate the requests of trace files on `num_workers` engines.

    With `prefill_engine_args` and `decode_engine_args` there are two pools instead, of `num_prefill_workers` and
    `num_decode_workers`. Which prompts go to the former, `split_policy` says (a name of `dynamo.router.split`), or
    `router_config`; all, if neither does. `first_from_decode` counts the first token as ai-dynamo's replay does, when
    the decode worker repeats it, and not when the prefill worker has it.

    `router_mode` is `round_robin`, `kv_router` (with the policy of `router_config`), or a policy's name.
    `trace_format` is `mooncake` or `azure`. Times are milliseconds of the virtual clock.

    Raises:
        TraceError: a file is not what it must be; names the line.
        ValueError: an argument cannot be meant, or asks for what is not simulated.
    """
    del model_name
    del performance_model_metadata, benchmark_granularity, capture_planner_details  # of a planner there is none
    _refuse(replay_mode, unsupported)
    if trace_format not in FORMATS:
        raise ValueError(f"trace_format must be one of {', '.join(FORMATS)}, got {trace_format!r}")
    files = [trace_files] if isinstance(trace_files, str | os.PathLike) else trace_files
    fleet = engines(
        extra_engine_args,
        prefill_engine_args,
        decode_engine_args,
        num_prefill_workers=num_prefill_workers,
        num_decode_workers=num_decode_workers,
        first_from_decode=first_from_decode,
    )
    config = router_config or KvRouterConfig()
    experiment = Experiment(
        trace_files=[os.fspath(path) for path in files],
        trace_format=trace_format,
        trace_block_size=trace_block_size,
        shared_prefix_ratio=trace_shared_prefix_ratio,
        num_prefix_groups=trace_num_prefix_groups,
        num_workers=num_workers,
        engine=fleet.engine,
        pools=fleet.pools,
        prefill_engine=fleet.prefill_engine,
        split=split_policy,
        policy=_policy(router_mode, config),
        router=config,
        speedup=arrival_speedup_ratio,
        concurrency=replay_concurrency,
        kv_event_lag_ms=kv_event_lag_ms or 0.0,
        max_sim_time_ms=max_sim_time_ms,
        goal=Goal(sla_ttft_ms, sla_itl_ms, sla_e2e_ms),
        seed=seed,
    )
    return replay(experiment, report_jsonl_path, capture_per_request, telemetry_options)


def run_synthetic_trace_replay(
    input_tokens: int,
    output_tokens: int,
    request_count: int,
    *,
    extra_engine_args: Mapping[str, Any] | None = None,
    prefill_engine_args: Mapping[str, Any] | None = None,
    decode_engine_args: Mapping[str, Any] | None = None,
    router_config: KvRouterConfig | None = None,
    num_workers: int = 1,
    replay_concurrency: int | None = None,
    replay_mode: str = "offline",
    router_mode: str = "round_robin",
    arrival_speedup_ratio: float = 1.0,
    request_rate: float | None = None,
    arrival_interval_ms: float | None = None,
    arrival_seed: int = 42,
    turns_per_session: int = 1,
    shared_prefix_ratio: float = 0.0,
    num_prefix_groups: int = 0,
    inter_turn_delay_ms: float = 0.0,
    zipf: float = 0.0,
    spread: float = 0.0,
    history: bool = False,
    report_jsonl_path: StrPath | None = None,
    sla_ttft_ms: float | None = None,
    sla_itl_ms: float | None = None,
    sla_e2e_ms: float | None = None,
    capture_per_request: bool = False,
    telemetry_options: TelemetryOptions | None = None,
    kv_event_lag_ms: float | None = None,
    seed: int = 0,
    model_name: str | None = None,
    num_prefill_workers: int = 1,
    num_decode_workers: int = 1,
    split_policy: str | None = None,
    first_from_decode: bool = False,
    performance_model_metadata: Mapping[str, Any] | None = None,
    benchmark_granularity: int = 8,
    capture_planner_details: bool = True,
    **unsupported: Any,
) -> ReplayReport:
    """Simulate made-up requests; see `SyntheticWorkload` for what they are like, `run_trace_replay` for the rest.

    Raises:
        ValueError: an argument cannot be meant, or asks for what is not simulated.
    """
    del model_name
    del performance_model_metadata, benchmark_granularity, capture_planner_details
    _refuse(replay_mode, unsupported)
    pace = [replay_concurrency, request_rate, arrival_interval_ms]
    if sum(value is not None for value in pace) != 1:
        raise ValueError("give exactly one of replay_concurrency, request_rate and arrival_interval_ms")
    fleet = engines(
        extra_engine_args,
        prefill_engine_args,
        decode_engine_args,
        num_prefill_workers=num_prefill_workers,
        num_decode_workers=num_decode_workers,
        first_from_decode=first_from_decode,
    )
    config = router_config or KvRouterConfig()
    experiment = Experiment(
        synthetic=SyntheticWorkload(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            request_count=request_count,
            request_rate=request_rate,
            arrival_interval_ms=arrival_interval_ms,
            turns_per_session=turns_per_session,
            inter_turn_delay_ms=inter_turn_delay_ms,
            shared_prefix_ratio=shared_prefix_ratio,
            num_prefix_groups=num_prefix_groups,
            zipf=zipf,
            spread=spread,
            history=history,
            seed=arrival_seed,
        ),
        num_workers=num_workers,
        engine=fleet.engine,
        pools=fleet.pools,
        prefill_engine=fleet.prefill_engine,
        split=split_policy,
        policy=_policy(router_mode, config),
        router=config,
        speedup=arrival_speedup_ratio,
        concurrency=replay_concurrency,
        kv_event_lag_ms=kv_event_lag_ms or 0.0,
        goal=Goal(sla_ttft_ms, sla_itl_ms, sla_e2e_ms),
        seed=seed,
    )
    return replay(experiment, report_jsonl_path, capture_per_request, telemetry_options)


def replay(
    experiment: Experiment,
    report_jsonl_path: StrPath | None = None,
    capture_per_request: bool = False,
    telemetry: TelemetryOptions | None = None,
) -> ReplayReport:
    """Run an experiment, and give or write what is asked for."""
    records: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    takers: list[Callable[[dict[str, Any]], None]] = []
    with ExitStack() as files:
        if report_jsonl_path is not None:
            takers.append(_writer(files.enter_context(Path(report_jsonl_path).open("w", encoding="utf-8"))))
        if capture_per_request:
            takers.append(records.append)
        sampled: list[Sampled] = []
        if telemetry is not None:
            experiment = msgspec.structs.replace(experiment, sample_interval_ms=telemetry.sample_interval_ms)
            if telemetry.jsonl_path is not None:
                sampled.append(_writer(files.enter_context(Path(telemetry.jsonl_path).open("w", encoding="utf-8"))))
            if telemetry.callback is not None:
                sampled.append(telemetry.callback)
            if telemetry.kept:
                sampled.append(samples.append)
        outcome = experiment.run(on_record=_fan_out(takers), on_sample=_fan_out_samples(sampled, experiment))
    return ReplayReport(
        summary=outcome.summary,
        per_request=records if capture_per_request else None,
        coverage={
            "capture_per_request": capture_per_request,
            "capture_planner_details": False,
            "per_request_records": len(records),
        },
        planner=None,
        telemetry=ReplayTelemetryDetails(telemetry.sample_interval_ms, samples)
        if telemetry is not None and telemetry.kept
        else None,
    )


def _writer(file: TextIO) -> Callable[[dict[str, Any]], None]:
    encode = msgspec.json.encode

    def write(item: dict[str, Any]) -> None:
        file.write(encode(item).decode() + "\n")

    return write


def record_writer(file: TextIO) -> Callable[[Record], None]:
    """Writes each finished request as a line of JSON."""
    write = _writer(file)
    return lambda record: write(record_dict(record))


def _fan_out(takers: Iterable[Callable[[dict[str, Any]], None]]) -> Callable[[Record], None] | None:
    takers = list(takers)
    if not takers:
        return None

    def take(record: Record) -> None:
        item = record_dict(record)
        for taker in takers:
            taker(item)

    return take


def _fan_out_samples(takers: list[Sampled], experiment: Experiment) -> Callable[[Sample], None] | None:
    if not takers:
        return None
    count, pools = 0, experiment.pools
    decode = [experiment.engine.num_gpu_blocks] * (experiment.num_workers if pools is None else pools.decode_workers)
    prefill_engine = experiment.prefill_engine or experiment.engine
    prefill = [prefill_engine.num_gpu_blocks] * (0 if pools is None else pools.prefill_workers)

    def take(sample: Sample) -> None:
        nonlocal count
        item = telemetry_sample(sample, count, decode, prefill)
        count += 1
        for taker in takers:
            taker(item)

    return take


class Engines(msgspec.Struct, frozen=True):
    """Which engines there are."""

    engine: EngineLimits
    prefill_engine: EngineLimits | None = None
    pools: Pools | None = None


def engines(
    args: Mapping[str, Any] | None,
    prefill_args: Mapping[str, Any] | None,
    decode_args: Mapping[str, Any] | None,
    *,
    num_prefill_workers: int,
    num_decode_workers: int,
    first_from_decode: bool = False,
) -> Engines:
    """Of one kind, or of two if both kinds' arguments are given. The way between is the prefill engines' affair.

    Raises:
        ValueError: names what is wrong.
    """
    if prefill_args is None and decode_args is None:
        return Engines(engine_limits(args))
    if prefill_args is None or decode_args is None or args is not None:
        raise ValueError(
            "prefill_engine_args, decode_engine_args: give both and no extra_engine_args, or neither of the two"
        )
    prefill, way = _apart("prefill_engine_args", prefill_args, "prefill")
    decode, _ = _apart("decode_engine_args", decode_args, "decode")
    pools = {
        "prefill_workers": num_prefill_workers,
        "decode_workers": num_decode_workers,
        "first_from_decode": first_from_decode,
        **way,
    }
    try:
        return Engines(
            engine_limits(decode, "decode_engine_args"),
            engine_limits(prefill, "prefill_engine_args"),
            msgspec.convert(pools, Pools),
        )
    except msgspec.ValidationError as e:
        raise ValueError(f"prefill_engine_args: {e}") from None


_WAY = {
    "kv_transfer_bandwidth": "kv_transfer_bandwidth",
    "kv_transfer_bytes_per_token": "kv_bytes_per_token",
    "kv_transfer_latency_ms": "kv_transfer_latency_ms",
    "kv_transfer_timing_mode": "kv_transfer_timing_mode",
}


def _apart(name: str, args: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of the engine, and what of the way to others. Raises ValueError."""
    given = _flat(args, name)
    said = given.pop("worker_type", kind)
    if said != kind:
        raise ValueError(f"{name}.worker_type: must be {kind!r}, got {said!r}")
    way = {ours: given.pop(theirs) for theirs, ours in _WAY.items() if theirs in given}
    return given, {key: value for key, value in way.items() if value is not None}


def _flat(args: Mapping[str, Any], name: str) -> dict[str, Any]:
    given = dict(args)
    nested = given.pop("engine", {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{name}.engine: must be a mapping")  # noqa: TRY004 - as all that is wrong here
    return given | dict(nested)


def engine_limits(args: Mapping[str, Any] | None, name: str = "extra_engine_args") -> EngineLimits:
    """The engine from its arguments, nested under `engine` or flat. Raises ValueError naming what is wrong."""
    given = _flat(args or {}, name)
    known = EngineLimits.__struct_fields__
    for field in given:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            raise ValueError(f"{name}.{field}: is not simulated" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return msgspec.convert(given, EngineLimits)
    except msgspec.ValidationError as e:
        raise ValueError(f"{name}: {e}") from None


def _policy(router_mode: str, config: KvRouterConfig) -> str:
    if router_mode == "kv_router":
        return config.router_policy
    name = router_mode.replace("_", "-")
    return name if name in BASELINES else router_mode


def _refuse(replay_mode: str, unsupported: Mapping[str, Any]) -> None:
    if replay_mode != "offline":
        raise ValueError(f"replay_mode must be 'offline', the only one there is, got {replay_mode!r}")
    for name, value in unsupported.items():
        if name not in _NOT_YET:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if value is not None:
            raise ValueError(f"{name}: {_NOT_YET[name]} in this version")
