"""What are namespaces, components and endpoints, and how is an endpoint served?

They are names; only an endpoint does something. Serving one instance of it is: a route on the process's
listener, and a record in discovery for as long as it is served.
"""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dynamo.runtime.address import EndpointAddress, check_name
from dynamo.runtime.client import Client
from dynamo.runtime.errors import DiscoveryError, EngineShutdown, InvalidArgument
from dynamo.runtime.handlers import UserHandler, bidirectional_handler, push_handler
from dynamo.runtime.health import Canary, canary_for, canary_options, request_probe, until_answered
from dynamo.runtime.instances import InstanceSet, instance_record, parse_instance
from dynamo.runtime.metrics import EndpointMetrics, ScopedMetrics
from dynamo.runtime.routes import Route
from dynamo.runtime.selection import RouterMode
from dynamo.runtime.streams import PushHandler

if TYPE_CHECKING:
    from dynamo.runtime.distributed import DistributedRuntime

log = logging.getLogger(__name__)

DOUBT_EVERY_S = 2.0  # so often an endpoint that hung is asked whether it answers again
DOUBT_TIMEOUT_S = 10.0  # and so long it may take: it may have much to catch up with

MetricsLabels = Sequence[tuple[str, str]]


class Namespace:
    """The outermost name: one deployment."""

    def __init__(self, runtime: "DistributedRuntime", name: str) -> None:
        self._runtime = runtime
        self.name = check_name("namespace", name)

    def component(self, name: str) -> "Component":
        """A component of this namespace."""
        return Component(self._runtime, self.name, name)


class Component:
    """The middle name: one kind of worker."""

    def __init__(self, runtime: "DistributedRuntime", namespace: str, name: str) -> None:
        self._runtime = runtime
        self.namespace = namespace
        self.name = check_name("component", name)

    async def create_service(self) -> None:
        """Nothing: kept for scripts of the first generation, which had to call it before serving."""

    def endpoint(self, name: str) -> "Endpoint":
        """An endpoint of this component."""
        return Endpoint(self._runtime, EndpointAddress(self.namespace, self.name, check_name("endpoint", name)))


