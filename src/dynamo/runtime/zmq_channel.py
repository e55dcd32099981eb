"""What do the two ends of a ZeroMQ event channel agree on?

An event is four frames: topic, publisher id and sequence (8 bytes each, big-endian), and `0x01`, u32be length,
msgpack of the `Event` (facts row E3). Where a publisher listens stands in its record in discovery (facts row R9).

ZeroMQ's own sockets are used from the loop's callbacks: `zmq.asyncio` costs a future and a task step an event, four
times as much (`benchmarks/event_plane.py`).
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
from typing import Any, Final

import msgspec
import zmq

from dynamo.runtime.address import split_host_port
from dynamo.runtime.events import EventScope
from dynamo.runtime.options import env_number

FRAME_VERSION: Final = 1
HEAD: Final = struct.Struct(">BI")  # version, length of the envelope
MAX_EVENT_BYTES: Final = 32 << 20  # the request plane's limit; a larger one closes the connection it came by
DEFAULT_HWM: Final = 10_000  # events held for one slow subscriber; at 1 KB each 10 MB
HEARTBEAT_MS: Final = 2000  # as the request plane's pings
HEARTBEAT_TIMEOUT_MS: Final = 6000  # a silent peer is given up after this
RESOLVE_TIMEOUT_S: Final = 5.0  # for the name of a host

NOBLOCK: Final = zmq.NOBLOCK
MORE: Final = zmq.NOBLOCK | zmq.SNDMORE


class Channel(msgspec.Struct):
    """A publisher's record in discovery. `instance_id` is the publisher's id."""

    type: str
    scope: dict[str, Any]
    topic: str
    instance_id: int
    transport: dict[str, Any]

    @classmethod
    def of(cls, scope: EventScope, topic: str, publisher_id: int, endpoint: str) -> "Channel":
        """The record of a publisher that listens on `endpoint` (`tcp://host:port`)."""
        transport = {"kind": "Zmq", "config": {"endpoint": endpoint}}
        return cls("EventChannel", scope.record(), topic, publisher_id, transport)

    def endpoint(self, publisher_id: int) -> str:
        """Where to connect. Raises ValueError for a record that is not this publisher's, over ZeroMQ and TCP."""
        config = self.transport.get("config")
        endpoint = config.get("endpoint") if self.transport.get("kind") == "Zmq" and isinstance(config, dict) else None
        if not isinstance(endpoint, str) or not endpoint.startswith("tcp://"):
            raise ValueError(f"its transport {self.transport} is not ZeroMQ over TCP")
        split_host_port(endpoint.removeprefix("tcp://"))
        if self.instance_id != publisher_id:
            raise ValueError(f"its instance_id {self.instance_id:x} does not fit its key")
        return endpoint


_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}  # by process id: a context does not survive a fork


def zmq_socket(kind: int) -> zmq.Socket[bytes]:
    """A new socket with what both ends set: queue length and heartbeats. Raises ValueError naming a variable."""
    hwm = queue_length()
    pid = os.getpid()
    if pid not in _contexts:
        # One thread moves some hundred MB a second; more only help many publishers of one process.
        _contexts[pid] = zmq.Context(io_threads=_whole("DYN_ZMQ_IO_THREADS", 1, 64))
    made = _contexts[pid].socket(kind)
    made.set(zmq.SNDHWM if kind == zmq.PUB else zmq.RCVHWM, hwm)
    made.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    made.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return made


def queue_length() -> int:
    """Events that wait for one subscriber, or for a way to leave. Raises ValueError naming the variable."""
    return _whole("DYN_EVENT_PLANE_HWM", DEFAULT_HWM, 10_000_000)


async def numeric_host(host: str) -> str:
    """The host's address: ZeroMQ binds no names. What does not resolve within 5 s is given back as it is."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return host
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        return host  # may be the name of an interface, which can be bound, or come to resolve when ZeroMQ tries again
    return str(found[0][4][0])


def _whole(variable: str, default: int, greatest: int) -> int:
    value = env_number(variable, default)
    if value != int(value) or not 1 <= value <= greatest:
        raise ValueError(f"{variable}: {value:g} must be a whole number from 1 to {greatest}")
    return int(value)
