"""How do simulated workers run as a program? `python -m dynamo.mocker --model-path DIR`."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from dynamo.engine.program import instance_ids, model_directory, run_program, serve_workers
from dynamo.engine.serving import EngineWorker, ServeOptions
from dynamo.engine.worker_args import dump_config
from dynamo.llm.model_directory import architectural_context_length
from dynamo.mocker import stats
from dynamo.mocker.args import MockerOptions, parse_args
from dynamo.mocker.engine import MockerConfig, MockerEngine
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.transfer import TransferTiming, kv_bytes_per_token
from dynamo.mocker.vocabulary import sayable_tokens
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import InvalidArgument


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    options = parse_args(argv)
    return run_program("mocker", options.worker, lambda runtime: serve(runtime, options))


async def serve(runtime: DistributedRuntime, options: MockerOptions) -> int:
    """Serve all workers of this process until the runtime has shut down. Returns the exit status.

    Raises:
        ValueError: the model directory is no good, or limits do not fit together; names the flag.
    """
    directory = await model_directory("--model-path", options.model_path)
    name = options.model_name or Path(options.model_path).name
    config = MockerConfig(
        model=str(directory),
        served_model_name=name,
        scheduler=options.scheduler(architectural_context_length(directory)),
        timing=options.timing,
        data_parallel_size=options.data_parallel_size,
        startup_time_s=options.startup_time,
        transfer=TransferTiming(
            options.kv_bytes_per_token or kv_bytes_per_token(directory, options.kv_cache_dtype),
            options.kv_transfer_bandwidth,
            options.speedup_ratio,
        ),
    )
    dump_config(options.worker.dump_config_to, msgspec.to_builtins(options))
    try:
        vocabulary = await asyncio.to_thread(sayable_tokens, directory)
    except InvalidArgument as e:
        raise ValueError(f"--model-path: {e}") from None
    sampler = Sampler(vocabulary, options.reasoning)
    ports = options.bootstrap_ports or (None,) * options.num_workers
    workers = [
        _worker(runtime, options, _with_port(config, options, port), sampler, directory, id_)
        for id_, port in zip(instance_ids(runtime, options.num_workers), ports, strict=True)
    ]
    return await serve_workers("mocker", workers, stagger_s(options))


def _with_port(config: MockerConfig, options: MockerOptions, port: int | None) -> MockerConfig:
    return config if port is None else replace(config, bootstrap=(options.bootstrap_host, port))


def _worker(
    runtime: DistributedRuntime,
    options: MockerOptions,
    config: MockerConfig,
    sampler: Sampler,
    directory: Path,
    instance_id: int,
) -> EngineWorker:
    engine = MockerEngine(config, sampler)
    worker = EngineWorker(runtime, engine, ServeOptions(directory, options.worker, instance_id))
    engine.held = worker.callers_are_behind
    for rank, scheduler in enumerate(engine.schedulers):
        stats.publish(scheduler, runtime.metrics, config.served_model_name, rank, instance_id)
    return worker


def stagger_s(options: MockerOptions) -> float:
    """Seconds between two workers' starts. Few start at once; many would flood discovery and its readers."""
    if options.stagger_delay >= 0:
        return options.stagger_delay
    if options.num_workers <= 32:
        return 0.0
    return 0.1 if options.num_workers <= 128 else 0.2
