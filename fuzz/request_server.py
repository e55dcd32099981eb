"""What does a worker make of a caller's bytes?"""

from typing import Any

import msgspec

from dynamo.runtime import DistributedRuntime, wire
from dynamo.runtime.server import ServerConnection
from dynamo.runtime.streams import ResponseStream
from fuzz.harness import LOOP, BrokenError, Transport, feed, settle

MAX_BYTES = 1 << 16
HELLO = wire.PREAMBLE + bytes(wire.frame(wire.HELLO, (MAX_BYTES, "fuzz")))
PATH = "1/a/b/c"


def session(*frames: tuple[int, Any]) -> bytes:
    """Read at once: a greeting, and frames."""
    return b"\0" + HELLO + b"".join(bytes(wire.frame(*each)) for each in frames)


SEEDS = [
    session((wire.REQUEST, (1, PATH, {"request-id": "r"}, {"token_ids": [1, 2]})), (wire.PING, ())),
    b"\7" + session((wire.REQUEST, (1, PATH, {}, "x" * 300)), (wire.CANCEL, (1, "kill")))[1:],
    session((wire.REQUEST, (1, PATH, {}, None)), (wire.DATA, (1, "x")), (wire.END, (1,)), (wire.FLOW, (1, False))),
    session((wire.LEFT, [PATH]), (wire.REQUEST, (2, "2/a/b/c", {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16}, 1))),
]


class Worker:
    """Echoes what reaches it, and remembers on behalf of which connection."""

    def __init__(self) -> None:
        self.connection: ServerConnection | None = None
        self.reached = 0

    def __call__(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        self.reached += 1
        if self.connection is None or not self.connection.greeted:
            raise BrokenError("a stranger reached the handler")
        stream.send(payload)
        if self.reached % 2:
            stream.end()


async def _start() -> tuple[DistributedRuntime, Worker]:
    runtime, worker = DistributedRuntime(discovery_backend="mem"), Worker()
    await runtime.endpoint("a.b.c").start_push_endpoint(worker, instance_id=1)
    runtime.server.max_message_bytes = MAX_BYTES
    return runtime, worker


RUNTIME, WORKER = LOOP.run_until_complete(_start())


async def one(data: bytes) -> None:
    """A caller connects, says this, and is gone."""
    connection = WORKER.connection = ServerConnection(RUNTIME.server)
    transport = Transport(connection)
    connection.connection_made(transport)
    feed(connection, transport, data)
    held = len(connection._reader._partial)
    if held > (MAX_BYTES if connection.greeted else wire.MAX_GREETING_BYTES) + 4:
        raise BrokenError(f"{held} bytes are held")
    await settle()
    transport.abort()
    await settle()
    if connection.streams or connection in RUNTIME.server.connections:
        raise BrokenError("something of a connection that is over is still held")
