"""Where does a worker serve while it has one role, and how does it leave there when it gets another?

A `Seat` is one role of a worker: an endpoint for requests, what passes KV on or takes it over, and what routers of that
endpoint hear. A worker that changes its role opens another seat before it leaves the first. What is in flight there is
finished, and so is what callers send who have not heard of it yet; KV that is kept for decode workers is kept.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Literal

from dynamo.engine.dispatcher import Way
from dynamo.engine.handoff import HANDOFF_ENDPOINT, Ledger
from dynamo.engine.reports import Reports
from dynamo.engine.takeover import Claims
from dynamo.engine.transfer_metrics import DecodeMetrics, PrefillMetrics
from dynamo.engine.worker_args import DEFAULT_COMPONENT, PREFILL_COMPONENT, Role, WorkerOptions
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.component import Endpoint, ServedEndpoint
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.metrics import endpoint_labels
from dynamo.runtime.streams import PushHandler

log = logging.getLogger(__name__)

LOOK_S = 0.2  # between two looks at what is still in flight at a seat that was left
HEARD_S = 10.0  # for callers to hear that they should look elsewhere; they confirm it within milliseconds

State = Literal["new", "open", "left", "closed"]

_OTHER_COMPONENTS: dict[Role, tuple[str, str]] = {
    "prefill": (PREFILL_COMPONENT, "prefill2"),
    "decode": (DEFAULT_COMPONENT, "decode"),
    "agg": ("aggregated", "aggregated2"),
}
"""Where a worker goes that was started with another role: the usual place, unless that is where it was started."""


class InstanceEndpoint(Endpoint):
    """An endpoint seen as one of several instances that this process serves."""

    def __init__(self, endpoint: Endpoint, instance_id: int) -> None:
        super().__init__(endpoint.runtime, endpoint.address)
        self.instance_id = instance_id

    def connection_id(self) -> int:
        """The id of this instance."""
        return self.instance_id


def path_of(role: Role, options: WorkerOptions) -> str:
    """The endpoint of a role: each has one of its own, as routers take all workers of an endpoint for alike."""
    if role == options.disaggregation_mode:
        return options.endpoint
    start = EndpointAddress.parse(options.endpoint)
    usual, other = _OTHER_COMPONENTS[role]
    return f"{start.namespace}.{other if usual == start.component else usual}.{start.endpoint}"


class Seat:
    """One role of one worker. `way` and `reports` are set before it opens."""

    way: Way
    reports: Reports

    def __init__(self, runtime: DistributedRuntime, role: Role, options: WorkerOptions, instance_id: int) -> None:
        self.role = role
        self.state: State = "new"
        self.endpoint = InstanceEndpoint(runtime.endpoint(path_of(role, options)), instance_id)
        self.handoff = self._make_handoff(options)
        self.served: ServedEndpoint | None = None
        self._runtime = runtime
        self._served_handoff: ServedEndpoint | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._reporting = False

    def _make_handoff(self, options: WorkerOptions) -> Ledger | Claims | None:
        endpoint = self.endpoint
        if self.role == "agg":
            return None
        base = endpoint_labels(endpoint.namespace, endpoint.component, None, endpoint.instance_id)
        metrics = endpoint.runtime.metrics
        if self.role == "prefill":
            path = f"{endpoint.namespace}.{endpoint.component}.{HANDOFF_ENDPOINT}"
            return Ledger(path, endpoint.instance_id, PrefillMetrics(metrics, base))
        return Claims(endpoint.runtime, DecodeMetrics(metrics, base), options.on_lost_kv)

    async def prepare(self) -> None:
        """Serve claims before there can be any, or begin to watch who serves them, and tell routers how it stands."""
        await self._stop_leaving()
        self._reporting = True
        await self.reports.start()
        if isinstance(self.handoff, Ledger) and self._served_handoff is None:
            endpoint = self._runtime.endpoint(self.handoff.endpoint)
            self._served_handoff = await endpoint.start_push_endpoint(
                self.handoff.handle, instance_id=self.endpoint.instance_id
            )
        elif isinstance(self.handoff, Claims):
            component = PREFILL_COMPONENT if self.endpoint.component == DEFAULT_COMPONENT else self.endpoint.component
            await self.handoff.prepare(f"{self.endpoint.namespace}.{component}.{HANDOFF_ENDPOINT}")

    async def open(self, handler: PushHandler, labels: Sequence[tuple[str, str]], health_check: dict[str, Any]) -> None:
        """Take requests. Raises as `Endpoint.start_push_endpoint`."""
        if self.served is not None:  # it was left, and something is in flight still
            await self.served.register()
        else:
            self.served = await self.endpoint.start_push_endpoint(
                handler,
                metrics_labels=list(labels),
                health_check_payload=health_check,
                instance_id=self.endpoint.instance_id,
            )
        self.state = "open"

    async def leave(self) -> None:
        """Let no new caller find it, and finish what is in flight, in time."""
        self.state = "left"
        if self.served is not None:
            await self.served.unregister()
        await self._close_reports()
        self._leaving = asyncio.get_running_loop().create_task(self._finish(), name=f"leave {self.endpoint.path}")

    async def _finish(self) -> None:
        runtime = self._runtime
        await runtime.server.all_left(HEARD_S)
        while await self._is_at_work():  # whose requests and readers end, and leases do
            pass
        self.state = "closed"
        for served in (self.served, self._served_handoff):
            if served is not None:
                await served.stop()
        self.served = self._served_handoff = None
        log.info("nothing is left of this worker's time at %s", self.endpoint.path)

    async def _is_at_work(self) -> bool:
        """Looks for a while. Streams wake it; a handle is given up without a word."""
        if self.served is not None and not await self.served.route.drained(LOOK_S):
            return True
        if not isinstance(self.handoff, Ledger) or not (self.handoff.num_issued + self.handoff.num_claimed):
            return False
        await asyncio.sleep(LOOK_S)
        return True

    async def stop(self) -> None:
        """The engine is about to stop: KV that is kept is given up."""
        if isinstance(self.handoff, Ledger):
            self.handoff.close()
        await self._stop_leaving()
        await self._close_reports()

    async def _stop_leaving(self) -> None:
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            if self.state == "left":  # else it has closed the doors, and is soon done
                leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def _close_reports(self) -> None:
        if self._reporting:
            self._reporting = False
            await self.reports.close()
