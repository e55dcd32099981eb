"""How do the events of many publishers reach one listener?

One SUB socket, connected to every publisher of the topic in discovery. Its descriptor's callback takes all that is
there, checks each publisher's sequence, and calls the listener or fills the iterator. An event after a silence is
taken at once; while they come one after the other, it looks a few times in a hundredth of a second, not at each.
"""

import asyncio
import contextlib
import logging
import struct
from collections import deque
from typing import Final, Self

import msgspec
import zmq

from dynamo import prometheus_names as names
from dynamo.runtime.address import join_host_port, split_host_port
from dynamo.runtime.discovery import Delete, Discovery
from dynamo.runtime.events import EVENT_CHANNELS, Event, EventScope, Irregularity, Listeners, SequenceCheck
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.zmq_channel import FRAME_VERSION, HEAD, MAX_EVENT_BYTES, NOBLOCK, Channel, numeric_host, zmq_socket

log = logging.getLogger(__name__)
rarely = Rarely(log)

RECONNECT_MS: Final = 100
RECONNECT_MAX_MS: Final = 2000  # a dead publisher's record goes after 10 s; until then it costs a try each 2 s
EVENTS_A_TURN: Final = 256  # then the loop's other callbacks get their turn
# Until it looks again after something came. Waking up for each message costs more than the message, and breaks up what
# the loop would send to a worker in one piece.
REST_S: Final = 0.005
UNREAD_EVENTS: Final = 1024  # held for an iterator that is behind; then the socket's own queue fills
UNCONNECTED_WARNING_S: Final = 5.0  # a publisher in discovery whose address does not answer for this long

