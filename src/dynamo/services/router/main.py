"""How does the stand-alone router run as a program? `python -m dynamo.router --endpoint dynamo.prefill.generate`."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from dynamo.engine.program import run_program
from dynamo.router.kv_router import KvRouter
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.client import Client
from dynamo.runtime.errors import EngineShutdown
from dynamo.services.router.args import RouterOptions, parse_args
from dynamo.services.router.endpoints import RouterEndpoints

log = logging.getLogger(__name__)

POLL_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    options = parse_args(argv)
    return run_program("router", options.planes, lambda runtime: serve(runtime, options))


async def serve(runtime: DistributedRuntime, options: RouterOptions) -> int:
    """Serve until the runtime has shut down. Returns the exit status.

    Raises:
        DynamoException: discovery, or a plane, cannot be used.
        ValueError: a setting that cannot be meant.
    """
    config = options.router
    router = KvRouter(
        runtime.endpoint(options.endpoint),
        options.block_size,
        config.config,
        session_affinity_ttl_secs=config.session_affinity_ttl_secs,
        load_threshold_config=config.thresholds,
        session_affinity_mode=config.session_affinity_mode,
    )
    try:
        client = await router.start()
        if not await _enough(runtime, client, options.min_initial_workers):
            return 0
        try:
            await _serve_endpoints(runtime, options, router)
        except EngineShutdown:
            return 0  # the signal came first
        print(
            f"router is ready: {len(client.instance_ids())} workers of {options.endpoint} "
            f"by dyn://{options.planes.endpoint}",
            flush=True,
        )
        await runtime.wait_drained()
    finally:
        await router.close()
    return 0


async def _serve_endpoints(runtime: DistributedRuntime, options: RouterOptions, router: KvRouter) -> None:
    async def status(_: dict[str, Any]) -> dict[str, Any]:
        return router.router.status()

    runtime.register_engine_route("router_status", status)
    handlers = RouterEndpoints(router)
    for name, handler in (
        ("best_worker_id", handlers.best_worker_id),
        ("get_overlap_scores", handlers.get_overlap_scores),
        ("generate", handlers.generate),  # last: who finds it finds the others
    ):
        endpoint = runtime.endpoint(f"{options.namespace}.router.{name}")
        await endpoint.start_endpoint(handler, metrics_labels=[("service", "router")])


async def _enough(runtime: DistributedRuntime, client: Client, workers: int) -> bool:
    """Wait until so many workers have joined; False if the runtime shuts down first."""
    if len(client.instance_ids()) < workers:
        log.info("waiting until there are %d workers", workers)
    while len(client.instance_ids()) < workers:
        if runtime.is_shutting_down():
            return False
        await asyncio.sleep(POLL_S)
    return True
