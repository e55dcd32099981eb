"""How does a router come to know all workers' caches, and know when it does not?

`KvEventFeed` hears the KV events of all workers of an endpoint, finds each one's source in discovery, and keeps the
index. It asks a worker for everything when it first meets it, for what was missed when a number is missing, and once
more when a worker falls silent, as nothing shows that the last event was lost. It never waits for a worker to keep
the others' events coming; a worker that cannot be asked is asked again, less and less often, as long as it is there.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec

from dynamo.llm.kv_events import KvEventData, RouterEvent
from dynamo.router.event_metrics import FeedMetrics
from dynamo.router.event_recovery import ask, publisher_of, read_source
from dynamo.router.event_stream import EventStream, StreamState
from dynamo.router.heard_publisher import RESYNC_S, HeardPublisher
from dynamo.router.recovery import KV_EVENTS_TOPIC, Retold, sources_prefix
from dynamo.router.tier_index import Outcome, TierIndex
from dynamo.router.types import WorkerKey
from dynamo.runtime.connection import ConnectionPool
from dynamo.runtime.discovery import Delete
from dynamo.runtime.errors import UNDECODABLE, DynamoException
from dynamo.runtime.events import Event, EventSubscriber, HasEvents, Listeners, ScopeLike, create_subscriber, scope_of
from dynamo.runtime.instances import Target
from dynamo.runtime.instruments import LabelPairs
from dynamo.runtime.logs import Rarely

log = logging.getLogger(__name__)
rarely = Rarely(log)

_OK = Outcome.OK
TICK_S = 0.5
QUIET_S = 1.5  # a worker that says nothing for this long is asked once whether that was all
SOURCE_GRACE_S = 2.0  # a publisher's source may show in discovery this much later than its first event
HEARING_S = 1.0  # for a connection to a publisher; it takes milliseconds
POLL_S = 0.01
RETRY_S = 0.2  # before a worker that could not be asked is asked again; doubles up to ...
RETRY_MAX_S = 10.0  # ... this, by when a dead worker has left discovery
ASKED_AT_ONCE = 16  # workers; a thousand that join together are known after a few seconds
SWEPT_A_TICK = 20_000  # blocks of workers that left, taken out of memory: 5 ms


class HasPlanes(HasEvents, Protocol):
    """What the feed needs of a runtime."""

    @property
    def pool(self) -> ConnectionPool: ...


class KvEventFeed:
    """Keeps `index` true to what the workers in `where` (an endpoint, or a component) publish.

    `kv_block_size` is the router's; workers that say another are refused, loudly. `labels` are those of
    all its metrics, which tell it from the feeds of other models.
    """

    def __init__(
        self,
        runtime: HasPlanes,
        where: ScopeLike,
        index: TierIndex,
        kv_block_size: int,
        labels: LabelPairs | None = None,
    ) -> None:
        self.index = index
        self.kv_block_size = kv_block_size
        self._runtime = runtime
        self._scope = scope_of(where)
        self._publishers: dict[int, HeardPublisher] = {}
        self._metrics = FeedMetrics(runtime.metrics, index, self._states, labels)
        self._owners: dict[WorkerKey, int] = {}
        self._asking: dict[EventStream, asyncio.Task[None]] = {}
        self._limit = asyncio.Semaphore(ASKED_AT_ONCE)
        self._decoder = msgspec.msgpack.Decoder(list[RouterEvent])
        self._loop = asyncio.get_running_loop()
        self._subscriber: EventSubscriber | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Meet the workers of now, and follow the others. Returns before they have told everything: see `settled`.

        Raises DiscoveryError, ValueError as `create_subscriber`.
        """
        prefix = sources_prefix(self._scope)
        for key, value in (await self._runtime.discovery.get_prefix(prefix)).items():
            self._put_source(key, value)
        self._subscriber = await create_subscriber(
            self._runtime,
            self._scope,
            KV_EVENTS_TOPIC,
            Listeners(on_event=self._on_event, on_leave=self._on_channel_leave),
        )
        self._tasks = [
            self._loop.create_task(self._follow_sources(prefix), name="kv event sources"),
            self._loop.create_task(self._tick(), name="kv event feed"),
        ]

    async def close(self) -> None:
        """Hear and ask no more. The index stays as it is."""
        tasks = [*self._tasks, *self._asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._subscriber is not None:
            await self._subscriber.close()
        for publisher in self._publishers.values():
            self._use(publisher, None)
        self._metrics.close()

    # --- what is known of it

    def status(self) -> list[dict[str, Any]]:
        """A line for each rank that publishes: whether all is known of it, and if not, why."""
        now = self._loop.time()
        return [line for publisher in self._publishers.values() for line in publisher.status(self.index, now)]

    def publishing(self) -> set[WorkerKey]:
        """The ranks that are heard, or could be."""
        return set(self._owners)

    def unsynced(self) -> list[WorkerKey]:
        """The ranks whose cache is not known in full."""
        return [
            worker
            for publisher in self._publishers.values()
            for worker, stream in publisher.streams.items()
            if publisher.refused or stream.state is not StreamState.SYNCED
        ]

    async def settled(self, timeout_s: float) -> bool:
        """Wait until the cache of every rank is known. Returns whether that came within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while any(
                    stream.state is StreamState.RECOVERING
                    for publisher in self._publishers.values()
                    if not publisher.refused
                    for stream in publisher.streams.values()
                ):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _states(self) -> dict[str, int]:
        states: Counter[str] = Counter({state.value: 0 for state in StreamState})
        for publisher in self._publishers.values():
            states.update(state.value for state in publisher.states())
        return dict(states)

    # --- sources come and go

    async def _follow_sources(self, prefix: str) -> None:
        async for change in self._runtime.discovery.watch(prefix):
            if isinstance(change, Delete):
                self._leave(self._publishers.get(publisher_of(change.key) or 0))
            else:
                self._put_source(change.key, change.value)

    def _put_source(self, key: str, value: bytes) -> None:
        publisher_id = publisher_of(key)
        if publisher_id is None:
            return
        try:
            record, target = read_source(publisher_id, value)
        except ValueError as e:
            self._metrics.warn("invalid_source")
            rarely.warning(key, "ignoring the event source %s: %s", key, e)
            return
        publisher = self._publisher(publisher_id)
        if publisher.record == record:
            return
        publisher.record = record
        self._use(publisher, target)
        size = record.metadata.kv_block_size
        if size is not None and size != self.kv_block_size:
            publisher.refused = f"its KV blocks have {size} tokens, this router's {self.kv_block_size}"
            self._metrics.lifecycle("refused")
            log.error(
                "KV events of worker %x, rank %d are refused: %s. Give both the same block size; until then no request "
                "is sent there for what it has cached",
                record.worker.worker_id,
                record.worker.dp_rank,
                publisher.refused,
            )
            self.index.remove_worker(record.worker)
        else:
            publisher.refused = ""
        self._adopt(publisher, record.worker)

    def _publisher(self, publisher_id: int) -> HeardPublisher:
        publisher = self._publishers.get(publisher_id)
        if publisher is None:
            publisher = self._publishers[publisher_id] = HeardPublisher(publisher_id, seen_at=self._loop.time())
            self._metrics.lifecycle("joined")
        return publisher

    def _use(self, publisher: HeardPublisher, target: Target | None) -> None:
        """Keep the connection to where a publisher is asked for as long as it may be."""
        for known, used in ((publisher.target, False), (target, True)):
            if known is not None:
                self._runtime.pool.use(known.host_port, used)
        publisher.target = target

    def _adopt(self, publisher: HeardPublisher, worker: WorkerKey) -> EventStream:
        """Hear a rank from this publisher from now on. The last to appear counts: it is the worker's latest life."""
        for other in [key for key in publisher.streams if publisher.record is not None and key != worker]:
            self._drop(publisher, other)
        stream = publisher.streams.get(worker)
        if stream is None or stream.closed:
            stream = publisher.streams[worker] = EventStream(
                worker, partial(self._apply, publisher, worker), partial(self.index.clear, worker)
            )
        before = self._owners.get(worker)
        if before != publisher.id:
            self._owners[worker] = publisher.id
            if before is not None:
                self._metrics.lifecycle("replaced")
                self._stop_asking(self._publishers[before].streams[worker])
                self.index.remove_worker(worker)
        if not publisher.refused and stream.state is StreamState.RECOVERING:
            if publisher.target is not None:
                self._recover(publisher, stream)
            elif publisher.record is not None:
                stream.go_on_alone("its worker keeps no local index (enable_local_indexer)")
        self._changed.set()
        return stream

    def _on_channel_leave(self, publisher_id: int) -> None:
        publisher = self._publishers.get(publisher_id)
        if publisher is not None and publisher.record is None:
            self._leave(publisher)

    def _leave(self, publisher: HeardPublisher | None) -> None:
        """A publisher is gone, with all that was known of its ranks."""
        if publisher is None:
            return
        del self._publishers[publisher.id]
        self._metrics.lifecycle("left")
        self._use(publisher, None)
        for worker in list(publisher.streams):
            self._drop(publisher, worker)
        self._changed.set()

    def _drop(self, publisher: HeardPublisher, worker: WorkerKey) -> None:
        """Hear a rank no more from this publisher, but from another that speaks for it, if there is one."""
        self._stop_asking(publisher.streams.pop(worker))
        if self._owners.get(worker) != publisher.id:
            return
        del self._owners[worker]
        self.index.remove_worker(worker)
        rival = self._rival(publisher, worker)
        if rival is not None:
            self._adopt(rival, worker)

    def _rival(self, publisher: HeardPublisher, worker: WorkerKey) -> HeardPublisher | None:
        """Another publisher that says it is of the same rank: of a life before, or of the one after."""
        others = (other for other in self._publishers.values() if other is not publisher)
        return next((other for other in others if worker in other.streams), None)

    def _stop_asking(self, stream: EventStream) -> None:
        stream.closed = True
        task = self._asking.pop(stream, None)
        if task is not None:
            task.cancel()

    # --- events come

    def _on_event(self, message: Event) -> None:
        publisher = self._publisher(message.publisher_id)
        publisher.heard_at = self._loop.time()
        publisher.confirmed = False
        self._metrics.batches.value += 1
        if publisher.refused:
            return
        try:
            events = self._decoder.decode(message.payload)
        except UNDECODABLE as e:
            self._metrics.warn("undecodable")
            rarely.warning(
                f"undecodable {publisher.id}", "publisher %x sent what are no KV events: %s", publisher.id, e
            )
            return
        ranks: dict[Any, EventStream] = publisher.streams  # a key is equal to a plain pair, which is made sooner
        for event in events:
            stream = ranks.get((event.worker_id, event.event.dp_rank))
            if stream is None:
                stream = self._meet(publisher, WorkerKey(event.worker_id, event.event.dp_rank))
            if stream is None or stream.closed:
                continue
            if stream.is_next(event):  # as nearly always
                self._apply(publisher, stream.worker, event)
            else:
                self._hear_otherwise(publisher, stream, event)

    def _hear_otherwise(self, publisher: HeardPublisher, stream: EventStream, event: RouterEvent) -> None:
        """An event came that is not the next one, or not at a time for it."""
        gaps = stream.gaps
        must_ask = stream.hear(event)
        if stream.gaps != gaps:
            self._note_gap(stream)
        if must_ask:
            self._recover(publisher, stream)

    def _meet(self, publisher: HeardPublisher, worker: WorkerKey) -> EventStream | None:
        """A publisher speaks for a rank for the first time. None if it is not its own."""
        record = publisher.record
        if record is not None:
            self._metrics.warn("foreign_worker")
            rarely.warning(
                f"foreign {publisher.id}",
                "publisher %x of worker %x, rank %d sent events of worker %x, rank %d, which are ignored",
                publisher.id,
                *record.worker,
                *worker,
            )
            return None
        owner = self._publishers.get(self._owners.get(worker, -1))
        if owner is not None and owner.record is not None:  # what discovery says counts for more than what anyone says
            self._metrics.warn("foreign_worker")
            return None
        return self._adopt(publisher, worker)

    def _note_gap(self, stream: EventStream) -> None:
        self._metrics.lifecycle("gap")
        rarely.warning(
            f"gap {stream.worker}",
            "KV events of worker %x, rank %d: %s",
            *stream.worker,
            stream.reason,
        )

    def _apply(self, publisher: HeardPublisher, worker: WorkerKey, event: RouterEvent) -> None:
        if event.residency_domain != "worker":
            self._metrics.warn("unsupported_residency_domain")
            return
        change = event.event.data
        if change.__class__ is not KvEventData:
            change = event.event.change
        outcome = self.index.apply(worker, event.storage_tier, change)
        if outcome is _OK and change.stored is not None:
            self._metrics.stored.value += 1
            return
        self._metrics.applied(change, outcome)
        if outcome is Outcome.UNKNOWN_PARENT:
            self._doubt(publisher, worker)

    def _doubt(self, publisher: HeardPublisher, worker: WorkerKey) -> None:
        """A worker stored blocks after one that we do not know it to hold: hear everything again, but not too often."""
        stream, now = publisher.streams.get(worker), self._loop.time()
        if stream is None or stream.state is not StreamState.SYNCED or now - publisher.resynced_at < RESYNC_S:
            return
        publisher.resynced_at = now
        if publisher.target is not None:
            stream.suspect("it stored blocks after one that it was not known to hold")
            self._recover(publisher, stream)

    # --- asking

    def _recover(self, publisher: HeardPublisher, stream: EventStream) -> None:
        if stream not in self._asking and not stream.closed:
            self._spawn(stream, self._recover_until_known(publisher, stream))

    def _spawn(self, stream: EventStream, asking: Coroutine[Any, Any, None]) -> None:
        task = self._asking[stream] = self._loop.create_task(asking, name=f"ask {stream.worker}")

        def done(task: asyncio.Task[None]) -> None:
            if self._asking.get(stream) is task:
                del self._asking[stream]
            if not task.cancelled() and task.exception() is not None:
                log.error("asking worker %x, rank %d failed", *stream.worker, exc_info=task.exception())

        task.add_done_callback(done)

    async def _recover_until_known(self, publisher: HeardPublisher, stream: EventStream) -> None:
        delay = RETRY_S
        if stream.expected is None:
            await self._hearing(publisher)
        while not stream.closed:
            try:
                if await self._ask_and_apply(publisher, stream):
                    self._changed.set()
                    return
                error = stream.reason
            except (*UNDECODABLE, DynamoException, TimeoutError, ValueError) as e:
                error = str(e) or type(e).__name__
            publisher.last_error = error
            publisher.recoveries["failed"] += 1
            self._metrics.lifecycle("recovery_failed")
            rarely.info(f"ask {publisher.id}", "asking worker %x, rank %d for its cache: %s", *stream.worker, error)
            rival = self._rival(publisher, stream.worker)
            if rival is not None:
                self._adopt(rival, stream.worker)  # this one is the dead one
                return
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, RETRY_MAX_S)

    async def _hearing(self, publisher: HeardPublisher) -> None:
        """Wait a little until a publisher's events come here: what it says before that would be missing again."""
        deadline = self._loop.time() + HEARING_S
        while self._loop.time() < deadline:
            if self._subscriber is not None and self._subscriber.publishers.get(publisher.id):
                await asyncio.sleep(POLL_S)  # until ZeroMQ has taken note of the subscription
                return
            await asyncio.sleep(POLL_S)

    async def _ask_and_apply(self, publisher: HeardPublisher, stream: EventStream) -> bool:
        target = publisher.target
        assert target is not None
        async with self._limit:
            parts = await ask(self._runtime.pool, target, stream.expected)
            kind, next_event_id = parts[0].kind, parts[0].next_event_id
            stream.begin(kind)
            for part in parts:
                stream.retold(kind, self._decoder.decode(part.events))
                await asyncio.sleep(0)  # requests go between two parts
                if stream.closed:
                    return False
        publisher.recoveries[kind] += 1
        publisher.last_error = ""
        self._metrics.lifecycle(f"recovered_{kind}")
        return stream.end(kind, next_event_id)

    async def _confirm(self, publisher: HeardPublisher, stream: EventStream) -> None:
        """A worker has fallen silent: was that all?"""
        assert publisher.target is not None
        try:
            async with self._limit:
                parts = await ask(self._runtime.pool, publisher.target, stream.expected)
        except (*UNDECODABLE, DynamoException, TimeoutError, ValueError) as e:
            publisher.last_error = str(e) or type(e).__name__
            publisher.confirmed = False
            publisher.heard_at = self._loop.time()  # ask again after another silence
            return
        if stream.closed or stream.state is not StreamState.SYNCED:
            return
        if parts[0].kind == "dump":
            stream.suspect("it fell silent, and what was missed is too much to tell again")
        elif self._late(stream, parts):
            self._metrics.lifecycle("recovered_silence")

    def _late(self, stream: EventStream, parts: list[Retold]) -> bool:
        before = stream.expected
        for part in parts:
            stream.retold("events", self._decoder.decode(part.events))
        return stream.expected != before

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._loop.time()
            for publisher in list(self._publishers.values()):
                self._look_after(publisher, now)
            self.index.sweep(SWEPT_A_TICK)

    def _look_after(self, publisher: HeardPublisher, now: float) -> None:
        """Ask whom it is time to ask."""
        if publisher.refused:
            return
        for stream in list(publisher.streams.values()):
            if stream.closed or stream in self._asking:
                continue
            if publisher.target is None:
                if stream.state is StreamState.RECOVERING and now - publisher.seen_at > SOURCE_GRACE_S:
                    stream.go_on_alone("its publisher has no source in discovery")
                    self._changed.set()
            elif stream.state is StreamState.RECOVERING:
                self._recover(publisher, stream)
            elif not publisher.confirmed and now - max(publisher.heard_at, publisher.seen_at) > QUIET_S:
                publisher.confirmed = True
                self._spawn(stream, self._confirm(publisher, stream))
