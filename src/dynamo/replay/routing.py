"""Where does each simulated request go?

The KV router here is the one that serves: `KvScheduler` with its policies, `TierIndex` fed by the engines' own cache
events. The others know nothing of a prompt and are what it is compared with.
"""

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from dynamo.llm.kv_events import KvEventData
from dynamo.mocker.batching import SchedulerConfig
from dynamo.replay.prompts import ReplayedSequence
from dynamo.router.computed_elsewhere import computed_elsewhere
from dynamo.router.config import KvRouterConfig
from dynamo.router.policies import POLICIES
from dynamo.router.queue import RouterQueue
from dynamo.router.queue_profile import configure, load_profile
from dynamo.router.scheduler import KvScheduler
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import Decision, RouteRequest, WorkerKey, WorkerLimits

BASELINES = ("round-robin", "random", "least-loaded")


class Choice(msgspec.Struct, frozen=True):
    """A worker, and how many tokens of the prompt the router believes it to hold."""

    worker: int
    overlap_tokens: int = 0
    best_overlap_tokens: int = 0


Placed = Callable[[ReplayedSequence, Choice, float], None]
Refused = Callable[[ReplayedSequence, float], None]


class Routing(Protocol):
    """What places requests. Every request it placed it hears of twice: at the first token, and at the end."""

    name: str
    wants_cache_events: bool
    wants_progress: bool

    def connect(self, placed: Placed, refused: Refused) -> None:
        """To be called once, before any request: whom to tell where requests go."""
        ...

    def route(self, sequence: ReplayedSequence, now: float) -> None:
        """Place a request, now or later."""
        ...

    def next_deadline(self) -> float:
        """When `tick` is to be called next; never, if nothing waits."""
        ...

    def tick(self, now: float) -> None:
        """Time has passed."""
        ...

    def first_token(self, sequence: ReplayedSequence, now: float) -> None:
        """Its prompt is computed."""
        ...

    def finished(self, sequence: ReplayedSequence, now: float) -> None:
        """It is done."""
        ...

    def cache_changed(self, worker: int, changes: list[KvEventData], now: float) -> None:
        """A worker's cache changed."""
        ...

    def output_block(self, sequence: ReplayedSequence) -> None:
        """Its answer fills one more block. Only told where progress is wanted."""
        ...


