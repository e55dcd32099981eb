"""How does a vLLM worker run as a program? `python -m dynamo.vllm --model DIR_OR_HUB_ID`."""

import asyncio
import dataclasses
import gc
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial, reduce
from operator import or_
from pathlib import Path

import msgspec

from dynamo.engine.program import run_program
from dynamo.engine.role_route import serve_role_route
from dynamo.engine.serving import WORKER_TYPES, EngineWorker, ServeOptions
from dynamo.engine.worker_args import Role, WorkerOptions, dump_config
from dynamo.llm.hub import fetch_model
from dynamo.llm.model_card import ModelInput, ModelType
from dynamo.llm.registration import register_model
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.component import Endpoint
from dynamo.runtime.errors import DynamoException
from dynamo.vllm import args, transport
from dynamo.vllm.args import PROG, VllmOptions

log = logging.getLogger(__name__)

_TYPES = {"chat": ModelType.Chat, "completions": ModelType.Completions}


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    words = args.parse_ours(sys.argv[1:] if argv is None else argv)
    args.before_vllm(words)
    try:
        options = args.engine_options(words)
        worker = args.shared_options(words)
        return run_program(PROG, worker, lambda runtime: serve(runtime, worker, options))
    except KeyboardInterrupt:  # while vLLM was being imported: there is nothing to end yet
        return 130


async def serve(runtime: DistributedRuntime, worker_options: WorkerOptions, options: VllmOptions) -> int:
    """Serve one engine until the runtime has shut down. Returns the exit status.

    Raises:
        ValueError: the model or an option is no good; names the flag.
        DynamoException: discovery or the request plane cannot be used.
    """
    try:
        directory = Path(os.path.abspath(await fetch_model(options.engine_args.model)))  # noqa: ASYNC240
    except DynamoException as e:
        raise ValueError(f"--model: {e}") from None
    args.settle(options, directory)
    chosen = None
    if worker_options.disaggregation_mode != "agg" or options.transfer.transport != "auto":
        chosen = await asyncio.to_thread(transport.configure, options.engine_args, worker_options, options.transfer)
    dump_config(worker_options.dump_config_to, _in_effect(worker_options, options))
    from dynamo.vllm.engine import VllmEngine

    engine = VllmEngine(options)
    engine.transport = chosen
    worker = EngineWorker(runtime, engine, ServeOptions(directory, worker_options))
    log.info("loading %s; this takes half a minute or more", directory)
    try:
        if not await worker.start():
            return 0
    except (RuntimeError, ValueError) as e:
        if isinstance(e, DynamoException) or _is_ours(e):
            raise
        raise ValueError(f"vLLM could not start with this model and these flags: {why(e)}") from e
    for name in engine.lora_names:
        register = partial(_register_adapter, worker, worker_options, directory, name)
        worker.on_register.append(register)
        await register(worker.endpoint, worker.role)
    serve_role_route(runtime, [worker])
    for route, callback in engine.controls().items():
        runtime.register_engine_route(route, callback)
    runtime.metrics.add_text_source(
        engine.prometheus_text, [("model", options.served_model_names[0]), ("dynamo_endpoint", worker_options.endpoint)]
    )
    # vLLM and torch leave a million objects that live as long as the process; a full collection over them stops
    # every stream for 0.4 s.
    gc.collect()
    gc.freeze()
    print(f"vllm is ready: {options.served_model_names[0]} by 1 worker at {worker.endpoint.address.url}", flush=True)
    try:
        return await worker.run()
    finally:
        gc.unfreeze()  # or Triton's bindings fill the screen with what they call leaks


async def _register_adapter(
    worker: EngineWorker, worker_options: WorkerOptions, directory: Path, name: str, endpoint: Endpoint, role: Role
) -> None:
    config = worker.config
    await register_model(
        ModelInput.Tokens,
        reduce(or_, (_TYPES[word] for word in worker_options.endpoint_types)),
        endpoint,
        str(directory),
        config.served_model_name or config.model,
        worker_type=WORKER_TYPES[role],
        kv_cache_block_size=config.kv_cache_block_size,
        runtime_config=worker.runtime_config(role),
        custom_template_path=worker_options.custom_jinja_template,
        lora_name=name,
        base_model_path=str(directory),
    )


def _in_effect(worker: WorkerOptions, options: VllmOptions) -> dict[str, object]:
    engine = {f.name: getattr(options.engine_args, f.name) for f in dataclasses.fields(options.engine_args)}
    environment = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "OMP_"))}
    return {"worker": msgspec.to_builtins(worker), "engine": engine, "environment": environment}


def _is_ours(error: BaseException) -> bool:
    """Whether the message says already which flag or variable is wrong."""
    return str(error).startswith(("--", "DYN_"))


def why(error: BaseException) -> str:
    """The gist of an error from vLLM's start, on one line. Its configuration speaks in pydantic's paragraphs."""
    details = getattr(error, "errors", None)
    if callable(details):
        found = []
        for detail in details():
            place = ".".join(str(part) for part in detail["loc"])
            message = str(detail["msg"]).removeprefix("Value error, ").strip()
            found.append(f"{place}: {message}" if place else message)
        text = "; ".join(found)
    else:
        text = str(error)
    return " ".join(text.split())[:1000] or type(error).__name__
