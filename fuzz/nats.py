"""What does a process make of what comes by way of NATS: connections, and events in parts?"""

import contextlib
from types import SimpleNamespace
from typing import Any

import msgspec

from dynamo.runtime import wire
from dynamo.runtime.event_channel import MAX_EVENT_BYTES, NO_EVENT, read_frame
from dynamo.runtime.events import Event
from dynamo.runtime.nats.channel import PART, Assembler
from dynamo.runtime.nats.transport import ACK, AGAIN, DATA, END, HEAD, RESET, Exchange
from fuzz.harness import BrokenError, settle
from fuzz.request_server import HELLO, MAX_BYTES, PATH, RUNTIME, WORKER, ServerConnection

REQUEST = bytes(wire.frame(wire.REQUEST, (1, PATH, {}, "x")))


def message(kind: int, number: int, expected: int, body: bytes = b"") -> bytes:
    """One message, with u16be of its length before it."""
    data = HEAD.pack(kind, number, expected) + body
    return len(data).to_bytes(2, "big") + data


SEEDS = [
    message(DATA, 0, 0, HELLO) + message(DATA, 1, 1, REQUEST) + message(ACK, 2, 2) + message(END, 2, 2),
    message(DATA, 0, 0, HELLO) + message(DATA, 2, 1, REQUEST) + message(DATA, 1, 1, REQUEST) + message(AGAIN, 3, 0),
    message(DATA, 0, 0, HELLO) + message(RESET, 0, 0),
    message(DATA, 7, 0, HELLO) + PART.pack(2, 0, 2) + b"\0\x0a" + PART.pack(2, 1, 2) + b"part",
]

DECODER = msgspec.msgpack.Decoder(Event)


def link() -> Any:
    """What an exchange needs of its link: nothing leaves."""
    return SimpleNamespace(
        inbox="dynamo.inbox.me",
        max_payload=1 << 20,
        publish=lambda *_: None,
        routes={},
        on_up=[],
        up=True,
        up_since=0.0,
    )


async def one(data: bytes) -> None:
    """Somebody says messages to our inbox; the same bytes are parts of events."""
    ours = link()
    exchange = Exchange(ours)
    made: list[ServerConnection] = []

    def make() -> ServerConnection:
        made.append(ServerConnection(RUNTIME.server))
        WORKER.connection = made[-1]
        return made[-1]

    exchange.listen(make)
    assembler, at = Assembler(), 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + 2 + size]
        at += 2 + size
        said = SimpleNamespace(subject=f"{ours.inbox}.1", reply="dynamo.inbox.you.1", data=body, headers=None)
        ours.routes.get("1", ours.on_stranger)(said)
        with contextlib.suppress(*NO_EVENT):
            whole = assembler.add(body)
            if whole is not None:
                read_frame(whole, DECODER)
    if sum(map(len, assembler._parts)) > 2 * MAX_EVENT_BYTES:
        raise BrokenError("parts without end")
    for connection in made:
        if len(connection._reader._partial) > MAX_BYTES + 4:
            raise BrokenError("more is held than the limit")
        connection.drop("it is over")
    await settle()
    if any(connection.streams for connection in made) or exchange._transports:
        raise BrokenError("something of a connection that is over is still held")
