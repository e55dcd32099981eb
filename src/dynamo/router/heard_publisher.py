"""What does a router know of one publisher of KV events?"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dynamo.router.event_stream import EventStream, StreamState
from dynamo.router.recovery import SourceRecord
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import WorkerKey
from dynamo.runtime.instances import Target

RESYNC_S = 60.0  # a worker whose events contradict what is known of it is asked for everything at most this often


@dataclass(slots=True, eq=False)
class HeardPublisher:
    """What discovery says of it, and the streams it is heard on."""

    id: int
    record: SourceRecord | None = None
    target: Target | None = None
    streams: dict[WorkerKey, EventStream] = field(default_factory=dict)
    seen_at: float = 0.0
    heard_at: float = 0.0
    confirmed: bool = False
    """Whether it was asked since it was last heard."""
    refused: str = ""
    last_error: str = ""
    resynced_at: float = -RESYNC_S
    recoveries: Counter[str] = field(default_factory=Counter)

    def states(self) -> Iterator[StreamState]:
        """How far each of its ranks is known."""
        return (StreamState.REFUSED if self.refused else stream.state for stream in self.streams.values())

    def status(self, index: TierIndex, now: float) -> Iterator[dict[str, Any]]:
        """A line for each of its ranks."""
        for worker, stream in self.streams.items():
            yield {
                "worker_id": worker.worker_id,
                "dp_rank": worker.dp_rank,
                "publisher_id": f"{self.id:x}",
                "state": StreamState.REFUSED.value if self.refused else stream.state.value,
                "reason": self.refused or stream.reason,
                "last_error": self.last_error,
                "blocks": index.blocks(worker),
                "next_event_id": stream.expected,
                "gaps": stream.gaps,
                "missed_events": stream.missed_events,
                "duplicates": stream.duplicates,
                "recoveries": dict(self.recoveries),
                "silent_s": round(now - self.heard_at, 1) if self.heard_at else None,
            }
