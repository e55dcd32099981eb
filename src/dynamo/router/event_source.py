"""What can a worker tell again of its cache?

The last events, from a bounded log, and all that its cache holds now, from an index of its own. It serves both to
routers that missed something, on an endpoint of its own that they find in discovery.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import islice
from typing import Literal

import msgspec

from dynamo.llm.kv_events import KvEvent, KvEventData, RouterEvent, StorageTier
from dynamo.router.recovery import (
    Ask,
    Retold,
    SourceMetadata,
    SourceRecord,
    SourceWorker,
    query_endpoint,
    source_key,
)
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import WorkerKey
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.component import Endpoint, ServedEndpoint
from dynamo.runtime.errors import DynamoException
from dynamo.runtime.events import scope_of
from dynamo.runtime.handlers import push_handler
from dynamo.runtime.instances import instance_record

log = logging.getLogger(__name__)

KEPT_EVENTS = 16_384  # with one block each, as decoding makes them, some 10 s of a busy GPU
KEPT_BLOCKS = 131_072  # in all of them: about 20 MB
TOLD_BLOCKS = 16_384  # in one part of an answer: about 700 KB


class EventLog:
    """The last events of one rank, whose numbers have no gaps."""

    def __init__(self, max_events: int = KEPT_EVENTS, max_blocks: int = KEPT_BLOCKS) -> None:
        self._events: deque[RouterEvent] = deque()
        self._max_events = max_events
        self._max_blocks = max_blocks
        self._blocks = 0
        self.next_event_id = 0

    def append(self, event: RouterEvent) -> None:
        """Keep an event, and drop the oldest that there is no room for."""
        self._events.append(event)
        self._blocks += event_blocks(event)
        self.next_event_id = event.event.event_id + 1
        while len(self._events) > self._max_events or self._blocks > self._max_blocks:
            self._blocks -= event_blocks(self._events.popleft())

    def since(self, event_id: int) -> list[RouterEvent] | None:
        """The events from a number on; None if they are not all here any more, or not here yet."""
        first = self.next_event_id - len(self._events)
        if not first <= event_id <= self.next_event_id:
            return None
        return list(islice(self._events, event_id - first, None))


def event_blocks(event: RouterEvent) -> int:
    """How many blocks an event names."""
    data = event.event.change
    if data.stored is not None:
        return len(data.stored.blocks)
    return len(data.removed.block_hashes) if data.removed is not None else 0


class EventSource:
    """One rank's events and blocks, told again to whoever asks. `note` every event, in order."""

    def __init__(
        self, endpoint: Endpoint, topic: str, publisher_id: int, worker: WorkerKey, kv_block_size: int
    ) -> None:
        self._endpoint = endpoint
        self._topic = topic
        self.publisher_id = publisher_id
        self._worker = worker
        self._kv_block_size = kv_block_size
        self._held = TierIndex(keep_contents=True)
        self._served: ServedEndpoint | None = None
        self.log = EventLog()

    def note(self, event: RouterEvent) -> None:
        """An event is being published."""
        self.log.append(event)
        self._held.apply(self._worker, event.storage_tier, event.event.change)

    def tell(self, from_event_id: int | None) -> Iterator[Retold]:
        """The answer to a router, in parts. It is of this moment, whenever the parts are taken."""
        following = self.log.next_event_id
        past = None if from_event_id is None else self.log.since(from_event_id)
        if past is not None:
            return _parts("events", following, past)
        return _parts("dump", following, self._account())

    def held(self) -> Iterable[tuple[StorageTier, KvEventData]]:
        """All that the cache holds now, as the changes that would make it so."""
        return self._held.dump(self._worker)

    def _account(self) -> Iterator[RouterEvent]:
        worker_id, rank = self._worker
        return (RouterEvent(worker_id, KvEvent(i, data, rank), tier) for i, (tier, data) in enumerate(self.held()))

    # --- serving it

    async def open(self) -> None:
        """Serve, and enter discovery. Raises DiscoveryError, CannotConnect."""
        runtime, address = self._endpoint.runtime, self._endpoint.address
        name = query_endpoint(self.publisher_id)
        target = EndpointAddress(address.namespace, address.component, name)
        worker_id = self._worker.worker_id
        instance_id = worker_id if 0 < worker_id < 1 << 63 else runtime.instance_id
        server = await runtime.serving()
        self._served = await Endpoint(runtime, target).start_push_endpoint(
            push_handler(self._answer), graceful_shutdown=False, instance_id=instance_id
        )
        scope = scope_of(self._endpoint)
        record = SourceRecord(
            "EventSource",
            scope.record(),
            self._topic,
            self.publisher_id,
            SourceMetadata(
                {"namespace": address.namespace, "component": address.component, "name": address.endpoint},
                SourceWorker(*self._worker),
                self.publisher_id,
                msgspec.json.decode(instance_record(target, instance_id, server.host_port)),
                self._kv_block_size,
            ),
        )
        await runtime.discovery.put(source_key(scope, self._topic, self.publisher_id), msgspec.json.encode(record))

    async def _answer(self, request: object) -> AsyncIterator[Retold]:
        ask = msgspec.convert(request, Ask)
        for part in self.tell(ask.from_event_id):
            yield part
            await asyncio.sleep(0)  # an engine's tokens go between two parts

    async def close(self) -> None:
        """Leave discovery and stop serving."""
        served, self._served = self._served, None
        if served is not None:
            try:
                key = source_key(scope_of(self._endpoint), self._topic, self.publisher_id)
                await self._endpoint.runtime.discovery.delete(key)
                await served.stop()
            except DynamoException as e:
                log.warning("leaving discovery: %s; the entry will expire", e)


def _parts(kind: Literal["events", "dump"], next_event_id: int, events: Iterable[RouterEvent]) -> Iterator[Retold]:
    part: list[RouterEvent] = []
    blocks = 0
    encode = msgspec.msgpack.Encoder().encode
    for event in events:
        part.append(event)
        blocks += 1 + event_blocks(event)
        if blocks >= TOLD_BLOCKS:
            yield Retold(kind, next_event_id, encode(part))
            part, blocks = [], 0
    yield Retold(kind, next_event_id, encode(part))
