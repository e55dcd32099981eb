"""What does a caller make of a worker's bytes?"""

from typing import Any

import msgspec

from dynamo.runtime import Context, DistributedRuntime, wire
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.connection import Connection
from dynamo.runtime.errors import DynamoException
from dynamo.runtime.instances import instance_record, parse_instance
from fuzz.harness import LOOP, BrokenError, Transport, feed, settle

MAX_BYTES = 1 << 16
CALLS = 3
HELLO = wire.PREAMBLE + bytes(wire.frame(wire.HELLO, (MAX_BYTES, "fuzz")))


def session(*frames: tuple[int, Any]) -> bytes:
    """Read at once: a greeting, and frames."""
    return b"\0" + HELLO + b"".join(bytes(wire.frame(*each)) for each in frames)


SEEDS = [
    session((wire.ITEMS, ([1, 2, 1], [1, {"a": 2}, "x"], [1, 3])), (wire.PONG, ()), (wire.ITEMS, ([2], [1], [2]))),
    session(
        (wire.ERROR, (1, {"kind": "EngineShutdown", "message": "m"})), (wire.REFUSED, (2, {"kind": "CannotConnect"}))
    ),
    b"\5" + session((wire.FLOW, (1, False)), (wire.LEAVING, ["1/a/b/c"]), (wire.ITEMS, ([1], [b"x" * 500], [])))[1:],
]


class Sink:
    """Heard of its end at most once, and of nothing after that."""

    def __init__(self) -> None:
        self.over = False

    def _still(self) -> None:
        if self.over:
            raise BrokenError("a stream went on after its end")

    def on_item(self, item: msgspec.Raw) -> None:
        self._still()

    def on_end(self) -> None:
        self._still()
        self.over = True

    def on_error(self, error: DynamoException) -> None:
        self.on_end()

    def flush(self) -> None:
        pass


async def _start() -> DistributedRuntime:
    runtime = DistributedRuntime(discovery_backend="mem")
    runtime.pool.max_message_bytes = MAX_BYTES
    return runtime


RUNTIME = LOOP.run_until_complete(_start())
ADDRESS = EndpointAddress.parse("a.b.c")
TARGET = parse_instance("/1", instance_record(ADDRESS, 1, "127.0.0.1:1"), lambda _: None)


async def one(data: bytes) -> None:
    """A worker that was asked three things says this, and is gone."""
    connection = Connection("127.0.0.1:1", RUNTIME.pool)
    transport = Transport(connection)
    connection.connection_made(transport)
    sinks = [Sink() for _ in range(CALLS)]
    for sink in sinks:
        connection.call(TARGET, "x", sink, Context())
    feed(connection, transport, data)
    if len(connection._reader._partial) > MAX_BYTES + 4:
        raise BrokenError(f"{len(connection._reader._partial)} bytes are held")
    await settle()
    transport.abort()
    await settle()
    if connection.calls or TARGET.inflight or not all(sink.over for sink in sinks):
        raise BrokenError("a call outlived its connection")
