"""How does an event leave, without anybody waiting for it?

Each publisher binds a PUB socket of its own. It holds up to `DYN_EVENT_PLANE_HWM` (10,000) events for each
subscriber; one that is further behind misses events until it reads again, and the others do not notice.
"""

import logging
import os
from typing import Final, Self

import zmq

from dynamo.runtime.address import join_host_port, split_host_port
from dynamo.runtime.curve import CurveKeys
from dynamo.runtime.discovery import Discovery
from dynamo.runtime.errors import CannotConnect, DiscoveryError
from dynamo.runtime.event_writer import EventWriter, publisher_id_of
from dynamo.runtime.events import EventScope
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.server import advertised_host
from dynamo.runtime.zmq_channel import MORE, NOBLOCK, numeric_host, zmq_record, zmq_socket

log = logging.getLogger(__name__)
rarely = Rarely(log)

MAX_HEARD_BYTES: Final = 4096  # of what subscribers say: topics, and who they are; more would be kept in memory
LINGER_MS: Final = 500  # how long closing waits for the last events to leave


class ZmqPublisher(EventWriter):
    """See `EventPublisher`."""

    def __init__(
        self,
        metrics: Metrics,
        scope: EventScope,
        topic: str,
        publisher_id: int,
        host: str,
        curve: CurveKeys | None = None,
    ) -> None:
        super().__init__(metrics, scope, topic, publisher_id)
        self._topic_frame = topic.encode()
        self._id_frame = publisher_id.to_bytes(8, "big")
        self._socket = zmq_socket(zmq.PUB)
        self._discovery: Discovery | None = None
        try:
            self._socket.set(zmq.LINGER, LINGER_MS)
            self._socket.set(zmq.IPV6, ":" in host)
            self._socket.set(zmq.XPUB_NODROP, 1)
            self._socket.set(zmq.MAXMSGSIZE, MAX_HEARD_BYTES)
            if curve is not None:
                curve.guard(self._socket)
            self._socket.bind(f"tcp://{join_host_port(host, 0)}")
        except zmq.ZMQError as e:
            self._socket.close(0)
            raise CannotConnect(f"cannot listen for subscribers on {host!r} (DYN_EVENT_PLANE_HOST): {e}") from e
        bound = self._socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        host, port = split_host_port(bound.rstrip(b"\0").decode().removeprefix("tcp://"))
        self.endpoint = f"tcp://{join_host_port(advertised_host(host), port)}"
        self._record = zmq_record(scope, topic, publisher_id, self.endpoint, curve.public if curve else None)

    @classmethod
    async def create(
        cls,
        discovery: Discovery,
        metrics: Metrics,
        scope: EventScope,
        topic: str,
        publisher_id: int | None,
        curve: CurveKeys | None = None,
    ) -> Self:
        """Bind and enter discovery; see `dynamo.runtime.events.create_publisher`."""
        publisher_id = publisher_id_of(publisher_id)
        host = os.environ.get("DYN_EVENT_PLANE_HOST", "").strip().strip("[]") or "127.0.0.1"
        publisher = cls(metrics, scope, topic, publisher_id, await numeric_host(host), curve)
        try:
            await discovery.put(publisher._key, publisher._record)
        except BaseException:
            publisher._socket.close(0)
            raise
        publisher._discovery = discovery
        return publisher

    def publish(self, payload: object) -> int:
        """See `EventPublisher.publish`."""
        frame = self._next_frame(payload, closed=self._socket.closed)
        send = self._socket.send
        try:
            send(self._topic_frame, MORE)
        except zmq.Again:
            self._begin_where_there_is_room()
        send(self._id_frame, MORE)
        send(self.sequence.to_bytes(8, "big"), MORE)
        send(frame, NOBLOCK)
        return self._has_left()

    def _begin_where_there_is_room(self) -> None:
        """A subscriber's queue is full, or was when ZeroMQ last looked, which it does every 3 ms at most."""
        send = self._socket.send
        self._socket.get(zmq.EVENTS)  # looks now: else one that has read all would miss what others have no room for
        try:
            send(self._topic_frame, MORE)
        except zmq.Again:
            # Count that, then send to all others: without XPUB_NODROP, ZeroMQ leaves out the full queues, and those
            # only, until they drain.
            self._overflows.value += 1
            rarely.warning(self._key, "a subscriber of %r is too slow and misses events", self.topic)
            self._socket.set(zmq.XPUB_NODROP, 0)
            send(self._topic_frame, MORE)
            self._socket.set(zmq.XPUB_NODROP, 1)

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
