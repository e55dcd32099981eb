"""How is the frontend started as a program, and how does it stop?"""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from dynamo.frontend.args import FrontendConfig, Limits, parse
from dynamo.runtime.stop_signals import on_stop_signals

log = logging.getLogger(__name__)

BIND_FAILED = 1  # exit status
# Objects that may be made, beyond those freed, before the youngest are searched for cycles. A request is about 50 and
# leaves no cycle, so Python's 700 would have it search the living requests again and again: 10 % of a short one's cost.
GC_THRESHOLD = 10_000


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m dynamo.frontend`."""
    from dynamo.runtime.logs import configure_logging

    config = parse(argv)
    configure_logging()
    if config.http_workers > 1:
        from dynamo.frontend.processes import supervise

        raise SystemExit(supervise(config))
    raise SystemExit(run(config))


def run(config: FrontendConfig, *, reuse_port: bool = False) -> int:
    """Serve until a signal says otherwise. Gives back the exit status."""
    import gc

    import uvloop

    gc.set_threshold(GC_THRESHOLD, 20, 20)
    os.environ.update(config.tcp_tls)  # where the runtime looks for them
    return uvloop.run(_serve(config, reuse_port))


async def _serve(config: FrontendConfig, reuse_port: bool) -> int:
    from dynamo.frontend.service import FrontendService, raise_descriptor_limit
    from dynamo.runtime.distributed import DistributedRuntime

    limits = Limits.from_env()
    raise_descriptor_limit(limits.fd_limit_target)
    stop = _stop_on_signals()
    try:
        runtime = DistributedRuntime(
            asyncio.get_running_loop(),
            config.discovery_backend,
            config.request_plane,
            event_plane=config.event_plane,
        )
        service = FrontendService(runtime, config, limits)
    except ValueError as e:
        sys.stderr.write(f"dynamo.frontend: error: {e}\n")
        return 2
    try:
        await service.start(reuse_port=reuse_port)
    except ValueError as e:
        sys.stderr.write(f"dynamo.frontend: error: {e}\n")
        await runtime.close()
        return BIND_FAILED
    except OSError as e:
        where = f"{config.http_host}:{config.http_port}"
        sys.stderr.write(f"dynamo.frontend: error: cannot serve on {where}: {e.strerror or e}\n")
        await runtime.close()
        return BIND_FAILED
    local = config.http_host in ("127.0.0.1", "localhost", "::1")
    note = " (this machine only; --http-host 0.0.0.0 lets others in)" if local else ""
    log.info("listening on %s%s, router mode %s", service.url, note, config.router_mode)
    await stop.wait()
    await service.close()
    await runtime.close()
    return 0


def _stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; the second signal ends the process at once."""
    stop = asyncio.Event()
    on_stop_signals(stop.set, stop.is_set, log, "no new requests; finishing those that run")
    return stop
