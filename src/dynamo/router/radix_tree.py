"""Which workers hold which prefix, for a program of one's own: the index without a runtime.

Workers' events come in as JSON. Prompts are asked for by the local hashes of their blocks.
"""

import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from dynamo.llm.block_hash import sequence_hashes
from dynamo.llm.kv_events import KvEvent, KvEventData
from dynamo.router.tier_index import Outcome, TierIndex
from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import UNDECODABLE

_U64 = (1 << 64) - 1
_REFUSED = {
    Outcome.UNKNOWN_PARENT: "Failed to find parent block",
    Outcome.UNKNOWN_BLOCK: "Failed to find block",
}


class OverlapScores(msgspec.Struct, frozen=True):
    """How many blocks of a prompt each (worker id, dp rank) holds from its start.

    `frequencies` are empty: how often a block is used is not counted.
    """

    scores: dict[WorkerKey, int]
    frequencies: list[int]


class RadixTree:
    """An index of the blocks of any number of workers. May be used from several threads."""

    def __init__(self) -> None:
        self._index = TierIndex(keep_contents=True)
        self._decoder = msgspec.json.Decoder(KvEvent)
        self._lock = threading.Lock()

    def find_matches(self, sequence: Sequence[int], early_exit: bool = False) -> OverlapScores:
        """Match a prompt, given by the local hashes of its blocks. `early_exit` is taken and changes no score.

        Raises ValueError for a hash that is not an unsigned 64-bit number.
        """
        _check_hashes("sequence", sequence)
        chained = sequence_hashes(sequence)
        with self._lock:
            found = self._index.find(chained)
        return OverlapScores({worker: overlap.device for worker, overlap in found.items()}, [])

    def apply_event(self, worker_id: int, kv_cache_event_bytes: bytes) -> None:
        """Apply one event, JSON `{"event_id", "data": {"stored" | "removed": …} | "cleared", "dp_rank"}`.

        Raises:
            ValueError: the bytes are not an event.
            RuntimeError: it stores blocks after one that the worker does not hold (nothing was stored), or removes
                one that it does not hold (the others were removed).
        """
        if not isinstance(kv_cache_event_bytes, bytes):
            raise TypeError(f"kv_cache_event_bytes: must be bytes, not {type(kv_cache_event_bytes).__name__}")
        worker_id = _check_worker(worker_id)
        try:
            event = self._decoder.decode(kv_cache_event_bytes)
            change = event.change
            if change.stored is not None:
                _check_hashes("block_hash", [block.block_hash for block in change.stored.blocks])
                _check_hashes("tokens_hash", [block.tokens_hash for block in change.stored.blocks])
        except (*UNDECODABLE, ValueError) as e:
            raise ValueError(f"Failed to deserialize KvCacheEvent: {e}") from e
        with self._lock:
            outcome = self._index.apply(WorkerKey(worker_id, event.dp_rank), "device", change)
        if outcome in _REFUSED:
            raise RuntimeError(f"Failed to apply event: {_REFUSED[outcome]}")
        if outcome is Outcome.INVALID:
            raise ValueError("Failed to deserialize KvCacheEvent: data: needs stored, removed or cleared")

    def remove_worker(self, worker_id: int) -> None:
        """Forget a worker, with all its ranks."""
        with self._lock:
            for worker in self._ranks(worker_id):
                self._index.remove_worker(worker)

    def clear_all_blocks(self, worker_id: int) -> None:
        """All blocks of a worker, on all its ranks, are gone."""
        with self._lock:
            for worker in self._ranks(worker_id):
                self._index.clear(worker)

    def _ranks(self, worker_id: int) -> list[WorkerKey]:
        return [worker for worker in self._index.workers() if worker.worker_id == worker_id]

    def dump_tree_as_events(self) -> list[str]:
        """Everything that is held, as JSON of events (with `worker_id`) that lead there from nothing."""
        encode = msgspec.json.Encoder().encode
        with self._lock:
            dumps = [(worker, self._index.dump(worker)) for worker in self._index.workers()]
        events = ((worker, change) for worker, dump in dumps for _, change in dump)
        return [encode(_in_full(worker, number, change)).decode() for number, (worker, change) in enumerate(events)]


def _in_full(worker: WorkerKey, number: int, change: KvEventData) -> dict[str, Any]:
    """An event with every field, also those that say nothing, as readers of dumps expect them."""
    data: dict[str, Any]
    if change.stored is not None:
        blocks = [
            {"block_hash": block.block_hash, "tokens_hash": block.tokens_hash, "mm_extra_info": None}
            for block in change.stored.blocks
        ]
        data = {"stored": {"parent_hash": change.stored.parent_hash, "start_position": None, "blocks": blocks}}
    else:
        data = {"removed": {"block_hashes": change.removed.block_hashes if change.removed is not None else []}}
    return {
        "worker_id": worker.worker_id,
        "storage_tier": "device",
        "residency_domain": "worker",
        "event": {"event_id": number, "data": data, "dp_rank": worker.dp_rank},
    }


def _check_worker(worker_id: int) -> int:
    if not 0 <= worker_id <= _U64:
        raise OverflowError(f"worker_id: {worker_id} is not an unsigned 64-bit number")
    return worker_id


def _check_hashes(name: str, hashes: Sequence[int]) -> None:
    for value in hashes:
        if not 0 <= value <= _U64:
            raise ValueError(f"{name}: {value} is not an unsigned 64-bit number")
