"""What does a worker tell the world about itself while it serves?

KV events and load go to the event plane, for routers; the same numbers go to Prometheus, for people.
"""

import asyncio
from collections.abc import Callable

from dynamo.engine.contract import EngineConfig
from dynamo.engine.gauges import EngineGauges
from dynamo.llm.kv_events import KvEventData, LoadMetrics, StorageTier
from dynamo.router.publisher import KvEventPublisher, WorkerMetricsPublisher, common_time
from dynamo.runtime.component import Endpoint

LOAD_INTERVAL_S = 0.1  # between two reports of one rank's load; a step of a real engine takes 10 to 50 ms
# About, between two messages of one rank. What a router decides does not suffer: replayed traces come out the same with
# events 50 ms late as with 25.
KV_SPACING_S = 0.05


class Reports:
    """One worker's publishers. `waiting` is the number of requests that wait before the engine."""

    def __init__(
        self,
        endpoint: Endpoint,
        instance_id: int,
        config: EngineConfig,
        gauges: EngineGauges,
        waiting: Callable[[], int],
    ) -> None:
        self._endpoint = endpoint
        self._instance_id = instance_id
        self._waiting = waiting
        self._blocks = config.total_kv_blocks
        self._loop = asyncio.get_running_loop()
        self._load = WorkerMetricsPublisher()
        self._latest: dict[int, LoadMetrics] = {}
        self._published_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        start = config.data_parallel_start_rank
        self._ranks = range(start, start + config.data_parallel_size)
        self._kv = self._kv_publishers(config.kv_cache_block_size if config.publishes_kv_events else None)
        self._gauges = gauges

    def _kv_publishers(self, block_size: int | None) -> dict[int, KvEventPublisher]:
        if block_size is None:
            return {}
        publishers = {
            rank: KvEventPublisher(self._endpoint, self._instance_id, block_size, rank, enable_local_indexer=True)
            for rank in self._ranks
        }
        for publisher in publishers.values():
            publisher.spacing_s = KV_SPACING_S
        return publishers

    async def start(self) -> None:
        """Join the event plane, and say that nothing is in use yet."""
        await self._load.create_endpoint(self._endpoint, self._instance_id)
        for publisher in self._kv.values():
            await publisher.ready()
        for rank in self._ranks:
            self.load(LoadMetrics(self._instance_id, rank, 0))

    def take_over(self, before: "Reports") -> None:
        """Tell anew what the same engine holds, of which others told elsewhere until now. Nothing may be published by
        `before` from here on."""
        for rank, publisher in self._kv.items():
            if rank in before._kv:
                publisher.publish_held(before._kv[rank])

    def kv_events(self, events: list[KvEventData], dp_rank: int = 0, tier: StorageTier = "device") -> None:
        """See `EngineCallbacks.on_kv_events`."""
        publisher = self._kv.get(dp_rank)
        if publisher is not None:
            publisher.publish(events, tier)

    def load(self, load: LoadMetrics) -> None:
        """See `EngineCallbacks.on_load`. What changes faster than LOAD_INTERVAL_S is published once, at its last."""
        load.worker_id = self._instance_id
        if load.dp_rank == self._ranks.start:  # who waits before the engine has no rank yet; count it once
            load.waiting_requests += self._waiting()
        self._latest[load.dp_rank] = load
        if self._timer is None:
            now = self._loop.time()
            if now - self._published_at >= LOAD_INTERVAL_S:
                self._publish_load()
            else:  # when other workers do: a router wakes up once for all
                self._timer = self._loop.call_at(common_time(now, LOAD_INTERVAL_S), self._publish_load)

    def _publish_load(self) -> None:
        self._timer = None
        self._published_at = self._loop.time()
        latest, self._latest = self._latest, {}
        for load in latest.values():
            self._load.publish_load(load)
            if self._blocks and load.dp_rank in self._gauges.cache_usage:
                self._gauges.cache_usage[load.dp_rank].set(load.kv_used_blocks / self._blocks)

    async def close(self) -> None:
        """Leave the event plane."""
        if self._timer is not None:
            self._timer.cancel()
        await self._load.close()
        for publisher in self._kv.values():
            await publisher.close()
