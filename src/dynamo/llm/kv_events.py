"""What a worker tells the routers about the blocks it holds.

The shapes are those that subscribers of the topic `kv-events` know (facts row K12): hashes are unsigned 64 bit,
`block_hash` is the engine's own name for a block, `tokens_hash` the content hash of `dynamo.llm.block_hash`.
None of them can be part of a cycle, so Python's garbage collector need not look at the thousands that come a second.
"""

from typing import Literal

import msgspec

StorageTier = Literal["device", "host_pinned", "disk", "external"]


class StoredBlock(msgspec.Struct, omit_defaults=True, gc=False):
    """One full block of `kv_block_size` tokens."""

    block_hash: int
    tokens_hash: int


class Stored(msgspec.Struct, omit_defaults=True, gc=False):
    """A run of blocks, each the child of the one before; the first is the child of `parent_hash`."""

    blocks: list[StoredBlock]
    parent_hash: int | None = None
    start_position: int | None = None


class Removed(msgspec.Struct, gc=False):
    """Blocks that are gone. Children of a removed block are not removed with it."""

    block_hashes: list[int]


class KvEventData(msgspec.Struct, omit_defaults=True, gc=False):
    """Exactly one of the three is set."""

    stored: Stored | None = None
    removed: Removed | None = None
    cleared: bool | None = None


class KvEvent(msgspec.Struct, omit_defaults=True, gc=False):
    """One change. `event_id` counts up by one for each (worker, dp rank), so a gap shows.

    On the wire, all blocks being gone is the word alone; `change` gives any event's data as a struct.
    """

    event_id: int
    data: KvEventData | Literal["cleared"]
    dp_rank: int = 0

    @property
    def change(self) -> KvEventData:
        """What happened."""
        return KvEventData(cleared=True) if isinstance(self.data, str) else self.data


class RouterEvent(msgspec.Struct, omit_defaults=True, gc=False):
    """An event as it is published: whose it is, and on which tier."""

    worker_id: int
    event: KvEvent
    storage_tier: StorageTier = "device"
    residency_domain: str = "worker"


class LoadMetrics(msgspec.Struct, omit_defaults=True, gc=False):
    """How busy one rank of a worker is (topic `kv_metrics`, facts row E5). Blocks are KV blocks."""

    worker_id: int
    dp_rank: int
    active_decode_blocks: int
    active_prefill_tokens: int = 0
    kv_used_blocks: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
