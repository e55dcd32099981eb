"""How do the events of many publishers reach one listener by way of NATS?

One subscription for the scope and topic, or a reader of the stream that keeps them. Who publishes is known from
discovery, as with ZeroMQ: events of others wait a while for their publisher to appear there, and are dropped.
"""

import asyncio
import logging
import struct
from collections import deque
from typing import Final, Self

import msgspec

from dynamo import prometheus_names as names
from dynamo.runtime.discovery import Delete, Discovery
from dynamo.runtime.events import EVENT_CHANNELS, Event, EventScope, Irregularity, Listeners, SequenceCheck
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.nats.channel import Assembler, check_record, pattern_of, publisher_in, read_frame
from dynamo.runtime.nats.durable import DurableFeed, is_kept, stream_for
from dynamo.runtime.nats.link import Interest, Message, NatsLink, status_of
from dynamo.runtime.zmq_channel import queue_length

log = logging.getLogger(__name__)
rarely = Rarely(log)

EARLY_EVENTS: Final = 1024  # of publishers that are not in discovery yet


class NatsSubscriber:
    """See `EventSubscriber`."""

    def __init__(
        self,
        link: NatsLink,
        discovery: Discovery,
        metrics: Metrics,
        scope: EventScope,
        topic: str,
        listeners: Listeners,
    ) -> None:
        self.topic = topic
        self._link = link
        self._scope = scope
        self._prefix = f"{EVENT_CHANNELS}/{scope.path}/"
        self._discovery = discovery
        self._listeners = listeners
        self._loop = asyncio.get_running_loop()
        self._publishers: dict[int, Assembler] = {}
        self._checks: dict[int, SequenceCheck] = {}
        self._early: deque[tuple[int, Message]] = deque()
        self._unread: deque[Event] = deque()
        self._most_unread = queue_length()
        self._waiter: asyncio.Future[None] | None = None
        self._change = asyncio.Event()
        self._closed = False
        self._watching: asyncio.Task[None] | None = None
        self._interest: Interest | None = None
        self._feed: DurableFeed | None = None
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._count(metrics)

    def _count(self, metrics: Metrics) -> None:
        n = names.event_plane
        labels = [names.labels.NAMESPACE, n.TOPIC_LABEL]
        series = (self._scope.namespace, self.topic)
        self._received = metrics.counter(n.RECEIVED_TOTAL, "Events that were received", labels).labels(*series)
        self._missed = metrics.counter(
            n.MISSED_TOTAL, "Events missing between two that were received, by their sequence numbers", labels
        ).labels(*series)
        self._duplicates = metrics.counter(n.DUPLICATES_TOTAL, "Events that came twice", labels).labels(*series)
        self._rejected = metrics.counter(
            n.REJECTED_TOTAL, "Messages that are no event of a publisher in discovery", labels
        ).labels(*series)
        state = metrics.gauge(
            n.PUBLISHERS, "Publishers in discovery, and how many of them are connected", [*labels, n.STATE_LABEL]
        )
        state.labels(*series, "known").set_function(lambda: len(self._publishers))
        state.labels(*series, "connected").set_function(lambda: sum(self.publishers.values()))

    @classmethod
    async def create(
        cls,
        link: NatsLink,
        discovery: Discovery,
        metrics: Metrics,
        scope: EventScope,
        topic: str,
        listeners: Listeners,
    ) -> Self:
        """Look into discovery and listen; see `dynamo.runtime.events.create_subscriber`."""
        kept = await is_kept(link, scope, topic)
        present = await discovery.get_prefix(f"{EVENT_CHANNELS}/{scope.path}/")
        subscriber = cls(link, discovery, metrics, scope, topic, listeners)
        for key, value in present.items():
            subscriber._put(key, value)
        subscriber._watching = subscriber._loop.create_task(subscriber._follow(), name=f"events {topic}")
        link.on_up.append(subscriber._change.set)
        pattern = pattern_of(scope, topic)
        if kept:
            subscriber._feed = DurableFeed(link, stream_for(scope, topic), pattern, subscriber._on_message)
        else:
            subscriber._interest = await link.subscribe(pattern, subscriber._on_message)
        return subscriber

    # --- publishers come and go

    async def _follow(self) -> None:
        async for change in self._discovery.watch(self._prefix):
            if isinstance(change, Delete):
                self._delete(change.key)
            else:
                self._put(change.key, change.value)

    def _id_of(self, key: str) -> int | None:
        """The publisher's id, if the key is of our topic."""
        head, _, tail = key.rpartition("/")
        if not head.endswith(f"/topic/{self.topic}"):
            return None
        try:
            return int(tail, 16)
        except ValueError:
            return None

    def _put(self, key: str, value: bytes) -> None:
        publisher_id = self._id_of(key)
        if publisher_id is None or publisher_id in self._publishers:
            return
        try:
            check_record(value, publisher_id)
        except (msgspec.DecodeError, ValueError) as e:
            rarely.warning(key, "ignoring the event channel %s: %s", key, e)
            return
        self._publishers[publisher_id] = Assembler()
        if self._listeners.on_join is not None:
            self._listeners.on_join(publisher_id)
        self._change.set()
        early = [message for publisher, message in self._early if publisher == publisher_id]
        if early:
            self._early = deque((p, message) for p, message in self._early if p != publisher_id)
            for message in early:
                self._take(publisher_id, message)

    def _delete(self, key: str) -> None:
        publisher_id = self._id_of(key)
        if publisher_id is None or self._publishers.pop(publisher_id, None) is None:
            return
        self._checks.pop(publisher_id, None)
        if self._listeners.on_leave is not None:
            self._listeners.on_leave(publisher_id)
        self._change.set()

    @property
    def _hears(self) -> bool:
        reads = self._feed is None or self._feed.reads
        return self._link.up and reads and not self._closed

    @property
    def publishers(self) -> dict[int, bool]:
        """See `EventSubscriber.publishers`."""
        return dict.fromkeys(self._publishers, self._hears)

    async def wait_connected(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """See `EventSubscriber.wait_connected`."""
        async with asyncio.timeout(timeout_s):
            if self._feed is not None:
                await self._feed.ready()
            while sum(self.publishers.values()) < count:
                self._change.clear()
                await self._change.wait()

    # --- events come

    def _on_message(self, message: Message) -> None:
        publisher_id = publisher_in(message.subject)
        if publisher_id is None or status_of(message) is not None:
            self._rejected.value += 1
        elif publisher_id in self._publishers:
            self._take(publisher_id, message)
        else:
            self._early.append((publisher_id, message))
            if len(self._early) > EARLY_EVENTS:
                self._early.popleft()
                self._rejected.value += 1

    def _take(self, publisher_id: int, message: Message) -> None:
        try:
            frame = self._publishers[publisher_id].add(message.data)
            if frame is None:
                return
            event = read_frame(frame, self._decoder)
            if event.publisher_id != publisher_id or event.topic != self.topic:
                raise ValueError("its subject is another publisher's, or another topic's")
        except (ValueError, struct.error, msgspec.DecodeError) as e:
            self._rejected.value += 1
            rarely.warning(self._prefix + self.topic, "a message of topic %r is not an event: %s", self.topic, e)
            return
        self._deliver(event)

    def _deliver(self, event: Event) -> None:
        check = self._checks.get(event.publisher_id)
        if check is None:
            check = self._checks[event.publisher_id] = SequenceCheck()
        if len(self._unread) >= self._most_unread:
            rarely.warning(self._prefix, "a reader of %r is too slow and misses events", self.topic)
            return  # the next one that is read has a number that tells
        irregularity = check.check(event)
        if irregularity is not None and not self._report(irregularity):
            return
        self._received.value += 1
        if self._listeners.on_event is not None:
            try:
                self._listeners.on_event(event)
            except Exception:  # a listener that fails keeps no other event from being heard
                log.exception(
                    "the listener of %r failed on event %d of %x", self.topic, event.sequence, event.publisher_id
                )
            return
        self._unread.append(event)
        self._wake()

    def _report(self, irregularity: Irregularity) -> bool:
        """Count and tell; whether to deliver the event."""
        if irregularity.kind == "gap":
            self._missed.value += irregularity.missed
        if self._listeners.on_irregularity is not None:
            self._listeners.on_irregularity(irregularity)
        if irregularity.kind == "duplicate":
            self._duplicates.value += 1
            return False
        return True

    # --- the iterator

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._unread:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter  # no deadline: it lasts as long as its owner wants to hear; `close` ends it
        return self._unread.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def close(self) -> None:
        """See `EventSubscriber.close`."""
        if self._closed:
            return
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._change.set in self._link.on_up:
            self._link.on_up.remove(self._change.set)
        if self._feed is not None:
            await self._feed.close()
        if self._interest is not None:
            await self._link.unsubscribe(self._interest)
        self._publishers.clear()
        self._wake()
