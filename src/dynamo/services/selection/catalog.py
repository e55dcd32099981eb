"""What is known of a worker, and may requests go there?

A gateway tells of its workers, in any order and in parts. One that lacks something is kept, with the reasons why
nothing is sent there.
"""

from typing import Any, Literal

import msgspec

from dynamo.engine.zmq_kv_events import local_endpoint
from dynamo.router.types import WorkerKey, WorkerLimits
from dynamo.runtime.errors import InvalidArgument
from dynamo.services.bodies import check_zmq_endpoint
from dynamo.services.cache_group import GroupKey

MAX_WORKERS = 4096
MAX_RANKS = 1024  # of one worker; one that says more is wrong
MAX_TAINTS = 256


class _Facts(msgspec.Struct, kw_only=True):
    endpoint: str | None = None
    """Where the gateway sends requests: given back as it is."""
    kv_events_endpoint: str | None = None
    """Where the first rank publishes its KV events; the port counts up with the rank, as vLLM's does."""
    kv_events_endpoints: dict[str, str] | None = None
    """The same for each rank, where they are not so."""
    replay_endpoint: str | None = None
    block_size: int | None = None
    data_parallel_start_rank: int | None = None
    data_parallel_size: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    total_kv_blocks: int | None = None
    stable_routing_id: str | None = None
    is_eagle: bool | None = None
    taints: list[str] | None = None
    topology_domains: dict[str, str] | None = None
    kv_transfer_domain: str | None = None
    kv_transfer_enforcement: Literal["required", "preferred"] | None = None
    kv_transfer_preferred_weight: float | None = None


class WorkerBody(_Facts, kw_only=True):
    """`POST /workers`: all that is known of a worker, in place of what was."""

    worker_id: int
    model_name: str = "default"
    routing_group: str = "default"


class WorkerPatch(_Facts, kw_only=True):
    """`PATCH /workers/{id}`: what has changed; the rest stays. A worker cannot change its model or group so."""

    worker_id: int | None = None
    model_name: str | None = None
    routing_group: str | None = None


class WorkerRecord(WorkerBody, kw_only=True):
    """A worker as it stands in the catalog. `reasons` say why nothing is sent there."""

    lifecycle: Literal["schedulable", "incomplete", "unschedulable"] = "incomplete"
    reasons: list[str] = []

    @property
    def key(self) -> GroupKey:
        """Whose requests may go there."""
        return GroupKey(self.model_name, self.routing_group)

    @property
    def ranks(self) -> list[WorkerKey]:
        """What of it requests can be sent to."""
        first, count = self.data_parallel_start_rank or 0, self.data_parallel_size or 1
        return [WorkerKey(self.worker_id, rank) for rank in range(first, first + min(count, MAX_RANKS))]

    @property
    def limits(self) -> WorkerLimits:
        """What the choice looks at."""
        return WorkerLimits(
            self.total_kv_blocks, self.max_num_batched_tokens, self.max_num_seqs, frozenset(self.taints or ())
        )

    def events_of(self, rank: int) -> str | None:
        """Where a rank's KV events are heard; None if nobody said."""
        named = (self.kv_events_endpoints or {}).get(str(rank))
        if named is not None or self.kv_events_endpoint is None:
            return named
        return _counted(self.kv_events_endpoint, rank - (self.data_parallel_start_rank or 0))

    def replay_of(self, rank: int) -> str | None:
        """Where a rank's engine tells again what was missed."""
        if self.replay_endpoint is None:
            return None
        return _counted(self.replay_endpoint, rank - (self.data_parallel_start_rank or 0))

    def place(self) -> tuple[Any, ...]:
        """What cannot change while the worker stays: if it does, the worker is another."""
        ranks = self.ranks
        return (
            self.key,
            self.block_size,
            ranks,
            [self.events_of(each.dp_rank) for each in ranks],
            [self.replay_of(each.dp_rank) for each in ranks],
        )

    def told(self) -> dict[str, Any]:
        """The record as answers show it."""
        first = ("worker_id", "model_name", "routing_group", "lifecycle")
        shown: dict[str, Any] = {name: getattr(self, name) for name in (*first, *_Facts.__struct_fields__)}
        if shown["kv_events_endpoints"] is None:
            del shown["kv_events_endpoints"]
        shown["taints"] = sorted(self.taints or ())
        shown["topology_domains"] = self.topology_domains or {}
        if self.reasons:
            shown["not_schedulable_reasons"] = self.reasons
        return shown


def _counted(endpoint: str, offset: int) -> str:
    """The endpoint of the rank so many after the first. One that is none is for `missing` to tell."""
    try:
        check_zmq_endpoint("", endpoint)
    except InvalidArgument:
        return endpoint
    return local_endpoint(endpoint, offset)


def new_record(body: WorkerBody) -> WorkerRecord:
    """A record that is not in the catalog yet. Raises InvalidArgument for what cannot be meant."""
    record = WorkerRecord(**msgspec.structs.asdict(body))
    record.key.check()
    if not 0 <= record.worker_id < 1 << 64:
        raise InvalidArgument("worker_id: is an unsigned 64-bit number", "worker_id")
    for field, least in (
        ("block_size", 0),
        ("data_parallel_start_rank", 0),
        ("data_parallel_size", 1),
        ("max_num_batched_tokens", 1),
        ("max_num_seqs", 1),
        ("total_kv_blocks", 1),
    ):
        value = getattr(record, field)
        if value is not None and not least <= value < 1 << 40:
            raise InvalidArgument(f"{field}: must be at least {least}, got {value}", field)
    if (record.data_parallel_size or 1) > MAX_RANKS:
        raise InvalidArgument(f"data_parallel_size: must be at most {MAX_RANKS}", "data_parallel_size")
    if len(record.taints or ()) > MAX_TAINTS:
        raise InvalidArgument(f"taints: at most {MAX_TAINTS}", "taints")
    return record


def patched(record: WorkerRecord, patch: WorkerPatch) -> WorkerRecord:
    """The record with what has changed. Raises InvalidArgument."""
    for field in ("worker_id", "model_name", "routing_group"):
        value = getattr(patch, field)
        if value is not None and value != getattr(record, field):
            raise InvalidArgument(f"{field}: cannot be changed; DELETE the worker and POST it anew", field)
    changes = {name: value for name, value in msgspec.structs.asdict(patch).items() if value is not None}
    known = {name: getattr(record, name) for name in WorkerBody.__struct_fields__}
    return new_record(WorkerBody(**(known | changes)))


def missing(record: WorkerRecord, *, use_kv_events: bool) -> list[str]:
    """What must be said of a worker before requests go there."""
    reasons = []
    if not record.endpoint:
        reasons.append("endpoint: is missing")
    if not record.block_size:
        reasons.append("block_size: is missing, or 0")
    if use_kv_events:
        for _, rank in record.ranks:
            endpoint = record.events_of(rank)
            if endpoint is None:
                reasons.append(f"kv_events_endpoint: is missing for dp_rank {rank}")
                continue
            try:
                check_zmq_endpoint("kv_events_endpoint", endpoint)
                if record.replay_endpoint is not None:
                    check_zmq_endpoint("replay_endpoint", record.replay_endpoint)
            except InvalidArgument as e:
                reasons.append(e.message)
                break
    return reasons