class Endpoint:
    """The innermost name: something that can be asked."""

    def __init__(self, runtime: "DistributedRuntime", address: EndpointAddress) -> None:
        self.runtime = runtime
        self.address = address

    def __repr__(self) -> str:
        return f"Endpoint({self.address.url})"

    @property
    def namespace(self) -> str:
        """The first part of the name."""
        return self.address.namespace

    @property
    def component(self) -> str:
        """The second part of the name."""
        return self.address.component

    @property
    def name(self) -> str:
        """The third part of the name."""
        return self.address.endpoint

    @property
    def path(self) -> str:
        """`ns.comp.ep`."""
        return str(self.address)

    @cached_property
    def metrics(self) -> ScopedMetrics:
        """Factories for a handler's own counters, gauges and histograms, labelled with this endpoint."""
        return self.runtime.metrics.scope(self.namespace, self.component, self.name)

    def connection_id(self) -> int:
        """The id of the instance that this process serves."""
        return self.runtime.instance_id

    def lease_id(self) -> int:
        """The name of `connection_id` in the first generation of this interface."""
        return self.runtime.instance_id

    # --- serving

    async def serve_endpoint(
        self,
        handler: UserHandler,
        graceful_shutdown: bool = True,
        metrics_labels: MetricsLabels | None = None,
        health_check_payload: dict[str, Any] | None = None,
    ) -> None:
        """Serve until the runtime shuts down. See `start_endpoint`."""
        await self._until_shutdown(
            self.start_endpoint(handler, graceful_shutdown, metrics_labels, health_check_payload)
        )

    async def start_endpoint(
        self,
        handler: UserHandler,
        graceful_shutdown: bool = True,
        metrics_labels: MetricsLabels | None = None,
        health_check_payload: dict[str, Any] | None = None,
    ) -> "ServedEndpoint":
        """Begin to serve; returns once callers can find the instance.

        Args:
            handler: an async generator `(request, context)` or `(request)`.
            graceful_shutdown: whether shutdown waits for the requests in flight here.
            metrics_labels: more labels for this endpoint's metrics.
            health_check_payload: what the canary sends through this endpoint when it is idle.

        Raises:
            DiscoveryError: discovery cannot be used, or another live worker has this instance id.
            CannotConnect: the request plane's address cannot be bound.
            EngineShutdown: the runtime is shutting down.
        """
        return await self.start_push_endpoint(
            push_handler(handler),
            graceful_shutdown=graceful_shutdown,
            metrics_labels=metrics_labels,
            health_check_payload=health_check_payload,
        )

    async def serve_bidirectional_endpoint(
        self, handler: UserHandler, graceful_shutdown: bool = True, metrics_labels: MetricsLabels | None = None
    ) -> None:
        """Serve `handler(requests, context)`, an async generator over a stream of requests, until shutdown."""
        await self._until_shutdown(self.start_bidirectional_endpoint(handler, graceful_shutdown, metrics_labels))

    async def _until_shutdown(self, starting: "Awaitable[ServedEndpoint]") -> None:
        try:
            served = await starting
        except EngineShutdown:
            return  # the shutdown came first
        await served.finished()

    async def start_bidirectional_endpoint(
        self, handler: UserHandler, graceful_shutdown: bool = True, metrics_labels: MetricsLabels | None = None
    ) -> "ServedEndpoint":
        """Like `serve_bidirectional_endpoint`, but returns once callers can find the instance."""
        return await self.start_push_endpoint(
            bidirectional_handler(handler), graceful_shutdown=graceful_shutdown, metrics_labels=metrics_labels
        )

    async def start_push_endpoint(
        self,
        handler: PushHandler,
        *,
        graceful_shutdown: bool = True,
        metrics_labels: MetricsLabels | None = None,
        health_check_payload: dict[str, Any] | None = None,
        instance_id: int | None = None,
    ) -> "ServedEndpoint":
        """Serve a handler that pushes its answers. `instance_id`: for several workers in one process."""
        runtime = self.runtime
        instance_id = runtime.instance_id if instance_id is None else instance_id
        if not 0 < instance_id < 1 << 63:
            raise InvalidArgument(f"instance_id {instance_id} is not between 1 and 2**63 - 1", "instance_id")
        server = await runtime.serving()
        if runtime.is_shutting_down():
            raise EngineShutdown(f"{self.path} is not served: the runtime is shutting down")
        stats = runtime.metrics.endpoint(
            self.namespace, self.component, self.name, instance_id=instance_id, labels=metrics_labels
        )
        route = server.add_route(self.address.wire_path(instance_id), handler, stats)
        served = ServedEndpoint(self, instance_id, route, graceful_shutdown)
        runtime.served.append(served)
        try:
            await served.register()
            await served.watch_health(stats, health_check_payload)
            if runtime.is_shutting_down():
                await served.unregister()
                raise EngineShutdown(f"{self.path} is not served: the runtime is shutting down")
        except BaseException:
            await served.finish("it could not be started")
            raise
        return served

    async def unregister_endpoint_instance(self) -> None:
        """Take this process's instances of the endpoint out of discovery; what is in flight goes on [R16]."""
        for served in self._served_here():
            await served.unregister()

    async def register_endpoint_instance(self) -> None:
        """Put them back."""
        for served in self._served_here():
            await served.register()

    def _served_here(self) -> "list[ServedEndpoint]":
        return [served for served in self.runtime.served if served.endpoint.address == self.address]

    # --- calling

    async def client(self, router_mode: RouterMode | None = None) -> Client:
        """A client that knows the instances of now and follows their changes. Raises DiscoveryError."""
        instances = await self.runtime.instances_of(self.address)
        return Client(instances, self.runtime.pool, router_mode or RouterMode.RoundRobin)


