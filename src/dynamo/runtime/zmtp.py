"""How does one listen to a ZeroMQ publisher without ZeroMQ?

The part of ZMTP 3.0 (rfc.zeromq.org/spec/23) that a subscriber needs: TCP, one subscription, in the clear or sealed by
CURVE (`dynamo.runtime.curve_session`). libzmq hands each message over from a thread of its own, frame by frame: five
times what it costs to take all that a read brought apart here, where the event loop reads anyway.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from dynamo.runtime.curve_session import CurveSession

log = logging.getLogger(__name__)

RECONNECT_S: Final = 0.1
RECONNECT_MAX_S: Final = 2.0  # a dead publisher's record goes after 10 s; until then it costs a try each 2 s
MAX_FRAMES: Final = 64  # of a message; an event has four
CONNECT_TIMEOUT_S: Final = 5.0  # for the connection, and again for what both say first

_GREETING_BYTES: Final = 64
_SIGNATURE: Final = b"\xff\0\0\0\0\0\0\0\1\x7f"
_MORE, _LONG, _COMMAND = 1, 2, 4  # a frame's flags
_SEALED_COMMAND: Final = 2  # CURVE's flag inside of the seal, where 1 is again that more follow
_METADATA: Final = b"\x0bSocket-Type\0\0\0\3SUB"
_SEALED_BYTES: Final = 64  # at least what a seal adds to a frame
_PING_TTL: Final = b"\0\x3c"  # 6 s, in tenths


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame as it goes over the wire."""
    if len(body) > 255:
        return bytes((flags | _LONG,)) + len(body).to_bytes(8, "big") + body
    return bytes((flags, len(body))) + body


def greeting(mechanism: bytes) -> bytes:
    """What each side says first, of security `NULL` or `CURVE`."""
    return _SIGNATURE + b"\3\0" + mechanism.ljust(20, b"\0") + b"\0" * 32


