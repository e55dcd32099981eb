"""What do the two ends of an event channel agree on, whatever carries it?

A frame is `0x01`, u32be length, msgpack of the `Event` (facts row E3). Where a publisher speaks stands in its record in
discovery (facts row R9).
"""

import struct
from typing import Any, Final

import msgspec

from dynamo.runtime.errors import UNDECODABLE
from dynamo.runtime.events import Event, EventScope
from dynamo.runtime.options import env_number

FRAME_VERSION: Final = 1
HEAD: Final = struct.Struct(">BI")  # version, length of the envelope
MAX_EVENT_BYTES: Final = 32 << 20  # the request plane's limit; a larger one closes the connection it came by
DEFAULT_HWM: Final = 10_000  # events held for one slow subscriber; at 1 KB each 10 MB

NO_EVENT: Final = (*UNDECODABLE, ValueError, struct.error, OverflowError)
"""What reading a message may raise that is no event."""


class Channel(msgspec.Struct):
    """A publisher's record in discovery. `instance_id` is the publisher's id."""

    type: str
    scope: dict[str, Any]
    topic: str
    instance_id: int
    transport: dict[str, Any]

    @classmethod
    def of(cls, scope: EventScope, topic: str, publisher_id: int, kind: str, config: dict[str, Any]) -> "Channel":
        """The record of a publisher that is heard by this kind of transport."""
        return cls("EventChannel", scope.record(), topic, publisher_id, {"kind": kind, "config": config})

    def check_id(self, publisher_id: int) -> None:
        """Raises ValueError for a record that is not this publisher's."""
        if self.instance_id != publisher_id:
            raise ValueError(f"its instance_id {self.instance_id:x} does not fit its key")


def read_frame(frame: bytes, decode: "msgspec.msgpack.Decoder[Event]") -> Event:
    """The event in a frame. Raises `NO_EVENT`."""
    version, length = HEAD.unpack_from(frame)
    if version != FRAME_VERSION or length != len(frame) - HEAD.size:
        raise ValueError(f"version {version}, or a length of {length} that is not its own")
    event = decode.decode(memoryview(frame)[HEAD.size :])
    if event.sequence < 0:
        raise ValueError(f"its number is {event.sequence}")
    return event


def queue_length() -> int:
    """Events that wait for one subscriber, or for a way to leave. Raises ValueError naming the variable."""
    return whole_number("DYN_EVENT_PLANE_HWM", DEFAULT_HWM, 10_000_000)


def whole_number(variable: str, default: int, greatest: int) -> int:
    """A number from 1 to `greatest` of the environment. Raises ValueError naming the variable."""
    value = env_number(variable, default)
    if value != int(value) or not 1 <= value <= greatest:
        raise ValueError(f"{variable}: {value:g} must be a whole number from 1 to {greatest}")
    return int(value)
