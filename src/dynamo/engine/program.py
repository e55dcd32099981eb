"""How does an engine's program run from its first line to its exit status?"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

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


def say_ready(name: str, model: str, options: WorkerOptions, workers: int = 1) -> None:
    """Print the one line that says that requests may come."""
    count = "1 worker" if workers == 1 else f"{workers} workers"
    print(f"{name} is ready: {model} by {count} at dyn://{options.endpoint}", flush=True)


async def model_directory(flag: str, model_path: str) -> Path:
    """The directory of a model given as a path or a hub id.

    Raises:
        ValueError: there is none, or it has no tokenizer; names the flag.
    """
    try:
        return Path(await fetch_model(model_path, ignore_weights=True))
    except DynamoException as e:
        raise ValueError(f"{flag}: {e}") from None
