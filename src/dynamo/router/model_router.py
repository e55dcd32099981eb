"""How are the requests of one model routed by what workers have cached? (`--router-mode kv`)

A `ModelRouter` brings together who is there (`FleetFeed`), what they hold (`KvEventFeed`, or a guess), how busy they
are (`LoadFeed`, `ReplicaSync`), and the decision (`RouterQueue`, `KvScheduler`). `route` is a plain call: its answer
comes in a callback, mostly before it returns, and no task is made for a request.
"""

import asyncio
import logging
from collections.abc import Sequence
from copy import copy
from time import perf_counter
from typing import Any

from dynamo.llm.model_card import ModelDeploymentCard, WorkerType
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.router.affinity import SessionAffinity
from dynamo.router.approximate import ApproximateIndex, PredictingIndex
from dynamo.router.config import KvRouterConfig, LoadThresholdConfig, RouterConfig
from dynamo.router.event_feed import KvEventFeed
from dynamo.router.fleet_feed import FleetFeed
from dynamo.router.load_feed import LoadFeed
from dynamo.router.overload import Overload
from dynamo.router.prompt_hashes import PromptHashes
from dynamo.router.queue import TIMEOUT_S, OnDecision, OnError, RouterQueue
from dynamo.router.queue_profile import configure, load_profile
from dynamo.router.replica_sync import ReplicaSync
from dynamo.router.route_request import route_request, says_nothing
from dynamo.router.router_metrics import RouterMetrics, base_labels
from dynamo.router.scheduler import KvScheduler
from dynamo.router.silent_workers import SilentWorkers
from dynamo.router.stats import TIMED_EVERY, RouterStats
from dynamo.router.status import router_status
from dynamo.router.ticket import Ticket
from dynamo.router.tier_index import TierIndex
from dynamo.router.turn import Turn
from dynamo.router.types import DEFAULT_BATCH_TOKENS, Decision, OverlapSource, RouteRequest, WorkerKey
from dynamo.router.worker_reports import WorkerReports
from dynamo.runtime.component import Endpoint
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import DynamoException, InvalidArgument, WorkerUnavailable
from dynamo.runtime.options import env_number

log = logging.getLogger(__name__)

TICK_S = 1.0
SOFT_BATCHES = 4  # engine steps' worth of queued prompt tokens from which a soft session goes elsewhere; about a second


