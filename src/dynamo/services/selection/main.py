"""How does the selection service run as a program? `python -m dynamo.select_service --port 8092`."""

import asyncio
from collections.abc import Sequence

from dynamo.services.program import run_service, say_ready
from dynamo.services.selection.args import SelectOptions, parse_args
from dynamo.services.selection.core import SelectionCore
from dynamo.services.selection.routes import SelectionRoutes
from dynamo.services.web import HttpService


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    options = parse_args(argv)
    return run_service("select_service", lambda stop: serve(options, stop))


async def serve(options: SelectOptions, stop: asyncio.Event) -> None:
    """Serve until `stop` is set. Raises CannotConnect if a port is taken, ValueError for what cannot be meant."""
    service = HttpService("dynamo_select_service")
    core = SelectionCore(
        options.router,
        service.metrics,
        indexer_peers=options.indexer_peers,
        replica_host=options.host,
        replica_sync_port=options.replica_sync_port,
        replica_sync_peers=options.replica_sync_peers,
        selection_cache=options.cache,
    )
    try:
        SelectionRoutes(service, core)
        await service.start(options.host, options.port)
        say_ready("select_service", service.url)
        await stop.wait()
    finally:
        core.refuse_waiting()
        await service.close()
        await core.close()