class ZmtpSubscription(asyncio.Protocol):
    """One publisher, heard from `open` until `close`, over as many connections as it takes.

    `on_message` gets the frames of each message, from the socket's callback. `on_change` is called when it is, or is no
    longer, subscribed: `connected` tells which. A message of more than `max_bytes` ends the connection. `secure` makes
    the CURVE session of each connection; without it they are in the clear, and then those only.
    """

    def __init__(
        self,
        host: str,
        port: int,
        topic: bytes,
        max_bytes: int,
        on_message: Callable[[list[bytes]], None],
        on_change: Callable[[], None],
        secure: "Callable[[], CurveSession] | None" = None,
    ) -> None:
        self.connected = False
        self.trouble = ""
        """Why the last connection was closed from here, if it was."""
        self._where = host, port
        self._topic = topic
        self._max_bytes = max_bytes + (_SEALED_BYTES if secure else 0)
        self._secure = secure
        self._session: CurveSession | None = None
        self._mechanism = b"CURVE" if secure else b"NULL"
        self._on_message = on_message
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._kept = bytearray()
        """What was read of a frame, or of the greeting, that is not all there yet."""
        self._needed = _GREETING_BYTES
        """So many bytes must be there before it is worth looking again."""
        self._greeted = False
        self._frames: list[bytes] = []
        self._message_bytes = 0
        self._paused = False
        self._heard_at = 0.0
        self._lost: asyncio.Future[None] | None = None
        self._keeping: asyncio.Task[None] | None = None

    # --- the connection

    def open(self) -> None:
        """Begin."""
        self._keeping = self._loop.create_task(self._keep(), name=f"events from {self._where[0]}:{self._where[1]}")

    async def close(self) -> None:
        """Hear no more."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._transport is not None:
            self._transport.abort()

    async def _keep(self) -> None:
        """Be connected, again and again."""
        delay_s = RECONNECT_S
        while True:
            self._lost = self._loop.create_future()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._loop.create_connection(lambda: self, *self._where)
                greeting = self._loop.call_later(CONNECT_TIMEOUT_S, self._give_up_unless_connected)
                await self._lost  # no deadline: `beat` ends a connection that has fallen silent
                greeting.cancel()
                if self._heard_at:
                    delay_s = RECONNECT_S
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, RECONNECT_MAX_S)

    def _give_up_unless_connected(self) -> None:
        if not self.connected:
            self._abort("it did not say what a publisher says first")

    def _abort(self, why: str) -> None:
        self.trouble = why
        log.debug("closing the connection to the publisher at %s:%d: %s", *self._where, why)
        if self._transport is not None:
            self._transport.abort()

    def beat(self, silence_s: float) -> None:
        """To be called now and then: asks a silent publisher whether it is there, and gives up one that is not."""
        if self._transport is None or not self.connected or self._paused:
            return
        silent_s = self._loop.time() - self._heard_at
        if silent_s > silence_s:
            self._abort(f"nothing was heard for {silent_s:.0f} s")
        else:
            self._say(b"\4PING" + _PING_TTL, _COMMAND)

    def pause(self, paused: bool) -> None:
        """Read nothing for a while. What the publisher says meanwhile waits in its queue."""
        if paused is self._paused:
            return
        self._paused = paused
        self._heard_at = self._loop.time()
        if self._transport is not None:
            (self._transport.pause_reading if paused else self._transport.resume_reading)()

    # --- asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = own = cast(asyncio.Transport, transport)  # uvloop's are not derived from it
        self._kept.clear()
        self._frames = []
        self._message_bytes = 0
        self._needed, self._greeted, self._heard_at = _GREETING_BYTES, False, 0.0
        try:
            self._session = self._secure() if self._secure is not None else None
        except ValueError as e:
            self._abort(str(e))
            return
        own.write(greeting(self._mechanism))
        if self._paused:
            own.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        if self.connected:
            self.connected = False
            self._on_change()
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._kept or not self._greeted:
            self._kept += data
            if len(self._kept) < self._needed:
                return
            data = bytes(self._kept)
            self._kept.clear()
        if not self._greeted:
            if data[:1] != b"\xff" or data[9] & 1 == 0 or data[10] < 3 or data[12:32].rstrip(b"\0") != self._mechanism:
                self._abort(f"it does not speak ZMTP 3 with security {self._mechanism.decode()}")
                return
            self._greeted = True
            data = data[_GREETING_BYTES:]
            self._write(frame(self._session.hello() if self._session else b"\5READY" + _METADATA, _COMMAND))
        try:
            rest = self._take(data)
        except ValueError as e:
            self._abort(str(e))
            return
        if rest < len(data) and self._transport is not None:
            self._kept += data[rest:]

    def _take(self, data: bytes) -> int:
        """Take whole frames. Returns where what is not whole begins, and notes what it needs. Raises ValueError."""
        at, end, frames = 0, len(data), self._frames
        while True:
            self._needed = 2
            if end - at < 2:
                return at
            flags = data[at]
            if flags & _LONG:
                self._needed = 9
                if end - at < 9:
                    return at
                size, body = int.from_bytes(data[at + 1 : at + 9], "big"), at + 9
                if size > self._max_bytes:
                    raise ValueError(f"a frame of {size} bytes")
            else:
                size, body = data[at + 1], at + 2
            if body + size > end:
                self._needed = body + size - at
                return at
            at = body + size
            held = data[body:at]
            if self._session is not None:
                if not self._session.ready:
                    self._agree(self._session, held)
                    continue
                inner, held = self._session.open(held)
                flags = (inner & _MORE) | (_COMMAND if inner & _SEALED_COMMAND else 0)
            if flags & _COMMAND:
                self._on_command(held)
                continue
            if not self.connected:
                raise ValueError("a message before it said that it is ready")
            frames.append(held)
            self._message_bytes += len(held)
            if self._message_bytes > self._max_bytes or len(frames) > MAX_FRAMES:
                raise ValueError(f"a message of {self._message_bytes} bytes, and {len(frames)} frames so far")
            if not flags & _MORE:
                self._frames = []
                self._message_bytes = 0
                self._heard_at = self._loop.time()
                self._on_message(frames)
                frames = self._frames

    def _agree(self, session: "CurveSession", command: bytes) -> None:
        """One step of the handshake. Raises ValueError."""
        answer = session.answer(command, _METADATA)
        if answer is not None:
            self._write(frame(answer, _COMMAND))
        else:
            self._on_ready()

    def _on_ready(self) -> None:
        self._heard_at = self._loop.time()
        self._say(b"\1" + self._topic)
        if not self.connected:
            self.connected = True
            self._on_change()

    def _on_command(self, body: bytes) -> None:
        self._heard_at = self._loop.time()
        if body.startswith(b"\5READY") and self._session is None:
            self._on_ready()
        elif body.startswith(b"\4PING"):
            self._say(b"\4PONG" + body[7:23], _COMMAND)  # with what stands behind its time to live
        elif body.startswith(b"\5ERROR"):
            raise ValueError(f"the publisher says {body[7:].decode(errors='replace')!r}")

    def _say(self, body: bytes, flags: int = 0) -> None:
        if self._session is not None:
            body, flags = self._session.seal(body, _SEALED_COMMAND if flags & _COMMAND else 0), 0
        self._write(frame(body, flags))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
