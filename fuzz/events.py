"""What does a router make of what is published, by ZeroMQ's frames?"""

import contextlib
import struct

import msgspec

from dynamo.llm.kv_events import LoadMetrics, RouterEvent
from dynamo.router.replica_book import Digest, SequenceEvents
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import UNDECODABLE
from dynamo.runtime.event_channel import HEAD
from dynamo.runtime.events import Event, Listeners, create_subscriber, scope_of
from dynamo.runtime.zmq_channel import zmq_record
from fuzz.harness import LOOP, BrokenError, settle

SCOPE, TOPIC, PUBLISHER = "ns.c.e", "kv-events", 7
DECODERS = [msgspec.msgpack.Decoder(kind).decode for kind in (list[RouterEvent], LoadMetrics, SequenceEvents, Digest)]


def message(sequence: int, payload: object) -> bytes:
    """The four frames, each with u16be of its length before it."""
    envelope = msgspec.msgpack.encode(Event(PUBLISHER, sequence, 1, TOPIC, msgspec.msgpack.encode(payload)))
    body = HEAD.pack(1, len(envelope)) + envelope
    frames = (TOPIC.encode(), PUBLISHER.to_bytes(8, "big"), sequence.to_bytes(8, "big"), body)
    return b"".join(struct.pack(">H", len(frame)) + frame for frame in frames)


SEEDS = [
    message(0, [{"worker_id": 1, "event": {"event_id": 1, "data": {"stored": {"blocks": []}}, "dp_rank": 0}}]),
    message(
        1, {"worker_id": 1, "dp_rank": 0, "active_decode_blocks": 3, "active_prefill_tokens": 1, "kv_used_blocks": 2}
    ),
    message(5, {"events": []}) + message(6, "x") + message(6, "x"),
]

HEARD: list[Event] = []


async def _start() -> tuple[DistributedRuntime, object]:
    runtime = DistributedRuntime(discovery_backend="mem")
    scope = scope_of(SCOPE)
    await runtime.discovery.put(
        scope.channel_key(TOPIC, PUBLISHER), zmq_record(scope, TOPIC, PUBLISHER, "tcp://127.0.0.1:1")
    )
    return runtime, await create_subscriber(runtime, SCOPE, TOPIC, Listeners(on_event=HEARD.append))


RUNTIME, SUBSCRIBER = LOOP.run_until_complete(_start())


def frames_of(data: bytes) -> list[bytes]:
    """The frames of one message."""
    frames, at = [], 0
    while at + 2 <= len(data) and len(frames) < 64:
        (size,) = struct.unpack_from(">H", data, at)
        frames.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return frames


async def one(data: bytes) -> None:
    """A publisher says messages of up to four frames."""
    HEARD.clear()
    frames = frames_of(data)
    for at in range(0, len(frames), 4):
        SUBSCRIBER._on_message(frames[at : at + 4])  # type: ignore[attr-defined]
    for event in HEARD:
        if event.publisher_id != PUBLISHER or event.sequence < 0:
            raise BrokenError("an event of somebody who is not in discovery")
        for decode in DECODERS:
            with contextlib.suppress(*UNDECODABLE):
                decode(event.payload)
    await settle()
