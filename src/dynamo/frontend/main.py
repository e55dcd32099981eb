"""How is the frontend started as a program, and how does it stop?"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dynamo.frontend.args import FrontendConfig, Limits, parse
from dynamo.runtime.stop_signals import on_stop_signals

if TYPE_CHECKING:
    from dynamo.frontend.service import FrontendService
    from dynamo.frontend.siblings import Share

log = logging.getLogger(__name__)

HAND_OVER = signal.SIGUSR2  # to one process of several; to the one that watches over them: let each hand over in turn

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

        raise SystemExit(supervise(config, sys.argv[1:] if argv is None else argv))
    raise SystemExit(run(config))


def run(config: FrontendConfig, share: "Share | None" = None, on_ready: Callable[[], None] | None = None) -> int:
    """Serve until a signal says otherwise. Gives back the exit status.

    Args:
        share: this process's part of a port that several share; alone it listens itself.
        on_ready: called once it listens.
    """
    import gc

    import uvloop

    gc.set_threshold(GC_THRESHOLD, 20, 20)
    os.environ.update(config.tcp_tls)  # where the runtime looks for them
    return uvloop.run(_serve(config, share, on_ready))


async def _serve(config: FrontendConfig, share: "Share | None", on_ready: Callable[[], None] | None) -> int:
    from dynamo.frontend.service import FrontendService, raise_descriptor_limit
    from dynamo.runtime.distributed import DistributedRuntime

    limits = Limits.from_env()
    raise_descriptor_limit(limits.fd_limit_target)
    signals = _Signals(shared=share is not None)
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
        await service.start(share)
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
    if on_ready is not None:
        on_ready()
    await signals.wait(service)
    await service.close()
    await runtime.close()
    return 0


class _Signals:
    """What operators, or the process that watches over those of a port, ask for by signals."""

    def __init__(self, *, shared: bool) -> None:
        self._stop, self._hand_over = asyncio.Event(), asyncio.Event()
        on_stop_signals(self._stop.set, self._stop.is_set, log, "no new requests; finishing those that run")
        if shared:
            loop = asyncio.get_running_loop()
            loop.remove_signal_handler(signal.SIGINT)  # a terminal sends it to all processes: the watching one decides
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            loop.add_signal_handler(HAND_OVER, self._hand_over.set)

    async def wait(self, service: "FrontendService") -> None:
        """Until this process is to close: told to stop, or gone out of a port's service in favour of another."""
        stop = asyncio.ensure_future(self._stop.wait())
        leave = asyncio.ensure_future(self._leave(service))
        await asyncio.wait((stop, leave), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        leave.cancel()

    async def _leave(self, service: "FrontendService") -> None:
        await self._hand_over.wait()
        log.info("%s: another process goes on here; finishing with those who are connected", HAND_OVER.name)
        await service.hand_over()