FRAMES: Final = 4
_MONITOR: Final = struct.Struct("=HI")  # what happened to a connection, and a detail (zmq_socket_monitor(3))


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
        self._connected: set[str] = set()
        self._checks: dict[int, SequenceCheck] = {}
        self._unread: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._change = asyncio.Event()
        self._paused = False
        self._again: asyncio.Handle | None = None
        """When it looks again, while it does not wait for the descriptor."""
        self._waits = True
        """Whether it waits for the descriptor."""
        self._watching: asyncio.Task[None] | None = None
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._count(metrics, scope)
        self._socket = zmq_socket(zmq.SUB)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.IPV6, 1)
        self._socket.set(zmq.MAXMSGSIZE, MAX_EVENT_BYTES + HEAD.size)
        self._socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        self._socket.subscribe(self._topic_frame)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._fd = int(self._socket.fileno())
        self._monitor_fd = int(self._monitor.fileno())
        self._loop.add_reader(self._fd, self._on_readable)
        self._loop.add_reader(self._monitor_fd, self._on_monitor)
        self._on_monitor()  # a descriptor signals only after its socket was found empty

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
                self._delete(change.key)
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
            if address not in self._addresses.values():
                self._socket.connect(address)
                self._loop.call_later(UNCONNECTED_WARNING_S, self._warn_if_unconnected, publisher_id, address)
        except (msgspec.DecodeError, ValueError, zmq.ZMQError) as e:
            rarely.warning(key, "ignoring the event channel %s: %s", key, e)
            return
        self._addresses[publisher_id] = address
        if known is not None and known not in self._addresses.values():
            self._disconnect(known)
        self._on_readable()  # connecting may have taken the descriptor's one signal that there is something to read
        if known is None and self._listeners.on_join is not None:
            self._listeners.on_join(publisher_id)
        self._change.set()

    def _delete(self, key: str) -> None:
        publisher_id = self._id_of(key)
        address = self._addresses.pop(publisher_id, None) if publisher_id is not None else None
        if publisher_id is None or address is None:
            return
        self._checks.pop(publisher_id, None)
        if address not in self._addresses.values():
            self._disconnect(address)
        if self._listeners.on_leave is not None:
            self._listeners.on_leave(publisher_id)
        self._change.set()

    def _disconnect(self, address: str) -> None:
        self._connected.discard(address)
        with contextlib.suppress(zmq.ZMQError):  # ENOENT: ZeroMQ has already given the connection up
            self._socket.disconnect(address)
        self._on_readable()

    def _warn_if_unconnected(self, publisher_id: int, address: str) -> None:
        if self._addresses.get(publisher_id) == address and address not in self._connected and not self._socket.closed:
            log.warning(
                "the publisher %x of %r cannot be reached at %s: its events are missing here. If it runs on another "
                "machine, set DYN_EVENT_PLANE_HOST there to an address of its own",
                publisher_id,
                self.topic,
                address,
            )

    def _on_monitor(self) -> None:
        while True:
            try:
                kind_and_value, endpoint = self._monitor.recv_multipart(NOBLOCK)
            except zmq.Again:
                break
            kind, _ = _MONITOR.unpack(kind_and_value)
            address = endpoint.decode()
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected.add(address)
            else:
                self._connected.discard(address)
        self._change.set()

    @property
    def publishers(self) -> dict[int, bool]:
        """See `EventSubscriber.publishers`."""
        return {publisher: address in self._connected for publisher, address in self._addresses.items()}

    async def wait_connected(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """See `EventSubscriber.wait_connected`."""
        async with asyncio.timeout(timeout_s):
            while sum(self.publishers.values()) < count:
                self._change.clear()
                await self._change.wait()

    # --- events come

    def _on_readable(self) -> None:
        """Take what is there. The descriptor signals once, so this goes on until there is nothing more."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._paused or self._socket.closed:
            return
        for taken in range(EVENTS_A_TURN):
            frames = self._receive()
            if not frames:
                self._rest(taken > 0)
                break
            event = self._event(frames)
            if event is not None:
                self._deliver(event)
                if self._paused:
                    break
        else:
            self._again = self._loop.call_soon(self._on_readable)
        self._wake()

    def _rest(self, busy: bool) -> None:
        """Look again in a while if something has come, else once the descriptor says so."""
        if busy:
            self._again = self._loop.call_later(REST_S, self._on_readable)
        if busy is self._waits:
            self._waits = not busy
            if busy:
                self._loop.remove_reader(self._fd)
            else:
                self._loop.add_reader(self._fd, self._on_readable)

    def _receive(self) -> list[bytes]:
        """One message if it has four frames; another number if it has not; [] if there is none.

        Asking after each frame whether there is a next would cost more than all the rest (1 µs each), so a message
        of fewer frames takes some of the one after it along. Then that is dropped too, and shows as a gap.
        """
        receive = self._socket.recv
        frames: list[bytes] = []
        try:
            frames.append(receive(NOBLOCK))
            frames.append(receive(NOBLOCK))
            frames.append(receive(NOBLOCK))
            frames.append(receive(NOBLOCK))
        except zmq.Again:
            return frames
        while self._socket.get(zmq.RCVMORE):
            frames.append(receive(NOBLOCK))
        return frames

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
            except Exception:  # the descriptor does not signal again for what is still unread, so go on
                log.exception(
                    "the listener of %r failed on event %d of %x", self.topic, event.sequence, event.publisher_id
                )
            return
        self._unread.append(event)
        self._paused = len(self._unread) >= UNREAD_EVENTS

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
            if self._socket.closed:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter  # no deadline: it lasts as long as its owner wants to hear; `close` ends it
        event = self._unread.popleft()
        if self._paused and len(self._unread) < UNREAD_EVENTS // 2:
            self._paused = False
            self._again = self._loop.call_soon(self._on_readable)
        return event

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (self._unread or self._socket.closed):
            self._waiter.set_result(None)

    async def close(self) -> None:
        """See `EventSubscriber.close`."""
        if self._socket.closed:
            return
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        if self._again is not None:
            self._again.cancel()
        self._socket.disable_monitor()
        self._socket.close(0)
        self._addresses.clear()
        self._connected.clear()
        self._wake()


async def _numeric(endpoint: str) -> str:
    """The address with its host's name resolved: ZeroMQ reports connections by number, and would block to resolve."""
    host, port = split_host_port(endpoint.removeprefix("tcp://"))
    return f"tcp://{join_host_port(await numeric_host(host), port)}"
