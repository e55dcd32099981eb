"""How do the events of many publishers reach one listener?

A connection to every publisher of the topic in discovery (`dynamo.runtime.zmtp`). Their callbacks check each
publisher's sequence, and call the listener or fill the iterator.
"""

import asyncio
import logging
import struct
from collections import deque
from typing import Final, Self

import msgspec

from dynamo import prometheus_names as names
from dynamo.runtime.address import join_host_port, split_host_port
from dynamo.runtime.discovery import Delete, Discovery
from dynamo.runtime.events import EVENT_CHANNELS, Event, EventScope, Irregularity, Listeners, SequenceCheck
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.zmq_channel import (
    FRAME_VERSION,
    HEAD,
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    MAX_EVENT_BYTES,
    Channel,
    numeric_host,
)
from dynamo.runtime.zmtp import ZmtpSubscription

log = logging.getLogger(__name__)
rarely = Rarely(log)

UNREAD_EVENTS: Final = 1024  # held for an iterator that is behind; then the publishers' own queues fill
UNCONNECTED_WARNING_S: Final = 5.0  # a publisher in discovery whose address does not answer for this long
FRAMES: Final = 4


class ZmqSubscriber:
    """See `EventSubscriber`."""

    def __init__(
        self, discovery: Discovery, metrics: Metrics, scope: EventScope, topic: str, listeners: Listeners
    ) -> None:
        self.topic = topic
        self._prefix = f"{EVENT_CHANNELS}/{scope.path}/"
        self._discovery = discovery
        self._listeners = listeners
        self._topic_frame = topic.encode()
        self._loop = asyncio.get_running_loop()
        self._addresses: dict[int, str] = {}
        self._links: dict[str, ZmtpSubscription] = {}
        self._checks: dict[int, SequenceCheck] = {}
        self._unread: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._change = asyncio.Event()
        self._paused = False
        self._closed = False
        self._watching: asyncio.Task[None] | None = None
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._count(metrics, scope)
        self._beating = self._loop.create_task(self._beat(), name=f"heartbeats of {topic}")

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
        state.labels(*series, "known").set_function(lambda: len(self._addresses))
        state.labels(*series, "connected").set_function(lambda: sum(self.publishers.values()))

    @classmethod
    async def create(
        cls, discovery: Discovery, metrics: Metrics, scope: EventScope, topic: str, listeners: Listeners
    ) -> Self:
        """Look into discovery and connect; see `dynamo.runtime.events.create_subscriber`."""
        present = await discovery.get_prefix(f"{EVENT_CHANNELS}/{scope.path}/")
        subscriber = cls(discovery, metrics, scope, topic, listeners)
        for key, value in present.items():
            await subscriber._put(key, value)
        subscriber._watching = subscriber._loop.create_task(subscriber._follow(), name=f"events {topic}")
        return subscriber

    # --- publishers come and go

    async def _follow(self) -> None:
        async for change in self._discovery.watch(self._prefix):
            if isinstance(change, Delete):
                await self._delete(change.key)
            else:
                await self._put(change.key, change.value)

    def _id_of(self, key: str) -> int | None:
        """The publisher's id, if the key is of our topic."""
        head, _, tail = key.rpartition("/")
        if not head.endswith(f"/topic/{self.topic}"):
            return None
        try:
            return int(tail, 16)
        except ValueError:
            return None

    async def _put(self, key: str, value: bytes) -> None:
        publisher_id = self._id_of(key)
        if publisher_id is None:
            return
        try:
            address = await _numeric(msgspec.json.decode(value, type=Channel).endpoint(publisher_id))
            known = self._addresses.get(publisher_id)
            if known == address:
                return
            if address not in self._links:
                self._connect(address)
                self._loop.call_later(UNCONNECTED_WARNING_S, self._warn_if_unconnected, publisher_id, address)
        except (msgspec.DecodeError, ValueError) as e:
            rarely.warning(key, "ignoring the event channel %s: %s", key, e)
            return
        self._addresses[publisher_id] = address
        if known is not None and known not in self._addresses.values():
            await self._disconnect(known)
        if known is None and self._listeners.on_join is not None:
            self._listeners.on_join(publisher_id)
        self._change.set()

    async def _delete(self, key: str) -> None:
        publisher_id = self._id_of(key)
        address = self._addresses.pop(publisher_id, None) if publisher_id is not None else None
        if publisher_id is None or address is None:
            return
        self._checks.pop(publisher_id, None)
        if address not in self._addresses.values():
            await self._disconnect(address)
        if self._listeners.on_leave is not None:
            self._listeners.on_leave(publisher_id)
        self._change.set()

    def _connect(self, address: str) -> None:
        host, port = split_host_port(address.removeprefix("tcp://"))
        link = self._links[address] = ZmtpSubscription(
            host, port, self._topic_frame, MAX_EVENT_BYTES + HEAD.size, self._on_message, self._change.set
        )
        link.pause(self._paused)
        link.open()

    async def _disconnect(self, address: str) -> None:
        await self._links.pop(address).close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_MS / 1000)
            for link in self._links.values():
                link.beat(HEARTBEAT_TIMEOUT_MS / 1000)

    def _warn_if_unconnected(self, publisher_id: int, address: str) -> None:
        link = self._links.get(address)
        if self._addresses.get(publisher_id) == address and link is not None and not link.connected:
            log.warning(
                "the publisher %x of %r cannot be reached at %s: its events are missing here. If it runs on another "
                "machine, set DYN_EVENT_PLANE_HOST there to an address of its own",
                publisher_id,
                self.topic,
                address,
            )

    @property
    def publishers(self) -> dict[int, bool]:
        """See `EventSubscriber.publishers`."""
        return {publisher: self._links[address].connected for publisher, address in self._addresses.items()}

    async def wait_connected(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """See `EventSubscriber.wait_connected`."""
        async with asyncio.timeout(timeout_s):
            while sum(self.publishers.values()) < count:
                self._change.clear()
                await self._change.wait()

    # --- events come

    def _on_message(self, frames: list[bytes]) -> None:
        event = self._event(frames)
        if event is not None:
            self._deliver(event)

    def _event(self, frames: list[bytes]) -> Event | None:
        """Check and decode one message; None if it is not for us."""
        if frames[0] != self._topic_frame and len(frames) == FRAMES:
            return None  # ZeroMQ matches prefixes: somebody's topic begins like ours
        try:
            _, publisher, sequence, frame = frames
            version, length = HEAD.unpack_from(frame)
            event = self._decoder.decode(memoryview(frame)[HEAD.size :])
            if (
                version != FRAME_VERSION
                or length != len(frame) - HEAD.size
                or publisher != event.publisher_id.to_bytes(8, "big")
                or sequence != event.sequence.to_bytes(8, "big")
            ):
                raise ValueError(f"version {version}, or frames that contradict each other")
        except (ValueError, struct.error, msgspec.DecodeError, OverflowError) as e:
            self._rejected.value += 1
            rarely.warning(self._prefix + self.topic, "a message of topic %r is not an event: %s", self.topic, e)
            return None
        if event.publisher_id not in self._addresses:
            self._rejected.value += 1  # it has left discovery, or has taken the port of one that has
            return None
        return event

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
        if not self._paused and len(self._unread) >= UNREAD_EVENTS:
            self._pause(True)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        for link in self._links.values():
            link.pause(paused)

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
        event = self._unread.popleft()
        if self._paused and len(self._unread) < UNREAD_EVENTS // 2:
            self._pause(False)
        return event

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (self._unread or self._closed):
            self._waiter.set_result(None)

    async def close(self) -> None:
        """See `EventSubscriber.close`."""
        if self._closed:
            return
        self._closed = True
        tasks = [task for task in (self._watching, self._beating) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for address in list(self._links):
            await self._disconnect(address)
        self._addresses.clear()
        self._wake()


async def _numeric(endpoint: str) -> str:
    """The address with its host's name resolved, so that one of two names is one connection."""
    host, port = split_host_port(endpoint.removeprefix("tcp://"))
    return f"tcp://{join_host_port(await numeric_host(host), port)}"
