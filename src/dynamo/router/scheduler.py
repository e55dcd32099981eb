"""Which worker gets this request, and why?

The whole decision, with time passed in and no I/O: the frontend, the stand-alone services and the simulator all call
this. It brings together who holds what (`OverlapSource`), who is busy (`ActiveLoad`) and a cost (`Policy`).
"""

import math
import random
from collections.abc import Sequence
from typing import Any

from dynamo.router.active_load import ActiveLoad, Booking
from dynamo.router.config import KvRouterConfig
from dynamo.router.policies import Policy, make_policy
from dynamo.router.types import Decision, Overlap, OverlapSource, RouteRequest, View, WorkerKey, WorkerLimits
from dynamo.runtime.errors import WorkerUnavailable

NO_OVERLAP = Overlap()


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
        self._rng = rng or random.Random()
        self._sent: dict[str, tuple[float, int]] = {}
        """Request id -> when it was booked, and how many prompt tokens were queued before it."""

    # --- workers

    def add_worker(self, worker: WorkerKey, limits: WorkerLimits | None = None) -> None:
        """Let a worker be chosen."""
        self.load.add_worker(worker, limits)

    def remove_worker(self, worker: WorkerKey) -> list[str]:
        """A worker is gone. Returns the ids of the requests that were booked there."""
        ids = self.load.remove_worker(worker)
        for request_id in ids:
            self._sent.pop(request_id, None)
        return ids

    # --- choosing

    def view(self, request: RouteRequest, now: float) -> View:
        """Everything a policy looks at, for one request."""
        position = self.load.position
        hashes = request.sequence_hashes
        found = self.overlaps.find(hashes, now)
        overlaps = {position[worker]: overlap for worker, overlap in found.items() if worker in position}
        shared: dict[int, int] = {}
        if self.config.router_track_active_blocks and self._assume_reuse(request):
            shared = self.load.shared_blocks(hashes)
        return View(
            fleet=self.load,
            request=request,
            block_size=self.block_size,
            blocks=-(-request.token_count // self.block_size),
            overlaps=overlaps,
            shared_blocks=shared,
            now=now,
        )

    def select(self, request: RouteRequest, now: float, *, explain: bool = False) -> Decision:
        """The worker for this request. Changes nothing: `book` does.

        Raises:
            WorkerUnavailable: there is no worker, or none that the request may go to.
        """
        if not self.load.workers:
            raise WorkerUnavailable("no worker has joined the router")
        view = self.view(request, now)
        costs = self.policy.costs(view)
        eligible = self._eligible(request)
        position, reason = self._choose(costs, eligible, self._temperature(request))
        overlap = view.overlaps.get(position, NO_OVERLAP)
        new_tokens = view.new_tokens(position)
        return Decision(
            worker=self.load.workers[position],
            overlap=overlap,
            new_tokens=new_tokens,
            cost=costs[position],
            hit_rate=1 - new_tokens / request.token_count if overlap.total else 0.0,
            policy=self.policy.name,
            reason=reason,
            candidates=len(costs) if eligible is None else len(eligible),
            best_overlap_blocks=max((held.total for held in view.overlaps.values()), default=0),
            explanation=self._explain(view, costs, eligible) if explain else None,
        )

    def _eligible(self, request: RouteRequest) -> list[int] | None:
        """Positions this request may go to; None for all."""
        if request.allowed is None and not request.required_taints:
            return None
        limits, workers = self.load.limits, self.load.workers
        eligible = [
            position
            for position, worker in enumerate(workers)
            if (request.allowed is None or worker in request.allowed)
            and request.required_taints <= limits[position].taints
        ]
        if not eligible:
            wanted = []
            if request.allowed is not None:
                wanted.append(f"workers {sorted(request.allowed)[:3]}")
            if request.required_taints:
                wanted.append(f"taints {sorted(request.required_taints)}")
            raise WorkerUnavailable(f"none of {len(workers)} workers is among the {' with '.join(wanted)} asked for")
        return eligible

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
        return self.config.router_temperature

    def _assume_reuse(self, request: RouteRequest) -> bool:
        override = request.override
        if override is not None and override.assume_kv_reuse is not None:
            return override.assume_kv_reuse
        return self.config.router_assume_kv_reuse

    def _explain(self, view: View, costs: Sequence[float], eligible: list[int] | None) -> dict[str, Any]:
        """The candidates with what was known of each, best first."""
        positions = range(len(costs)) if eligible is None else eligible
        fleet = self.load
        return {
            "policy": self.policy.name,
            "block_size": self.block_size,
            "prompt_tokens": view.request.token_count,
            "candidates": [
                {
                    "worker_id": fleet.workers[i].worker_id,
                    "dp_rank": fleet.workers[i].dp_rank,
                    "cost": round(costs[i], 3),
                    "overlap_blocks": view.overlaps.get(i, NO_OVERLAP)._asdict(),
                    "prefill_tokens": fleet.prefill_tokens[i],
                    "decode_blocks": fleet.decode_blocks[i],
                    "active_requests": fleet.requests[i],
                    "terms": {name: round(term, 3) for name, term in self.policy.terms(view, i).items()},
                }
                for i in sorted(positions, key=costs.__getitem__)
            ],
        }

    # --- the life of a request

    def book(self, request: RouteRequest, decision: Decision, now: float) -> None:
        """The request is sent where `decision` says."""
        override = request.override
        track_prefill = self.config.router_track_prefill_tokens
        if override is not None and override.track_prefill_tokens is not None:
            track_prefill = override.track_prefill_tokens
        position = self.load.position[decision.worker]
        queued = self.load.prefill_tokens[position]
        hashes: Sequence[int] = ()
        if self.config.router_track_active_blocks and self._assume_reuse(request):
            hashes = request.sequence_hashes
        self.load.book(
            request.request_id,
            decision.worker,
            hashes,
            decision.new_tokens,
            decision.overlap,
            now,
            private_blocks=self._private_blocks(request, len(hashes)),
            track_prefill=track_prefill,
        )
        self._sent[request.request_id] = (now, queued)

    def _private_blocks(self, request: RouteRequest, shared: int) -> int:
        """Blocks of the prompt that no other request can share, as far as this router is to know."""
        return -(-request.token_count // self.block_size) - shared if self.config.router_track_active_blocks else 0

    def prefill_done(self, request_id: str, now: float) -> None:
        """The request made its first token. Unknown ids and later calls are ignored."""
        sent = self._sent.pop(request_id, None)
        booking = self.load.bookings.get(request_id)
        if sent is not None and booking is not None:
            self.policy.observe(booking.worker, booking.new_tokens, now - sent[0], sent[1])
        self.load.prefill_done(request_id)

    def output_block(self, request_id: str) -> None:
        """The request generated one more block of tokens [K30]."""
        if self.config.router_track_output_blocks:
            self.load.output_block(request_id)

    def free(self, request_id: str) -> Booking | None:
        """The request ended, however it did. Unknown ids are ignored, so that every path may call this."""
        self._sent.pop(request_id, None)
        return self.load.free(request_id)

    def expire(self, now: float) -> list[str]:
        """Drop bookings that nobody freed within the configured time; returns their ids, which are worth a log line."""
        stale = self.load.expire(now - self.config.active_request_expiry_secs)
        for request_id in stale:
            self._sent.pop(request_id, None)
        return stale
