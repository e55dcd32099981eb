"""How is a worker chosen among those of one model and routing group, without a runtime?

The router's own parts, brought together for workers that a gateway told of: the index of what their engines publish
(or a guess), the book of what was reserved, the choice, and the queue.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from zmq.asyncio import Context

from dynamo.router.affinity import SessionAffinity
from dynamo.router.approximate import ApproximateIndex, PredictingIndex
from dynamo.router.config import KvRouterConfig, RouterConfig
from dynamo.router.overload import Overload
from dynamo.router.queue import TIMEOUT_S, OnDecision, OnError, RouterQueue, Waiting
from dynamo.router.queue_profile import configure, load_profile
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import DEFAULT_BATCH_TOKENS, Decision, OverlapSource, RouteRequest, WorkerKey
from dynamo.runtime.errors import WorkerUnavailable
from dynamo.runtime.options import env_number
from dynamo.services.cache_group import CacheGroup, EventCounts, GroupKey
from dynamo.services.refusals import conflict
from dynamo.services.replica_link import ReplicaLink
from dynamo.services.selection.catalog import WorkerRecord

log = logging.getLogger(__name__)

EXPIRY = "DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS"
SOFT_BATCHES = 4  # engine steps' worth of queued prompt tokens from which a soft session goes elsewhere


class Selector:
    """Chooses among the workers of one group. Owns their index, their book and their queue.

    Raises ValueError for a policy file, or a variable, that says what cannot be meant.
    """

    def __init__(
        self,
        key: GroupKey,
        block_size: int,
        config: RouterConfig,
        counts: EventCounts,
        context: Context,
        link: ReplicaLink,
        on_gone: Callable[[Iterable[str]], None],
    ) -> None:
        asked = config.config or KvRouterConfig()
        profile = load_profile(asked)
        self.key = key
        config_with_file = configure(asked, profile, asked.router_decode_policy)
        expiry_s = env_number(EXPIRY, config_with_file.active_request_expiry_secs)
        self.config = config_with_file.with_overrides(active_request_expiry_secs=expiry_s)
        self.cache = CacheGroup(key, block_size, counts, context)
        self.guess: ApproximateIndex | None = None
        self.scheduler = KvScheduler(block_size, self.config, self._source())
        self.queue = RouterQueue(
            self.scheduler,
            profile,
            timeout_s=env_number("DYN_ROUTER_QUEUE_TIMEOUT_SECS", TIMEOUT_S),
            refresh_after_s=env_number("DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS", 0.0) or None,
        )
        self.overload = Overload(self.scheduler, config.thresholds)
        self.affinity: SessionAffinity | None = None
        if config.session_affinity_ttl_secs is not None:
            self.affinity = SessionAffinity(config.session_affinity_ttl_secs, config.session_affinity_mode)
        self.records: dict[int, WorkerRecord] = {}
        self.ranks: dict[int, list[WorkerKey]] = {}
        self.is_eagle = False
        self.book = link.follow(key, block_size, self.scheduler)
        self._link = link
        self._on_gone = on_gone
        self._clock = asyncio.get_running_loop().time

    def _source(self) -> OverlapSource:
        config = self.config
        if not config.use_kv_events:
            by_age = config.router_approximate_cache_policy == "ttl"
            self.guess = ApproximateIndex(config.router_ttl_secs if by_age else None)
            return self.guess
        if config.router_predicted_ttl_secs is None:
            return self.cache.index
        self.guess = ApproximateIndex(config.router_predicted_ttl_secs)
        return PredictingIndex(self.cache.index, self.guess)

    # --- workers

    def join(self, record: WorkerRecord) -> None:
        """Requests may go to this worker. Raises InvalidArgument if its events cannot be heard: then let it `leave`."""
        self.ranks[record.worker_id] = record.ranks
        if self.config.use_kv_events:
            for worker in record.ranks:
                endpoint = record.events_of(worker.dp_rank)
                assert endpoint is not None
                self.cache.listen(worker, endpoint, record.replay_of(worker.dp_rank))
        self.update(record)
        now = self._clock()
        for worker in record.ranks:
            self.book.worker_joined(worker, now)

    def update(self, record: WorkerRecord) -> None:
        """A worker's limits, or what does not concern the choice, have changed."""
        self.records[record.worker_id] = record
        self.is_eagle = any(each.is_eagle for each in self.records.values())
        for worker in record.ranks:
            self.scheduler.add_worker(worker, record.limits)
            if self.guess is not None:
                self.guess.set_capacity(worker, record.total_kv_blocks)
        self.pump()

    async def leave(self, worker_id: int) -> None:
        """A worker is gone: what was reserved there is free, and nothing of its cache is known any more."""
        self.records.pop(worker_id, None)
        ranks = self.ranks.pop(worker_id, [])
        for worker in ranks:
            self._on_gone(self.scheduler.remove_worker(worker))
            if self.guess is not None:
                self.guess.remove_worker(worker)
            if self.affinity is not None:
                self.affinity.forget(worker)
        self._link.changed(self.key)
        await self.cache.leave(ranks)
        self.pump()

    async def close(self) -> None:
        """Nobody will be chosen any more; whoever waits is told."""
        self.queue.fail_all(WorkerUnavailable(f"there is no worker for {self.key} any more"))
        self._link.groups.pop(self.key, None)
        await self.cache.close()

    # --- choosing

    def choose(self, request: RouteRequest, *, explain: bool = False) -> Decision:
        """The worker for a request, which is booked nowhere. Raises WorkerUnavailable, WorkerOverloaded."""
        self._keep_to_session(request)
        self.overload.check(request)
        return self.scheduler.select(request, self._clock(), explain=explain)

    def reserve(
        self, request: RouteRequest, on_decision: OnDecision, on_error: OnError, *, explain: bool = False
    ) -> Waiting | None:
        """Choose a worker and book the request there, now or when one has room. Calls one of the two.

        Returns what `cancel` takes if the request waits. Raises WorkerUnavailable, WorkerOverloaded.
        """
        now = self._clock()
        request.arrived_at = now
        self._keep_to_session(request)
        self.overload.check(request)

        def decided(decision: Decision) -> None:
            self._booked(request, decision)
            on_decision(decision)

        return self.queue.route(request, now, decided, on_error, explain=explain)

    def reserve_at(self, request: RouteRequest, decision: Decision) -> None:
        """Book a request where it was decided that it goes. Raises SelectionServiceError (409) if that is gone."""
        if decision.worker not in self.scheduler.load.position:
            raise conflict(f"worker {decision.worker.worker_id} has left since it was selected: select again")
        self.scheduler.book(request, decision, self._clock())
        self._booked(request, decision)

    def _booked(self, request: RouteRequest, decision: Decision) -> None:
        now = self._clock()
        if self.affinity is not None and request.session_id is not None:
            if request.session_final:
                self.affinity.end(request.session_id)
            else:
                self.affinity.bind(request.session_id, decision.worker, now)
        if self._link.enabled:
            shared = request.sequence_hashes if self.scheduler.shares(request) else ()
            self.book.booked(self.scheduler.load.bookings[request.request_id], shared)
            self._link.changed(self.key)

    def _keep_to_session(self, request: RouteRequest) -> None:
        affinity = self.affinity
        if affinity is None or request.session_id is None:
            return
        worker = affinity.worker(request.session_id, self._clock())
        at = self.scheduler.load.position.get(worker) if worker is not None else None
        if worker is None or at is None or (request.allowed is not None and worker not in request.allowed):
            return
        load = self.scheduler.load
        batch = load.limits[at].max_batched_tokens or DEFAULT_BATCH_TOKENS
        full = load.prefill_tokens[at] > SOFT_BATCHES * batch or self.overload.busy(at)
        if affinity.mode == "hard" or not full:
            request.allowed = frozenset((worker,))

    # --- the life of a reservation

    def prefill_done(self, request_id: str) -> None:
        """It made its first token."""
        self.scheduler.prefill_done(request_id, self._clock())
        booking = self.scheduler.load.bookings.get(request_id)
        if booking is not None and self._link.enabled:
            self.book.prefill_done(booking)
            self._link.changed(self.key)
        self.pump()

    def free(self, request_id: str, output_tokens: int | None = None) -> None:
        """It ended."""
        booking = self.scheduler.free(request_id, self._clock(), output_tokens)
        if booking is not None and self._link.enabled:
            self.book.freed(booking)
            self._link.changed(self.key)
        self.pump()

    def pump(self) -> None:
        """Let those go that may."""
        if self.queue.pending:
            self.queue.pump(self._clock())

    def tick(self) -> None:
        """What is to be done from time to time."""
        now = self._clock()
        gone = self.scheduler.expire(now, self.book.keys.__contains__)
        if gone:
            log.warning(
                "%s: %d reservations were not ended within %g s and are dropped, first %s",
                self.key,
                len(gone),
                self.config.active_request_expiry_secs,
                gone[0],
            )
            self._on_gone(gone)
            self._link.changed(self.key)
        if self.affinity is not None:
            self.affinity.expire(now)
        self.queue.expire(now)
        self.pump()

    def load_of(self, worker: WorkerKey) -> dict[str, Any]:
        """One line of `/loads`."""
        load = self.scheduler.load
        at = load.position[worker]
        return {
            **worker._asdict(),
            "potential_prefill_tokens": load.prefill_tokens[at],
            "potential_decode_blocks": load.decode_blocks[at],
            "active_requests": load.requests[at],
        }