class _Blind:
    """Counts requests in flight and knows nothing else."""

    name: str
    wants_cache_events = False
    wants_progress = False

    def __init__(self, workers: int, seed: int) -> None:
        self.inflight = [0] * workers
        self.rng = random.Random(seed)

    def pick(self) -> int:
        """A worker's position."""
        raise NotImplementedError

    def connect(self, placed: Placed, refused: Refused) -> None:
        """See `Routing.connect`."""
        self.placed = placed

    def route(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Routing.route`."""
        worker = self.pick()
        self.inflight[worker] += 1
        self.placed(sequence, Choice(worker), now)

    def next_deadline(self) -> float:
        """Nothing waits."""
        return math.inf

    def tick(self, now: float) -> None:
        """Nothing to do."""

    def first_token(self, sequence: ReplayedSequence, now: float) -> None:
        """Nothing to do."""

    def finished(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Routing.finished`."""
        self.inflight[sequence.worker] -= 1

    def cache_changed(self, worker: int, changes: list[KvEventData], now: float) -> None:
        """Nothing to do."""

    def output_block(self, sequence: ReplayedSequence) -> None:
        """Nothing to do."""


class RoundRobin(_Blind):
    """One after the other."""

    name = "round-robin"
    _turn = 0

    def pick(self) -> int:
        """See `_Blind.pick`."""
        self._turn += 1
        return (self._turn - 1) % len(self.inflight)


class Random(_Blind):
    """Any."""

    name = "random"

    def pick(self) -> int:
        """See `_Blind.pick`."""
        return self.rng.randrange(len(self.inflight))


class LeastLoaded(RoundRobin):
    """The fewest requests in flight; among equals the next in turn."""

    name = "least-loaded"

    def pick(self) -> int:
        """See `_Blind.pick`."""
        start, count = super().pick(), len(self.inflight)
        return min(((start + i) % count for i in range(count)), key=self.inflight.__getitem__)


class KvRouting:
    """The KV router with one of its policies, and its queue. Cache events reach it `event_lag_s` after they happen."""

    wants_cache_events = True

    def __init__(
        self,
        workers: int,
        limits: SchedulerConfig,
        config: KvRouterConfig,
        *,
        event_lag_s: float = 0.0,
        seed: int = 0,
        selection: str | None = None,
    ) -> None:
        profile = load_profile(config)
        config = configure(config, profile, selection)
        self.block_size = limits.block_size
        self.index = TierIndex()
        self.scheduler = KvScheduler(limits.block_size, config, self.index, rng=random.Random(seed))
        self.queue = RouterQueue(self.scheduler, profile)
        self.name = config.router_policy
        self.wants_progress = config.router_track_output_blocks
        self._keys = [WorkerKey(worker) for worker in range(workers)]
        self._lag_s = event_lag_s
        self._under_way: deque[tuple[float, WorkerKey, list[KvEventData]]] = deque()
        self._now = 0.0
        for key in self._keys:
            self.scheduler.add_worker(
                key, WorkerLimits(limits.num_blocks, limits.max_num_batched_tokens, limits.max_num_seqs)
            )

    def connect(self, placed: Placed, refused: Refused) -> None:
        """See `Routing.connect`."""
        self._placed, self._refused = placed, refused

    def route(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Routing.route`."""
        request = self.request(sequence, now)

        def decided(decision: Decision) -> None:
            size = self.block_size
            choice = Choice(
                decision.worker.worker_id, decision.overlap.total * size, decision.best_overlap_blocks * size
            )
            self._placed(sequence, choice, self._now)

        self.queue.route(request, now, decided, lambda error: self._refused(sequence, self._now))

    def request(self, sequence: ReplayedSequence, now: float) -> RouteRequest:
        """What the scheduler is asked; it has heard of all cache changes that it can have heard of by now.

        Of a prompt that was computed elsewhere nothing is to be computed, so what speaks for a worker is its load.
        """
        self.catch_up(now)
        loaded = sequence.prefill_worker is not None
        request = RouteRequest(
            request_id=sequence.id,
            token_count=sequence.request.input_tokens,
            sequence_hashes=() if loaded else sequence.names.copy(),  # nobody looks at those of a loaded one
            session_id=sequence.request.session_id,
            expected_output_tokens=sequence.max_tokens if self.wants_progress else None,
            arrived_at=now,
        )
        if loaded:
            computed_elsewhere(request)
        return request

    def next_deadline(self) -> float:
        """See `Routing.next_deadline`."""
        deadline = self.queue.next_deadline()
        return math.inf if deadline is None else deadline

    def tick(self, now: float) -> None:
        """See `Routing.tick`."""
        self.catch_up(now)
        self.queue.pump(now)

    def catch_up(self, now: float) -> None:
        """Hear of all that can be known by now."""
        self._now = now
        self._deliver(now)

    def _deliver(self, now: float) -> None:
        due, apply = now - self._lag_s, self.index.apply
        while self._under_way and self._under_way[0][0] <= due:
            _, worker, changes = self._under_way.popleft()
            for change in changes:
                apply(worker, "device", change)

    def first_token(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Routing.first_token`."""
        self.scheduler.prefill_done(sequence.id, now)
        if self.queue.pending:
            self.tick(now)

    def finished(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Routing.finished`."""
        self.scheduler.free(sequence.id, now, sequence.num_output)
        if self.queue.pending:
            self.tick(now)

    def output_block(self, sequence: ReplayedSequence) -> None:
        """See `Routing.output_block`."""
        self.scheduler.output_block(sequence.id)

    def cache_changed(self, worker: int, changes: list[KvEventData], now: float) -> None:
        """See `Routing.cache_changed`. Blocks of an answer make no events fit for a choice, but take room like any."""
        self._under_way.append((now, self._keys[worker], changes))


def routing_names() -> list[str]:
    """All that can be asked for."""
    return [*BASELINES, *POLICIES]


def make_routing(
    name: str,
    workers: int,
    limits: SchedulerConfig,
    *,
    config: KvRouterConfig | None = None,
    event_lag_s: float = 0.0,
    seed: int = 0,
    selection: str | None = None,
) -> Routing:
    """The routing of that name: a baseline, or a policy of the KV router. Raises ValueError naming those there are."""
    for blind in (RoundRobin, Random, LeastLoaded):
        if name == blind.name:
            return blind(workers, seed)
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(routing_names())}, got {name!r}")
    config = (config or KvRouterConfig()).with_overrides(router_policy=name)
    return KvRouting(workers, limits, config, event_lag_s=event_lag_s, seed=seed, selection=selection)


def routing_details(routing: Routing) -> dict[str, Any]:
    """What the routing knows at the end, for checks: nothing may be left of finished requests."""
    if isinstance(routing, KvRouting):
        return {
            "open_bookings": len(routing.scheduler.load.bookings),
            "queued": routing.queue.pending,
            "index_blocks": len(routing.index),
        }
    return {}
