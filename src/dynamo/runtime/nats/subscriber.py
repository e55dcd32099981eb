"""How do the events of many publishers reach one listener by way of NATS?

One subscription for the scope and topic, or a reader of the stream that keeps them. Who publishes is known from
discovery, as with ZeroMQ: events of others wait a while for their publisher to appear there, and are dropped.
"""

import asyncio
from collections import deque
from typing import Final, Self

from dynamo.runtime.discovery import Discovery
from dynamo.runtime.event_channel import NO_EVENT, queue_length, read_frame
from dynamo.runtime.event_reader import EventReader, rarely
from dynamo.runtime.events import EVENT_CHANNELS, EventScope, Listeners
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.nats.channel import Assembler, check_record, pattern_of, publisher_in
from dynamo.runtime.nats.durable import DurableFeed, is_kept, stream_for
from dynamo.runtime.nats.link import Interest, Message, NatsLink, status_of

EARLY_EVENTS: Final = 1024  # of publishers that are not in discovery yet


class NatsSubscriber(EventReader):
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
        super().__init__(discovery, metrics, scope, topic, listeners)
        self._link = link
        self._assemblers: dict[int, Assembler] = {}
        self._early: deque[tuple[int, Message]] = deque()
        self._most_unread = queue_length()
        self._interest: Interest | None = None
        self._feed: DurableFeed | None = None

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
        await subscriber._begin(present)
        link.on_up.append(subscriber._change.set)
        pattern = pattern_of(scope, topic)
        if kept:
            subscriber._feed = DurableFeed(link, stream_for(scope, topic), pattern, subscriber._on_message)
        else:
            subscriber._interest = await link.subscribe(pattern, subscriber._on_message)
        return subscriber

    # --- publishers come and go

    async def _put(self, publisher_id: int, key: str, value: bytes) -> None:
        if publisher_id in self._assemblers:
            return
        check_record(value, publisher_id)
        self._assemblers[publisher_id] = Assembler()
        self._joined(publisher_id)
        early = [message for publisher, message in self._early if publisher == publisher_id]
        if early:
            self._early = deque((p, message) for p, message in self._early if p != publisher_id)
            for message in early:
                self._take(publisher_id, message)

    async def _delete(self, publisher_id: int) -> None:
        if self._assemblers.pop(publisher_id, None) is not None:
            self._left(publisher_id)

    @property
    def _hears(self) -> bool:
        reads = self._feed is None or self._feed.reads
        return self._link.up and reads and not self._closed

    @property
    def publishers(self) -> dict[int, bool]:
        """See `EventSubscriber.publishers`."""
        return dict.fromkeys(self._assemblers, self._hears)

    async def wait_connected(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """See `EventSubscriber.wait_connected`."""
        async with asyncio.timeout(timeout_s):
            if self._feed is not None:
                await self._feed.ready()
            await super().wait_connected(count, timeout_s)

    # --- events come

    def _on_message(self, message: Message) -> None:
        publisher_id = publisher_in(message.subject)
        if publisher_id is None or status_of(message) is not None:
            self._rejected.value += 1
        elif publisher_id in self._assemblers:
            self._take(publisher_id, message)
        else:
            self._early.append((publisher_id, message))
            if len(self._early) > EARLY_EVENTS:
                self._early.popleft()
                self._rejected.value += 1

    def _take(self, publisher_id: int, message: Message) -> None:
        try:
            frame = self._assemblers[publisher_id].add(message.data)
            if frame is None:
                return
            event = read_frame(frame, self._decoder)
            if event.publisher_id != publisher_id or event.topic != self.topic:
                raise ValueError("its subject is another publisher's, or another topic's")
        except NO_EVENT as e:
            self._reject(e)
            return
        if len(self._unread) < self._most_unread:
            self._deliver(event)
        else:  # the next one that is read has a number that tells
            rarely.warning(self._prefix, "a reader of %r is too slow and misses events", self.topic)

    async def _stop_hearing(self) -> None:
        if self._change.set in self._link.on_up:
            self._link.on_up.remove(self._change.set)
        if self._feed is not None:
            await self._feed.close()
        if self._interest is not None:
            await self._link.unsubscribe(self._interest)
        self._assemblers.clear()
