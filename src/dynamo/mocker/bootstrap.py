"""How do a simulated prefill and a decode worker meet whose requests started at the same time? (bootstrap handoff)

A router sends one prompt to both at once and gives them a room number. The decode worker connects to the prefill
worker's bootstrap port and names the room; once the prompt is computed the prefill worker says so, the KV "moves", and
the decode worker says that it has it.

    decode → prefill   magic, room (u64)
    prefill → decode   1 byte: READY or GONE
    decode → prefill   1 byte: DONE
"""

import asyncio
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

WAIT_S = 120.0  # for a prompt to be computed, its time in the queue included
CONNECT_S = 2.0
_HELLO = struct.Struct(">4sQ")
_MAGIC = b"DYNB"
READY, GONE, DONE = b"\x01", b"\x00", b"\x02"
MAX_ROOMS = 65_536  # rooms waited for or held; more is a caller that makes numbers up
MAX_GONE = 4096  # rooms that are remembered, so that who comes late need not wait for nothing


@dataclass(slots=True)
class _Room:
    """One prompt. `ready` resolves to whether its KV is here."""

    ready: asyncio.Future[bool]
    free: Callable[[], None] | None = None
    timer: asyncio.TimerHandle | None = None
    taken: bool = False


@dataclass
class BootstrapServer:
    """The bootstrap port of one prefill worker. Owned by the event loop's thread."""

    lease_s: float
    host: str = ""
    port: int = 0
    _rooms: dict[int, _Room] = field(default_factory=dict)
    _gone: dict[int, None] = field(default_factory=dict)
    _server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one. Raises OSError."""
        self._server = await asyncio.start_server(self._serve, host, port)
        self.host, self.port = self._server.sockets[0].getsockname()[:2]

    async def close(self) -> None:
        """Give up every room and stop listening."""
        for number in list(self._rooms):
            self.gone(number)
        if self._server is not None:
            self._server.close()
            self._server = None

    def ready(self, number: int, free: Callable[[], None]) -> None:
        """The prompt of a room is computed. `free` is called once, when its KV was fetched or its lease is over."""
        room = self._room(number)
        if room is None or room.ready.done():
            free()
            return
        room.free = free
        room.timer = asyncio.get_running_loop().call_later(self.lease_s, self.gone, number)
        room.ready.set_result(True)

    def gone(self, number: int) -> None:
        """The prompt of a room will not be computed, or its KV is not wanted any more."""
        self._gone[number] = None
        if len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]
        room = self._rooms.pop(number, None)
        if room is None:
            return
        if room.timer is not None:
            room.timer.cancel()
        if not room.ready.done():
            room.ready.set_result(False)
        if room.free is not None:
            room.free()

    def _room(self, number: int) -> _Room | None:
        room = self._rooms.get(number)
        if room is None and number not in self._gone and len(self._rooms) < MAX_ROOMS:
            room = self._rooms[number] = _Room(asyncio.get_running_loop().create_future())
        return room

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number: int | None = None
        try:
            async with asyncio.timeout(WAIT_S):
                magic, number = _HELLO.unpack(await reader.readexactly(_HELLO.size))
                room = self._room(number) if magic == _MAGIC else None
                if room is None or room.taken:
                    writer.write(GONE)
                    number = None
                    return
                room.taken = True
                writer.write(READY if await asyncio.shield(room.ready) else GONE)
                await writer.drain()
                await reader.read(1)  # DONE, or the end of a reader that died: either way it reads no more
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.debug("a bootstrap connection ended: %r", error)
        finally:
            if number is not None:
                self.gone(number)
            writer.close()


class Fetch:
    """The decode worker's end for one room."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ready(self) -> bool:
        """Wait until the prompt is computed. False: it will not be. Raises OSError, TimeoutError."""
        async with asyncio.timeout(WAIT_S):
            return await self._reader.read(1) == READY

    def close(self, done: bool) -> None:
        """Say that the KV is here, or just leave."""
        if done:
            self._writer.write(DONE)
        self._writer.close()


async def enter(host: str, port: int, number: int) -> Fetch:
    """Connect to a prefill worker's bootstrap port and name a room. Raises OSError, TimeoutError."""
    async with asyncio.timeout(CONNECT_S):
        reader, writer = await asyncio.open_connection(host, port)
    writer.write(_HELLO.pack(_MAGIC, number))
    return Fetch(reader, writer)