class ModelRouter:
    """Routes the requests of the workers of one endpoint that serve one model. Needs a running event loop.

    Args:
        card: the model's; workers with another checksum are not its. None: every instance of the endpoint is.
        block_size: of the workers' KV cache, in tokens, if not the card's.
        keep_contents: so that `dump_events` works; 8 bytes a block more.

    Raises:
        InvalidArgument: nobody says how large a KV block is.
        ValueError: the policy file, or a variable of the environment, says what cannot be meant.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        endpoint: Endpoint,
        card: ModelDeploymentCard | None,
        config: RouterConfig,
        *,
        block_size: int | None = None,
        keep_contents: bool = False,
    ) -> None:
        self._runtime = runtime
        self._endpoint = endpoint
        self._card = card
        self.name = card.display_name if card is not None else endpoint.path
        self.block_size = self._block_size(block_size)
        asked = config.config or KvRouterConfig()
        profile = load_profile(asked)
        prefill = card is not None and card.worker_type is WorkerType.Prefill
        selection = asked.router_prefill_policy if prefill else asked.router_decode_policy
        self.config = configure(asked, profile, selection)
        if prefill:  # what a prefill worker computed is soon elsewhere [G8]
            self.config = self.config.with_overrides(router_track_active_blocks=False)
        if unread := self.config.unread_settings():
            log.error("the policy %s of %s does not have: %s", self.config.router_policy, self.name, ", ".join(unread))
        expiry_s = env_number("DYN_ROUTER_ACTIVE_REQUEST_EXPIRY_SECS", self.config.active_request_expiry_secs)
        if expiry_s != self.config.active_request_expiry_secs:
            self.config = self.config.with_overrides(active_request_expiry_secs=expiry_s)
        self._stats = RouterStats(self.block_size)
        self._hashes = PromptHashes(self.block_size)
        self._eagle = card is not None and card.runtime_config.enable_eagle
        self.index: TierIndex | None = None
        self.guess: ApproximateIndex | None = None
        self._source = self._make_source(keep_contents)
        self.scheduler = KvScheduler(self.block_size, self.config, self._source)
        refresh_s = env_number("DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS", 0.0)
        self.queue = RouterQueue(
            self.scheduler,
            profile,
            timeout_s=env_number("DYN_ROUTER_QUEUE_TIMEOUT_SECS", TIMEOUT_S),
            refresh_after_s=refresh_s or None,
        )
        self.overload = Overload(self.scheduler, config.thresholds)
        self.reports = WorkerReports(self.scheduler.load)
        self.affinity: SessionAffinity | None = None
        if config.session_affinity_ttl_secs is not None:
            self.affinity = SessionAffinity(config.session_affinity_ttl_secs, config.session_affinity_mode)
        self.silent = SilentWorkers(self.name, self.block_size, uses_events=self.index is not None)
        self._metrics: RouterMetrics | None = None
        self.feed: KvEventFeed | None = None
        self.sync: ReplicaSync | None = None
        self._fleet: FleetFeed | None = None
        self._load_feed: LoadFeed | None = None
        self._workers: dict[int, list[WorkerKey]] = {}
        self.many_ranks = False
        """Whether any worker has more than a rank 0."""
        self._tickets: dict[str, Ticket] = {}
        self._loop = asyncio.get_running_loop()
        self.turn = Turn()
        self._deadline: asyncio.TimerHandle | None = None
        self._ticking: asyncio.Task[None] | None = None

    def _block_size(self, given: int | None) -> int:
        size = given if given is not None else self._card.kv_cache_block_size if self._card is not None else None
        if size is None or size < 1:
            raise InvalidArgument(
                f"--router-mode kv cannot work for {self.name}: its workers do not say how large a KV block is "
                "(kv_cache_block_size of register_model). Start them with it, or use another router mode",
                "kv_cache_block_size",
            )
        return size

    def _make_source(self, keep_contents: bool) -> OverlapSource:
        config = self.config
        if not config.use_kv_events:
            by_age = config.router_approximate_cache_policy == "ttl"
            self.guess = ApproximateIndex(config.router_ttl_secs if by_age else None)
            return self.guess
        self.index = TierIndex(keep_contents=keep_contents)
        if config.router_predicted_ttl_secs is None:
            return self.index
        self.guess = ApproximateIndex(config.router_predicted_ttl_secs)
        return PredictingIndex(self.index, self.guess)

    # --- begin and end

    async def start(self) -> None:
        """Meet the workers of now, and follow the others. Raises DiscoveryError, or what the event plane raises."""
        runtime, endpoint = self._runtime, self._endpoint
        labels = base_labels(runtime.metrics, endpoint.address.namespace, endpoint.address.component, self.name)
        worker_type = self._card.worker_type if self._card is not None else WorkerType.Aggregated
        self._metrics = RouterMetrics(runtime.metrics, self, labels, worker_type)
        try:
            if self.index is not None:
                self.feed = KvEventFeed(runtime, endpoint, self.index, self.block_size, labels)
                await self.feed.start()
            self._load_feed = LoadFeed(runtime, endpoint, self.reports, self._pump)
            await self._load_feed.start()
            if self.config.router_replica_sync:
                self.sync = ReplicaSync(runtime, endpoint, self.scheduler, affinity=self.affinity, on_change=self._pump)
                await self.sync.start()
            client = await endpoint.client()
            belongs = None if self._card is None else self._belongs
            self._fleet = FleetFeed(runtime.discovery, endpoint.address, client, belongs, self._fleet_changed)
            await self._fleet.start()
        except BaseException:
            await self.close()
            raise
        self._fleet_changed()
        self._ticking = self._loop.create_task(self._tick(), name=f"router {self.name}")

    def _belongs(self, card: ModelDeploymentCard) -> bool:
        assert self._card is not None
        return card.checksum == self._card.checksum

    async def close(self) -> None:
        """Follow nothing any more; whoever still waits is told. Safe to call twice."""
        self.queue.fail_all(WorkerUnavailable(f"the router of {self.name} is closing"))
        if self._deadline is not None:
            self._deadline.cancel()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        for part in (self._fleet, self.sync, self._load_feed, self.feed):
            if part is not None:
                await part.close()
        self._fleet = self.sync = self._load_feed = self.feed = None
        if self._metrics is not None:
            self._metrics.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._loop.time()
            self._stats.settle()
            self.reports.expire(now)
            gone = self.scheduler.expire(now, self._is_open)
            if gone:
                self._stats.leaked_bookings += len(gone)
                for request_id in gone:
                    self._tickets.pop(request_id, None)
                log.warning(
                    "%d bookings of %s were never freed and are dropped, first %s", len(gone), self.name, gone[0]
                )
            if self.affinity is not None:
                self.affinity.expire(now)
            self._pump()

    def _is_open(self, request_id: str) -> bool:
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            return not ticket.expires
        return self.sync is not None and request_id in self.sync.book.keys

    # --- who is there

    def _fleet_changed(self) -> None:
        assert self._fleet is not None
        wanted, load = self._fleet.ranks(), self.scheduler.load
        for worker in [worker for worker in load.workers if worker not in wanted]:
            self._worker_left(worker)
        now = self._loop.time()
        for worker, limits in wanted.items():
            joined = worker not in load.position
            self.scheduler.add_worker(worker, limits)
            if self.guess is not None:
                self.guess.set_capacity(worker, limits.total_blocks)
            if joined and self.sync is not None:
                self.sync.book.worker_joined(worker, now)
        self.many_ranks = any(worker.dp_rank for worker in wanted)
        unavailable = self._fleet.unavailable()
        self.scheduler.suspended = {worker for worker in wanted if worker.worker_id in unavailable}
        self._workers = {}
        for worker in wanted:
            self._workers.setdefault(worker.worker_id, []).append(worker)
        for worker_id, card in self._fleet.cards().items():
            self.silent.check(self._workers.get(worker_id, ()), card)
        self._pump()

    def _worker_left(self, worker: WorkerKey) -> None:
        self.scheduler.remove_worker(worker)
        self.reports.forget(worker)
        self.silent.pop(worker, None)
        if self.guess is not None:
            self.guess.remove_worker(worker)
        if self.affinity is not None:
            self.affinity.forget(worker)

    # --- routing

    def request(
        self,
        request_id: str,
        request: PreprocessedRequest,
        metadata: dict[str, str] | None = None,
        *,
        hashes: Sequence[int] | None = None,
    ) -> RouteRequest:
        """What `route` takes, from what the engine will get. Hashes the prompt: once a request. `hashes` are those that
        a router of the same model's other workers has made of it.

        Raises InvalidArgument as `route_request`.
        """
        timed = hashes is None and self._stats.is_timed()
        if hashes is None and not timed and not self._eagle and not metadata and says_nothing(request):
            tokens = request.token_ids  # of such are most
            return RouteRequest(request_id, len(tokens), self._hashes.of(tokens))
        return route_request(
            request_id,
            request,
            self.block_size,
            self._workers,
            metadata=metadata,
            is_eagle=self._eagle,
            stats=self._stats if timed else None,
            hashes_of=self._hashes,
            hashes=hashes,
        )

    def ranks_of(self, worker_id: int) -> Sequence[WorkerKey]:
        """A worker's ranks; none of an unknown one."""
        return self._workers.get(worker_id, ())

    def route(
        self,
        request: RouteRequest,
        on_decision: OnDecision,
        on_error: OnError,
        *,
        explain: bool = False,
        expires: bool = False,
    ) -> Ticket:
        """Choose a worker, now or when one has room. Calls exactly one of the two, perhaps before it returns, unless
        the ticket is cancelled first. From `on_decision` on the ticket must be freed at the end.

        The error is WorkerUnavailable (nobody can take it), WorkerOverloaded (all are busy) or
        RouterQueueLimitExceeded (no room to wait, or waited too long).
        """
        stats, now, request_id = self._stats, self._loop.time(), request.request_id
        timed = stats.requests % TIMED_EVERY == 0
        start = perf_counter() if timed else 0.0
        if self._fleet is not None and self._fleet.stale:
            self._fleet.flush()
        stats.requests += 1
        stats.prompts.append(request.token_count)
        if request_id in self._tickets or request_id in self.scheduler.load.bookings:
            request_id = request.request_id = self._another_name(request_id)
        request.arrived_at = now
        ticket = self._tickets[request_id] = Ticket(self, request, on_decision, on_error, expires)
        if request.session_id is not None and self.affinity is not None:
            self._keep_to_session(self.affinity, request, now)
        if self.overload.on and not request.computed:  # one that is computed was admitted when its prompt was
            try:
                self.overload.check(request)
            except DynamoException as e:
                ticket._failed(e)
                return ticket
        begin = perf_counter() if timed else 0.0
        explain = explain or log.isEnabledFor(logging.DEBUG)
        waiting = decision = None
        try:
            if self.queue.never_waits:
                decision = self.queue.place(request, now, explain)
            else:
                waiting = self.queue.route(request, now, ticket._decided, ticket._failed, explain)
        except (InvalidArgument, WorkerUnavailable) as e:  # a token that is none, far into the prompt; nobody is there
            ticket._failed(e)
            return ticket
        if timed:
            self._note_times(request, now, perf_counter() - start, perf_counter() - begin)
        if decision is not None:
            ticket._decided(decision)
        elif waiting is not None:
            ticket._waiting = waiting
            self._arm()
        return ticket

    def _note_times(self, request: RouteRequest, now: float, total_s: float, scheduling_s: float) -> None:
        """Note what routing a request has cost, and what a look at who holds its prompt does."""
        stats, look = self._stats, getattr(self._source, "groups", self._source.find)
        stats.total_ms.observe(total_s * 1000)
        stats.scheduling_ms.observe(scheduling_s * 1000)
        start = perf_counter()
        look(request.sequence_hashes, now)
        stats.find_matches_ms.observe((perf_counter() - start) * 1000)

    def query(self, request: RouteRequest, *, explain: bool = False) -> Decision:
        """Where the request would go if it were routed now. Changes nothing. Raises WorkerUnavailable."""
        return self.scheduler.select(self.as_routed(request), self._loop.time(), explain=explain)

    def as_routed(self, request: RouteRequest) -> RouteRequest:
        """The request as `route` would ask for it now: among the workers of now, and at its session's."""
        if self._fleet is not None and self._fleet.stale:
            self._fleet.flush()
        if self.affinity is not None and request.session_id is not None:
            request = copy(request)
            self._keep_to_session(self.affinity, request, self._loop.time())
        return request

    def refusal(self, request: RouteRequest) -> DynamoException | None:
        """Why `route` would refuse the request at once; None if it would not. Changes and counts nothing."""
        try:
            self.scheduler.eligible(request)
            return self.overload.refusal(request) or self.queue.full(request, self._loop.time())
        except WorkerUnavailable as e:
            return e

    def ticket(self, request_id: str) -> Ticket | None:
        """The request of that id, queued or at a worker."""
        return self._tickets.get(request_id)

    def _another_name(self, request_id: str) -> str:
        """Clients may give two requests one id."""
        number = 2
        while (name := f"{request_id}#{number}") in self._tickets or name in self.scheduler.load.bookings:
            number += 1
        return name

    def _keep_to_session(self, affinity: SessionAffinity, request: RouteRequest, now: float) -> None:
        assert request.session_id is not None
        worker = affinity.worker(request.session_id, now)
        at = self.scheduler.load.position.get(worker) if worker is not None else None
        if worker is None or at is None or worker in self.scheduler.suspended:
            return
        if request.allowed is not None and worker not in request.allowed:
            return
        if affinity.mode == "soft" and self._is_full(at):
            return
        request.allowed = frozenset((worker,))

    def _is_full(self, at: int) -> bool:
        load = self.scheduler.load
        batch = load.limits[at].max_batched_tokens or DEFAULT_BATCH_TOKENS
        return load.prefill_tokens[at] > SOFT_BATCHES * batch or self.overload.busy(at)

    def _decided(self, request: RouteRequest, decision: Decision) -> None:
        self._stats.decisions.append((decision, request.token_count))
        if request.session_id is not None and self.affinity is not None:
            if request.session_final:
                self.affinity.end(request.session_id)
            else:
                self.affinity.bind(request.session_id, decision.worker, self._loop.time())
        if self.sync is not None:
            shared = request.sequence_hashes if self.scheduler.shares(request) else ()
            self.sync.booked(self.scheduler.load.bookings[request.request_id], list(shared))
        if decision.explanation is not None:
            log.debug("request %s of %s: %s", request.request_id, self.name, decision.explanation)

    def _failed(self, request: RouteRequest) -> None:
        self._tickets.pop(request.request_id, None)
        self._stats.errors += 1

    # --- the life of a request

    def _first_token(self, ticket: Ticket) -> None:
        ticket.first_token_at = now = self._loop.time()
        self._stats.first_tokens.append(now - ticket.request.arrived_at)
        request_id = ticket.request.request_id
        self.scheduler.prefill_done(request_id, now)
        if self.sync is not None:
            booking = self.scheduler.load.bookings.get(request_id)
            if booking is not None:
                self.sync.prefill_done(booking)
        if self.queue.pending:
            self._pump()

    def _free(self, ticket: Ticket, output_tokens: int | None, cached_tokens: int | None) -> None:
        request_id = ticket.request.request_id
        if self._tickets.get(request_id) is not ticket:
            return
        del self._tickets[request_id]
        now = self._loop.time()
        if output_tokens:
            between_s = None
            if ticket.first_token_at is None and output_tokens == 1:
                ticket.first_token_at = now
                self._stats.first_tokens.append(now - ticket.request.arrived_at)
            elif ticket.first_token_at is not None and output_tokens > 1:
                between_s = (now - ticket.first_token_at) / (output_tokens - 1)
            self._stats.ends.append((output_tokens, between_s, cached_tokens or 0))
        booking = self.scheduler.free(request_id, now, output_tokens)
        if self.sync is not None and booking is not None:
            self.sync.freed(booking)
        if self.queue.pending:
            self._pump()

    # --- the queue

    def _pump(self) -> None:
        if self.queue.pending:
            self.queue.pump(self._loop.time())
            self._arm()

    def _arm(self) -> None:
        """Come back when somebody has waited too long."""
        if not self.queue.pending:
            return
        deadline = self.queue.next_deadline()
        if deadline is None or (self._deadline is not None and self._deadline.when() == deadline):
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._loop.call_at(deadline, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline = None
        self.queue.expire(self._loop.time())
        self._arm()

    # --- what is known of it

    @property
    def stats(self) -> RouterStats:
        """What it has counted until now."""
        self._stats.settle()
        return self._stats

    @property
    def endpoint_name(self) -> str:
        """The last part of the workers' endpoint."""
        return self._endpoint.address.endpoint

    @property
    def thresholds(self) -> LoadThresholdConfig:
        """When a worker counts as busy; may be set."""
        return self.overload.thresholds

    @thresholds.setter
    def thresholds(self, thresholds: LoadThresholdConfig) -> None:
        self.overload.thresholds = thresholds

    def status(self) -> dict[str, Any]:
        """All that an operator may ask: what is in effect, who is there and how busy, and what is amiss."""
        return router_status(self)
