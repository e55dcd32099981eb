"""May this decode worker fetch the KV that a prefill worker announced, and until when?

`Claims` looks at a handle (`dynamo.engine.handoff`), asks the prefill worker for it, and answers with a `Grant` or a
`Refusal`. What is refused is recomputed, or fails if the worker was started so; it is never guessed.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from dynamo.engine.handoff import (
    HANDOFF_ENDPOINT,
    LEASE_MARGIN_S,
    Handle,
    HandoffReply,
    HandoffRequest,
    Layout,
    digest_of,
)
from dynamo.engine.transfer_metrics import DecodeMetrics
from dynamo.llm import kv_lease
from dynamo.llm.kv_lease import Keeping
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.client import Client
from dynamo.runtime.connection import Call
from dynamo.runtime.context import Context
from dynamo.runtime.errors import DynamoException, InvalidArgument, StreamIncomplete

log = logging.getLogger(__name__)

CLAIM_TIMEOUT_S = 2.0  # for an answer that takes half a millisecond; a prefill worker that hangs costs this much
APPEAR_S = 1.0  # for a prefill worker that has just come to show in discovery
MAX_CLIENTS = 16  # components of prefill workers; a handle with a name of its own must not make a watch each

OnLostKv = Literal["recompute", "error"]


class Grant(msgspec.Struct):
    """The KV may be read until `deadline`, on this machine's monotonic clock, which moves while the claim is not done.
    `params` is for the engine."""

    handle: Handle
    params: Any
    deadline: float
    claim_id: str


class Refusal(msgspec.Struct, frozen=True):
    """The KV must not be read. `reason` is one word for metrics, `why` a sentence."""

    reason: str
    why: str


Then = Callable[[Grant | Refusal], None]
Renewed = Callable[[Grant], None]


class Claims:
    """A decode worker's claims. Owned by the event loop's thread.

    `layout` is set by the engine once it knows; handles of another layout are refused.
    """

    def __init__(self, runtime: DistributedRuntime, metrics: DecodeMetrics, on_lost: OnLostKv = "recompute") -> None:
        self.metrics = metrics
        self.on_lost = on_lost
        self.layout: Layout | None = None
        self._runtime = runtime
        self._clients: dict[str, Client] = {}

    async def prepare(self, endpoint: str) -> None:
        """Watch the prefill workers of an endpoint already, so that the first request need not wait for it."""
        await self._client(endpoint)

    def begin(self, request: PreprocessedRequest, then: Then, renewed: Renewed | None = None) -> "Claim":
        """Ask for the KV that `request.prefill_result` announces. `then` is called once, from a later turn of the
        loop, unless the claim is cancelled before; `renewed` whenever what was granted may be read for longer."""
        return Claim(self, request, then, renewed)

    def keep(self, request: PreprocessedRequest) -> Keeping | None:
        """Let the KV not expire while the request waits to be begun. None if it cannot be had, or not for longer."""
        handle = self.check(request)
        if isinstance(handle, Refusal):
            return None
        return kv_lease.keep(msgspec.to_builtins(handle), lambda endpoint: self.client(handle))

    def check(self, request: PreprocessedRequest) -> Handle | Refusal:
        """What can be said of a handle without asking."""
        result = request.prefill_result or {}
        try:
            handle = msgspec.convert(result.get("disaggregated_params"), Handle)
        except msgspec.ValidationError as e:
            return Refusal("malformed", f"prefill_result.disaggregated_params is no handle of ours: {e}")
        if self.layout is None or handle.layout.transport != self.layout.transport:
            ours = self.layout.transport if self.layout else "none"
            return Refusal("transport", f"the KV is offered by {handle.layout.transport!r}, this worker uses {ours!r}")
        if handle.layout != self.layout:
            return Refusal("layout", "the KV is of another model, kind of numbers, block size or engine version")
        if handle.num_tokens != len(request.token_ids):
            count = len(request.token_ids)
            return Refusal("length", f"the KV is of {handle.num_tokens} tokens, the prompt has {count}")
        if handle.digest != digest_of(request):
            return Refusal("digest", "the KV is of another prompt, adapter or cache salt")
        return handle

    async def client(self, handle: Handle) -> Client:
        """A client that has found the handle's prefill worker. Raises DynamoException, ValueError, TimeoutError."""
        client = await self._client(handle.endpoint)
        if handle.instance_id not in client.instance_ids():
            found = asyncio.Event()

            def look() -> None:
                if handle.instance_id in client.instance_ids():
                    found.set()

            client.on_change(look)
            try:
                look()
                async with asyncio.timeout(APPEAR_S):
                    await found.wait()
            finally:
                client.off_change(look)
        return client

    async def _client(self, endpoint: str) -> Client:
        known = self._clients.get(endpoint)
        if known is None:
            address = EndpointAddress.parse(endpoint)
            if address.endpoint != HANDOFF_ENDPOINT or len(self._clients) >= MAX_CLIENTS:
                raise ValueError(f"{endpoint} is not an endpoint to ask for KV")
            known = self._clients[endpoint] = await self._runtime.endpoint(endpoint).client()
        return known


