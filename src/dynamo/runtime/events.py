"""Who hears what a worker has to say to nobody in particular?

An event has a topic (`kv-events`, `kv_metrics`) and a scope (an endpoint, a component or a namespace). A publisher
puts itself into discovery, with ZeroMQ the address of a socket of its own; a subscriber finds all publishers of its
topic and scope there and follows them as they come and go. Who comes late, or reads too slowly, misses some events,
and is told so from the sequence numbers, which count up by one for each publisher from 0.

The plane is `zmq` (`dynamo.runtime.zmq_channel`) or `nats` (`dynamo.runtime.nats.channel`: through a server, which
keeps the events of some topics for who was away), by `DistributedRuntime(event_plane=)` or `DYN_EVENT_PLANE`.
"""

import os
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import msgspec

from dynamo.runtime.address import SCHEME, EndpointAddress, check_name
from dynamo.runtime.component import Component, Endpoint, Namespace
from dynamo.runtime.options import env_bool

if TYPE_CHECKING:
    from dynamo.runtime.curve import CurveKeys
    from dynamo.runtime.discovery import Discovery
    from dynamo.runtime.metrics import Metrics
    from dynamo.runtime.nats.link import NatsLink

EVENT_CHANNELS: Final = "v1/event_channels"
PLANES: Final = ("zmq", "nats")


class Event(msgspec.Struct, frozen=True):
    """One event as it arrived. `payload` is still encoded (msgpack): only the subscriber knows its type."""

    publisher_id: int
    sequence: int
    published_at: int
    """Milliseconds since 1970, by the publisher's clock."""
    topic: str
    payload: bytes

    def decode(self) -> Any:
        """The payload as plain values."""
        return msgspec.msgpack.decode(self.payload)


class Irregularity(msgspec.Struct, frozen=True):
    """A publisher's sequence is not what it should be.

    - `late`: the first event heard of a publisher is not its first; `received` events were before it.
    - `gap`: the events from `expected` up to `received` are missing.
    - `restart`: the publisher counts from the beginning again; what it said before is void.
    - `duplicate`: an event that was already delivered; it is not delivered again.
    """

    publisher_id: int
    kind: Literal["late", "gap", "restart", "duplicate"]
    expected: int
    received: int

    @property
    def missed(self) -> int:
        """How many events are known to be missing."""
        return max(0, self.received - self.expected)


@dataclass(slots=True)
class SequenceCheck:
    """One publisher's sequence, as it is heard. `expected` is the next number; `last_ms` the last event's time."""

    expected: int | None = None
    last_ms: int = 0

    def check(self, event: Event) -> Irregularity | None:
        """What is irregular about this event, if anything is. Notes it as heard, unless it is a duplicate."""
        expected, received = self.expected, event.sequence
        if received != expected:
            irregularity = self._compare(event)
            if irregularity is not None and irregularity.kind == "duplicate":
                return irregularity
        else:
            irregularity = None
        self.expected = received + 1
        self.last_ms = event.published_at
        return irregularity

    def _compare(self, event: Event) -> Irregularity | None:
        publisher, received = event.publisher_id, event.sequence
        if self.expected is None:
            return Irregularity(publisher, "late", 0, received) if received else None
        if received > self.expected:
            return Irregularity(publisher, "gap", self.expected, received)
        # A publisher never repeats an event, so a lower number that is newer, or the first one, is a new beginning.
        if event.published_at > self.last_ms or (received == 0 and self.expected > 1):
            return Irregularity(publisher, "restart", 0, received)
        return Irregularity(publisher, "duplicate", self.expected, received)


# --- where events are said and heard


class EventScope(msgspec.Struct, frozen=True):
    """A namespace, or a component in it, or an endpoint of that."""

    namespace: str
    component: str | None = None
    endpoint: str | None = None

    @property
    def path(self) -> str:
        """`namespace/{ns}/component/{c}/endpoint/{e}`, as far as it goes."""
        parts = f"namespace/{self.namespace}"
        if self.component is not None:
            parts += f"/component/{self.component}"
        if self.endpoint is not None:
            parts += f"/endpoint/{self.endpoint}"
        return parts

    def record(self) -> dict[str, Any]:
        """The scope as it stands in a channel's record."""
        if self.component is None:
            return {"kind": "namespace", "namespace": {"name": self.namespace}}
        if self.endpoint is None:
            return {"kind": "component", "component": {"namespace": self.namespace, "name": self.component}}
        place = {"namespace": self.namespace, "component": self.component, "name": self.endpoint}
        return {"kind": "endpoint", "endpoint": place}

    def channel_key(self, topic: str, publisher_id: int) -> str:
        """The discovery key of one publisher."""
        return f"{EVENT_CHANNELS}/{self.path}/topic/{topic}/{publisher_id:x}"


ScopeLike = EventScope | EndpointAddress | Endpoint | Component | Namespace | str


def scope_of(where: ScopeLike) -> EventScope:
    """The scope named by a namespace, component, endpoint, address, or a string of one to three parts (`ns.comp.ep`).

    Raises ValueError for a string that is not one.
    """
    if isinstance(where, EventScope):
        return where
    if isinstance(where, str):
        parts = where.removeprefix(SCHEME).split(".")
        kinds = ("namespace", "component", "endpoint")
        if len(parts) > len(kinds):
            raise ValueError(
                f"event scope {where!r}: write namespace, namespace.component or namespace.component.endpoint"
            )
        return EventScope(*(check_name(kind, part) for kind, part in zip(kinds, parts, strict=False)))
    if isinstance(where, Namespace):
        return EventScope(where.name)
    if isinstance(where, Component):
        return EventScope(where.namespace, where.name)
    address = where.address if isinstance(where, Endpoint) else where
    return EventScope(address.namespace, address.component, address.endpoint)


