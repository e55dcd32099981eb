"""How far is a request that a router was asked to place?"""

from typing import TYPE_CHECKING

import msgspec

from dynamo.router.queue import OnDecision, OnError, Waiting
from dynamo.router.types import Decision, RouteRequest
from dynamo.runtime.errors import DynamoException

if TYPE_CHECKING:
    from dynamo.router.model_router import ModelRouter
else:
    ModelRouter = object  # the types of a struct's fields are looked up


class Ticket(msgspec.Struct, eq=False):
    """One request on its way: in the queue, at a worker, or over. All calls may be made at any time, and repeated."""

    _router: ModelRouter
    request: RouteRequest
    _on_decision: OnDecision | None
    _on_error: OnError | None
    expires: bool
    """Whether its owner may forget it: then it ends by itself after `active_request_expiry_secs`."""
    decision: Decision | None = None
    """Where it was sent; None while it is not."""
    first_token_at: float | None = None
    _waiting: Waiting | None = None

    def cancel(self) -> None:
        """Nobody wants it any more: no callback follows, and nothing stays booked."""
        self._router.queue.cancel(self._waiting)
        self._forget()
        self.free()

    def first_token(self) -> None:
        """The worker made its first token: its prompt is computed."""
        if self.first_token_at is None and self.decision is not None:
            self._router._first_token(self)

    def output_block(self) -> None:
        """It generated one more block of tokens [K30]."""
        self._router.scheduler.output_block(self.request.request_id)

    def free(self, output_tokens: int | None = None, cached_tokens: int | None = None) -> None:
        """It ended, however it did. `output_tokens` of one that ended in order, `cached_tokens` as the worker said.

        One that made a single token need not have told of its first.
        """
        self._router._free(self, output_tokens, cached_tokens)

    def _decided(self, decision: Decision) -> None:
        self.decision = decision
        self._router._decided(self.request, decision)
        tell = self._on_decision
        self._on_decision = self._on_error = self._waiting = None
        if tell is not None:
            tell(decision)

    def _failed(self, error: DynamoException) -> None:
        self._router._failed(self.request)
        tell = self._on_error
        self._forget()
        if tell is not None:
            tell(error)

    def _forget(self) -> None:
        """Nobody is called any more: those who were to be know this ticket, and would make a cycle with it."""
        self._on_decision = self._on_error = self._waiting = None
