"""How does a router hear what workers say of their load? (topic `kv_metrics`, facts row E5)"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from dynamo.llm.kv_events import LoadMetrics
from dynamo.router.publisher import KV_METRICS_TOPIC
from dynamo.router.worker_reports import WorkerReports
from dynamo.runtime.errors import UNDECODABLE
from dynamo.runtime.events import Event, EventSubscriber, HasEvents, Listeners, ScopeLike, create_subscriber
from dynamo.runtime.logs import Rarely

rarely = Rarely(logging.getLogger(__name__))


class LoadFeed:
    """Brings reports to `reports`. `on_change` is called once a turn of the loop in which any came."""

    def __init__(
        self, runtime: HasEvents, where: ScopeLike, reports: WorkerReports, on_change: Callable[[], None]
    ) -> None:
        self.undecodable = 0
        self._runtime = runtime
        self._where = where
        self._reports = reports
        self._on_change = on_change
        self._decoder = msgspec.msgpack.Decoder(LoadMetrics)
        self._loop = asyncio.get_running_loop()
        self._subscriber: EventSubscriber | None = None
        self._soon: asyncio.Handle | None = None

    async def start(self) -> None:
        """Begin to hear. Raises as `create_subscriber`."""
        listeners = Listeners(on_event=self._hear)
        self._subscriber = await create_subscriber(self._runtime, self._where, KV_METRICS_TOPIC, listeners)

    async def close(self) -> None:
        """Hear no more."""
        if self._soon is not None:
            self._soon.cancel()
        if self._subscriber is not None:
            await self._subscriber.close()

    def _hear(self, event: Event) -> None:
        try:
            report = self._decoder.decode(event.payload)
        except UNDECODABLE as e:
            self.undecodable += 1
            rarely.warning(
                f"load {event.publisher_id}", "publisher %x sent what is no load report: %s", event.publisher_id, e
            )
            return
        self._reports.hear(report, self._loop.time())
        if self._soon is None:
            self._soon = self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._soon = None
        self._on_change()