class Claim:
    """One claim: a sink for the prefill worker's answer, and the open stream that says that we are reading."""

    def __init__(self, claims: Claims, request: PreprocessedRequest, then: Then, renewed: Renewed | None) -> None:
        self._claims = claims
        self._then: Then | None = then
        self._renewed = renewed
        self._keeping: Keeping | None = None
        self._loop = asyncio.get_running_loop()
        self._call: Call | None = None
        self._grant: Grant | None = None
        self._started = time.monotonic()
        self._timer = self._loop.call_later(CLAIM_TIMEOUT_S, self._too_late)
        found = claims.check(request)
        if isinstance(found, Refusal):
            self._loop.call_soon(self._answer, found)
            return
        self._handle = found
        self._task = self._loop.create_task(self._ask())

    # --- the engine's side

    def done(self) -> None:
        """The KV has been read: the prefill worker may forget it."""
        self._stop_keeping()
        if self._call is not None:
            self._call.cancel("stop")
            self._call = None

    def cancel(self) -> None:
        """Nobody wants the answer any more. KV that was claimed and is not read is given up; KV that may be being
        read now is for `done`."""
        then, self._then = self._then, None
        self._timer.cancel()
        if then is None:
            self._give_up()

    def _give_up(self) -> None:
        self._stop_keeping()
        if self._grant is not None and self._call is not None:
            request = HandoffRequest("release", self._handle.id, claim_id=self._grant.claim_id)
            self._client.start(self._handle.instance_id, request, _Deaf(), Context())
            self._call = None

    # --- the prefill worker's answer

    async def _ask(self) -> None:
        handle = self._handle
        try:
            self._client = await self._claims.client(handle)
        except (DynamoException, ValueError, TimeoutError) as e:
            self._answer(
                Refusal("unreachable", f"prefill worker {handle.instance_id:x}: {str(e) or 'it is not there'}")
            )
            return
        if self._then is None:
            verb: Literal["claim", "release"] = "release"  # cancelled meanwhile
        else:
            verb = "claim"
            self._started = time.monotonic()
        request = HandoffRequest(verb, handle.id, handle.incarnation, handle.digest)
        sink = self if verb == "claim" else _Deaf()
        self._call = self._client.start(handle.instance_id, request, sink, Context())

    def on_item(self, item: msgspec.Raw) -> None:
        """See `StreamSink`."""
        try:
            reply = _decode(item)
        except msgspec.MsgspecError as e:
            self._answer(Refusal("malformed", f"the prefill worker's answer cannot be read: {e}"))
            return
        if not reply.ok:
            self._answer(Refusal(reply.reason, f"the prefill worker refuses: {_WORDS.get(reply.reason, reply.reason)}"))
            return
        deadline = self._started + reply.remaining_s - LEASE_MARGIN_S
        self._grant = Grant(self._handle, reply.params, deadline, reply.claim_id)
        if self._then is None:  # cancelled, or too late
            self._give_up()
        else:
            self._keep(self._grant, reply.remaining_s)
            self._answer(self._grant)

    def _keep(self, grant: Grant, remaining_s: float) -> None:
        """The engine may read it late: it has other requests, and needs blocks for this one."""
        handle = grant.handle
        if handle.lease_s > 0:
            renewal = {"id": handle.id, "incarnation": handle.incarnation, "claim_id": grant.claim_id}
            first_s = max(0.0, remaining_s - handle.lease_s * (1 - 1 / kv_lease.RENEWALS_PER_LEASE))
            self._keeping = Keeping(
                lambda: self._claims.client(handle),
                handle.instance_id,
                renewal,
                handle.lease_s,
                first_s,
                self._kept_until,
            )

    def _kept_until(self, until: float) -> None:
        if self._grant is not None:
            self._grant.deadline = until - LEASE_MARGIN_S
            if self._renewed is not None:
                self._renewed(self._grant)

    def _stop_keeping(self) -> None:
        if self._keeping is not None:
            self._keeping.stop()
            self._keeping = None

    def on_end(self) -> None:
        """See `StreamSink`. The prefill worker's lease is over, or it has heard that we are done."""
        self._stop_keeping()
        self._call = None
        self.on_error(StreamIncomplete("no answer"))

    def on_error(self, error: DynamoException) -> None:
        """See `StreamSink`. Once granted this changes nothing: the transfer itself shows whether the KV is there."""
        self._call = None
        self._answer(Refusal("unreachable", f"prefill worker {self._handle.instance_id:x}: {error}"))

    def flush(self) -> None:
        """See `StreamSink`. All was done in the calls before."""

    def _too_late(self) -> None:
        self._answer(Refusal("unreachable", f"no answer from the prefill worker within {CLAIM_TIMEOUT_S:g} s"))

    def _answer(self, answer: Grant | Refusal) -> None:
        then, self._then = self._then, None
        self._timer.cancel()
        if then is not None:
            then(answer)


class _Deaf:
    """A sink for answers that change nothing."""

    def on_item(self, item: msgspec.Raw) -> None:
        """See `StreamSink`."""

    def on_end(self) -> None:
        """See `StreamSink`."""

    def on_error(self, error: DynamoException) -> None:
        """See `StreamSink`."""

    def flush(self) -> None:
        """See `StreamSink`."""


def first_token_of(request: PreprocessedRequest) -> int | None:
    """The token that the client has already.

    Raises:
        InvalidArgument: `prefill_result.token_ids` is not one token.
    """
    tokens = (request.prefill_result or {}).get("token_ids")
    if tokens is None or tokens == []:
        return None
    if not isinstance(tokens, list) or len(tokens) != 1 or not isinstance(tokens[0], int):
        raise InvalidArgument("prefill_result.token_ids: must be the one token that prefill made", "prefill_result")
    return tokens[0]


_WORDS = {
    "unknown": "it does not know the handle",
    "used": "the handle was used before",
    "released": "the KV was released",
    "expired": "the lease is over",
    "closed": "it has stopped",
    "incarnation": "the handle is from before its restart",
    "digest": "the KV is of another prompt",
}
_decode = msgspec.msgpack.Decoder(HandoffReply).decode
