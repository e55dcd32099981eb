"""What do all targets need? A loop, a transport without a socket, and a way to notice what was merely logged."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

LOOP = asyncio.new_event_loop()


class BrokenError(AssertionError):
    """A promise was broken."""


class Transport(asyncio.Transport):
    """Takes what is written, and tells the protocol when the connection is over, as a socket's would."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.over = False
        self.written = 0

    def write(self, data: Any) -> None:
        self.written += len(data)

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.write(data)

    def write_eof(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.over:
            self.over = True
            LOOP.call_soon(self.protocol.connection_lost, None)

    def is_closing(self) -> bool:
        return self.over

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Tracebacks(logging.Handler):
    """Nobody may make us log a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            complaints.append(record.getMessage() + ": " + repr(record.exc_info[1]))


complaints: list[str] = []


def pieces(data: bytes) -> Iterator[bytes]:
    """The bytes as they are read: the first one says how many at once, 0 all."""
    size = data[0] if data else 0
    rest = data[1:]
    step = size or len(rest) or 1
    return (rest[at : at + step] for at in range(0, len(rest), step))


def feed(protocol: asyncio.Protocol, transport: Transport, data: bytes) -> None:
    """Give a protocol the bytes, as long as it wants any."""
    for piece in pieces(data):
        if transport.over:
            return
        protocol.data_received(piece)


def run(one: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
    """One execution, with all that it left to be done in the loop. Raises what went wrong."""
    complaints.clear()
    LOOP.run_until_complete(one(data))
    if complaints:
        raise BrokenError(complaints[0])


async def settle() -> None:
    """Let the loop do what was called for soon."""
    for _ in range(3):
        await asyncio.sleep(0)


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    complaints.append(f"{context.get('message')}: {context.get('exception')!r}")


LOOP.set_exception_handler(_on_loop_error)
logging.getLogger().addHandler(Tracebacks())
logging.getLogger("dynamo").addHandler(logging.NullHandler())
