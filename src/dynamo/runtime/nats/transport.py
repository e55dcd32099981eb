"""How do two processes have a connection if all they can reach is a NATS server?

What the request plane writes to a socket, and reads from one, goes in numbered messages instead, from one process's
inbox to the other's. NATS may lose some, when a server restarts or cuts off who reads too slowly, and tells the sender
nothing of how fast the other side reads; so each message says how far its sender has read. What is not yet read is
kept, asked for again where a number is missing, and counts as unsent: writers are told to wait as with a full socket.

A message is u8 kind, u64be number, u64be the number that is expected next, and bytes of the stream. DATA and END (of
the stream) have a number of their own; the others have that of the next of these.
"""

import asyncio
import itertools
import logging
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from dynamo.runtime.nats.link import INBOX, NOBODY, Message, NatsLink, status_of

log = logging.getLogger(__name__)

HEAD: Final = struct.Struct(">BQQ")
DATA, END, ACK, AGAIN, RESET = range(1, 6)

CHUNK_BYTES: Final = 256 << 10  # so that one large frame does not hold up all others of the process
ACK_BYTES: Final = 256 << 10  # read, and the writer not told yet; pings tell of what is less
HIGH_WATER_BYTES: Final = 64 << 10  # asyncio's own default, until the protocol says
AGAIN_S: Final = 0.25  # what is missing is asked for again after so long
AWAY_S: Final = 1.0  # the other process is gone if nobody hears its subject for so long ...
BACK_S: Final = 4.0  # ... but after we ourselves were cut off it may take so long to be back, too
PROBE_S: Final = 0.25
CLOSE_S: Final = 1.0  # the other side gets so long to read the last


