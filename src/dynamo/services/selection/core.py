"""Which worker does a gateway's request go to, and what is reserved there?

The selection service without HTTP: a catalog of workers, a selector for each group of them, and the reservations.
Requests and answers are the JSON objects of the routes. Errors are InvalidArgument, WorkerOverloaded,
RouterQueueLimitExceeded, WorkerUnavailable, and SelectionServiceError for all else.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple
from uuid import uuid4

from zmq.asyncio import Context

from dynamo.router.config import KvRouterConfig, RouterConfig
from dynamo.router.overlap_report import overlap_report
from dynamo.router.types import Decision, RouteRequest, WorkerKey
from dynamo.runtime.errors import DynamoException, InvalidArgument, WorkerUnavailable
from dynamo.runtime.metrics import Metrics
from dynamo.services.bodies import signed
from dynamo.services.cache_group import SWEPT_A_TICK, TICK_S, CacheGroup, EventCounts, GroupKey, matched
from dynamo.services.peer_recovery import PeerRecovery
from dynamo.services.refusals import conflict, full, not_found, not_ready
from dynamo.services.replica_link import ReplicaLink
from dynamo.services.selection.catalog import (
    MAX_WORKERS,
    WorkerBody,
    WorkerPatch,
    WorkerRecord,
    missing,
    new_record,
    patched,
)
from dynamo.services.selection.pending import Pending, PendingSelections, SelectionCacheConfig
from dynamo.services.selection.prompts import (
    PromptBody,
    ReservationBody,
    SelectBody,
    check_id,
    constrain,
    prompt_request,
)
from dynamo.services.selection.selector import Selector

log = logging.getLogger(__name__)

MAX_RESERVATIONS = 200_000  # some 500 MB with prompts of 64 blocks; callers that never end theirs are found by expiry


class _Reservation(NamedTuple):
    selector: Selector
    worker: WorkerKey


class SelectionCore:
    """Owns everything the service knows. Needs a running event loop; close it.

    Raises:
        CannotConnect: the port for replicas is taken.
        ValueError: a setting that cannot be meant.
    """

    def __init__(
        self,
        config: RouterConfig,
        metrics: Metrics,
        *,
        indexer_peers: Iterable[str] = (),
        replica_host: str = "127.0.0.1",
        replica_sync_port: int | None = None,
        replica_sync_peers: Iterable[str] = (),
        selection_cache: SelectionCacheConfig | None = None,
    ) -> None:
        self.config = config
        self.catalog: dict[int, WorkerRecord] = {}
        self.selectors: dict[GroupKey, Selector] = {}
        self.caches: dict[GroupKey, CacheGroup] = {}
        self.reservations: dict[str, _Reservation] = {}
        self.pending = PendingSelections(selection_cache)
        self.link = ReplicaLink(replica_host, replica_sync_port, replica_sync_peers, self._pump)
        self.recovery = PeerRecovery(self.caches, indexer_peers)
        self.selections = 0
        self._booking: set[str] = set()
        self._counts = EventCounts(metrics)
        self._context = Context()
        self._changing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._closing: asyncio.Task[None] | None = None
        self._ticking = self._loop.create_task(self._tick(), name="selection")

    def refuse_waiting(self) -> None:
        """Tell whoever waits for a worker that none will come."""
        for selector in self.selectors.values():
            selector.queue.fail_all(WorkerUnavailable("the selection service is shutting down"))

    def close_soon(self) -> None:
        """Begin to close. May be repeated."""
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name="close selection")

    async def close(self) -> None:
        """Choose nobody any more; whoever waits is told. May be repeated."""
        self.close_soon()
        assert self._closing is not None
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        await self.recovery.close()
        for selector in list(self.selectors.values()):
            await selector.close()
        await self.link.close()
        self._context.term()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.pending.expire(self._loop.time())
            for selector in list(self.selectors.values()):
                selector.tick()
                selector.cache.index.sweep(SWEPT_A_TICK)

    def _pump(self) -> None:
        for selector in list(self.selectors.values()):
            selector.pump()

    def _gone(self, selection_ids: Iterable[str]) -> None:
        for selection_id in selection_ids:
            self.reservations.pop(selection_id, None)

    @property
    def _uses_events(self) -> bool:
        return (self.config.config or KvRouterConfig()).use_kv_events

    # --- workers

    async def upsert(self, body: WorkerBody) -> WorkerRecord:
        """Take what is said of a worker in place of what was. Raises InvalidArgument, SelectionServiceError (507)."""
        async with self._changing:
            return await self._put(new_record(body))

    async def patch(self, worker_id: int, patch: WorkerPatch) -> WorkerRecord:
        """Change what is known of a worker. Raises InvalidArgument, SelectionServiceError (404)."""
        async with self._changing:
            return await self._put(patched(self._record(worker_id), patch))

    async def delete(self, worker_id: int) -> WorkerRecord:
        """A worker is gone. Raises SelectionServiceError (404)."""
        async with self._changing:
            record = self._record(worker_id)
            await self._withdraw(record)
            del self.catalog[worker_id]
            record.lifecycle, record.reasons = "unschedulable", []
            log.info("%s: worker %d is gone", record.key, worker_id)
            return record

    def _record(self, worker_id: int) -> WorkerRecord:
        record = self.catalog.get(worker_id)
        if record is None:
            raise not_found(f"there is no worker {worker_id}")
        return record

    async def _put(self, record: WorkerRecord) -> WorkerRecord:
        old = self.catalog.get(record.worker_id)
        if old is None and len(self.catalog) >= MAX_WORKERS:
            raise full(f"{MAX_WORKERS} workers are known already")
        record.reasons = missing(record, use_kv_events=self._uses_events)
        stays = old is not None and old.lifecycle == "schedulable" and not record.reasons
        if stays and old is not None and old.place() == record.place():
            record.lifecycle = "schedulable"
            self.catalog[record.worker_id] = record
            self.selectors[record.key].update(record)
            return record
        if old is not None:
            await self._withdraw(old)
        self.catalog[record.worker_id] = record
        if not record.reasons:
            await self._admit(record)
        for reason in record.reasons:
            log.warning("%s: nothing is sent to worker %d: %s", record.key, record.worker_id, reason)
        return record

    async def _admit(self, record: WorkerRecord) -> None:
        assert record.block_size is not None
        selector = self.selectors.get(record.key)
        if selector is None:
            selector = Selector(
                record.key, record.block_size, self.config, self._counts, self._context, self.link, self._gone
            )
        try:
            selector.cache.check_block_size(record.block_size)
            selector.join(record)
        except DynamoException as e:
            record.reasons = [e.message]
            await selector.leave(record.worker_id)
            if not selector.records and self.selectors.get(record.key) is None:
                await selector.close()
            return
        self.selectors[record.key], self.caches[record.key] = selector, selector.cache
        record.lifecycle = "schedulable"
        for worker in record.ranks:
            listener = selector.cache.listeners.get(worker)
            if listener is not None:
                self.recovery.joined(record.key, listener)
        log.info("%s: requests may go to worker %d at %s", record.key, record.worker_id, record.endpoint)

    async def _withdraw(self, record: WorkerRecord) -> None:
        if record.lifecycle != "schedulable":
            return
        selector = self.selectors[record.key]
        for worker in record.ranks:
            listener = selector.cache.listeners.get(worker)
            if listener is not None:
                self.recovery.left(listener)
        await selector.leave(record.worker_id)
        if not selector.records:
            del self.selectors[record.key], self.caches[record.key]
            await selector.close()

    def workers(self, model_name: str | None = None, routing_group: str | None = None) -> list[dict[str, Any]]:
        """The catalog, or the part of it that is of a model or group."""
        return [
            record.told()
            for record in self.catalog.values()
            if model_name in (None, record.model_name) and routing_group in (None, record.routing_group)
        ]

    def ready(self) -> dict[str, Any]:
        """Whether requests can go anywhere."""
        schedulable = sum(record.lifecycle == "schedulable" for record in self.catalog.values())
        return {
            "ready": schedulable > 0 and not self.recovery.busy,
            "schedulable_workers": schedulable,
            "workers": self.workers(),
        }

    # --- asking

    def _selector(self, key: GroupKey) -> Selector:
        selector = self.selectors.get(key)
        if selector is not None:
            return selector
        if not self.selectors:
            raise not_ready("no worker can take requests yet")
        raise not_ready(f"no worker of {key} can take requests")

    def _request(self, body: PromptBody, request_id: str) -> tuple[Selector, RouteRequest]:
        selector = self._selector(body.key)
        size = selector.scheduler.block_size
        return selector, prompt_request(request_id, body, size, is_eagle=selector.is_eagle)

    def overlap_scores(self, body: PromptBody) -> dict[str, Any]:
        """What each worker holds of a prompt: see `overlap_report`."""
        selector, request = self._request(body, "")
        found = selector.scheduler.overlaps.find(request.sequence_hashes, self._loop.time())
        here = {worker: held for worker, held in found.items() if worker in selector.scheduler.load.position}
        return overlap_report(selector.scheduler.block_size, len(request.sequence_hashes), here)

    def potential_loads(self, body: PromptBody) -> list[dict[str, Any]]:
        """By worker, its load with this prompt."""
        selector, request = self._request(body, "")
        return selector.scheduler.potential_loads(request, self._loop.time())

    def loads(self, model_name: str | None = None, routing_group: str | None = None) -> list[dict[str, Any]]:
        """By group: every worker's load, and what waits."""
        return [
            {
                "model_name": key.model_name,
                "routing_group": key.routing_group,
                "loads": [selector.load_of(worker) for worker in selector.scheduler.load.workers],
                "pending_count": selector.queue.pending,
                "pending_isl_tokens": sum(queue.isl_tokens for queue in selector.queue.classes.values()),
            }
            for key, selector in self.selectors.items()
            if model_name in (None, key.model_name) and routing_group in (None, key.routing_group)
        ]

    # --- choosing

    def select(self, body: SelectBody) -> dict[str, Any]:
        """The best worker. With a `selection_id` the choice may be booked later; nothing is booked now."""
        selection_id = body.selection_id
        if selection_id is not None:
            self._check_free(selection_id)
        selector, request = self._select_request(body, selection_id or "")
        decision = selector.choose(request, explain=body.explain)
        self.selections += 1
        if selection_id is not None:
            self.pending.put(selection_id, Pending(body.key, request, decision, self._loop.time()))
        at = selector.scheduler.load.position[decision.worker]
        blocks = selector.scheduler.view(request, self._loop.time()).potential_decode_blocks(at)
        told = {} if selection_id is None else {"selection_id": selection_id}
        return told | _selection(selector, decision, blocks)

    async def select_and_reserve(self, body: SelectBody) -> dict[str, Any]:
        """The best worker, where the request is booked until it is freed. Waits for room if the router has a queue."""
        selection_id = body.selection_id or str(uuid4())
        self._check_free(selection_id)
        selector, request = self._select_request(body, selection_id)
        decided: asyncio.Future[Decision] = self._loop.create_future()

        def chosen(decision: Decision) -> None:
            self.reservations[selection_id] = _Reservation(selector, decision.worker)
            if not decided.done():
                decided.set_result(decision)

        def failed(error: DynamoException) -> None:
            if not decided.done():
                decided.set_exception(error)

        self._booking.add(selection_id)
        waiting = None
        try:
            waiting = selector.reserve(request, chosen, failed, explain=body.explain)
            decision = await decided
        except asyncio.CancelledError:  # the caller has gone, perhaps as its turn came
            selector.queue.cancel(waiting)
            if self.reservations.pop(selection_id, None) is not None:
                selector.free(selection_id)
            raise
        finally:
            self._booking.discard(selection_id)
        self.selections += 1
        self.pending.discard(selection_id)
        at = selector.scheduler.load.position.get(decision.worker)
        told = {
            "selection_id": selection_id,
            "sequence_hashes": [signed(value) for value in request.sequence_hashes],
            "isl_tokens": request.token_count,
            "track_prefill_tokens": selector.config.router_track_prefill_tokens,
        }
        return told | _selection(selector, decision, 0 if at is None else selector.scheduler.load.decode_blocks[at])

    def _select_request(self, body: SelectBody, request_id: str) -> tuple[Selector, RouteRequest]:
        selector, request = self._request(body, request_id)
        constrain(request, body, selector.ranks)
        return selector, request

    def _check_free(self, selection_id: str) -> None:
        check_id(selection_id)
        if selection_id in self.reservations or selection_id in self._booking:
            raise conflict(f"selection {selection_id} is reserved already, or waits to be")
        if len(self.reservations) + len(self._booking) >= MAX_RESERVATIONS:
            raise full(f"{MAX_RESERVATIONS} reservations are open, which is the most: end those that are over")

    # --- reservations

    def reserve(self, body: ReservationBody) -> dict[str, Any]:
        """Book what `select` chose under this id, or what the caller chose. Raises SelectionServiceError (404, 409)."""
        selection_id = body.selection_id
        self._check_free(selection_id)
        selector, request, decision = self._chosen_by_caller(body) if body.worker_id is not None else self._take(body)
        self.pending.discard(selection_id)
        selector.reserve_at(request, decision)
        self.reservations[selection_id] = _Reservation(selector, decision.worker)
        record = selector.records[decision.worker.worker_id]
        return {
            "selection_id": selection_id,
            "model_name": selector.key.model_name,
            "routing_group": selector.key.routing_group,
            **decision.worker._asdict(),
            "endpoint": record.endpoint,
        }

    def _take(self, body: ReservationBody) -> tuple[Selector, RouteRequest, Decision]:
        pending = self.pending.take(body.selection_id, body.key, self._loop.time())
        if pending is None:
            raise not_found(
                f"nothing was selected as {body.selection_id!r} for {body.key}, or it was longer ago than "
                f"{self.pending.ttl_s:g} s, or it is reserved already"
            )
        return self._selector(body.key), pending.request, pending.decision

    def _chosen_by_caller(self, body: ReservationBody) -> tuple[Selector, RouteRequest, Decision]:
        assert body.worker_id is not None
        selector, request = self._request(body, body.selection_id)
        worker = WorkerKey(body.worker_id, body.dp_rank)
        if worker not in selector.scheduler.load.position:
            raise not_found(
                f"{body.key} has no worker {body.worker_id} with dp_rank {body.dp_rank} that takes requests"
            )
        request.allowed = frozenset((worker,))
        request.expected_output_tokens = body.expected_output_tokens
        try:
            decision = selector.scheduler.select(request, self._loop.time())
        except WorkerUnavailable as e:
            raise conflict(e.message) from None
        if body.effective_prefill_tokens is not None:
            if body.effective_prefill_tokens < 0:
                raise InvalidArgument("effective_prefill_tokens: is negative", "effective_prefill_tokens")
            decision.new_tokens = body.effective_prefill_tokens
        if not body.track_prefill_tokens:
            decision.new_tokens = 0
        return selector, request, decision

    def _reservation(self, selection_id: str) -> _Reservation:
        found = self.reservations.get(selection_id)
        if found is None:
            raise not_found(f"there is no reservation {selection_id[:200]!r}")
        return found

    def prefill_complete(self, selection_id: str) -> None:
        """Its prompt is computed. Raises SelectionServiceError (404)."""
        self._reservation(selection_id).selector.prefill_done(selection_id)

    def output_block(self, selection_id: str, decay_fraction: float | None = None) -> bool:
        """It generated one more block. Returns whether such blocks are counted here at all.

        Raises InvalidArgument, SelectionServiceError (404).
        """
        if decay_fraction is not None and not 0 <= decay_fraction <= 1:
            raise InvalidArgument(f"decay_fraction: must be between 0 and 1, got {decay_fraction!r}", "decay_fraction")
        selector = self._reservation(selection_id).selector
        selector.scheduler.output_block(selection_id, decay_fraction)
        return selector.config.router_track_output_blocks

    def free(self, selection_id: str, output_tokens: int | None = None) -> None:
        """It ended, however it did. Raises SelectionServiceError (404)."""
        selector = self._reservation(selection_id).selector
        del self.reservations[selection_id]
        selector.free(selection_id, output_tokens)


def _selection(selector: Selector, decision: Decision, potential_decode_blocks: int) -> dict[str, Any]:
    """What all answers say of a choice; token counts under the names that callers know."""
    worker, record = decision.worker, selector.records.get(decision.worker.worker_id)
    told = {
        "model_name": selector.key.model_name,
        "routing_group": selector.key.routing_group,
        **worker._asdict(),
        "endpoint": record.endpoint if record is not None else None,
        "block_size": selector.scheduler.block_size,
        "overlap": matched({worker.dp_rank: decision.overlap}, selector.scheduler.block_size),
        "effective_prefill_tokens": decision.new_tokens,
        "potential_decode_blocks": potential_decode_blocks,
        "policy": decision.policy,
        "reason": decision.reason,
    }
    if decision.explanation is not None:
        told["routing"] = decision.explanation
    return told
