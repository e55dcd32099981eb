"""What does a worker make of what its engine says of its KV cache?"""

import contextlib

import msgspec

from dynamo.engine.zmq_kv_events import KvEventDecoder
from dynamo.llm.kv_events import KvEventData
from fuzz.harness import BrokenError

U64 = 1 << 64
STORED = {"type": "BlockStored", "block_hashes": [1, b"x" * 32], "parent_block_hash": None, "block_size": 2}
SEEDS = [
    msgspec.msgpack.encode([1.5, [STORED | {"token_ids": [1, 2, 3, 4], "extra_keys": [["salt"], None]}], 0]),
    msgspec.msgpack.encode([1.5, [["BlockStored", [-1], 5, [1, 2], 2, None, "CPU"], ["BlockRemoved", [1]]], 0]),
    msgspec.msgpack.encode([1.5, [{"type": "BlockRemoved", "block_hashes": [1], "group_idx": 0}], None]),
    msgspec.msgpack.encode([1.5, [{"type": "AllBlocksCleared"}, {"type": "New"}]]),
]


async def one(data: bytes) -> None:
    """A batch, twice: the decoder remembers."""
    decoder = KvEventDecoder()
    for _ in range(2):
        with contextlib.suppress(ValueError):
            for _, event in decoder.decode(data):
                check(event)


def check(event: KvEventData) -> None:
    """What goes on to routers is what they take."""
    for block in event.stored.blocks if event.stored is not None else ():
        if not (0 <= block.block_hash < U64 and 0 <= block.tokens_hash < U64):
            raise BrokenError("a hash that is no u64")
