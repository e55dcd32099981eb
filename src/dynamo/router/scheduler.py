"""Which worker gets this request, and why?

The whole decision, with time passed in and no I/O: the frontend, the stand-alone services and the simulator all call
this. It brings together who holds what (`OverlapSource`), who is busy (`ActiveLoad`) and a cost (`Policy`).
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from dynamo.router.active_load import ActiveLoad, Booking
from dynamo.router.config import KvRouterConfig
from dynamo.router.journey import Journey
from dynamo.router.policies import Policy, make_policy
from dynamo.router.types import (
    NO_OVERLAP,
    Decision,
    Decoded,
    Overlap,
    OverlapSource,
    Prefilled,
    RouteRequest,
    View,
    WorkerKey,
    WorkerLimits,
)
from dynamo.runtime.errors import WorkerUnavailable

GROUPS_KNOWN = 1024  # sets of workers whose positions are remembered; at 1,000 workers in each, 16 MB
LESSON_EVERY_S = 0.01  # a policy learns from a hundred requests a second at most: more tell it nothing, and cost 10 µs


class _Sent(msgspec.Struct):
    """How a worker stood when a request was sent there, until the policy has learnt from it."""

    at: float
    queued_tokens: int
    decodes: int
    decode_blocks: int
    new_tokens: int
    computes: bool
    """Whether the prompt is computed there: else it tells nothing of how long that takes."""
    first_token_at: float | None = None


class KvScheduler:
    """Chooses among the workers of one model. Owns the book of active requests; not thread-safe."""

    def __init__(
        self,
        block_size: int,
        config: KvRouterConfig,
        overlaps: OverlapSource,
        *,
        policy: Policy | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.block_size = block_size
        self.config = config
        self.overlaps = overlaps
        self.policy = policy or make_policy(config.router_policy, config)
        self.load = ActiveLoad()
        self._positions = _Positions(overlaps, self.load)
        self._routed: Callable[[WorkerKey, Sequence[int], float], None] | None = getattr(overlaps, "routed", None)
        self.suspended: set[WorkerKey] = set()
        """Workers that get nothing new: they failed a moment ago, or are leaving. What they have stays booked."""
        # Of the configuration, what is looked at for each request.
        self._tracks_blocks = config.router_track_active_blocks
        self._reuses = config.router_assume_kv_reuse and config.router_track_active_blocks
        self._tracks_prefill = config.router_track_prefill_tokens
        self._usual_temperature = config.router_temperature
        self._learns = self.policy.learns
        self._rng = rng or random.Random()
        self._sent: dict[str, _Sent] = {}
        self._next_lesson_at = -math.inf

    # --- workers

    def add_worker(self, worker: WorkerKey, limits: WorkerLimits | None = None) -> None:
        """Let a worker be chosen, or know its new limits."""
        self.load.add_worker(worker, limits)

    def remove_worker(self, worker: WorkerKey) -> list[str]:
        """A worker is gone. Returns the ids of the requests that were booked there."""
        self.suspended.discard(worker)
        self.policy.forget(worker)
        ids = self.load.remove_worker(worker)
        for request_id in ids:
            self._sent.pop(request_id, None)
        return ids

    # --- choosing

    def view(self, request: RouteRequest, now: float) -> View:
        """Everything a policy looks at, for one request."""
        hashes, size = request.sequence_hashes, self.block_size
        held, most = ((), 0) if request.computed and request.ignores_caches else self._positions.held(hashes, now)
        reuses = self._reuses if request.override is None else self.shares(request)
        shared = self.load.shared_blocks(hashes) if reuses else ()
        return View(
            self.load, request, size, -(-request.token_count // size), held, shared, most, now
        )  # by place: fast

    def select(self, request: RouteRequest, now: float, *, explain: bool = False) -> Decision:
        """The worker for this request. Changes nothing: `book` does.

        Raises:
            WorkerUnavailable: there is no worker, or none that the request may go to.
        """
        eligible = self.eligible(request)
        view = self.view(request, now)
        costs = self.policy.costs(view)
        if request.journey is not None and request.ignores_caches:
            costs = self._add_journey(request.journey, view, costs)
        if request.preferred_taints:
            costs = self._prefer(costs, request.preferred_taints)
        temperature = self._usual_temperature if request.override is None else self._temperature(request)
        position, reason = self._choose(costs, eligible, temperature)
        overlap, new_tokens, hit_rate, best = NO_OVERLAP, request.token_count, 0.0, 0
        if view.held:
            overlap = view.overlap(position)
            new_tokens = view.new_tokens_after(overlap)
            best = view.most_overlap if eligible is None else max(view.overlap(at).total for at in eligible)
            if overlap.total and request.token_count:
                hit_rate = 1 - new_tokens / request.token_count
        return Decision(
            self.load.workers[position],
            overlap,
            new_tokens,
            costs[position],
            hit_rate,
            self.policy.name,
            reason,
            len(costs) if eligible is None else len(eligible),
            best,
            0.0,
            self._explain(view, costs, eligible, position, reason) if explain else None,
        )  # by place: fast

    def best_overlap(self, request: RouteRequest, now: float) -> int:
        """The most blocks of the prompt that any worker which it may go to holds. Raises as `eligible`."""
        eligible = self.eligible(request)
        view = self.view(request, now)
        return view.most_overlap if eligible is None else _most(view, eligible)

    def eligible(self, request: RouteRequest) -> list[int] | None:
        """Positions this request may go to; None for all.

        Raises:
            WorkerUnavailable: it may go to none.
        """
        workers = self.load.workers
        if request.allowed is None and not request.required_taints and not self.suspended:
            if not workers:
                raise WorkerUnavailable("no worker has joined the router")
            return None
        limits, position = self.load.limits, self.load.position
        positions = range(len(workers)) if request.allowed is None else map(position.get, request.allowed)
        eligible = [
            at
            for at in positions
            if at is not None and request.required_taints <= limits[at].taints and workers[at] not in self.suspended
        ]
        if not eligible:
            raise WorkerUnavailable(self._why_none(request))
        return eligible

    def _why_none(self, request: RouteRequest) -> str:
        wanted = []
        if request.allowed is not None:
            names = ", ".join(f"{key.worker_id}/{key.dp_rank}" for key in sorted(request.allowed)[:3])
            wanted.append(f"is {names}" + (" or another of those asked for" if len(request.allowed) > 3 else ""))
        if request.required_taints:
            wanted.append(f"has the taints {sorted(request.required_taints)}")
        if self.suspended:
            wanted.append("has not failed or begun to leave a moment ago")
        count = len(self.load.workers)
        return (
            f"none of {count} workers " + " and ".join(wanted)
            if count and wanted
            else "no worker has joined the router"
        )

    def _add_journey(self, journey: Journey, view: View, costs: list[float]) -> list[float]:
        """Add what fetching the prompt's KV costs each worker."""
        columns = enumerate(zip(costs, journey.tokens_column(self._holding(view)), strict=True))
        return [cost + self.policy.waiting(view, position, tokens) for position, (cost, tokens) in columns]

    def _holding(self, view: View) -> View:
        """The same with what workers hold of a prompt that was computed elsewhere."""
        held, most = self._positions.held(view.request.sequence_hashes, view.now)
        return msgspec.structs.replace(view, held=held, most_overlap=most)

    def _prefer(self, costs: list[float], weights: Mapping[str, float]) -> list[float]:
        """Multiply each cost by 1 - tanh(sum of the weights of the taints the worker has) [K47]."""
        factors: dict[frozenset[str], float] = {}
        for limits in self.load.limits:
            if limits.taints not in factors:
                factors[limits.taints] = 1 - math.tanh(sum(weights.get(taint, 0.0) for taint in limits.taints))
        # A cost below zero is made better by making it larger.
        return [
            cost * factor if cost >= 0 else cost * (2 - factor)
            for cost, factor in zip(costs, (factors[limits.taints] for limits in self.load.limits), strict=True)
        ]

    def _choose(self, costs: Sequence[float], eligible: list[int] | None, temperature: float) -> tuple[int, str]:
        if eligible is not None:
            if len(eligible) == 1:
                return eligible[0], "the only worker allowed"
            position, reason = self._choose([costs[i] for i in eligible], None, temperature)
            return eligible[position], reason
        if temperature > 0:
            return self._draw(costs, temperature), f"drawn at temperature {temperature:g}"
        lowest = min(costs)
        first = costs.index(lowest)
        if costs.count(lowest) == 1:
            return first, "lowest cost"
        ties = [position for position, cost in enumerate(costs) if cost == lowest]
        return self._rng.choice(ties), f"lowest cost, drawn among {len(ties)} equal"

    def _draw(self, costs: Sequence[float], temperature: float) -> int:
        """Softmax over negated costs, scaled to their range [K24]; uniform where all are equal."""
        low, high = min(costs), max(costs)
        if high == low:
            return self._rng.randrange(len(costs))
        weights = [math.exp((low - cost) / (high - low) / temperature) for cost in costs]
        return self._rng.choices(range(len(costs)), weights)[0]

    def _temperature(self, request: RouteRequest) -> float:
        override = request.override
        if override is not None and override.router_temperature is not None:
            return override.router_temperature
        return self._usual_temperature

    def shares(self, request: RouteRequest) -> bool:
        """Whether the request's blocks count once with those of others that have them too [K31]."""
        override = request.override
        if override is not None and override.assume_kv_reuse is not None:
            return override.assume_kv_reuse and self._tracks_blocks
        return self._reuses

    def _track_prefill(self, request: RouteRequest) -> bool:
        override = request.override
        if override is not None and override.track_prefill_tokens is not None:
            return override.track_prefill_tokens
        return self._tracks_prefill

    # --- explaining

    def _explain(
        self, view: View, costs: Sequence[float], eligible: list[int] | None, chosen: int, reason: str
    ) -> dict[str, Any]:
        """The candidates with what was known of each, best first."""
        positions = range(len(costs)) if eligible is None else eligible
        request = view.request
        holding = self._holding(view) if request.journey is not None and request.ignores_caches else None
        return {
            "policy": self.policy.name,
            "reason": reason,
            "worker": self.load.workers[chosen]._asdict(),
            "block_size": self.block_size,
            "prompt_tokens": view.request.token_count,
            "candidates": [
                self._explain_one(view, costs, i, holding) for i in sorted(positions, key=costs.__getitem__)
            ],
        }

    def _explain_one(self, view: View, costs: Sequence[float], position: int, holding: View | None) -> dict[str, Any]:
        fleet, journey = self.load, view.request.journey
        explained = {
            **fleet.workers[position]._asdict(),
            "cost": round(costs[position], 3),
            "overlap_blocks": view.overlap(position)._asdict(),
            "new_tokens": view.new_tokens(position),
            "prefill_tokens": fleet.prefill_tokens[position],
            "decode_blocks": fleet.decode_blocks[position],
            "potential_decode_blocks": view.potential_decode_blocks(position),
            "active_requests": fleet.requests[position],
            "terms": {name: round(term, 3) for name, term in self.policy.terms(view, position).items()},
        }
        if holding is not None and journey is not None:
            explained["transfer"] = journey.explain(holding, position)
        return explained

    def potential_loads(self, request: RouteRequest, now: float) -> list[dict[str, Any]]:
        """By worker: its load if this request were added [K53]. Changes nothing."""
        view = self.view(request, now)
        return [
            {
                **worker._asdict(),
                "potential_prefill_tokens": self.load.prefill_tokens[i] + view.new_tokens(i),
                "potential_decode_blocks": view.potential_decode_blocks(i),
                "active_requests": self.load.requests[i],
            }
            for i, worker in enumerate(self.load.workers)
        ]

    # --- the life of a request

    def book(self, request: RouteRequest, decision: Decision, now: float) -> None:
        """The request is sent where `decision` says.

        Raises:
            KeyError: the worker is gone, or the request's id is booked already.
        """
        reuses, computes = self._reuses, self._tracks_prefill
        if request.override is not None:
            reuses, computes = self.shares(request), self._track_prefill(request)
        hashes: Sequence[int] = request.sequence_hashes if reuses else ()
        sent = None
        if self._learns and now >= self._next_lesson_at:
            sent = self._as_sent(decision, computes, now)
        private = 0  # blocks of the prompt that no other request can share, as far as this router is to know
        if self._tracks_blocks:
            private = max(0, -(-request.token_count // self.block_size) - len(hashes))
        expected = 0.0
        if request.expected_output_tokens and self.config.router_track_output_blocks:
            expected = request.expected_output_tokens / self.block_size
        new_tokens = decision.new_tokens if computes else 0
        self.load.book(request.request_id, decision.worker, hashes, new_tokens, now, private, expected)
        if sent is not None:
            self._sent[request.request_id] = sent
            self._next_lesson_at = now + LESSON_EVERY_S
        if self._routed is not None:
            self._routed(decision.worker, request.sequence_hashes, now)

    def _as_sent(self, decision: Decision, computes: bool, now: float) -> _Sent:
        load = self.load
        at = load.position[decision.worker]
        decodes = load.requests[at] - load.prefill_requests[at]
        return _Sent(now, load.prefill_tokens[at], decodes, load.decode_blocks[at], decision.new_tokens, computes)

    def prefill_done(self, request_id: str, now: float) -> None:
        """The request made its first token. Unknown ids and later calls are ignored."""
        if request_id in self._sent:
            self._learn_prefill(request_id, now)
        self.load.prefill_done(request_id, now)

    def _learn_prefill(self, request_id: str, now: float) -> None:
        sent = self._sent[request_id]
        if sent.first_token_at is None:
            sent.first_token_at = now
            if sent.computes:
                self.policy.prefilled(
                    Prefilled(
                        self.load.bookings[request_id].worker,
                        sent.new_tokens,
                        sent.queued_tokens,
                        sent.decodes,
                        sent.decode_blocks,
                        now - sent.at,
                    )
                )

    def output_block(self, request_id: str, decay_fraction: float | None = None) -> None:
        """The request generated one more block of tokens [K30]. See `ActiveLoad.output_block`."""
        if self.config.router_track_output_blocks:
            self.load.output_block(request_id, decay_fraction)

    def free(self, request_id: str, now: float | None = None, output_tokens: int | None = None) -> Booking | None:
        """The request ended, however it did. Unknown ids are ignored, so that every path may call this.

        `output_tokens`, of a request that ended in order at `now`, tell the policy how fast the worker decodes. Of one
        that made a single token `prefill_done` need not be called.
        """
        if request_id in self._sent:
            if now is not None and output_tokens:
                self._learn_end(request_id, now, output_tokens)
            del self._sent[request_id]
        return self.load.free(request_id, now if output_tokens == 1 else None)

    def _learn_end(self, request_id: str, now: float, output_tokens: int) -> None:
        first_token_at, load = self._sent[request_id].first_token_at, self.load
        if first_token_at is not None:
            worker = load.bookings[request_id].worker
            at, seconds = load.position[worker], now - first_token_at
            self.policy.decoded(Decoded(worker, output_tokens, seconds, load.requests[at], load.decode_blocks[at]))
        elif output_tokens == 1:
            self._learn_prefill(request_id, now)

    def expire(self, now: float, alive: Callable[[str], bool] | None = None) -> list[str]:
        """Drop bookings that nobody freed within the configured time; returns their ids, which are worth a log line.

        `alive` says whether the request of that id goes on all the same.
        """
        gone = self.load.expire(now - self.config.active_request_expiry_secs, now, alive)
        for request_id in gone:
            self._sent.pop(request_id, None)
        return gone


def _most(view: View, eligible: list[int]) -> int:
    """The most blocks that any worker which may be chosen holds."""
    totals = view.overlap_column(lambda overlap: overlap.total, 0)
    return max(totals[at] for at in eligible)


class _Positions:
    """Who holds what, by position. Owns what it remembers of which workers are where."""

    def __init__(self, source: OverlapSource, load: ActiveLoad) -> None:
        self._find = source.find
        self._groups: Callable[..., Sequence[tuple[Overlap, Sequence[WorkerKey]]]]
        self._groups = getattr(source, "groups", self._one_by_one)
        self._load = load
        self._version = load.version
        self._known: dict[int, tuple[Sequence[WorkerKey], tuple[int, ...]]] = {}

    def held(self, sequence_hashes: Sequence[int], now: float) -> tuple[Sequence[tuple[Overlap, Sequence[int]]], int]:
        """What groups of positions hold, and the most blocks that one does."""
        found = self._groups(sequence_hashes, now)
        if not found:
            return (), 0
        held: list[tuple[Overlap, Sequence[int]]] = []
        most = 0
        for overlap, workers in found:
            positions = self._of(workers)
            if positions:
                held.append((overlap, positions))
                device, host, disk = overlap
                most = max(most, device + host + disk)
        return held, most

    def _one_by_one(self, sequence_hashes: Sequence[int], now: float) -> Sequence[tuple[Overlap, Sequence[WorkerKey]]]:
        return [(overlap, (worker,)) for worker, overlap in self._find(sequence_hashes, now).items()]

    def _of(self, workers: Sequence[WorkerKey]) -> tuple[int, ...]:
        if len(workers) == 1:
            at = self._load.position.get(workers[0])
            return (at,) if at is not None else ()
        if self._version != self._load.version or len(self._known) >= GROUPS_KNOWN:
            self._version = self._load.version
            self._known.clear()
        known = self._known.get(id(workers))
        if known is None or known[0] is not workers:
            position = self._load.position.get
            positions = tuple(at for worker in workers if (at := position(worker)) is not None)
            self._known[id(workers)] = known = workers, positions
        return known[1]
