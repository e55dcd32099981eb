"""How do workers that repeat the prompt run as a program? `python -m dynamo.echo --model-path DIR`."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo.echo.engine import echo_engine
from dynamo.engine.contract import EngineConfig
from dynamo.engine.program import instance_ids, model_directory, run_program, serve_workers
from dynamo.engine.serving import EngineWorker, ServeOptions
from dynamo.engine.worker_args import WorkerOptions, add_worker_options, dump_config, positive_int, worker_options
from dynamo.llm.model_directory import architectural_context_length
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.options import OptionParser

DELAY_MS = 10.0  # DYN_TOKEN_ECHO_DELAY_MS: 100 tokens a second, about what a person reads along


class EchoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, read and checked."""

    model_path: str
    model_name: str | None
    num_workers: int
    delay_ms: float
    max_model_len: int | None
    block_size: int | None
    worker: WorkerOptions


def parse_args(argv: Sequence[str] | None = None) -> EchoOptions:
    """Read the command line. Ends the program with one line on stderr where it is wrong."""
    parser = OptionParser("python -m dynamo.echo", "Workers that answer with the prompt, to try out all around them.")
    parser.usage = "%(prog)s --model-path DIR [option ...]"
    model = parser.add_argument_group("model")
    parser.option(model, "--model-path", metavar="DIR", help="model directory or hub id, for tokenizer and template")
    parser.option(model, "--model-name", metavar="NAME", help="what requests call the model (unset: the directory's)")
    parser.option(model, "--max-model-len", metavar="N", type=positive_int, help="context length (unset: the model's)")
    parser.option(
        model, "--block-size", metavar="N", type=positive_int, help="KV block size to state in the model card"
    )
    echo = parser.add_argument_group("echo")
    parser.option(echo, "--num-workers", metavar="N", type=positive_int, default=1, help="workers in this process")
    parser.option(
        echo,
        "--delay-ms",
        metavar="MS",
        env="DYN_TOKEN_ECHO_DELAY_MS",
        type=float,
        default=DELAY_MS,
        help="milliseconds between tokens",
    )
    add_worker_options(parser)
    args = parser.parse(argv)
    if not args.model_path:
        parser.error("--model-path: is required: tokenizer and template are the model's")
    if args.delay_ms < 0:
        parser.error(f"--delay-ms: {args.delay_ms} is negative")
    try:
        worker = worker_options(args)
    except ValueError as e:
        parser.error(str(e))
    fields = {name: getattr(args, name) for name in EchoOptions.__struct_fields__ if name != "worker"}
    return EchoOptions(worker=worker, **fields)


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    options = parse_args(argv)
    return run_program("echo", options.worker, lambda runtime: serve(runtime, options))


async def serve(runtime: DistributedRuntime, options: EchoOptions) -> int:
    """Serve all workers of this process until the runtime has shut down. Returns the exit status."""
    directory = await model_directory("--model-path", options.model_path)
    name = options.model_name or Path(options.model_path).name
    config = EngineConfig(
        model=str(directory),
        served_model_name=name,
        context_length=options.max_model_len or architectural_context_length(directory),
        kv_cache_block_size=options.block_size,
        publishes_kv_events=False,
        runtime_data={"engine": "echo"},
    )
    dump_config(options.worker.dump_config_to, msgspec.to_builtins(options))
    workers = [
        EngineWorker(
            runtime, echo_engine(config, options.delay_ms / 1000), ServeOptions(directory, options.worker, id_)
        )
        for id_ in instance_ids(runtime, options.num_workers)
    ]
    return await serve_workers("echo", workers)
