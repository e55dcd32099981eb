"""How do the routers of the same workers tell each other what they do? [K50]

Over the event plane: what is booked and freed as it happens (topic `active_sequences_events`, the shape that others
know), a digest of all that is open every two seconds (`active_sequences_digests`), and where sessions were bound
(`session_affinity_events`). What to make of it is `ReplicaBook`'s business; here are sockets and the clock.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

from dynamo.router.active_load import Booking
from dynamo.router.affinity import SessionAffinity
from dynamo.router.replica_book import Digest, Place, ReplicaBook, SequenceEvents
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import UNDECODABLE
from dynamo.runtime.events import (
    Event,
    EventPublisher,
    EventSubscriber,
    HasEvents,
    Listeners,
    ScopeLike,
    create_publisher,
    create_subscriber,
    new_publisher_id,
)
from dynamo.runtime.logs import Rarely

rarely = Rarely(logging.getLogger(__name__))

EVENTS_TOPIC = "active_sequences_events"
DIGESTS_TOPIC = "active_sequences_digests"
SESSIONS_TOPIC = "session_affinity_events"
DIGEST_INTERVAL_S = 2.0  # so routers agree within six seconds of a loss; 9 bytes an open request


class SessionBound(msgspec.Struct, frozen=True):
    """A router bound a session to a worker."""

    session_id: str
    worker: Place
    router_id: int


class ReplicaSync:
    """Exchanges with the other routers of the endpoint `where`. Its `router_id` is also its publishers' id."""

    def __init__(
        self,
        runtime: HasEvents,
        where: ScopeLike,
        scheduler: KvScheduler,
        *,
        affinity: SessionAffinity | None = None,
        on_change: Callable[[], None] | None = None,
        digest_interval_s: float = DIGEST_INTERVAL_S,
    ) -> None:
        self.router_id = new_publisher_id()
        self.book = ReplicaBook(scheduler, self.router_id)
        self.undecodable = 0
        self._runtime = runtime
        self._where = where
        self._affinity = affinity
        self._on_change = on_change
        self._interval_s = digest_interval_s
        self._loop = asyncio.get_running_loop()
        self._publishers: dict[str, EventPublisher] = {}
        self._subscribers: list[EventSubscriber] = []
        self._decoders: dict[str, Callable[[bytes], SequenceEvents | Digest | SessionBound]] = {
            EVENTS_TOPIC: msgspec.msgpack.Decoder(SequenceEvents).decode,
            DIGESTS_TOPIC: msgspec.msgpack.Decoder(Digest).decode,
            SESSIONS_TOPIC: msgspec.msgpack.Decoder(SessionBound).decode,
        }
        self._sequence = -1
        self._flushing: asyncio.Handle | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to speak and to listen. Raises as `create_publisher` and `create_subscriber`."""
        topics = [EVENTS_TOPIC, DIGESTS_TOPIC]
        if self._affinity is not None:
            topics.append(SESSIONS_TOPIC)
            self._affinity.on_bind = self._tell_bound
        try:
            for topic in topics:
                listeners = Listeners(
                    on_event=self._hear, on_leave=self._router_left if topic == EVENTS_TOPIC else None
                )
                self._subscribers.append(await create_subscriber(self._runtime, self._where, topic, listeners))
                self._publishers[topic] = await create_publisher(
                    self._runtime, self._where, topic, publisher_id=self.router_id
                )
        except BaseException:
            await self.close()
            raise
        self._ticking = self._loop.create_task(self._tick(), name="replica digests")

    async def close(self) -> None:
        """Leave the others, who forget what we had open."""
        if self._affinity is not None:
            self._affinity.on_bind = None
        if self._ticking is not None:
            self._ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticking
        if self._flushing is not None:
            self._flushing.cancel()
        for subscriber in self._subscribers:
            await subscriber.close()
        for publisher in self._publishers.values():
            await publisher.close()
        self._publishers.clear()

    @property
    def routers(self) -> int:
        """How many other routers are heard."""
        ids = self._subscribers[0].publishers if self._subscribers else {}
        return len([router for router in ids if router != self.router_id])

    # --- speaking

    def booked(self, booking: Booking, sequence_hashes: list[int]) -> None:
        """We booked a request. What happens in one turn of the loop leaves in one message."""
        self.book.booked(booking, sequence_hashes)
        self._soon()

    def prefill_done(self, booking: Booking) -> None:
        """One of ours made its first token."""
        self.book.prefill_done(booking)
        self._soon()

    def freed(self, booking: Booking) -> None:
        """One of ours ended."""
        self.book.freed(booking)
        self._soon()

    def _soon(self) -> None:
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        events = self.book.take_events()
        publisher = self._publishers.get(EVENTS_TOPIC)
        if events is not None and publisher is not None:
            self._sequence = publisher.publish(events)

    def _tell_bound(self, session_id: str, worker: WorkerKey) -> None:
        publisher = self._publishers.get(SESSIONS_TOPIC)
        if publisher is not None:
            publisher.publish(SessionBound(session_id, Place(*worker), self.router_id))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            self._flush()
            self._publishers[DIGESTS_TOPIC].publish(self.book.digest(self._sequence))

    # --- listening

    def _hear(self, event: Event) -> None:
        if event.publisher_id == self.router_id:
            return
        try:
            message = self._decoders[event.topic](event.payload)
        except UNDECODABLE as e:
            self.undecodable += 1
            rarely.warning(
                f"{event.topic} {event.publisher_id}",
                "publisher %x sent what is not of the topic %s: %s",
                event.publisher_id,
                event.topic,
                e,
            )
            return
        now = self._loop.time()
        if isinstance(message, SequenceEvents):
            self.book.hear(message, event.sequence, now)
        elif isinstance(message, Digest):
            self.book.hear_digest(message, now)
            self._soon()  # it may have asked for something
        elif self._affinity is not None:
            worker = WorkerKey(message.worker.worker_id, message.worker.dp_rank)
            self._affinity.adopt(message.session_id, worker, now)
        if self._on_change is not None:
            self._on_change()

    def _router_left(self, publisher_id: int) -> None:
        self.book.router_left(publisher_id)
        if self._on_change is not None:
            self._on_change()
