"""What does each look at who holds what cost?"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from dynamo.router.stats import RouterStats
from dynamo.router.types import OverlapSource, WorkerKey


class TimedSource:
    """An overlap source, with what each look costs."""

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

    def find(self, sequence_hashes: Sequence[int], now: float) -> dict[WorkerKey, Any]:
        """See `OverlapSource`."""
        start = perf_counter()
        found = self._find(sequence_hashes, now)
        self._stats.find_matches_ms.observe((perf_counter() - start) * 1000)
        return found

    def _timed_groups(self, sequence_hashes: Sequence[int], now: float) -> Any:
        start = perf_counter()
        found = self._groups(sequence_hashes, now)
        self._stats.find_matches_ms.observe((perf_counter() - start) * 1000)
        return found
