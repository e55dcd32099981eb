"""What does each worker hold of a prompt, in the words that callers of a router know?"""

from collections.abc import Mapping
from typing import Any

from dynamo.router.types import Overlap, WorkerKey


def overlap_report(block_size: int, blocks: int, found: Mapping[WorkerKey, Overlap]) -> dict[str, Any]:
    """Counts of blocks. A tier's plain count is cumulative; its extension is what it adds to the tiers before.

    `shared_cache` is of a cache that all workers share, which is not in this version: nothing is ever found there.
    """
    return {
        "block_size": block_size,
        "num_blocks": blocks,
        "workers": [
            {
                **worker._asdict(),
                "device_blocks": held.device,
                "host_pinned_blocks": held.device + held.host,
                "disk_blocks": held.total,
                "host_pinned_extension_blocks": held.host,
                "disk_extension_blocks": held.disk,
                "shared_beyond_device_blocks": None,
            }
            for worker, held in sorted(found.items(), key=lambda item: (-item[1].total, item[0]))
        ],
        "shared_cache": {"enabled": False, "total_hit_blocks": 0, "ranges": [], "error": None},
    }
