"""Which request goes next, when every worker has as much to compute as it should? [K42-K44]

A request waits while every worker that it may go to has more queued prompt tokens than its class allows; it is placed
when it goes, by what is known then. Within a class the higher `strict_priority` goes first, and among equals the
higher key:

    fcfs   priority_jump - seconds since the queue began        lcfs   priority_jump + seconds since the queue began
    wspt   (1 + priority_jump) / max(1, prompt tokens - cached tokens)

Between classes deficit round robin decides: each in its turn may send its quantum of uncached tokens. Requests with
the same constraints wait in a lane of their own, so that one that is pinned to a busy worker holds up nobody else.

There is no clock and no I/O: time is passed in, answers are callbacks. Every request ends: it goes, it is cancelled, or
its time is over.
"""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from operator import le

from dynamo.router.queue_profile import PolicyClass, QueueProfile
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import DEFAULT_BATCH_TOKENS, Decision, RouteRequest, WorkerKey
from dynamo.runtime.errors import DynamoException, RouterQueueLimitExceeded, WorkerUnavailable

TIMEOUT_S = 60.0  # DYN_ROUTER_QUEUE_TIMEOUT_SECS: clients that wait longer for a first token have mostly gone
REFRESHED_AT_ONCE = 8  # requests whose cached tokens are looked up anew when a place is free; 0.1 ms

OnDecision = Callable[[Decision], None]
OnError = Callable[[DynamoException], None]
Constraints = tuple[frozenset[WorkerKey] | None, frozenset[str]]


class Waiting:
    """One request in the queue, or one that has left it."""

    __slots__ = (
        "cached_tokens",
        "deadline",
        "explain",
        "known_at",
        "lane",
        "on_decision",
        "on_error",
        "order",
        "queued_at",
        "request",
    )

    def __init__(
        self, request: RouteRequest, on_decision: OnDecision, on_error: OnError, explain: bool, now: float
    ) -> None:
        self.request = request
        self.on_decision = on_decision
        self.on_error = on_error
        self.explain = explain
        self.queued_at = self.known_at = now
        self.deadline = 0.0
        self.cached_tokens = 0
        self.lane: _Lane | None = None
        """Where it waits; None once it does not."""
        self.order: tuple[float, float, int] = (0.0, 0.0, 0)
        """Its place: the lowest goes first."""

    @property
    def uncached_tokens(self) -> int:
        """What it costs, in prompt tokens to compute; at least 1."""
        return max(1, self.request.token_count - self.cached_tokens)


class _Lane:
    """Requests of one class with the same constraints, in a heap. Places that were left stay until they come up."""

    def __init__(self, queue: "ClassQueue", constraints: Constraints) -> None:
        self.queue = queue
        self.constraints = constraints
        self.heap: list[tuple[tuple[float, float, int], Waiting]] = []
        self.live = 0

    def head(self) -> Waiting | None:
        """The next to go."""
        while self.heap:
            order, waiting = self.heap[0]
            if waiting.lane is self and waiting.order == order:
                return waiting
            heapq.heappop(self.heap)
        return None

    def push(self, waiting: Waiting) -> None:
        """Queue a request at the place its `order` gives it."""
        if len(self.heap) > 64 and len(self.heap) > 2 * self.live:
            self.heap = [(order, each) for order, each in self.heap if each.lane is self and each.order == order]
            heapq.heapify(self.heap)
        heapq.heappush(self.heap, (waiting.order, waiting))

    def entries(self) -> list[Waiting]:
        """All that wait here."""
        return [each for order, each in self.heap if each.lane is self and each.order == order]


class ClassQueue:
    """One class's requests and numbers. `deficit` is the uncached tokens it may send before it is others' turn."""

    def __init__(self, policy: PolicyClass) -> None:
        self.policy = policy
        self.lanes: dict[Constraints, _Lane] = {}
        self.deficit = 0.0
        self.requests = self.isl_tokens = self.cached_tokens = 0
        self.received = 0
        self.rejected: Counter[str] = Counter()
        self.queued: Counter[str] = Counter()
        """Requests that had to wait, by why."""
        self._bounds: list[float] = []
        self._version = -1

    def some_worker_is_free(self, scheduler: KvScheduler, eligible: list[int] | None) -> bool:
        """Whether a request of this class may go now."""
        load = scheduler.load
        if self._version != load.version:
            self._version = load.version
            self._bounds = [self.policy.bound(lim.max_batched_tokens or DEFAULT_BATCH_TOKENS) for lim in load.limits]
        if eligible is None:
            return any(map(le, load.prefill_tokens, self._bounds))
        return any(load.prefill_tokens[at] <= self._bounds[at] for at in eligible)

    def admit(self, request: RouteRequest, cached_tokens: int, workers: int) -> None:
        """Raises RouterQueueLimitExceeded if there is no room to wait. One request may always."""
        full = self.full(request, cached_tokens, workers)
        if full is not None:
            self.rejected[full.limit_kind] += 1
            raise full

    def full(self, request: RouteRequest, cached_tokens: int, workers: int) -> RouterQueueLimitExceeded | None:
        """Why there is no room to wait; None if there is."""
        policy = self.policy
        for kind, limit, current, more in (
            ("requests", policy.request_queue_limit_per_worker, self.requests, 1),
            ("raw_isl_tokens", policy.raw_isl_token_queue_limit_per_worker, self.isl_tokens, request.token_count),
            ("cached_tokens", policy.cached_token_queue_limit_per_worker, self.cached_tokens, cached_tokens),
        ):
            if limit is None:
                continue
            if current + more > limit * workers and (self.requests or limit == 0):
                return RouterQueueLimitExceeded(
                    policy_class=policy.name, limit_kind=kind, current=current, limit=limit * workers
                )
        return None


