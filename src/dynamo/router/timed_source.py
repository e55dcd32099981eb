"""What does each look at who holds what cost?"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from dynamo.router.stats import RouterStats
from dynamo.router.types import Overlap, OverlapSource, WorkerKey


class TimedSource:
    """An overlap source, with what a look costs, of some looks."""

    def __init__(self, source: OverlapSource, stats: RouterStats) -> None:
        self._stats = stats
        self._find = source.find
        groups: Callable[..., Any] | None = getattr(source, "groups", None)
        if groups is not None:
            self._groups = groups
            self.groups = self._timed_groups
        routed: Callable[[WorkerKey, Sequence[int], float], None] | None = getattr(source, "routed", None)
        if routed is not None:
            self.routed = routed

    def find(self, sequence_hashes: Sequence[int], now: float) -> dict[WorkerKey, Overlap]:
        """See `OverlapSource`."""
        if not self._stats.is_timed("find"):
            return self._find(sequence_hashes, now)
        found: dict[WorkerKey, Overlap] = self._timed(self._find, sequence_hashes, now)
        return found

    def _timed_groups(self, sequence_hashes: Sequence[int], now: float) -> Any:
        if not self._stats.is_timed("find"):
            return self._groups(sequence_hashes, now)
        return self._timed(self._groups, sequence_hashes, now)

    def _timed(self, look: Callable[..., Any], sequence_hashes: Sequence[int], now: float) -> Any:
        start = perf_counter()
        found = look(sequence_hashes, now)
        self._stats.find_matches_ms.observe((perf_counter() - start) * 1000)
        return found
