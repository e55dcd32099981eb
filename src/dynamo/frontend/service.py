"""What does a running frontend consist of, and in which order does it begin and end?"""

import asyncio
import logging
import resource
import ssl
from pathlib import Path
from typing import Any

import msgspec

from dynamo.frontend.app import App, paths
from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.http1 import HttpServer
from dynamo.frontend.metrics import FrontendMetrics
from dynamo.frontend.migration import MigrationRules
from dynamo.frontend.models import ModelRegistry, NamespaceFilter
from dynamo.frontend.router_series import RouterSeries
from dynamo.frontend.routes_admin import AdminRoutes
from dynamo.frontend.routes_models import ModelRoutes
from dynamo.frontend.routes_openai import OpenAIRoutes, load_template
from dynamo.frontend.routes_system import SystemRoutes
from dynamo.frontend.siblings import Share, Siblings
from dynamo.frontend.watchdog import Watchdog
from dynamo.router.options import options_without_effect
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import EngineShutdown
from dynamo.runtime.loop_monitor import LoopMonitor
from dynamo.runtime.selection import RouterMode
from dynamo.runtime.tls import Renewed, server_context

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0  # how late a silent worker or a stalled client may be noticed
TLS_HANDSHAKE_S = 10.0  # browsers far away need three round trips; who says nothing holds a socket no longer
SETTLE_S = 15.0  # for the files of a model and what is cached of it; who needs longer is waited for by its requests
POLITE_S = 2.0  # clients that keep a connection busy ask again within it, and are told then to make a new one
LAST_WORDS_S = 1.0  # for the errors of requests that outlived the shutdown's grace to reach their clients


