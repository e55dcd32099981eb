"""How does a payload become a publisher's next event, whatever carries it?"""

import threading
import time

import msgspec

from dynamo import prometheus_names as names
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.event_channel import FRAME_VERSION, HEAD, MAX_EVENT_BYTES
from dynamo.runtime.events import Event, EventScope, new_publisher_id
from dynamo.runtime.metrics import Metrics


class EventWriter:
    """What publishers have in common: who they are, their numbers, and what they count."""

    def __init__(self, metrics: Metrics, scope: EventScope, topic: str, publisher_id: int) -> None:
        self.publisher_id = publisher_id
        self.topic = topic
        self.sequence = 0
        """The next event's number."""
        self._key = scope.channel_key(topic, publisher_id)
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

    def _next_frame(self, payload: object, *, closed: bool) -> bytearray:
        """The next event, ready to leave. Raises as `EventPublisher.publish`."""
        if closed:
            raise RuntimeError(f"the publisher of {self.topic!r} is closed")
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"publish {self.topic!r} on the loop's thread: use loop.call_soon_threadsafe(publish, ...)"
            )
        buffer = bytearray(HEAD.size)
        try:
            event = Event(
                self.publisher_id, self.sequence, time.time_ns() // 1_000_000, self.topic, self._encoder.encode(payload)
            )
        except (TypeError, ValueError, OverflowError) as e:
            raise InvalidArgument(f"an event of {self.topic!r} cannot be encoded: {e}") from e
        self._encoder.encode_into(event, buffer, HEAD.size)
        length = len(buffer) - HEAD.size
        if length > MAX_EVENT_BYTES:
            raise InvalidArgument(f"an event of {self.topic!r} has {length} bytes; the limit is {MAX_EVENT_BYTES}")
        HEAD.pack_into(buffer, 0, FRAME_VERSION, length)
        return buffer

    def _has_left(self) -> int:
        """The event has left, or will. Gives its number."""
        sequence = self.sequence
        self.sequence = sequence + 1
        self._published.value += 1
        return sequence


def publisher_id_of(given: int | None) -> int:
    """The id that was given, or one of its own. Raises ValueError."""
    if given is None:
        return new_publisher_id()
    if not 0 <= given < 1 << 64:
        raise ValueError(f"publisher_id {given} must be from 0 to 2**64 - 1")
    return given