class RouterQueue:
    """Places requests through a scheduler, and lets them wait while all workers are busy."""

    def __init__(
        self,
        scheduler: KvScheduler,
        profile: QueueProfile,
        *,
        timeout_s: float = TIMEOUT_S,
        refresh_after_s: float | None = None,
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s (DYN_ROUTER_QUEUE_TIMEOUT_SECS) must be above 0, got {timeout_s!r}")
        if refresh_after_s is not None and not 0 < refresh_after_s < math.inf:
            raise ValueError(
                f"refresh_after_s (DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS) must be above 0, got {refresh_after_s!r}"
            )
        self.scheduler = scheduler
        self.profile = profile
        self.timeout_s = timeout_s
        self.refresh_after_s = refresh_after_s
        self.classes = {policy.name: ClassQueue(policy) for policy in profile.classes}
        self.pending = 0
        """Requests that wait."""
        self._ring = list(self.classes.values())
        self._only = self._ring[0] if len(self._ring) == 1 and not profile.queues else None
        self.never_waits = self._only is not None
        """Whether every request is placed, or refused, at once."""
        self._turn = 0
        self._began: float | None = None
        self._numbers = itertools.count()
        self._by_deadline: deque[Waiting] = deque()
        self._by_age: deque[Waiting] = deque()
        self._pumping = self._pump_again = False

    def tokens_ahead(self, request: RouteRequest, cached_tokens: int, now: float) -> int:
        """Prompt tokens that workers will have to compute for those who wait and would go before this request."""
        if not self.pending:
            return 0
        queue = self.classes[self.profile.classify(request.policy_class, request.token_count - cached_tokens).name]
        place = self._key(request, max(1, request.token_count - cached_tokens), now, queue.policy.queue_policy)
        waiting = (each for lane in queue.lanes.values() for each in lane.entries())
        return sum(each.uncached_tokens for each in waiting if each.order[:2] <= place)

    def full(self, request: RouteRequest, now: float) -> RouterQueueLimitExceeded | None:
        """Why `route` would refuse the request, which has to wait and finds no room; None if it would not. Raises
        WorkerUnavailable."""
        if self._only is not None or request.computed:
            return None
        blocks = self.scheduler.best_overlap(request, now)
        cached_tokens = min(request.token_count, blocks * self.scheduler.block_size)
        queue = self.classes[self.profile.classify(request.policy_class, request.token_count - cached_tokens).name]
        if self._why_wait(queue, request) is None:
            return None
        return queue.full(request, cached_tokens, len(self.scheduler.load.workers))

    # --- coming in

    def route(
        self, request: RouteRequest, now: float, on_decision: OnDecision, on_error: OnError, explain: bool = False
    ) -> Waiting | None:
        """Place a request now, or when a worker has room. Exactly one of the callbacks is called, perhaps before
        this returns, unless it is cancelled. With `on_decision` the request is booked.

        Returns what `cancel` takes if the request waits.
        """
        try:
            if self._only is not None:
                decision = self.place(request, now, explain)
            else:
                decision = self.scheduler.select(request, now, explain=explain)
        except WorkerUnavailable as e:
            if self._only is None:
                queue = self.classes[self.profile.classify(request.policy_class, request.token_count).name]
                queue.received += 1
                queue.rejected["no_worker"] += 1
            on_error(e)
            return None
        if self._only is None:
            waiting = self._wait(request, decision, now, on_decision, on_error, explain)
            if waiting is not None:
                return waiting if waiting.lane is not None else None
            self.scheduler.book(request, decision, now)
        on_decision(decision)
        return None

    def place(self, request: RouteRequest, now: float, explain: bool = False) -> Decision:
        """As `route` where a request `never_waits`: choose and book at once. Raises WorkerUnavailable."""
        assert self._only is not None
        self._only.received += 1
        try:
            decision = self.scheduler.select(request, now, explain=explain)
        except WorkerUnavailable:
            self._only.rejected["no_worker"] += 1
            raise
        self.scheduler.book(request, decision, now)
        return decision

    def _wait(
        self,
        request: RouteRequest,
        decision: Decision,
        now: float,
        on_decision: OnDecision,
        on_error: OnError,
        explain: bool,
    ) -> Waiting | None:
        """Let a request wait, or refuse it, if it may not go; None if it may."""
        cached_tokens = min(request.token_count, decision.best_overlap_blocks * self.scheduler.block_size)
        queue = self.classes[self.profile.classify(request.policy_class, request.token_count - cached_tokens).name]
        queue.received += 1
        reason = self._why_wait(queue, request)
        if reason is None:
            return None
        waiting = Waiting(request, on_decision, on_error, explain, now)
        waiting.cached_tokens = cached_tokens
        try:
            if not request.computed:  # its client has seen a token: it waits, but is not refused for that
                queue.admit(request, cached_tokens, len(self.scheduler.load.workers))
        except RouterQueueLimitExceeded as e:
            on_error(e)
            return waiting
        queue.queued[reason] += 1
        self._enter(waiting, queue, now)
        if reason != "busy":
            self.pump(now)
        return waiting

    def _why_wait(self, queue: ClassQueue, request: RouteRequest) -> str | None:
        if not queue.policy.queues:
            return None
        if not queue.some_worker_is_free(self.scheduler, self.scheduler.eligible(request)):
            return "busy"
        lane = queue.lanes.get(_constraints(request))
        return "order" if lane is not None and lane.live else None

    def _enter(self, waiting: Waiting, queue: ClassQueue, now: float) -> None:
        constraints = _constraints(waiting.request)
        lane = queue.lanes.get(constraints)
        if lane is None:
            lane = queue.lanes[constraints] = _Lane(queue, constraints)
        if self._began is None:
            self._began = now
        waiting.deadline = now + self.timeout_s
        waiting.lane = lane
        waiting.order = self._order(waiting, queue.policy.queue_policy)
        lane.live += 1
        lane.push(waiting)
        self.pending += 1
        queue.requests += 1
        queue.isl_tokens += waiting.request.token_count
        queue.cached_tokens += waiting.cached_tokens
        self._by_deadline = self._without_gone(self._by_deadline)
        self._by_deadline.append(waiting)
        if self.refresh_after_s is not None:
            self._by_age = self._without_gone(self._by_age)
            self._by_age.append(waiting)

    def _order(self, waiting: Waiting, queue_policy: str) -> tuple[float, float, int]:
        place = self._key(waiting.request, waiting.uncached_tokens, waiting.queued_at, queue_policy)
        return *place, next(self._numbers)

    def _key(
        self, request: RouteRequest, uncached_tokens: int, queued_at: float, queue_policy: str
    ) -> tuple[float, float]:
        """The place in the queue; the lowest goes first."""
        offset = queued_at - (self._began or 0.0)
        if queue_policy == "fcfs":
            key = request.priority_jump - offset
        elif queue_policy == "lcfs":
            key = request.priority_jump + offset
        else:
            key = (1 + request.priority_jump) / uncached_tokens
        return -request.strict_priority, -key

    # --- going out

    def pump(self, now: float) -> None:
        """Let go whoever may. To be called when load may have become less: a first token, an end, a worker more."""
        if self._pumping:  # a callback freed something: go on once it has returned
            self._pump_again = True
            return
        self._pumping = True
        try:
            self.expire(now)
            while self.pending:
                self._pump_again = False
                self._refresh(now)
                if not self._send_next(now) and not self._pump_again:
                    break
        finally:
            self._pumping = False

    def _send_next(self, now: float) -> bool:
        ready = [(queue, waiting) for queue in self._ring if queue.requests and (waiting := self._first(queue))]
        if not ready:
            return False
        waiting = self._take_turn(ready)
        self._leave(waiting)
        try:
            decision = self.scheduler.select(waiting.request, now, explain=waiting.explain)
            decision.queued_ms = (now - waiting.queued_at) * 1000
            self.scheduler.book(waiting.request, decision, now)
        except WorkerUnavailable as e:
            waiting.on_error(e)
        else:
            waiting.on_decision(decision)
        return True

    def _first(self, queue: ClassQueue) -> Waiting | None:
        """The class's next request that may go. Requests that no worker can take any more are failed."""
        best: Waiting | None = None
        for constraints, lane in list(queue.lanes.items()):
            head = lane.head()
            if head is None:
                del queue.lanes[constraints]
                continue
            try:
                eligible = self.scheduler.eligible(head.request)
            except WorkerUnavailable as e:
                for waiting in lane.entries():
                    queue.rejected["no_worker"] += 1
                    self._leave(waiting)
                    waiting.on_error(e)
                continue
            if (best is None or head.order < best.order) and queue.some_worker_is_free(self.scheduler, eligible):
                best = head
        return best

    def _take_turn(self, ready: list[tuple[ClassQueue, Waiting]]) -> Waiting:
        """Deficit round robin over the classes that have somebody to send, without walking round after round."""
        rounds = {
            id(queue): max(0, math.ceil((waiting.uncached_tokens - queue.deficit) / queue.policy.quantum))
            for queue, waiting in ready
        }
        fewest = min(rounds.values())
        count = len(self._ring)
        place = {id(queue): (i - self._turn) % count for i, queue in enumerate(self._ring)}
        chosen: tuple[ClassQueue, Waiting] | None = None
        for queue, waiting in sorted(ready, key=lambda each: place[id(each[0])]):
            queue.deficit += fewest * queue.policy.quantum
            if chosen is None and rounds[id(queue)] == fewest:
                chosen = queue, waiting
        assert chosen is not None
        queue, waiting = chosen
        queue.deficit = max(0.0, queue.deficit - waiting.uncached_tokens)
        self._turn = self._ring.index(queue)
        return waiting

    def _leave(self, waiting: Waiting) -> None:
        lane = waiting.lane
        assert lane is not None
        waiting.lane = None
        lane.live -= 1
        queue = lane.queue
        self.pending -= 1
        queue.requests -= 1
        queue.isl_tokens -= waiting.request.token_count
        queue.cached_tokens -= waiting.cached_tokens
        if not queue.requests:
            queue.deficit = 0.0
            queue.lanes.clear()

    def cancel(self, waiting: Waiting | None) -> bool:
        """Nobody wants it any more: no callback follows. False if it does not wait, or no more."""
        if waiting is None or waiting.lane is None:
            return False
        waiting.lane.queue.rejected["cancelled"] += 1
        self._leave(waiting)
        return True

    def fail_all(self, error: DynamoException) -> None:
        """Nobody will go any more."""
        for queue in self._ring:
            for lane in list(queue.lanes.values()):
                for waiting in lane.entries():
                    self._leave(waiting)
                    waiting.on_error(error)

    # --- time

    def next_deadline(self) -> float | None:
        """When `expire` is to be called next."""
        while self._by_deadline and self._by_deadline[0].lane is None:
            self._by_deadline.popleft()
        return self._by_deadline[0].deadline if self._by_deadline else None

    def expire(self, now: float) -> int:
        """Fail whoever has waited too long. Returns how many."""
        gone = 0
        for waiting in self._due(self._by_deadline, lambda each: each.deadline <= now):
            assert waiting.lane is not None
            queue = waiting.lane.queue
            queue.rejected["timeout"] += 1
            self._leave(waiting)
            gone += 1
            waiting.on_error(
                RouterQueueLimitExceeded(
                    f"no worker had room within {self.timeout_s:g} s (DYN_ROUTER_QUEUE_TIMEOUT_SECS)",
                    queue.policy.name,
                    "wait_seconds",
                    math.ceil(now - waiting.queued_at),
                    math.ceil(self.timeout_s),
                )
            )
        return gone

    def _refresh(self, now: float) -> None:
        """Look up anew what is cached of those that have waited long, and give them the place that follows [K51]."""
        if self.refresh_after_s is None:
            return
        due = now - self.refresh_after_s
        for waiting in itertools.islice(self._due(self._by_age, lambda each: each.known_at <= due), REFRESHED_AT_ONCE):
            lane = waiting.lane
            assert lane is not None
            waiting.known_at = now
            self._by_age.append(waiting)
            before = waiting.cached_tokens
            try:
                waiting.cached_tokens = min(
                    waiting.request.token_count,
                    self.scheduler.best_overlap(waiting.request, now) * self.scheduler.block_size,
                )
            except WorkerUnavailable:
                continue  # the pump sees to it
            if waiting.cached_tokens != before:
                lane.queue.cached_tokens += waiting.cached_tokens - before
                if lane.queue.policy.queue_policy == "wspt":
                    waiting.order = self._order(waiting, "wspt")
                    lane.push(waiting)

    def _due(self, line: deque[Waiting], due: Callable[[Waiting], bool]) -> Iterator[Waiting]:
        """Take from the front those that still wait and are due."""
        while line and (line[0].lane is None or due(line[0])):
            waiting = line.popleft()
            if waiting.lane is not None:
                yield waiting

    def _without_gone(self, line: deque[Waiting]) -> deque[Waiting]:
        """The same line, shorter if most in it have left: they hold their prompts' hashes."""
        if len(line) < 64 or len(line) < 2 * self.pending:
            return line
        return deque(waiting for waiting in line if waiting.lane is not None)


def _constraints(request: RouteRequest) -> Constraints:
    return request.allowed, request.required_taints
