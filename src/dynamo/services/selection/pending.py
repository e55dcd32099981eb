"""What was selected, and may be booked soon?

A gateway may ask first and book later, under the id it gave. What was chosen is kept for that: for a time, and within
bounds of number and memory, the oldest going first.
"""

import sys
from collections import OrderedDict

import msgspec

from dynamo.router.types import Decision, RouteRequest
from dynamo.services.cache_group import GroupKey

TTL_S = 120.0  # facts row L4, like the two below
MAX_ENTRIES = 4096
MAX_BYTES = 256 << 20
_HASH_BYTES = sys.getsizeof(1 << 63) + 8  # a number and its place in a list


class SelectionCacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of what is kept; None for the service's own (120 s, 4096, 256 MiB). Raises ValueError."""

    ttl_secs: float | None = None
    max_entries: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, got {value!r}")


class Pending(msgspec.Struct):
    """One selection."""

    key: GroupKey
    request: RouteRequest
    decision: Decision
    at: float

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return 1024 + len(self.request.sequence_hashes) * _HASH_BYTES


class PendingSelections:
    """Selections by id, the oldest first."""

    def __init__(self, config: SelectionCacheConfig | None = None) -> None:
        config = config or SelectionCacheConfig()
        self.ttl_s = config.ttl_secs or TTL_S
        self._max_entries = config.max_entries or MAX_ENTRIES
        self._max_bytes = config.max_bytes or MAX_BYTES
        self._kept: OrderedDict[str, Pending] = OrderedDict()
        self.bytes = 0
        self.evicted = 0
        """Selections that had to go before their time."""

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, selection_id: str, pending: Pending) -> None:
        """Keep a selection, in place of another of the same id."""
        self.discard(selection_id)
        self._kept[selection_id] = pending
        self.bytes += pending.size
        while len(self._kept) > self._max_entries or (self.bytes > self._max_bytes and len(self._kept) > 1):
            self.discard(next(iter(self._kept)))
            self.evicted += 1

    def take(self, selection_id: str, key: GroupKey, now: float) -> Pending | None:
        """The selection of that id and group, which is no more afterwards."""
        self.expire(now)
        pending = self._kept.get(selection_id)
        if pending is None or pending.key != key:
            return None
        self.discard(selection_id)
        return pending

    def discard(self, selection_id: str) -> None:
        """Forget a selection, if there is one."""
        pending = self._kept.pop(selection_id, None)
        if pending is not None:
            self.bytes -= pending.size

    def expire(self, now: float) -> None:
        """Forget what nobody booked in time."""
        while self._kept:
            selection_id, pending = next(iter(self._kept.items()))
            if now - pending.at <= self.ttl_s:
                return
            self.discard(selection_id)
