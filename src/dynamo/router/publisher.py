"""How do routers learn what a worker holds and how busy it is?

`KvEventPublisher` tells of blocks that came and went (topic `kv-events`, a list of `RouterEvent`);
`WorkerMetricsPublisher` tells of load (topic `kv_metrics`). Both only hand over to the event plane: no call waits.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dynamo.llm.block_hash import BlockMmInfo, compute_block_hash_for_seq
from dynamo.llm.kv_events import (
    KvEvent,
    KvEventData,
    LoadMetrics,
    Removed,
    RouterEvent,
    StorageTier,
    Stored,
    StoredBlock,
)
from dynamo.router.event_source import EventLog, EventSource
from dynamo.router.recovery import KV_EVENTS_TOPIC
from dynamo.router.types import WorkerKey
from dynamo.runtime.component import Endpoint
from dynamo.runtime.events import EventPublisher, create_publisher, new_publisher_id

KV_METRICS_TOPIC = "kv_metrics"
EARLY_MESSAGES = 16_384  # kept while the socket is being opened, which takes milliseconds
MAX_BATCH = 1024  # events in one message, however long it may wait for more
_U64 = (1 << 64) - 1  # engines may give hashes as signed numbers


class _Channel:
    """A publisher on the event plane that is being opened; what is published meanwhile goes out first."""

    def __init__(self, endpoint: Endpoint, topic: str, source: EventSource | None = None) -> None:
        self._publisher: EventPublisher | None = None
        self._early: deque[object] = deque(maxlen=EARLY_MESSAGES)
        self._source = source
        self._opening = asyncio.get_running_loop().create_task(self._open(endpoint, topic))

    async def _open(self, endpoint: Endpoint, topic: str) -> None:
        publisher_id = None
        if self._source is not None:
            await self._source.open()  # first, so that whoever hears the publisher can ask for what was before
            publisher_id = self._source.publisher_id
        self._publisher = await create_publisher(endpoint.runtime, endpoint, topic, publisher_id=publisher_id)
        while self._early:
            self._publisher.publish(self._early.popleft())

    async def opened(self) -> None:
        """Return once subscribers can find the publisher. Raises what opening raised."""
        await asyncio.shield(self._opening)

    def publish(self, payload: object) -> None:
        """Send, or keep until there is a publisher."""
        if self._publisher is not None:
            self._publisher.publish(payload)
        else:
            self._early.append(payload)

    async def close(self) -> None:
        """Leave the event plane."""
        if not self._opening.done():
            self._opening.cancel()
        await asyncio.gather(self._opening, return_exceptions=True)
        if self._publisher is not None:
            await self._publisher.close()
        if self._source is not None:
            await self._source.close()


def common_time(now: float, spacing_s: float) -> float:
    """The next of the times, `spacing_s` apart by the loop's clock, at which all publishers of a machine speak."""
    return (now // spacing_s + 1) * spacing_s


class KvEventPublisher:
    """Publishes one rank's KV events, numbered from 0 by one for each rank of a worker.

    Events of one turn of the event loop leave as one message; with `batching_timeout_ms` those of that time do. With
    `spacing_s` a message leaves about that often: events after a silence go at once, those that follow wait for each
    other and for a time that all publishers of a machine have in common, and a router pays and wakes up once for many.
    With `enable_local_indexer` the worker tells routers that missed some again, or all that it holds (facts row K16):
    without it a router that missed an event starts anew with this worker. Needs a running event loop.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        worker_id: int | None = None,
        kv_block_size: int = 0,
        dp_rank: int = 0,
        enable_local_indexer: bool = False,
        zmq_endpoint: str | None = None,
        zmq_topic: str | None = None,
        batching_timeout_ms: int | None = None,
        image_token_id: int | None = None,
        kv_state_endpoint: str | None = None,
        video_token_id: int | None = None,
    ) -> None:
        for name, value in (("zmq_endpoint", zmq_endpoint), ("kv_state_endpoint", kv_state_endpoint)):
            if value is not None:
                raise ValueError(f"{name}: is not in this version; call publish_stored and publish_removed instead")
        if kv_block_size < 1:
            raise ValueError(f"kv_block_size: must be at least 1 token, not {kv_block_size}")
        self.worker_id = endpoint.connection_id() if worker_id is None else worker_id
        self.kv_block_size = kv_block_size
        self.dp_rank = dp_rank
        self.spacing_s = 0.0
        """Seconds between two messages; 0 for as many as there are."""
        self._delay_s = (batching_timeout_ms or 0) / 1000
        self._sent_at = float("-inf")
        self._log = EventLog()
        self._source: EventSource | None = None
        if enable_local_indexer:
            worker = WorkerKey(self.worker_id, dp_rank)
            self._source = EventSource(endpoint, KV_EVENTS_TOPIC, new_publisher_id(), worker, kv_block_size)
            self._log = self._source.log
        self._batch: list[RouterEvent] = []
        self._timer: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self._channel = _Channel(endpoint, KV_EVENTS_TOPIC, self._source)

    async def ready(self) -> None:
        """Return once subscribers can find this publisher."""
        await self._channel.opened()

    def publish(self, changes: Sequence[KvEventData], tier: StorageTier = "device") -> None:
        """Publish changes in their order."""
        for change in changes:
            data: KvEventData | Literal["cleared"] = "cleared" if change.cleared else change
            event = RouterEvent(self.worker_id, KvEvent(self._log.next_event_id, data, self.dp_rank), tier)
            self._batch.append(event)
            if self._source is not None:
                self._source.note(event)
            else:
                self._log.append(event)
        if len(self._batch) >= MAX_BATCH:
            self._flush()
        elif self._batch and self._timer is None:
            wait_s = self._delay_s or self._spacing_left_s()
            self._timer = self._loop.call_later(wait_s, self._flush) if wait_s else self._loop.call_soon(self._flush)

    def publish_held(self, other: "KvEventPublisher") -> None:
        """Publish all blocks that another publisher of the same rank has told of and that are held still."""
        if other._source is not None:
            for tier, change in other._source.held():
                self.publish([change], tier)

    def _spacing_left_s(self) -> float:
        now = self._loop.time()
        return 0.0 if now - self._sent_at >= self.spacing_s else common_time(now, self.spacing_s) - now

    def publish_stored(
        self,
        token_ids: Sequence[int],
        num_block_tokens: Sequence[int],
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        block_mm_infos: Sequence[BlockMmInfo | None] | None = None,
        lora_name: str | None = None,
        is_eagle: bool | None = None,
        cache_salt: str | None = None,
    ) -> None:
        """Blocks that the engine calls `block_hashes` now hold `token_ids`, `num_block_tokens[i]` each.

        Raises:
            ValueError: a block is not full, or the numbers do not fit together.
        """
        partial = [count for count in num_block_tokens if count != self.kv_block_size]
        if partial:
            raise ValueError(
                f"num_block_tokens: a block has {partial[0]} tokens, not {self.kv_block_size}: only full ones"
            )
        contents = compute_block_hash_for_seq(
            token_ids, self.kv_block_size, block_mm_infos, lora_name, is_eagle, cache_salt
        )
        if not len(block_hashes) == len(num_block_tokens) == len(contents):
            raise ValueError(
                f"block_hashes: {len(block_hashes)} hashes for {len(num_block_tokens)} blocks "
                f"and {len(token_ids)} tokens do not fit together"
            )
        blocks = [StoredBlock(hash_ & _U64, content) for hash_, content in zip(block_hashes, contents, strict=True)]
        parent = None if parent_hash is None else parent_hash & _U64
        if blocks:
            self.publish([KvEventData(stored=Stored(blocks, parent))])

    def publish_removed(self, block_hashes: Sequence[int]) -> None:
        """These blocks are gone."""
        if block_hashes:
            self.publish([KvEventData(removed=Removed([hash_ & _U64 for hash_ in block_hashes]))])

    def publish_cleared(self) -> None:
        """All blocks are gone."""
        self.publish([KvEventData(cleared=True)])

    def publish_batch(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Several events at once: `{"type": "stored" | "removed", ...}` with the arguments of the calls above."""
        for event in events:
            arguments = {key: value for key, value in event.items() if key != "type"}
            if event.get("type") == "stored":
                self.publish_stored(**arguments)
            elif event.get("type") == "removed":
                self.publish_removed(**arguments)
            else:
                raise ValueError(f"type: {event.get('type')!r} is not one of stored, removed")

    def events_from(self, event_id: int) -> list[RouterEvent] | None:
        """Past events from `event_id` on; None if it is forgotten already, so that only a full account helps."""
        return self._log.since(event_id)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._batch:
            self._sent_at = self._loop.time()
            batch, self._batch = self._batch, []
            self._channel.publish(batch)

    def shutdown(self) -> None:
        """Send what is left and leave the event plane, soon. `close` waits for it."""
        self._flush()
        self._closing = self._loop.create_task(self._channel.close())

    async def close(self) -> None:
        """Send what is left and leave the event plane."""
        self._flush()
        await self._channel.close()


class WorkerMetricsPublisher:
    """Publishes how busy a worker's ranks are. Every call is one message; the caller decides how often."""

    def __init__(self) -> None:
        self._channel: _Channel | None = None
        self.worker_id = 0

    async def create_endpoint(self, endpoint: Endpoint, worker_id: int | None = None) -> None:
        """Join the event plane beside `endpoint`."""
        self.worker_id = endpoint.connection_id() if worker_id is None else worker_id
        self._channel = _Channel(endpoint, KV_METRICS_TOPIC)
        await self._channel.opened()

    def publish(
        self, dp_rank: int | None = None, active_decode_blocks: int | None = None, kv_used_blocks: int | None = None
    ) -> None:
        """Publish one rank's load in KV blocks."""
        self.publish_load(
            LoadMetrics(self.worker_id, dp_rank or 0, active_decode_blocks or 0, kv_used_blocks=kv_used_blocks or 0)
        )

    def publish_load(self, load: LoadMetrics) -> None:
        """Publish all that is known of one rank's load. Raises RuntimeError before `create_endpoint`."""
        if self._channel is None:
            raise RuntimeError("create_endpoint must be awaited before anything is published")
        self._channel.publish(load)

    async def close(self) -> None:
        """Leave the event plane."""
        if self._channel is not None:
            await self._channel.close()
