"""Which events does a stream of server-sent events hold?"""

from collections.abc import AsyncIterator

from dynamo.runtime.errors import Unknown

MAX_EVENT_BYTES = 16 << 20  # an event of a token with all its alternatives is under a megabyte


def all_events(body: bytes) -> list[bytes]:
    """The data of each event of a whole stream. Raises as `events`."""
    found = (_data(event) for event in body.replace(b"\r\n", b"\n").split(b"\n\n"))
    return [event for event in found if event is not None]


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event, without comments and fields that are not data, to the end of the stream.

    Raises:
        Unknown: an event does not end, or something is there that is no event.
    """
    rest = b""
    async for piece in pieces:
        data = rest + piece if rest else piece
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *whole, rest = data.split(b"\n\n")
        for event in whole:
            if (found := _data(event)) is not None:
                yield found
        if len(rest) > MAX_EVENT_BYTES:
            raise Unknown(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
    if rest.strip() and (found := _data(rest)) is not None:
        yield found


def _data(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:  # nearly every event
        return event[6:]
    found: list[bytes] = []
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            found.append(line[5:].removeprefix(b" "))
        elif line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
            raise Unknown(f"the server sent what is no event: {line[:100]!r}")
    return b"\n".join(found) if found else None
