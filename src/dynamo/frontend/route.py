"""How does a prompt get its worker from a router that keeps account of what is where?

A `Route` is one prompt's account: asked for a worker, booked at it, closed at the end, whatever the end is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynamo.llm.protocols.engine import PreprocessedRequest, Routing
from dynamo.router.model_router import ModelRouter
from dynamo.router.route_request import check_override
from dynamo.router.ticket import Ticket
from dynamo.router.types import Decision, RouteRequest, WorkerKey
from dynamo.runtime.context import Context
from dynamo.runtime.errors import DynamoException


def wanted_of(
    router: ModelRouter, request: PreprocessedRequest, context: Context, hashes: Sequence[int] | None = None
) -> RouteRequest:
    """What the router has to know of a prompt, with its hashes if they are known. Raises InvalidArgument for what it
    cannot do."""
    wanted = router.request(context.id(), request, context.metadata, hashes=hashes)
    if wanted.override is not None:
        check_override(wanted.override, router.config.router_policy)
    return wanted


def name_rank(router: ModelRouter, request: PreprocessedRequest, decision: Decision) -> int:
    """Write the chosen rank into the request, unless the worker has but one; gives it back."""
    worker_id, rank = decision.worker
    if router.many_ranks and (rank or len(router.ranks_of(worker_id)) > 1):
        request.routing = request.routing or Routing()
        request.routing.dp_rank = rank
    return rank


class Route(msgspec.Struct, eq=False):
    """One prompt's way. `go` is called with each decision, `fail` with a refusal; perhaps before `ask` returns."""

    router: ModelRouter
    wanted: RouteRequest
    go: Callable[[Decision], None]
    fail: Callable[[DynamoException], None]
    explain: bool = False
    ticket: Ticket | None = None
    queue_depth: int = 0
    """Requests that waited for a worker when this one came."""
    _pins: frozenset[WorkerKey] | None = None

    @property
    def decision(self) -> Decision | None:
        """Where the prompt is, or was last; None while it waits."""
        return self.ticket.decision if self.ticket is not None else None

    def ask(self) -> None:
        """Ask for a worker; again, where the last one could not be reached."""
        decision = self.place()
        if decision is not None:
            self.go(decision)

    def place(self) -> Decision | None:
        """As `ask`, but a decision that comes at once is given back, and `go` not called with it."""
        router, wanted = self.router, self.wanted
        if self.ticket is None:
            self._pins = wanted.allowed
        else:
            self.ticket.free()
            self.ticket = None
            wanted.allowed = self._pins  # a session may have narrowed it to the worker that is gone
        self.queue_depth = router.queue.pending
        ticket = self.ticket = router.route(wanted, self._decided, self.fail, explain=self.explain)
        return ticket.decision

    def _decided(self, decision: Decision) -> None:
        """A decision that did not come at once: else the ticket is not ours yet, and `ask` goes on."""
        if self.ticket is not None:
            self.go(decision)

    def first_token(self) -> None:
        """The worker has computed the prompt."""
        if self.ticket is not None:
            self.ticket.first_token()

    def finish(self, output_tokens: int | None = None, cached_tokens: int | None = None) -> None:
        """It ended in order. One that made a single token need not have told of its first."""
        if self.ticket is not None:
            self.router.turn.end(self.ticket, output_tokens, cached_tokens)

    def cancel(self) -> None:
        """It ended otherwise, or waits and is not wanted any more."""
        if self.ticket is not None:
            self.ticket.cancel()


def explained_route(route: Route | None, instance_id: int | None) -> dict[str, Any]:
    """Why a prompt went to this instance, for people; without a route its router looked at nothing."""
    decision = route.decision if route is not None else None
    if decision is None:
        reason = "the router mode of this server looks at no cache; --router-mode kv does"
        return {"policy": None, "reason": reason, "worker": {"worker_id": instance_id}}
    return {**(decision.explanation or {}), "queued_ms": decision.queued_ms, "hit_rate": decision.hit_rate}


class OutputBlocks:
    """Tells a router of each block that an answer fills [K30]."""

    __slots__ = ("_block_size", "_route", "_tokens")

    def __init__(self, route: Route) -> None:
        self._route = route
        self._block_size = route.router.block_size
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """So many more tokens."""
        full = self._tokens // self._block_size
        self._tokens += tokens
        ticket = self._route.ticket
        if ticket is not None:
            for _ in range(full, self._tokens // self._block_size):
                ticket.output_block()
