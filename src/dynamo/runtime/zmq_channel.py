"""What do the two ends of a ZeroMQ event channel agree on?

An event is four frames: topic, publisher id and sequence (8 bytes each, big-endian), and the frame of any channel
(`dynamo.runtime.event_channel`; facts row E3).

ZeroMQ's own sockets are used from the loop's callbacks: `zmq.asyncio` costs a future and a task step an event, four
times as much (`benchmarks/event_plane.py`).
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
from typing import Final

import msgspec
import zmq

from dynamo.runtime.address import split_host_port
from dynamo.runtime.event_channel import Channel, queue_length, whole_number
from dynamo.runtime.events import EventScope

HEARTBEAT_MS: Final = 2000  # as the request plane's pings
HEARTBEAT_TIMEOUT_MS: Final = 6000  # a silent peer is given up after this
MAX_SOCKETS: Final = 32768  # of a process; ZeroMQ's own 1,023 would be 500 simulated workers with two publishers each
RESOLVE_TIMEOUT_S: Final = 5.0  # for the name of a host

NOBLOCK: Final = zmq.NOBLOCK
MORE: Final = zmq.NOBLOCK | zmq.SNDMORE


def zmq_record(scope: EventScope, topic: str, publisher_id: int, endpoint: str, key: bytes | None = None) -> bytes:
    """The record of a publisher that listens on `endpoint` (`tcp://host:port`); `key` is its public one, if it has."""
    config = {"endpoint": endpoint} | ({"curve_key": key.decode()} if key is not None else {})
    return msgspec.json.encode(Channel.of(scope, topic, publisher_id, "Zmq", config))


class Reached(msgspec.Struct, frozen=True):
    """Where a publisher is heard, and its public key (Z85), if it seals what it says."""

    endpoint: str
    key: bytes | None = None


def reached_in(record: bytes, publisher_id: int) -> Reached:
    """Where to connect. Raises ValueError, or DecodeError, for a record that is not this publisher's, over ZeroMQ and
    TCP."""
    channel = msgspec.json.decode(record, type=Channel)
    transport = channel.transport
    config = transport.get("config")
    endpoint = config.get("endpoint") if transport.get("kind") == "Zmq" and isinstance(config, dict) else None
    if not isinstance(endpoint, str) or not endpoint.startswith("tcp://"):
        raise ValueError(f"its transport {transport} is not ZeroMQ over TCP")
    split_host_port(endpoint.removeprefix("tcp://"))
    channel.check_id(publisher_id)
    key = config.get("curve_key") if isinstance(config, dict) else None
    if key is not None and not isinstance(key, str):
        raise ValueError(f"its key {key!r} is no text")
    return Reached(endpoint, key.encode() if key else None)


_contexts: dict[int, zmq.Context[zmq.Socket[bytes]]] = {}  # by process id: a context does not survive a fork


def zmq_socket(kind: int) -> zmq.Socket[bytes]:
    """A new socket with what both ends set: queue length and heartbeats. Raises ValueError naming a variable."""
    hwm = queue_length()
    pid = os.getpid()
    if pid not in _contexts:
        # One thread moves some hundred MB a second; more only help many publishers of one process.
        _contexts[pid] = zmq.Context(io_threads=whole_number("DYN_ZMQ_IO_THREADS", 1, 64))
        _contexts[pid].set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    made = _contexts[pid].socket(kind)
    made.set(zmq.SNDHWM if kind == zmq.PUB else zmq.RCVHWM, hwm)
    made.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    made.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return made


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
