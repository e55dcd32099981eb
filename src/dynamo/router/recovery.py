"""What do a worker and a router say to each other when events were missed?

A publisher of KV events stands in discovery under `v1/event_sources` with the endpoint that tells them again. A router
asks there from an event's number on. It gets those events, or, if the worker no longer has them all, everything that
the worker holds, as events that lead there from nothing.
"""

from typing import Any, Literal

import msgspec

from dynamo.router.types import WorkerKey
from dynamo.runtime.events import EventScope

EVENT_SOURCES = "v1/event_sources"
KV_EVENTS_TOPIC = "kv-events"


def query_endpoint(publisher_id: int) -> str:
    """The name of the endpoint that tells a publisher's events again."""
    return f"worker_kv_query_source_{publisher_id:x}"


def sources_prefix(scope: EventScope) -> str:
    """The discovery prefix of all sources in a scope."""
    return f"{EVENT_SOURCES}/{scope.path}/"


def source_key(scope: EventScope, topic: str, publisher_id: int) -> str:
    """The discovery key of one source."""
    return f"{EVENT_SOURCES}/{scope.path}/topic/{topic}/{publisher_id:x}"


class SourceWorker(msgspec.Struct, frozen=True):
    """Whose events they are."""

    worker_id: int
    dp_rank: int = 0


class SourceMetadata(msgspec.Struct, frozen=True, omit_defaults=True):
    """`recovery_target` is the instance record of the endpoint to ask; `kv_block_size` is in tokens, if it is said."""

    kv_state_endpoint: dict[str, str]
    worker: SourceWorker
    publisher_id: int
    recovery_target: dict[str, Any] | None = None
    kv_block_size: int | None = None


class SourceRecord(msgspec.Struct, frozen=True):
    """A source as it stands in discovery (facts row R10)."""

    type: str
    scope: dict[str, Any]
    topic: str
    publisher_id: int
    metadata: SourceMetadata

    @property
    def worker(self) -> WorkerKey:
        """Whose events they are."""
        return WorkerKey(self.metadata.worker.worker_id, self.metadata.worker.dp_rank)


class Ask(msgspec.Struct, frozen=True):
    """Tell again from this event on; without it, everything that is held."""

    from_event_id: int | None = None


class Retold(msgspec.Struct, frozen=True):
    """A part of the answer; all parts have the same `kind` and `next_event_id`, the number the live events go on with.

    `events` is msgpack of a list of `RouterEvent`. Those of a dump lead from nothing to what is held; their numbers
    mean nothing.
    """

    kind: Literal["events", "dump"]
    next_event_id: int
    events: bytes