class FrontendService:
    """Everything between the listening socket and the request plane. The runtime belongs to the caller.

    Raises:
        ValueError: a setting in the environment or the request template is wrong; names it.
    """

    def __init__(self, runtime: DistributedRuntime, config: FrontendConfig, limits: Limits) -> None:
        self._runtime = runtime
        self._config = config
        self._limits = limits
        path_of = paths()
        defaults = load_template(config.request_template) if config.request_template else None
        self.metrics = FrontendMetrics(runtime.metrics, config.metrics_prefix)
        routing = msgspec.structs.replace(config.router, mode=RouterMode(config.router_mode))
        self.models = ModelRegistry(
            runtime,
            self.metrics,
            NamespaceFilter(config.namespace, config.namespace_prefix),
            routing,
            config.router_min_initial_workers,
        )
        unused = [
            f"{flag} has no effect: --router-mode is {config.router_mode}" for flag in options_without_effect(routing)
        ]
        for line in unused:
            log.warning("%s", line)
        self._series = RouterSeries(runtime.metrics, config.metrics_prefix, self.models)
        migration = MigrationRules(config.migration_limit, config.migration_max_seq_len)
        keep_alive_s = limits.sse_keep_alive_ms / 1e3
        self._watchdog = Watchdog(min(WATCH_INTERVAL_S, limits.stream_timeout_s / 4, (keep_alive_s or 4) / 4))
        self._system = SystemRoutes(self.models, self.metrics, path_of, limits)
        self._admin = AdminRoutes(self.models, config.router_mode, unused)
        self._app = App(
            OpenAIRoutes(self.models, self.metrics, limits, self._watchdog, defaults, migration),
            ModelRoutes(self.models),
            self._system,
            self._admin,
            self.metrics,
            limits,
            path_of,
        )
        self._monitor = LoopMonitor(runtime.metrics, config.metrics_prefix)
        self._following: asyncio.Task[None] | None = None
        self._http: HttpServer | None = None
        self._listening: list[asyncio.Server] = []
        self._siblings: Siblings | None = None

    async def start(self, share: Share | None = None) -> None:
        """Begin to follow discovery, and to listen. Where the port is shared others answer there meanwhile, so that
        this process listens only once it can answer too.

        Raises:
            OSError: the address cannot be bound.
            ValueError: a TLS file cannot be used.
        """
        loop = asyncio.get_running_loop()
        self._http = HttpServer(self._app, self._limits.body_limit_bytes)
        options = {**_encryption(self._config), "backlog": self._limits.listen_backlog}
        if share is None:
            where = self._config.http_host, self._config.http_port
            self._listening.append(await loop.create_server(self._http, *where, **options))
        self._following = loop.create_task(self.models.follow(), name="model cards")
        self._following.add_done_callback(_report_end)
        self._monitor.start()
        self._runtime.metrics.on_scrape(self._update_series)
        if share is not None:
            if not await self.models.settled(SETTLE_S):
                log.warning("some models cannot be used yet; listening all the same")
            siblings = Siblings(share, self.metrics, self._config.metrics_prefix, self.models)
            await siblings.start()  # now, and not before: until then the one that this replaces is told of settings
            self._siblings = self._system.siblings = siblings
            self._admin.on_change = siblings.tell_settings
            for sock in share.listening:
                self._listening.append(await loop.create_server(self._http, sock=sock, **options))

    def _update_series(self) -> None:
        """Before each scrape, whichever port it comes to."""
        self.metrics.update()
        self._series.update()
        for worker_set in self.models.sets():
            worker_set.count_cache(self.metrics)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        port: int = self._listening[0].sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """The address of the service."""
        scheme = "https" if self._config.tls_cert_path else "http"
        host = self._config.http_host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def drain(self) -> None:
        """Take no new requests; `/health` says so. What runs goes on."""
        self._system.draining = True

    async def hand_over(self) -> None:
        """Leave a port on which others go on: whoever connects now is theirs, and who is connected here is answered."""
        await self._stop_listening()
        if self._http is not None:
            await self._http.see_off(POLITE_S, POLITE_S + self._limits.stream_timeout_s)

    async def _stop_listening(self) -> None:
        for server in self._listening:
            server.close()
        self._listening.clear()
        if self._siblings is not None:
            await self._siblings.close()

    async def close(self) -> None:
        """Drain, give what runs `DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS`, end the rest with an error, and close."""
        self.drain()
        if not await self._app.finished(self._limits.graceful_shutdown_s):
            for answer in self._watchdog.watched:
                answer.fail(EngineShutdown("the frontend is shutting down"))
            await self._app.finished(LAST_WORDS_S)
        await self._stop_listening()
        if self._http is not None:
            await self._http.shutdown(LAST_WORDS_S)
        self._watchdog.close()
        self._monitor.close()
        self._runtime.metrics.off_scrape(self._update_series)
        self.models.close()
        await self.models.closed()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)


def _report_end(following: "asyncio.Task[None]") -> None:
    """Following discovery never ends by itself; if it does, models would silently go stale."""
    if not following.cancelled() and (error := following.exception()) is not None:
        log.critical("models are no longer followed: %s", error, exc_info=error)


def _encryption(config: FrontendConfig) -> dict[str, Any]:
    """What the listener is told of TLS; nothing for plain HTTP. Raises ValueError."""
    if config.tls_cert_path is None or config.tls_key_path is None:
        return {}
    cert, key = Path(config.tls_cert_path), Path(config.tls_key_path)
    client_ca = Path(config.tls_client_ca_cert_path) if config.tls_client_ca_cert_path else None

    def make() -> ssl.SSLContext:
        context = server_context(cert, key, client_ca, "--tls-cert-path, --tls-key-path, --tls-client-ca-cert-path")
        context.set_alpn_protocols(["http/1.1"])
        return context

    return {"ssl": Renewed([cert, key, client_ca], make).door(), "ssl_handshake_timeout": TLS_HANDSHAKE_S}


def raise_descriptor_limit(target: int) -> None:
    """Let the process open up to `target` files and sockets, as far as the hard limit goes [H9]."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = target if hard == resource.RLIM_INFINITY else min(target, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