class ServedEndpoint:
    """One instance of an endpoint while this process serves it."""

    def __init__(self, endpoint: Endpoint, instance_id: int, route: Route, graceful: bool) -> None:
        self.endpoint = endpoint
        self.instance_id = instance_id
        self.route = route
        self.graceful = graceful
        self._wanted = False
        self._registered = False
        self._ills: set[str] = set()
        """What keeps it from being found although it is wanted."""
        self._settling = asyncio.Lock()
        self._canary: Canary | None = None
        self._doubting: asyncio.Task[None] | None = None
        self._done = asyncio.Event()

    @property
    def key(self) -> str:
        """Where it stands in discovery."""
        return self.endpoint.address.instance_key(self.instance_id)

    async def register(self) -> None:
        """Let callers find it, if it is well. Raises DiscoveryError."""
        self._wanted = True
        await self._settle()
        if self._canary is not None:
            self._canary.start()

    async def unregister(self) -> None:
        """Let no new caller find it, and ask connected ones to look elsewhere. Raises DiscoveryError."""
        self._wanted = False
        if self._canary is not None:
            await self._canary.stop()
        await self._settle()

    async def well(self, name: str, is_well: bool) -> None:
        """One of those who watch over it says how it is: it is left out of routing while any of them calls it ill.

        What is in flight goes on. Raises DiscoveryError; say it again then.
        """
        if is_well:
            self._ills.discard(name)
        else:
            self._ills.add(name)
        self.endpoint.runtime.health.set_endpoint(self.endpoint.name, not self._ills, self.instance_id)
        await self._settle()

    async def suspect(self, reason: str, payload: dict[str, Any]) -> None:
        """It takes requests and does not answer: end those in flight, so that their callers send them elsewhere, and
        leave it out of routing until it answers `payload`. Raises DiscoveryError."""
        if self._doubting is not None and not self._doubting.done():
            return
        log.error("%s is left out of routing until it answers again: %s", self.endpoint.path, reason)
        self._doubting = asyncio.get_running_loop().create_task(self._doubt(payload), name=f"doubt {self.route.path}")
        self.endpoint.runtime.server.leave(self.route.path)  # first, so that nothing is sent back here
        self.route.abort(f"{self.endpoint.path}: {reason}")
        await self.well("stall", False)

    async def _doubt(self, payload: dict[str, Any]) -> None:
        probe = request_probe(await self._own_client(), self.instance_id)
        while True:
            await until_answered(probe, payload, DOUBT_EVERY_S, DOUBT_TIMEOUT_S)
            try:
                await self.well("stall", True)
            except DiscoveryError as e:
                log.warning("%s answers again, but: %s", self.endpoint.path, e)
            else:
                log.warning("%s answers again", self.endpoint.path)
                return

    async def _settle(self) -> None:
        """Be in discovery if it is wanted and well, and else not."""
        runtime = self.endpoint.runtime
        async with self._settling:
            findable = self._wanted and not self._ills
            if findable and not self._registered:
                runtime.server.stay(self.route.path)
                self._registered = True  # if this is cancelled half-way, it may be there
                try:
                    await runtime.discovery.put(self.key, await self._record(), create=True)
                except DiscoveryError:
                    self._registered = False
                    raise
            elif not findable and self._registered:
                runtime.server.leave(self.route.path)
                try:
                    await runtime.discovery.delete(self.key)
                except DiscoveryError:
                    self._registered = False  # the store makes it good
                    raise
                self._registered = False

    async def _record(self) -> bytes:
        return instance_record(
            self.endpoint.address, self.instance_id, (await self.endpoint.runtime.serving()).host_port
        )

    async def watch_health(self, counters: EndpointMetrics, payload: dict[str, Any] | None) -> None:
        """Say that the endpoint is ready, and have a canary ask it when it is idle, if canaries are on."""
        runtime, name = self.endpoint.runtime, self.endpoint.name
        runtime.health.set_endpoint(name, True, self.instance_id)
        if not canary_options().enabled:
            return
        client = await self._own_client()
        self._canary = canary_for(self._canary_says, runtime.metrics, counters, name, client, self.instance_id, payload)
        if self._canary is not None:
            self._canary.start()

    async def _own_client(self) -> Client:
        """A client that finds this instance also while it is in no discovery."""
        runtime = self.endpoint.runtime
        target = parse_instance(self.key, await self._record(), _ignore)
        alone = InstanceSet(self.endpoint.address, runtime.discovery, runtime.pool)
        alone.targets[self.instance_id] = target
        runtime.pool.use(target.host_port, True)  # until the process ends: it is itself
        return Client(alone, runtime.pool, RouterMode.Direct)

    async def _canary_says(self, is_well: bool) -> None:
        await self.well("canary", is_well)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Stop serving this one: leave discovery, finish what is in flight within `drain_s`, kill the rest."""
        await self.unregister()
        self.route.admitting = False
        await self.route.drained(drain_s)
        await self.finish("it has stopped")

    async def finish(self, reason: str) -> None:
        """Kill what is still in flight and forget the route."""
        if self._canary is not None:
            await self._canary.stop()
        if self._doubting is not None:
            self._doubting.cancel()
        self.route.admitting = False
        self.route.abort(f"{self.endpoint.path}: {reason}")
        runtime = self.endpoint.runtime
        runtime.forget(self)
        if not any(self._is_known_as(other) for other in runtime.served):
            runtime.health.remove_endpoint(self.endpoint.name, self.instance_id)
        self._done.set()

    def _is_known_as(self, other: "ServedEndpoint") -> bool:
        """Whether health cannot tell the two apart: one instance in two components, while it moves."""
        return (self.endpoint.name, self.instance_id) == (other.endpoint.name, other.instance_id)

    async def finished(self) -> None:
        """Wait until it is no longer served."""
        await self._done.wait()  # no deadline: serving lasts until somebody ends it


def _ignore(_: int) -> None: ...
