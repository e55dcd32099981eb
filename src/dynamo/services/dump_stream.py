"""How does a whole index leave over HTTP, while questions are answered between?"""

import asyncio
from collections.abc import Iterable

import msgspec
from aiohttp import web

from dynamo.services.cache_group import CacheGroup, dumped_event

BLOCKS_A_PIECE = 8192  # made in some 5 ms


async def stream_dump(request: web.Request, groups: Iterable[CacheGroup]) -> web.StreamResponse:
    """`{"model:group": {"block_size": ..., "events": [...]}, ...}`, of this moment, worker by worker."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    encode = msgspec.json.Encoder().encode
    before = b"{"
    for group in list(groups):
        name = encode(":".join(group.key))
        await response.write(before + name + b':{"block_size":%d,"events":[' % group.block_size)
        before = b","
        piece, blocks, separator = bytearray(), 0, b""
        for number, (worker, tier, change) in enumerate(group.dump()):
            piece += separator + encode(dumped_event(number, worker, tier, change))
            separator = b","
            blocks += len(change.stored.blocks) if change.stored is not None else 1
            if blocks >= BLOCKS_A_PIECE:
                await response.write(bytes(piece))
                await asyncio.sleep(0)
                piece, blocks = bytearray(), 0
        await response.write(bytes(piece) + b"]}")
    await response.write(b"}" if before == b"," else b"{}")
    await response.write_eof()
    return response
