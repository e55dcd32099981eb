"""How does an event leave, without anybody waiting for it?

Each publisher binds a PUB socket of its own. It holds up to `DYN_EVENT_PLANE_HWM` (10,000) events for each
subscriber; one that is further behind misses events until it reads again, and the others do not notice.
"""

import logging
import os
import threading
import time
from typing import Final, Self

import msgspec
import zmq

from dynamo import prometheus_names as names
from dynamo.runtime.address import join_host_port, split_host_port
from dynamo.runtime.discovery import Discovery
from dynamo.runtime.errors import CannotConnect, DiscoveryError, InvalidArgument
from dynamo.runtime.events import Event, EventScope, new_publisher_id
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.server import advertised_host
from dynamo.runtime.zmq_channel import (
    FRAME_VERSION,
    HEAD,
    MAX_EVENT_BYTES,
    MORE,
    NOBLOCK,
    Channel,
    numeric_host,
    zmq_socket,
)

log = logging.getLogger(__name__)
rarely = Rarely(log)

LINGER_MS: Final = 500  # how long closing waits for the last events to leave


class ZmqPublisher:
    """See `EventPublisher`."""

    def __init__(self, metrics: Metrics, scope: EventScope, topic: str, publisher_id: int, host: str) -> None:
        self.publisher_id = publisher_id
        self.topic = topic
        self.sequence = 0
        """The next event's number."""
        self._key = scope.channel_key(topic, publisher_id)
        self._topic_frame = topic.encode()
        self._id_frame = publisher_id.to_bytes(8, "big")
        self._thread = threading.get_ident()
        self._encoder = msgspec.msgpack.Encoder()
        labels = [names.labels.NAMESPACE, names.event_plane.TOPIC_LABEL]
        series = (scope.namespace, topic)
        self._published = metrics.counter(
            names.event_plane.PUBLISHED_TOTAL, "Events that were published", labels
        ).labels(*series)
        self._overflows = metrics.counter(
            names.event_plane.OVERFLOWS_TOTAL,
            "Times the queue of a subscriber was full; how many events it missed is counted where it runs",
            labels,
        ).labels(*series)
        self._socket = zmq_socket(zmq.PUB)
        self._discovery: Discovery | None = None
        try:
            self._socket.set(zmq.LINGER, LINGER_MS)
            self._socket.set(zmq.IPV6, ":" in host)
            self._socket.set(zmq.XPUB_NODROP, 1)
            self._socket.bind(f"tcp://{join_host_port(host, 0)}")
        except zmq.ZMQError as e:
            self._socket.close(0)
            raise CannotConnect(f"cannot listen for subscribers on {host!r} (DYN_EVENT_PLANE_HOST): {e}") from e
        bound = self._socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        host, port = split_host_port(bound.rstrip(b"\0").decode().removeprefix("tcp://"))
        self.endpoint = f"tcp://{join_host_port(advertised_host(host), port)}"
        self._record = msgspec.json.encode(Channel.of(scope, topic, publisher_id, self.endpoint))

    @classmethod
    async def create(
        cls, discovery: Discovery, metrics: Metrics, scope: EventScope, topic: str, publisher_id: int | None
    ) -> Self:
        """Bind and enter discovery; see `dynamo.runtime.events.create_publisher`."""
        if publisher_id is None:
            publisher_id = new_publisher_id()
        if not 0 <= publisher_id < 1 << 64:
            raise ValueError(f"publisher_id {publisher_id} must be from 0 to 2**64 - 1")
        host = os.environ.get("DYN_EVENT_PLANE_HOST", "").strip().strip("[]") or "127.0.0.1"
        publisher = cls(metrics, scope, topic, publisher_id, await numeric_host(host))
        try:
            await discovery.put(publisher._key, publisher._record)
        except BaseException:
            publisher._socket.close(0)
            raise
        publisher._discovery = discovery
        return publisher

    def publish(self, payload: object) -> int:
        """See `EventPublisher.publish`."""
        if self._socket.closed:
            raise RuntimeError(f"the publisher of {self.topic!r} is closed")
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"publish {self.topic!r} on the loop's thread: use loop.call_soon_threadsafe(publish, ...)"
            )
        sequence = self.sequence
        frame = self._frame(payload, sequence)
        send = self._socket.send
        try:
            send(self._topic_frame, MORE)
        except zmq.Again:
            # A subscriber's queue is full. Count that, then send to all others: without XPUB_NODROP, ZeroMQ leaves
            # out the full queues, and those only, until they drain.
            self._overflows.value += 1
            rarely.warning(self._key, "a subscriber of %r is too slow and misses events", self.topic)
            self._socket.set(zmq.XPUB_NODROP, 0)
            send(self._topic_frame, MORE)
            self._socket.set(zmq.XPUB_NODROP, 1)
        send(self._id_frame, MORE)
        send(sequence.to_bytes(8, "big"), MORE)
        send(frame, NOBLOCK)
        self.sequence = sequence + 1
        self._published.value += 1
        return sequence

    def _frame(self, payload: object, sequence: int) -> bytearray:
        buffer = bytearray(HEAD.size)
        try:
            event = Event(
                self.publisher_id, sequence, time.time_ns() // 1_000_000, self.topic, self._encoder.encode(payload)
            )
        except (TypeError, ValueError, OverflowError) as e:
            raise InvalidArgument(f"an event of {self.topic!r} cannot be encoded: {e}") from e
        self._encoder.encode_into(event, buffer, HEAD.size)
        length = len(buffer) - HEAD.size
        if length > MAX_EVENT_BYTES:
            raise InvalidArgument(f"an event of {self.topic!r} has {length} bytes; the limit is {MAX_EVENT_BYTES}")
        HEAD.pack_into(buffer, 0, FRAME_VERSION, length)
        return buffer

    async def close(self) -> None:
        """See `EventPublisher.close`."""
        discovery, self._discovery = self._discovery, None
        if discovery is not None:
            try:
                await discovery.delete(self._key)
            except DiscoveryError as e:
                log.warning("leaving discovery: %s; the entry will expire", e)
            finally:
                self._socket.close(LINGER_MS)
