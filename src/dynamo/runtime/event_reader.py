"""Who publishes a topic, which of their events are missing, and who is told, whatever carries them?

A subscriber follows the topic's publishers in discovery and has a way to hear them; what it has heard it gives to
`_deliver`, which looks at each publisher's numbers, and calls the listener or fills the iterator.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from typing import Self

import msgspec

from dynamo import prometheus_names as names
from dynamo.runtime.discovery import Delete, Discovery
from dynamo.runtime.errors import UNDECODABLE
from dynamo.runtime.events import EVENT_CHANNELS, Event, EventScope, Irregularity, Listeners, SequenceCheck
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics

log = logging.getLogger(__name__)
rarely = Rarely(log)


class EventReader(ABC):
    """What subscribers have in common. See `EventSubscriber`."""

    def __init__(
        self, discovery: Discovery, metrics: Metrics, scope: EventScope, topic: str, listeners: Listeners
    ) -> None:
        self.topic = topic
        self._prefix = f"{EVENT_CHANNELS}/{scope.path}/"
        self._discovery = discovery
        self._listeners = listeners
        self._loop = asyncio.get_running_loop()
        self._checks: dict[int, SequenceCheck] = {}
        self._unread: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._change = asyncio.Event()
        self._closed = False
        self._watching: asyncio.Task[None] | None = None
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._count(metrics, scope)

    def _count(self, metrics: Metrics, scope: EventScope) -> None:
        n = names.event_plane
        labels = [names.labels.NAMESPACE, n.TOPIC_LABEL]
        series = (scope.namespace, self.topic)
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
        state.labels(*series, "known").set_function(lambda: len(self.publishers))
        state.labels(*series, "connected").set_function(lambda: sum(self.publishers.values()))

    # --- publishers come and go

    @property
    @abstractmethod
    def publishers(self) -> dict[int, bool]:
        """See `EventSubscriber.publishers`."""

    @abstractmethod
    async def _put(self, publisher_id: int, key: str, value: bytes) -> None:
        """A publisher's record came, or came again. Raises ValueError, or DecodeError, for one that is none."""

    @abstractmethod
    async def _delete(self, publisher_id: int) -> None:
        """A publisher has left, which need not be known here."""

    async def _begin(self, present: dict[str, bytes]) -> None:
        """Know who is there, and follow who comes and goes."""
        for key, value in present.items():
            await self._note(key, value)
        self._watching = self._loop.create_task(self._follow(), name=f"events {self.topic}")

    async def _follow(self) -> None:
        async for change in self._discovery.watch(self._prefix):
            await self._note(change.key, None if isinstance(change, Delete) else change.value)

    async def _note(self, key: str, value: bytes | None) -> None:
        publisher_id = self._id_of(key)
        if publisher_id is None:
            return
        if value is None:
            await self._delete(publisher_id)
            return
        try:
            await self._put(publisher_id, key, value)
        except (*UNDECODABLE, ValueError) as e:
            rarely.warning(key, "ignoring the event channel %s: %s", key, e)

    def _id_of(self, key: str) -> int | None:
        """The publisher's id, if the key is of our topic."""
        head, _, tail = key.rpartition("/")
        if not head.endswith(f"/topic/{self.topic}"):
            return None
        try:
            return int(tail, 16)
        except ValueError:
            return None

    def _joined(self, publisher_id: int) -> None:
        if self._listeners.on_join is not None:
            self._listeners.on_join(publisher_id)
        self._change.set()

    def _left(self, publisher_id: int) -> None:
        self._checks.pop(publisher_id, None)
        if self._listeners.on_leave is not None:
            self._listeners.on_leave(publisher_id)
        self._change.set()

    async def wait_connected(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """See `EventSubscriber.wait_connected`."""
        async with asyncio.timeout(timeout_s):
            while sum(self.publishers.values()) < count:
                self._change.clear()
                await self._change.wait()

    # --- events come

    def _reject(self, error: Exception) -> None:
        """Something came that is no event."""
        self._rejected.value += 1
        rarely.warning(self._prefix + self.topic, "a message of topic %r is not an event: %s", self.topic, error)

    def _deliver(self, event: Event) -> None:
        check = self._checks.get(event.publisher_id)
        if check is None:
            check = self._checks[event.publisher_id] = SequenceCheck()
        irregularity = check.check(event)
        if irregularity is not None and not self._report(irregularity):
            return
        self._received.value += 1
        if self._listeners.on_event is not None:
            try:
                self._listeners.on_event(event)
            except Exception:  # what else came with the same read is to be heard all the same
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
        await self._stop_hearing()
        self._wake()

    @abstractmethod
    async def _stop_hearing(self) -> None:
        """Close what was opened to hear; there are no publishers any more."""
