"""What does one process share with its deployment?

`DistributedRuntime` owns the process's discovery, its listener, its connections to workers, its metrics and
health, and the order in which all that ends.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.component import Endpoint, Namespace, ServedEndpoint
from dynamo.runtime.connection import ConnectionPool
from dynamo.runtime.discovery import Discovery, open_discovery
from dynamo.runtime.errors import CannotConnect, DynamoException
from dynamo.runtime.events import choose_event_plane
from dynamo.runtime.health import Health
from dynamo.runtime.instances import InstanceSet
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.options import env_number
from dynamo.runtime.server import RequestServer
from dynamo.runtime.tls import RequestTls

if TYPE_CHECKING:
    from dynamo.runtime.curve import CurveKeys
    from dynamo.runtime.discovery.etcd.client import EtcdClient
    from dynamo.runtime.nats.link import NatsLink
    from dynamo.runtime.nats.settings import NatsSettings
    from dynamo.runtime.nats.transport import Exchange
    from dynamo.runtime.system_server import SystemServer

log = logging.getLogger(__name__)

GRACE_S = 5.0  # DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS: callers still send while they learn that we leave
DRAIN_S = 30.0  # DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS: requests in flight get this long

EngineRoute = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class DistributedRuntime:
    """One process's part in a deployment.

    Args:
        event_loop: the loop it will be used on; by default the running one.
        discovery_backend: auto, file, mem, etcd or kubernetes; else DYN_DISCOVERY_BACKEND.
        request_plane: how this process's endpoints are reached: `tcp`, or `nats`; else DYN_REQUEST_PLANE. Those of
            others are reached as their records say.
        enable_nats: ignored, kept for scripts that pass it.
        event_plane: `zmq`, or `nats`; else DYN_EVENT_PLANE.
        response_plane: answers come back on the request's connection, so this can only be the request plane's name.

    Raises:
        ValueError: a plane or backend that is unknown or not in this version, or a wrong variable of NATS or
            TLS.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop | None = None,
        discovery_backend: str | None = None,
        request_plane: str | None = None,
        enable_nats: bool | None = None,
        *,
        event_plane: str | None = None,
        response_plane: str | None = None,
    ) -> None:
        self.request_plane = _one_of("request plane", request_plane, ("tcp", "nats"), "DYN_REQUEST_PLANE")
        self.event_plane = choose_event_plane(event_plane)
        self.curve = _curve_keys(self.event_plane)
        response_plane = response_plane or os.environ.get("DYN_RESPONSE_PLANE")
        _only("response plane", response_plane, self.request_plane, "DYN_RESPONSE_PLANE")
        _only("request plane codec", os.environ.get("DYN_REQUEST_PLANE_CODEC"), "msgpack", "DYN_REQUEST_PLANE_CODEC")
        tls = RequestTls.from_environ()
        self._nats_settings: NatsSettings | None = None
        if "nats" in (self.request_plane, self.event_plane):
            self._nats_settings = _nats_settings()
        _shutdown_limits()  # a wrong value must not show only when the process is told to end
        self.discovery: Discovery = open_discovery(discovery_backend)
        self.instance_id = secrets.randbelow((1 << 63) - 1) + 1
        self.process = f"{socket.gethostname()}/{os.getpid()}"
        self.metrics = Metrics(self.instance_id)
        self.health = Health()
        self.system_server: SystemServer | None = None
        self.pool = ConnectionPool(self.process, self.metrics, self.nats_exchange, tls)
        by_nats = self.nats_exchange if self.request_plane == "nats" else None
        self.server = RequestServer(self.process, self.metrics, by_nats, tls)
        self._nats: NatsLink | None = None
        self._exchange: Exchange | None = None
        self.served: list[ServedEndpoint] = []
        self.engine_routes: dict[str, EngineRoute] = {}
        self._instances: dict[EndpointAddress, InstanceSet] = {}
        self._loop = event_loop
        self._shutdown = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        if self._loop is None:
            with contextlib.suppress(RuntimeError):  # made outside a loop: `started` finds it
                self._loop = asyncio.get_running_loop()
        if self._loop is not None:
            self._begin(self._loop)

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the system server, if DYN_SYSTEM_PORT asks for one."""
        if env_number("DYN_SYSTEM_PORT", -1) >= 0 and self._starting is None:
            self._starting = loop.create_task(self._start_system_server(), name="system server")

    async def _start_system_server(self) -> None:
        from dynamo.runtime.system_server import start_system_server

        self.system_server = await start_system_server(self)

    async def started(self) -> None:
        """Wait until the system server, if there is one, listens. Raises what kept it from doing so."""
        self._loop = asyncio.get_running_loop()
        self._begin(self._loop)
        if self._starting is not None:
            await asyncio.shield(self._starting)  # bounded: it binds one socket

    # --- health

    def set_health_status(self, ready: bool) -> None:
        """Say whether this process can do its work."""
        self.health.set_ready(ready)

    def register_engine_route(self, name: str, callback: EngineRoute) -> None:
        """Serve `/engine/{name}` on the system server: `callback` gets the body and returns the answer's."""
        self.engine_routes[name.strip("/")] = callback

    # --- names

    def endpoint(self, path: str) -> Endpoint:
        """The endpoint `ns.comp.ep` or `dyn://ns.comp.ep`. Raises ValueError."""
        return Endpoint(self, EndpointAddress.parse(path))

    def namespace(self, name: str) -> Namespace:
        """A namespace, as the first generation of this interface names endpoints. Raises ValueError."""
        return Namespace(self, name)

    def etcd_client(self) -> "EtcdClient | None":
        """etcd as the first generation of this interface offers it; None if discovery is another backend."""
        from dynamo.runtime.discovery.etcd.backend import EtcdDiscovery
        from dynamo.runtime.discovery.etcd.client import EtcdClient

        return EtcdClient(self.discovery.gateway) if isinstance(self.discovery, EtcdDiscovery) else None

    # --- for components and clients

    async def serving(self) -> RequestServer:
        """The listener, listening. Raises CannotConnect."""
        await self.started()
        await self.server.start()
        return self.server

    async def nats(self) -> "NatsLink":
        """The connection to NATS, connected; one for all that needs it. Raises CannotConnect."""
        if self._nats is None:
            from dynamo.runtime.nats.link import NatsLink

            try:
                settings = self._nats_settings or _nats_settings()
            except ValueError as e:  # only here where neither plane is NATS's, but a worker is reached by it
                raise CannotConnect(str(e)) from None
            self._nats = NatsLink(settings, self.process, self.metrics)
        await self._nats.start()
        return self._nats

    async def nats_exchange(self) -> "Exchange":
        """The connections of this process by way of NATS. Raises CannotConnect."""
        link = await self.nats()
        if self._exchange is None:
            from dynamo.runtime.nats.transport import Exchange

            self._exchange = Exchange(link)
        return self._exchange

    async def instances_of(self, address: EndpointAddress) -> InstanceSet:
        """The live instances of an endpoint; one set for all clients. Raises DiscoveryError."""
        await self.started()
        known = self._instances.get(address)
        if known is None:
            known = self._instances[address] = InstanceSet(address, self.discovery, self.pool)
            try:
                await known.start()
            except BaseException:
                del self._instances[address]
                raise
            self.pool.on_connected.append(known.connected)
            self.pool.on_connection_failed.append(known.inhibit_address)
            self.pool.on_leaving.append(known.leaving)
        return known

    def forget(self, served: ServedEndpoint) -> None:
        """An endpoint is no longer served."""
        self.server.remove_route(served.route)
        if served in self.served:
            self.served.remove(served)

    # --- the end

    def shutdown(self) -> None:
        """Begin to leave, in order; returns at once. May be called from any thread; later calls do nothing."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.shutdown)
            return
        if not self._shutdown.is_set():
            self._shutdown.set()
            self.discovery.hurry()
            self._ending = asyncio.get_running_loop().create_task(self._leave(), name="runtime shutdown")

    def is_shutting_down(self) -> bool:
        """Whether `shutdown` was called."""
        return self._shutdown.is_set()

    async def wait_drained(self) -> None:
        """Wait until `shutdown` was called and everything it waits for is over."""
        await self._shutdown.wait()
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def wait_shutdown(self) -> None:
        """Wait until `shutdown` is called."""
        await self._shutdown.wait()  # no deadline: that is what a server does

    async def close(self) -> None:
        """Leave in order and close everything. Safe to call twice."""
        self.shutdown()
        assert self._ending is not None
        await self._ending
        await self.pool.close()
        for instances in self._instances.values():
            await instances.close()
        self._instances.clear()
        if self._nats is not None:
            await self._nats.close()
        await self.discovery.close()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self.system_server is not None:
            await self.system_server.close()
            self.system_server = None

    async def _leave(self) -> None:
        """Leave discovery, give callers time to learn it, admit nothing new, finish what is in flight."""
        self.health.set_ready(False)
        served = tuple(self.served)
        for one in served:
            try:
                await one.unregister()
            except DynamoException as e:
                log.warning("leaving discovery: %s; the entry will expire", e)
        grace_s, drain_s = _shutdown_limits()
        if grace_s > 0:
            await self.server.all_left(grace_s)
        self.server.admitting = False
        await asyncio.gather(*(self._end(one, drain_s if one.graceful else 0.0) for one in served))
        await self.server.close()

    async def _end(self, served: ServedEndpoint, drain_s: float) -> None:
        if not await served.route.drained(drain_s):
            log.warning("%s: requests in flight after %g s are cancelled", served.endpoint.path, drain_s)
        await served.finish("the worker is shutting down")


def _shutdown_limits() -> tuple[float, float]:
    """Grace and drain, in seconds. Raises ValueError naming the variable."""
    grace_s = env_number("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", GRACE_S)
    return grace_s, env_number("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", DRAIN_S)


def _curve_keys(event_plane: str) -> "CurveKeys | None":
    if not any(name.startswith("DYN_EVENT_PLANE_CURVE_") and value for name, value in os.environ.items()):
        return None
    from dynamo.runtime.curve import CurveKeys  # and with it ZeroMQ, which not every runtime needs

    return CurveKeys.from_environ(event_plane)


def _nats_settings() -> "NatsSettings":
    from dynamo.runtime.nats.settings import NatsSettings

    return NatsSettings.from_environ()


def _one_of(what: str, given: str | None, known: tuple[str, ...], variable: str) -> str:
    """The argument, else the variable, else the first. Raises ValueError for another one."""
    name = (given or os.environ.get(variable) or known[0]).strip().lower()
    if name not in known:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(known)} ({variable})")
    return name


def _only(what: str, given: str | None, supported: str, variable: str) -> None:
    if given and given != supported:
        raise ValueError(f"{what} {given!r} is not in this version: use {supported} ({variable})")
