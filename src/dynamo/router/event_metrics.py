"""What can be counted about KV events?"""

from collections.abc import Callable
from functools import partial

from dynamo import prometheus_names as names
from dynamo.llm.kv_events import KvEventData
from dynamo.router.tier_index import Outcome, TierIndex
from dynamo.runtime.instruments import Counter, LabelPairs
from dynamo.runtime.metrics import Metrics

_OK = Outcome.OK
_WARNINGS = {Outcome.DUPLICATE: "duplicate_store", Outcome.UNKNOWN_BLOCK: "unknown_remove"}


def _count(states: Callable[[], dict[str, int]], state: str) -> int:
    return states()[state]


class FeedMetrics:
    """The series of one feed (facts rows O29 and O32). `base` tells it from others of this process."""

    def __init__(
        self, metrics: Metrics, index: TierIndex, states: Callable[[], dict[str, int]], base: LabelPairs | None = None
    ) -> None:
        base = metrics.worker_label if base is None else base
        self._applied = metrics.counter(
            names.kvrouter.KV_CACHE_EVENTS_APPLIED,
            "KV events that came to the index, by what became of them",
            ["event_type", "status"],
            base=base,
        )
        self._warnings = metrics.counter(
            names.kvrouter.KV_CACHE_EVENT_WARNINGS, "KV events that are suspicious", ["warning_kind"], base=base
        )
        self._lifecycle = metrics.counter(
            names.kv_ingress.LIFECYCLE_TOTAL, "What happened to sources of KV events", ["action"], base=base
        )
        self._sources = metrics.gauge(
            names.kv_ingress.SOURCES, "Sources of KV events, by how much is known of them", ["state"], base=base
        )
        self.batches = metrics.counter(names.kv_ingress.BATCHES_TOTAL, "Messages with KV events", base=base).labels()
        self.stored = self._applied.labels("stored", _OK.value)
        """Counts what nearly all events are: blocks stored in order."""
        self._known: dict[tuple[str, Outcome], Counter] = {("stored", _OK): self.stored}
        self._blocks = metrics.gauge(
            names.kv_ingress.INDEX_BLOCKS, "Different KV blocks that the index knows", base=base
        )
        self._blocks.labels().set_function(lambda: len(index))
        self._base, self._states = base, tuple(states())
        for state in self._states:
            self._sources.labels(state).set_function(partial(_count, states, state))

    def applied(self, change: KvEventData, outcome: Outcome) -> None:
        """An event came to the index."""
        kind = "stored" if change.stored is not None else "removed" if change.removed is not None else "cleared"
        counter = self._known.get((kind, outcome))
        if counter is None:
            status = Outcome.OK if outcome is Outcome.DUPLICATE else outcome
            counter = self._known[kind, outcome] = self._applied.labels(kind, status.value)
        counter.value += 1
        if outcome in _WARNINGS:
            self.warn(_WARNINGS[outcome])

    def warn(self, kind: str) -> None:
        """Something suspicious came."""
        self._warnings.labels(kind).value += 1

    def lifecycle(self, action: str) -> None:
        """Something happened to a source."""
        self._lifecycle.labels(action).value += 1

    def close(self) -> None:
        """The feed is over: show nothing of now."""
        self._blocks.drop(self._base)
        for state in self._states:
            self._sources.drop((*self._base, ("state", state)))