class NatsTransport(asyncio.Transport):
    """One end of a connection. Does what the request plane asks of a transport of asyncio's."""

    def __init__(self, exchange: "Exchange", name: str, peer: str, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the other side was first heard; ConnectionRefusedError if there is nobody."""
        self._exchange = exchange
        self._link = exchange.link
        self._name = name
        self._peer = peer
        self._reply = f"{self._link.inbox}.{name}"
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._unread: deque[tuple[int, bytes]] = deque()
        """What the other side has not yet confirmed, as kind and bytes, from `_first` up to `_next`."""
        self._first = 0
        self._next = 0
        self._unread_bytes = 0
        self._expected = 0
        self._unconfirmed_bytes = 0
        self._asked: tuple[int, float] = (-1, 0.0)
        """What was last asked for again, and when."""
        self._high, self._low = HIGH_WATER_BYTES, HIGH_WATER_BYTES // 4
        self._paused = False
        self._closing = False
        self._lost = False
        self._away_since = self._away_seen = 0.0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def begin(self) -> None:
        """Tell the protocol that it may write."""
        self._protocol.connection_made(self)

    # --- what a protocol asks of its transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return f"nats:{self._peer}" if name == "peername" else default

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return self._unread_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_WATER_BYTES if high is None else high
        self._low = self._high // 4 if low is None else low

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return
        size = min(CHUNK_BYTES, self._link.max_payload - HEAD.size)
        for start in range(0, len(data), size):
            self._put(DATA, bytes(data[start : start + size]))
        if self._unread_bytes > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def close(self) -> None:
        """Let the other side read what was written, for at most CLOSE_S."""
        if not self._closing:
            self._put(END, b"")
            self._closing = True
            self._later("close", CLOSE_S, self._lose, None)

    def abort(self) -> None:
        if not self._lost:
            self._say(RESET)
            self._lose(None)

    # --- sending

    def _put(self, kind: int, data: bytes) -> None:
        self._unread.append((kind, data))
        self._unread_bytes += len(data)
        self._publish(kind, self._next, data)
        self._next += 1

    def _say(self, kind: int) -> None:
        self._publish(kind, self._next, b"")

    def _publish(self, kind: int, number: int, data: bytes) -> None:
        """Without a connection nothing leaves: when it is back, both sides tell what they have."""
        self._unconfirmed_bytes = 0
        self._link.publish(self._peer, HEAD.pack(kind, number, self._expected) + data, self._reply)

    def _confirmed(self, expected: int) -> None:
        """The other side has read all before this number."""
        if expected > self._next:
            raise ValueError(f"it has read {expected} messages of {self._next}")
        while self._first < expected:
            _, data = self._unread.popleft()
            self._unread_bytes -= len(data)
            self._first += 1
        if self._paused and self._unread_bytes <= self._low:
            self._paused = False
            self._protocol.resume_writing()
        if self._closing and not self._unread:
            self._lose(None)

    def resume(self) -> None:
        """The link is up again: find out what was lost."""
        if self.opened.done():
            self._say(AGAIN)
        else:
            self._send_again()  # the other side does not know of this connection yet

    # --- receiving

    def receive(self, message: Message) -> None:
        """One message for this connection."""
        if self._lost:
            return
        if status_of(message) == NOBODY:
            self._nobody()
            return
        try:
            kind, number, expected = HEAD.unpack_from(message.data)
            if kind != RESET:
                self._confirmed(expected)
        except (struct.error, ValueError) as e:
            log.warning("closing the connection to %s, which does not speak our protocol: %s", self._peer, e)
            self.abort()
            return
        if kind == RESET:
            self._lose(ConnectionResetError("the other side does not have this connection any more"))
            return
        if not self.opened.done():
            self.opened.set_result(None)
        self._away_seen = 0.0
        if kind not in (DATA, END):
            if number > self._expected:
                self._ask_again()
            if kind == AGAIN:
                self._send_again()
        elif number == self._expected:
            self._expected += 1
            self._read(kind, message.data[HEAD.size :])
        elif number > self._expected:
            self._ask_again()

    def _read(self, kind: int, data: bytes) -> None:
        if kind == END:
            self._say(ACK)
            self._lose(None)
            return
        self._unconfirmed_bytes += len(data)
        if not self._closing:
            self._protocol.data_received(data)
        if self._unconfirmed_bytes >= ACK_BYTES and not self._lost:
            self._say(ACK)

    def _ask_again(self) -> None:
        asked, at = self._asked
        if asked != self._expected or self._loop.time() - at >= AGAIN_S:
            self._asked = self._expected, self._loop.time()
            self._say(AGAIN)

    def _send_again(self) -> None:
        for number, (kind, data) in enumerate(self._unread, self._first):
            self._publish(kind, number, data)

    def _nobody(self) -> None:
        """NATS says that nobody hears what we send: the other process is gone, or is being connected again."""
        now = self._loop.time()
        if now - self._away_seen > AWAY_S:
            self._away_since = now
        self._away_seen = now
        patience_s = AWAY_S if self.opened.done() else 0.0
        if now >= max(self._away_since + patience_s, self._link.up_since + BACK_S * (self._exchange.was_down)):
            error = ConnectionRefusedError if not self.opened.done() else ConnectionResetError
            self._lose(error("no process listens there any more"))
        else:
            self._later("probe", PROBE_S, self._probe)

    def _probe(self) -> None:
        if self.opened.done():
            self._say(ACK)
        else:
            self._send_again()

    # --- the end

    def _later(self, what: str, delay_s: float, call: Callable[..., None], *args: object) -> None:
        known = self._timers.get(what)
        if known is not None:
            known.cancel()
        self._timers[what] = self._loop.call_later(delay_s, call, *args)

    def _lose(self, error: OSError | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        for timer in self._timers.values():
            timer.cancel()
        self._exchange.forget(self._name)
        if not self.opened.done():
            self.opened.set_exception(error or ConnectionAbortedError("the connection was closed"))
            self.opened.exception()  # whoever dials hears it; nobody may
        self._unread.clear()
        self._unread_bytes = 0
        self._loop.call_soon(self._protocol.connection_lost, error)


class Exchange:
    """The connections of one process by way of NATS: those it makes, and those it takes."""

    def __init__(self, link: NatsLink) -> None:
        self.link = link
        self.was_down = False
        """Whether the link was ever lost, and the others' perhaps with it."""
        self._token = link.inbox.removeprefix(INBOX)
        self._numbers = itertools.count()
        self._transports: dict[str, NatsTransport] = {}
        self._make_protocol: Callable[[], asyncio.Protocol] | None = None
        link.on_stranger = self._on_stranger
        link.on_up.append(self._resume)

    def listen(self, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        """Take connections: a protocol for each."""
        self._make_protocol = make_protocol

    def stop_listening(self) -> None:
        """Refuse those who still come."""
        self._make_protocol = None

    async def dial(self, inbox: str, protocol: asyncio.Protocol) -> None:
        """Connect to the process with this inbox. The caller bounds the time.

        Raises:
            OSError: nobody is there, or who is there takes no connections.
        """
        number = str(next(self._numbers))
        transport = self._add(number, f"{inbox}.{self._token}-{number}", protocol)
        transport.begin()
        await transport.opened

    def _add(self, name: str, peer: str, protocol: asyncio.Protocol) -> NatsTransport:
        transport = self._transports[name] = NatsTransport(self, name, peer, protocol)
        self.link.routes[name] = transport.receive
        return transport

    def forget(self, name: str) -> None:
        """A connection is over."""
        self._transports.pop(name, None)
        self.link.routes.pop(name, None)

    def _on_stranger(self, message: Message) -> None:
        """The first message of somebody new, or one more of a connection that is over."""
        if status_of(message) or len(message.data) < HEAD.size or not message.reply:
            return
        kind, number, _ = HEAD.unpack_from(message.data)
        if kind == DATA and number == 0 and self._make_protocol is not None:
            name = message.subject.removeprefix(f"{self.link.inbox}.")
            transport = self._add(name, message.reply, self._make_protocol())
            transport.begin()
            transport.receive(message)
        elif kind in (DATA, AGAIN):
            self.link.publish(message.reply, HEAD.pack(RESET, 0, 0))

    def _resume(self) -> None:
        self.was_down = True
        for transport in tuple(self._transports.values()):
            transport.resume()
