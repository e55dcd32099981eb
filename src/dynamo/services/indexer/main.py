"""How does the stand-alone indexer run as a program? `python -m dynamo.indexer --port 8090`."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from dynamo.services.access_log import AccessLog
from dynamo.services.cache_group import GroupKey, sweep
from dynamo.services.indexer.args import IndexerOptions, parse_args
from dynamo.services.indexer.registry import IndexRegistry
from dynamo.services.indexer.routes import IndexerRoutes
from dynamo.services.program import run_service, say_ready
from dynamo.services.web import HttpService


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    options = parse_args(argv)
    return run_service("indexer", lambda stop: serve(options, stop))


async def serve(options: IndexerOptions, stop: asyncio.Event) -> None:
    """Serve until `stop` is set.

    Raises:
        DynamoException: a worker of the command line cannot be heard, or the port is taken.
        OSError: the access log cannot be opened.
    """
    access_log = None
    if options.access_log is not None:
        access_log = AccessLog(Path(options.access_log), local_time=options.access_log_local_time)
    service = HttpService("dynamo_kvindexer", access_log=access_log, trace_id_header=options.trace_id_header)
    registry = IndexRegistry(service.metrics, options.peers)
    IndexerRoutes(service, registry, options.min_initial_workers, access_log)
    sweeping = asyncio.get_running_loop().create_task(sweep(registry.groups.values()), name="sweep")
    try:
        key = GroupKey(options.model_name, options.routing_group)
        for worker, endpoint in options.workers.items():
            assert options.block_size is not None
            registry.register(key, worker, endpoint, None, options.block_size)
        await service.start(options.host, options.port)
        say_ready("indexer", service.url)
        await stop.wait()
    finally:
        await service.close()
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        await registry.close()
