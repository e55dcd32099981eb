"""What is active at each worker, by what callers say? They choose the workers themselves."""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from dynamo.router.config import KvRouterConfig
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import Decision, Overlap, RouteRequest, WorkerKey
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import env_number
from dynamo.services.cache_group import GroupKey
from dynamo.services.refusals import conflict, full, not_found
from dynamo.services.replica_link import ReplicaLink

log = logging.getLogger(__name__)

TICK_S = 1.0
MAX_RANKS = 65_536  # of all workers
MAX_REQUESTS = 200_000  # some 500 MB with prompts of 64 blocks


class _Nothing:
    """Nobody's cache is known here."""

    def find(self, sequence_hashes: Sequence[int], now: float) -> dict[WorkerKey, Overlap]:
        return {}


class _Tracked(msgspec.Struct):
    block_size: int
    scheduler: KvScheduler
    ranks: dict[int, list[WorkerKey]] = {}
    shapes: dict[int, tuple[int, int]] = {}


class SlotTracker:
    """Books by model and routing group. Needs a running event loop; close it. Raises CannotConnect, ValueError."""

    def __init__(self, host: str, replica_sync_port: int | None = None, replica_sync_peers: Iterable[str] = ()) -> None:
        self.link = ReplicaLink(host, replica_sync_port, replica_sync_peers)
        expiry_s = env_number("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS", 300.0)
        self._config = KvRouterConfig(router_policy="linear", active_request_expiry_secs=expiry_s)
        self._groups: dict[GroupKey, _Tracked] = {}
        self._loop = asyncio.get_running_loop()
        self._ticking = self._loop.create_task(self._tick(), name="slots")

    async def close(self) -> None:
        """Forget everything, and leave the replicas."""
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        await self.link.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for key, group in self._groups.items():
                gone = group.scheduler.expire(self._loop.time(), self.link.groups[key].book.keys.__contains__)
                if gone:
                    log.warning("%s: %d requests were never freed and are dropped, first %s", key, len(gone), gone[0])
                    self.link.changed(key)

    # --- workers

    def register(self, key: GroupKey, worker_id: int, block_size: int, dp_start: int, dp_size: int) -> None:
        """Know a worker. Raises InvalidArgument, SelectionServiceError (409, 507)."""
        key.check()
        if block_size < 1:
            raise InvalidArgument("block_size: must be above 0", "block_size")
        for field, value, least in (("dp_start", dp_start, 0), ("dp_size", dp_size, 1), ("worker_id", worker_id, 0)):
            if value < least:
                raise InvalidArgument(f"{field}: must be at least {least}, got {value}", field)
        group = self._groups.get(key)
        if group is not None and group.block_size != block_size:
            raise conflict(f"block_size: {block_size} is not {group.block_size}, which the workers of {key} have")
        if group is not None and worker_id in group.ranks:
            raise conflict(f"worker {worker_id} is registered already for {key}")
        if dp_size + sum(len(each.scheduler.load.workers) for each in self._groups.values()) > MAX_RANKS:
            raise full(f"dp_size: at most {MAX_RANKS} ranks of all workers are tracked")
        if group is None:
            group = self._groups[key] = _Tracked(block_size, KvScheduler(block_size, self._config, _Nothing()))
            self.link.follow(key, block_size, group.scheduler)
        group.ranks[worker_id] = [WorkerKey(worker_id, rank) for rank in range(dp_start, dp_start + dp_size)]
        group.shapes[worker_id] = dp_start, dp_size
        book, now = self.link.groups[key].book, self._loop.time()
        for worker in group.ranks[worker_id]:
            group.scheduler.add_worker(worker)
            book.worker_joined(worker, now)

    def unregister(self, key: GroupKey, worker_id: int) -> None:
        """A worker is gone, with all that was active there. Raises SelectionServiceError (404)."""
        group = self._groups.get(key)
        if group is None or worker_id not in group.ranks:
            raise not_found(f"worker {worker_id} is not registered for {key}")
        for worker in group.ranks.pop(worker_id):
            group.scheduler.remove_worker(worker)
        del group.shapes[worker_id]
        self.link.changed(key)
        if not group.ranks:
            del self._groups[key], self.link.groups[key]

    def workers(self) -> list[dict[str, Any]]:
        """All workers."""
        return [
            {
                "worker_id": worker_id,
                "model_name": key.model_name,
                "routing_group": key.routing_group,
                "block_size": group.block_size,
                "dp_start": start,
                "dp_size": size,
            }
            for key, group in self._groups.items()
            for worker_id, (start, size) in group.shapes.items()
        ]

    def _group(self, key: GroupKey) -> _Tracked:
        group = self._groups.get(key)
        if group is None:
            raise not_found(f"no worker is registered for {key}")
        return group

    # --- requests

    @property
    def active(self) -> int:
        """How many requests are active, those of replicas among them."""
        return sum(len(group.scheduler.load.bookings) for group in self._groups.values())

    def add(self, key: GroupKey, request_id: str, worker: WorkerKey, hashes: list[int], new_tokens: int) -> None:
        """A request was sent to a worker. Raises SelectionServiceError (404, 409, 507)."""
        group = self._group(key)
        load = group.scheduler.load
        if worker not in load.position:
            raise not_found(f"{key} has no worker {worker.worker_id} with dp_rank {worker.dp_rank}")
        if request_id in load.bookings:
            at = load.bookings[request_id].worker
            raise conflict(f"request {request_id} is active already, at worker {at.worker_id}, dp_rank {at.dp_rank}")
        if self.active >= MAX_REQUESTS:
            raise full(f"{MAX_REQUESTS} requests are active, which is the most: free those that are over")
        request = RouteRequest(
            request_id=request_id, token_count=len(hashes) * group.block_size, sequence_hashes=hashes
        )
        decision = Decision(
            worker=worker,
            overlap=Overlap(),
            new_tokens=new_tokens,
            cost=0.0,
            hit_rate=0.0,
            policy="",
            reason="",
            candidates=0,
        )
        group.scheduler.book(request, decision, self._loop.time())
        if self.link.enabled:
            self.link.groups[key].book.booked(load.bookings[request_id], hashes)
            self.link.changed(key)

    def prefill_complete(self, key: GroupKey, request_id: str) -> None:
        """A request made its first token. Raises SelectionServiceError (404)."""
        scheduler = self._group(key).scheduler
        booking = scheduler.load.bookings.get(request_id)
        if booking is None:
            raise not_found(f"request {request_id} is not active")
        scheduler.prefill_done(request_id, self._loop.time())
        if self.link.enabled:
            self.link.groups[key].book.prefill_done(booking)
            self.link.changed(key)

    def free(self, key: GroupKey, request_id: str) -> None:
        """A request ended. One that is not active is no error, so that every path may say so. Raises (404) for a group
        that nobody is of."""
        booking = self._group(key).scheduler.free(request_id)
        if booking is not None and self.link.enabled:
            self.link.groups[key].book.freed(booking)
            self.link.changed(key)

    # --- loads

    def loads(self, model_name: str | None, routing_group: str | None) -> Iterator[dict[str, Any]]:
        """A line for each rank."""
        for key, group in self._groups.items():
            if model_name not in (None, key.model_name) or routing_group not in (None, key.routing_group):
                continue
            load = group.scheduler.load
            for at, worker in enumerate(load.workers):
                yield {
                    **key._asdict(),
                    **worker._asdict(),
                    "active_prefill_tokens": load.prefill_tokens[at],
                    "active_decode_blocks": load.decode_blocks[at],
                }

    def potential_loads(self, key: GroupKey, hashes: list[int], new_tokens: int) -> list[dict[str, Any]]:
        """The same if a request were added to each."""
        group = self._group(key)
        request = RouteRequest(request_id="", token_count=len(hashes) * group.block_size, sequence_hashes=hashes)
        lines = group.scheduler.potential_loads(request, self._loop.time())
        load = group.scheduler.load
        for at, line in enumerate(lines):
            line["potential_prefill_tokens"] = load.prefill_tokens[at] + new_tokens
        return lines
