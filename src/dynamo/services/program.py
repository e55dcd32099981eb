"""How does a service run from its first line to its exit status?"""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable

from dynamo.runtime.errors import DynamoException
from dynamo.runtime.logs import configure_logging
from dynamo.runtime.stop_signals import on_stop_signals

log = logging.getLogger(__name__)

Work = Callable[[asyncio.Event], Awaitable[None]]
"""Serves until the event is set, then ends in bounded time."""


def run_service(name: str, work: Work) -> int:
    """Run `work` on uvloop until SIGTERM or SIGINT, of which a second one ends the process at once.

    Returns the exit status. What the user can put right is one line on stderr, and status 1.
    """
    import uvloop

    configure_logging()
    try:
        uvloop.run(_run(work))
    except (DynamoException, ValueError, OSError) as e:
        sys.stderr.write(f"{name}: error: {e}\n")
        return 1
    return 0


async def _run(work: Work) -> None:
    stop = asyncio.Event()
    on_stop_signals(stop.set, stop.is_set, log, "shutting down; a second one ends at once")
    await work(stop)


def say_ready(name: str, url: str) -> None:
    """Print the one line that says that requests may come."""
    print(f"{name} is ready: {url}", flush=True)
