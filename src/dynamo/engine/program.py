"""How does an engine's program run from its first line to its exit status?"""

import asyncio
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from dynamo.engine.role_route import serve_role_route
from dynamo.engine.serving import EngineWorker
from dynamo.engine.worker_args import WorkerOptions
from dynamo.llm.hub import fetch_model
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import DynamoException
from dynamo.runtime.logs import configure_logging
from dynamo.runtime.worker import handle_signals

Work = Callable[[DistributedRuntime], Awaitable[int]]
"""Serves on a runtime until that has shut down. Returns the exit status."""


def run_program(name: str, options: WorkerOptions, work: Work) -> int:
    """Run `work` on uvloop with a runtime of its own, which SIGTERM and SIGINT shut down in order.

    Returns the exit status. What the user can put right is one line on stderr, without a traceback, and status 1.
    """
    import uvloop

    configure_logging()
    try:
        return uvloop.run(_run(options, work))
    except (DynamoException, ValueError, OSError) as e:
        sys.stderr.write(f"{name}: error: {e}\n")
        return 1


async def _run(options: WorkerOptions, work: Work) -> int:
    os.environ.update(options.nats_tls | options.tcp_tls)  # where the runtime, and what it starts, look for them
    runtime = DistributedRuntime(
        asyncio.get_running_loop(),
        options.discovery_backend,
        options.request_plane,
        event_plane=options.event_plane,
        response_plane=options.response_plane,
    )
    handle_signals(runtime)
    try:
        await runtime.started()
        return await work(runtime)
    finally:
        await runtime.close()


async def serve_workers(program: str, workers: Sequence[EngineWorker], stagger_s: float = 0.0) -> int:
    """Start the workers of one process, `stagger_s` apart, say on one line that requests may come, and serve until
    the runtime has shut down. Returns the exit status. Raises as `EngineWorker.start`."""

    async def start(index: int, worker: EngineWorker) -> bool:
        await asyncio.sleep(index * stagger_s)
        return await worker.start()

    started = await asyncio.gather(*(start(i, worker) for i, worker in enumerate(workers)))
    running = [worker for worker, is_up in zip(workers, started, strict=True) if is_up]
    if running:
        serve_role_route(running[0].runtime, running)
    if len(running) == len(workers):
        say_ready(program, running[0].model_name, running[0].options.worker, len(running))
    return max(await asyncio.gather(*(worker.run() for worker in running)), default=0)


def say_ready(program: str, model: str, options: WorkerOptions, workers: int = 1) -> None:
    """Print the one line that says that requests may come."""
    count = "1 worker" if workers == 1 else f"{workers} workers"
    print(f"{program} is ready: {model} by {count} at dyn://{options.endpoint}", flush=True)


def instance_ids(runtime: DistributedRuntime, count: int) -> list[int]:
    """Ids for the workers of one process: the first has the process's own."""
    return [runtime.instance_id, *(secrets.randbelow((1 << 63) - 1) + 1 for _ in range(count - 1))]


async def model_directory(flag: str, model_path: str) -> Path:
    """The directory of a model given as a path or a hub id.

    Raises:
        ValueError: there is none, or it has no tokenizer; names the flag.
    """
    try:
        return Path(await fetch_model(model_path, ignore_weights=True))
    except DynamoException as e:
        raise ValueError(f"{flag}: {e}") from None