def check_topic(topic: str) -> str:
    """Return `topic` if it can be one. Raises ValueError."""
    return check_name("topic", topic)


# --- the two ends


class EventPublisher(Protocol):
    """Says events of one topic in one scope."""

    publisher_id: int
    topic: str

    def publish(self, payload: object) -> int:
        """Send one event now; gives its sequence number. Never blocks.

        `payload` is anything msgspec can encode. A subscriber whose queue is full misses the event and is told by
        the next one's number. Call it on the loop's thread.

        Raises:
            InvalidArgument: the payload cannot be encoded, or is over 32 MiB.
            RuntimeError: the publisher is closed, or this is another thread.
        """

    async def close(self) -> None:
        """Leave discovery and close the socket. Safe to call twice."""


class EventSubscriber(Protocol):
    """Hears the events of one topic in one scope: an async iterator, unless it was made with `on_event`."""

    topic: str

    @property
    def publishers(self) -> dict[int, bool]:
        """The publishers in discovery, each with whether its socket is connected."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    async def wait_connected(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """Return once `count` publishers are connected. Raises TimeoutError."""

    async def close(self) -> None:
        """Stop hearing; iteration ends. Safe to call twice."""


MAX_PUBLISHER_ID: Final = 1 << 53  # so that JSON readers without integers keep it exact


def new_publisher_id() -> int:
    """An id that no other publisher has."""
    return random.SystemRandom().randrange(1, MAX_PUBLISHER_ID)


class HasEvents(Protocol):
    """What the event plane needs of a runtime."""

    @property
    def discovery(self) -> "Discovery": ...

    @property
    def metrics(self) -> "Metrics": ...

    @property
    def event_plane(self) -> str: ...

    @property
    def curve(self) -> "CurveKeys | None":
        """What events over ZeroMQ are sealed with; None: they are in the clear."""

    async def nats(self) -> "NatsLink": ...


@dataclass(frozen=True, slots=True)
class Listeners:
    """Plain calls from the socket's callback; they must not block. All are optional."""

    on_event: Callable[[Event], None] | None = None
    """Each event. With it, the subscriber is not iterated."""
    on_irregularity: Callable[[Irregularity], None] | None = None
    """Before the event that showed it."""
    on_join: Callable[[int], None] | None = None
    """A publisher is in discovery: its id."""
    on_leave: Callable[[int], None] | None = None
    """A publisher is no longer in discovery: its id."""


NO_LISTENERS: Final = Listeners()


async def create_publisher(
    runtime: HasEvents, scope: ScopeLike, topic: str, *, publisher_id: int | None = None
) -> EventPublisher:
    """A publisher, once it is bound and in discovery. `publisher_id` is drawn if not given.

    Raises:
        ValueError: a wrong scope, topic, id or variable, or an event plane that is not in this version.
        CannotConnect: the socket cannot be bound, or NATS cannot be reached.
        DiscoveryError: discovery cannot be written.
    """
    if choose_event_plane(runtime.event_plane) == "nats":
        from dynamo.runtime.nats.publisher import NatsPublisher

        return await NatsPublisher.create(
            await runtime.nats(),
            runtime.discovery,
            runtime.metrics,
            scope_of(scope),
            check_topic(topic),
            publisher_id,
        )
    from dynamo.runtime.zmq_publisher import ZmqPublisher

    return await ZmqPublisher.create(
        runtime.discovery, runtime.metrics, scope_of(scope), check_topic(topic), publisher_id, runtime.curve
    )


async def create_subscriber(
    runtime: HasEvents, scope: ScopeLike, topic: str, listeners: Listeners = NO_LISTENERS
) -> EventSubscriber:
    """A subscriber, once it has begun to connect to every publisher in discovery.

    A component's scope includes its endpoints', a namespace's its components'. Raises as `create_publisher`.
    """
    if choose_event_plane(runtime.event_plane) == "nats":
        from dynamo.runtime.nats.subscriber import NatsSubscriber

        return await NatsSubscriber.create(
            await runtime.nats(), runtime.discovery, runtime.metrics, scope_of(scope), check_topic(topic), listeners
        )
    from dynamo.runtime.zmq_subscriber import ZmqSubscriber

    return await ZmqSubscriber.create(
        runtime.discovery, runtime.metrics, scope_of(scope), check_topic(topic), listeners, runtime.curve
    )


def choose_event_plane(name: str | None = None) -> str:
    """The argument, else `DYN_EVENT_PLANE`, else `zmq`. Raises ValueError for what is not in this version."""
    plane = (name or os.environ.get("DYN_EVENT_PLANE") or "zmq").strip().lower()
    if plane not in PLANES:
        raise ValueError(f"event plane {plane!r} is not one of {', '.join(PLANES)} (DYN_EVENT_PLANE)")
    if os.environ.get("DYN_ZMQ_BROKER_URL") or env_bool("DYN_ZMQ_BROKER_ENABLED", False):
        raise ValueError(
            "DYN_ZMQ_BROKER_ENABLED, DYN_ZMQ_BROKER_URL: a ZMQ broker is not supported. Unset them: publishers are "
            "found through discovery, and DYN_EVENT_PLANE_HOST says where they listen"
        )
    return plane
