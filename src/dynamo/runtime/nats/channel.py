"""What do the two ends of an event channel on NATS agree on?

Subjects: `dynamo.events.{namespace}.{component}.{endpoint}.{topic}.{publisher:x}`, with `%` for what a scope does not
have, so that one pattern hears a scope and all in it. A message is the frame of any channel
(`dynamo.runtime.event_channel`), or where the server takes no message of that size `0x02`, u16be index, u16be count,
and a part of it. A publisher's record in discovery has the transport `{"kind": "Nats", "config": {"subject": ...}}`.
"""

import struct
from typing import Final
from urllib.parse import quote

import msgspec

from dynamo.runtime.event_channel import MAX_EVENT_BYTES, Channel
from dynamo.runtime.events import EventScope

PREFIX: Final = "dynamo.events"
ABSENT: Final = "%"  # no name is encoded as this
PART: Final = struct.Struct(">BHH")
PART_VERSION: Final = 2


def _token(name: str | None) -> str:
    """A name as one token of a subject: NATS gives a meaning to `*` and `>`."""
    return ABSENT if name is None else quote(name, safe="")


def subject_of(scope: EventScope, topic: str, publisher_id: int) -> str:
    """Where one publisher speaks."""
    parts = (scope.namespace, scope.component, scope.endpoint)
    return ".".join([PREFIX, *map(_token, parts), _token(topic), f"{publisher_id:x}"])


def pattern_of(scope: EventScope, topic: str) -> str:
    """What hears all publishers of a topic in a scope: a component's includes its endpoints', and so on."""
    parts = [_token(scope.namespace)]
    parts.append("*" if scope.component is None else _token(scope.component))
    parts.append("*" if scope.endpoint is None else _token(scope.endpoint))
    return ".".join([PREFIX, *parts, _token(topic), "*"])


def publisher_in(subject: str) -> int | None:
    """The publisher's id, from the end of a subject."""
    try:
        return int(subject.rpartition(".")[2], 16)
    except ValueError:
        return None


def channel_record(scope: EventScope, topic: str, publisher_id: int) -> bytes:
    """The record of a publisher in discovery."""
    config = {"subject": subject_of(scope, topic, publisher_id)}
    return msgspec.json.encode(Channel.of(scope, topic, publisher_id, "Nats", config))


def check_record(value: bytes, publisher_id: int) -> None:
    """Raises ValueError, or DecodeError, for a record that is not this publisher's, or of another plane."""
    record = msgspec.json.decode(value, type=Channel)
    if record.transport.get("kind") != "Nats":
        raise ValueError(f"its transport {record.transport} is not NATS")
    record.check_id(publisher_id)


def in_parts(frame: bytes, limit: int) -> list[bytes]:
    """A frame as messages of at most `limit` bytes: mostly itself."""
    if len(frame) <= limit:
        return [frame]
    size = limit - PART.size
    count = -(-len(frame) // size)
    return [PART.pack(PART_VERSION, i, count) + frame[i * size : (i + 1) * size] for i in range(count)]


class Assembler:
    """Puts one publisher's parts together. They come in order; what is not whole is dropped, and shows as a gap."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, message: bytes) -> bytes | None:
        """The frame, if the message completes one. Raises ValueError for what is neither a frame nor a part."""
        if not message or message[0] != PART_VERSION:
            return message
        if len(message) < PART.size:
            raise ValueError("a part without its head")
        _, index, count = PART.unpack_from(message)
        if index == 0:
            self._parts.clear()
        if index != len(self._parts) or count * len(message) > 2 * MAX_EVENT_BYTES:
            self._parts.clear()
            return None  # one before it is missing
        self._parts.append(message[PART.size :])
        if len(self._parts) < count:
            return None
        whole = b"".join(self._parts)
        self._parts.clear()
        return whole
