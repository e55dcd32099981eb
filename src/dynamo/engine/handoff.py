"""Who may still read the KV cache that a prefill worker keeps for a prompt?

A prefill worker keeps the KV of a computed prompt and writes a *handle* for it: a ticket with a secret number, and
with all by which a decode worker can tell that it is not its own. The `Ledger` is the prefill worker's book of them.

    issue ──▶ issued ──claim──▶ claimed ──reader stops the claim's stream──▶ read
               ⟲renew            ⟲renew
                │                 │
                └─release, expiry─┴─▶ given up

Whoever wants it renews its lease while it waits (`dynamo.llm.kv_lease`). A handle is claimed once. Only the claim's
answer, and those to its renewals, say how long the KV will stay: until then the prefill worker gives the blocks to
nobody else, whatever happens. A reader that is done within that time has read what was written; one that is late
throws away what it read. So nothing that is stale, foreign, forged or used twice is ever decoded from: it is
recomputed. A claim's stream stays open while its reader is at work, so that a prefill worker that is told to leave
waits for it.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from dynamo.engine.transfer_metrics import PrefillMetrics
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.streams import ResponseStream

log = logging.getLogger(__name__)

HANDOFF_ENDPOINT = "handoff"  # beside `generate`, on the same component and with the same instance ids
NO_HANDOFF = "no_handoff"  # annotation of a request whose KV nobody will fetch, such as a health check's
DEFAULT_LEASE_S = 30.0  # how long KV is kept for a reader; what vLLM does by default
LEASE_MARGIN_S = 1.0  # a reader stops that much earlier: clocks that drift apart, an engine step that is late
MAX_HELD_S = 600.0  # whatever its holder says: no client of a frontend waits longer for a worker's next word

Verb = Literal["claim", "renew", "release"]
End = Literal["read", "released", "expired", "closed"]


class Layout(msgspec.Struct, frozen=True):
    """What must be equal at both ends for KV to mean the same: bytes in blocks, made by the same model.

    `model` is a digest of the model, the kinds of numbers, heads and layers, and the engine's version.
    """

    transport: str
    model: str
    block_size: int


class Handle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ticket, as `EngineOutput.disaggregated_params` carries it. `expires_at` is Unix time, for people and
    routers: the prefill worker's own clock decides. `kv_bytes` is the size of the transfer, where known. `lease_s` is
    how much longer the KV stays from each renewal on; 0 where it cannot be renewed."""

    id: str
    incarnation: str
    endpoint: str
    instance_id: int
    engine_id: str
    layout: Layout
    num_tokens: int
    digest: str
    expires_at: float
    cached_tokens: int = 0
    kv_bytes: int = 0
    lease_s: float = 0.0


class HandoffRequest(msgspec.Struct, omit_defaults=True):
    """What the endpoint `handoff` is asked. `claim_id` is for a claimant that renews or gives up what it claimed."""

    verb: Verb
    id: str
    incarnation: str = ""
    digest: str = ""
    claim_id: str = ""


class HandoffReply(msgspec.Struct, omit_defaults=True):
    """The answer. `remaining_s` belongs to what was granted or renewed, `params` to a claim; `reason` says why not."""

    ok: bool
    reason: str = ""
    claim_id: str = ""
    params: dict[str, Any] | None = None
    remaining_s: float = 0.0


def digest_of(request: PreprocessedRequest) -> str:
    """32 hex digits over all that a prompt's KV depends on: tokens, adapter, and the cache's salt."""
    routing = request.routing
    names = (request.model, routing.lora_name if routing else None, routing.cache_salt if routing else None)
    hasher = hashlib.blake2b(msgspec.msgpack.encode(names), digest_size=16)
    hasher.update(array("I", request.token_ids).tobytes())
    return hasher.hexdigest()


@dataclass(slots=True)
class _Entry:
    """One handle. `held_until` is on this process's monotonic clock."""

    params: Any
    digest: str
    held_until: float
    lease_s: float
    give_up_at: float
    timer: asyncio.TimerHandle
    claim_id: str | None = None
    stream: ResponseStream | None = None


@dataclass
class Ledger:
    """The handles of one prefill worker. Owned by the event loop's thread.

    Attributes:
        endpoint: path of the endpoint that serves `handle`.
        free: told the `params` of a handle that ended, and how, so that the engine gives back what it kept.
        extend: asked to have the engine keep what `params` name for one more lease; tells for how many seconds from
            the call on it does at least, 0 if that is unknown, None if it keeps it no more. None where the engine
            keeps it until `free` anyway.
    """

    endpoint: str
    instance_id: int
    metrics: PrefillMetrics
    free: "Callable[[Any, End], None]" = lambda params, how: None
    extend: "Callable[[Any], Awaitable[float | None]] | None" = None
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _gone: dict[str, str] = field(default_factory=dict)
    _extending: "set[asyncio.Task[None]]" = field(default_factory=set)

    @property
    def num_issued(self) -> int:
        """Handles that nobody has claimed."""
        return sum(entry.claim_id is None for entry in self._entries.values())

    @property
    def num_claimed(self) -> int:
        """Handles whose reader is at work."""
        return len(self._entries) - self.num_issued

    # --- the engine's side

    def issue(
        self,
        request: PreprocessedRequest,
        layout: Layout,
        engine_id: str,
        params: Any,
        held_s: float,
        *,
        cached_tokens: int = 0,
        kv_bytes: int = 0,
        lease_s: float = 0.0,
    ) -> dict[str, Any]:
        """A handle for the KV of a prompt, which the engine keeps for `held_s` seconds from now at least.

        Args:
            params: what the reader needs to find it; also what `free` and `extend` will be told.
            lease_s: how much longer it can be kept from each renewal on; 0 if it cannot.
        """
        now = time.monotonic()
        id_ = secrets.token_hex(16)
        timer = asyncio.get_running_loop().call_later(max(0.0, held_s), self._expire, id_)
        self._entries[id_] = _Entry(params, digest_of(request), now + held_s, lease_s, now + MAX_HELD_S, timer)
        self.metrics.issued()
        handle = Handle(
            id=id_,
            incarnation=self.incarnation,
            endpoint=self.endpoint,
            instance_id=self.instance_id,
            engine_id=engine_id,
            layout=layout,
            num_tokens=len(request.token_ids),
            digest=self._entries[id_].digest,
            expires_at=time.time() + held_s,
            cached_tokens=cached_tokens,
            kv_bytes=kv_bytes,
            lease_s=lease_s,
        )
        return dict(msgspec.to_builtins(handle))

    def close(self) -> None:
        """Give everything up: the engine is about to stop."""
        for id_ in list(self._entries):
            self._end(id_, "closed")
        for task in self._extending:
            task.cancel()

    # --- from the wire

    def handle(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        """The push handler of the endpoint: a `HandoffRequest` in, a `HandoffReply` out. A granted claim's stream
        stays open; its reader stops it when it has read, and kills it (or dies) when it has not."""
        try:
            request = _decode(payload)
        except msgspec.MsgspecError as e:
            stream.fail(InvalidArgument(f"not a handoff request: {e}"))
            return
        if request.verb == "release":
            _answer(stream, self.release(request))
            return
        if request.verb == "renew":
            self.renew(request, lambda reply: _answer(stream, reply))
            return
        reply = self.claim(request)
        stream.send(reply)
        if reply.ok:
            self._entries[request.id].stream = stream
            stream.context.on_stop(lambda: self._reader_left(request.id, stream))
        else:
            stream.end()

    def _reader_left(self, id_: str, stream: ResponseStream) -> None:
        """A reader that vanished may still be reading, by another of its processes: its KV stays for its lease."""
        if id_ in self._entries and not stream.context.is_killed():
            self._end(id_, "read")

    def claim(self, request: HandoffRequest) -> HandoffReply:
        """Grant a handle to its first claimant, or say why not."""
        entry = self._entries.get(request.id)
        now = time.monotonic()
        if entry is None:
            foreign = request.incarnation != self.incarnation
            reason = "incarnation" if foreign else self._gone.get(request.id, "unknown")
        elif request.incarnation != self.incarnation:
            reason = "incarnation"
        elif entry.claim_id is not None:
            reason = "used"
        elif request.digest != entry.digest:
            reason = "digest"
        elif entry.held_until - now <= LEASE_MARGIN_S:
            reason = "expired"
        else:
            entry.claim_id = secrets.token_hex(8)
            self.metrics.claimed()
            return HandoffReply(True, "", entry.claim_id, entry.params, entry.held_until - now)
        self.metrics.refused(reason)
        log.warning("a decode worker's claim of KV was refused: %s", reason)
        return HandoffReply(False, reason)

    def renew(self, request: HandoffRequest, then: Callable[[HandoffReply], None]) -> None:
        """The KV is still wanted. Of what is claimed, only its claimant may say so."""
        entry = self._entries.get(request.id)
        now = time.monotonic()
        reason = ""
        if entry is None:
            reason = self._gone.get(request.id, "unknown")
        elif request.incarnation != self.incarnation:
            reason = "incarnation"
        elif (entry.claim_id or "") != request.claim_id:
            reason = "claimed"
        elif not entry.lease_s:
            reason = "fixed"
        elif now + entry.lease_s > entry.give_up_at:
            reason = "too long"
        if entry is None or reason:
            then(HandoffReply(False, reason))
        elif self.extend is None:
            then(self._renewed(request.id, now + entry.lease_s))
        else:
            task = asyncio.get_running_loop().create_task(self._extend(request.id, entry.params, then))
            self._extending.add(task)
            task.add_done_callback(self._extending.discard)

    async def _extend(self, id_: str, params: Any, then: Callable[[HandoffReply], None]) -> None:
        assert self.extend is not None
        began = time.monotonic()
        kept_s = await self.extend(params)
        then(HandoffReply(False, "expired") if kept_s is None else self._renewed(id_, began + kept_s))

    def _renewed(self, id_: str, until: float) -> HandoffReply:
        entry = self._entries.get(id_)
        if entry is None:
            return HandoffReply(False, self._gone.get(id_, "unknown"))
        now = time.monotonic()
        if until > entry.held_until:
            entry.held_until = until
            entry.timer.cancel()
            entry.timer = asyncio.get_running_loop().call_later(until - now, self._expire, id_)
        self.metrics.renewed()
        return HandoffReply(True, remaining_s=entry.held_until - now)

    def release(self, request: HandoffRequest) -> HandoffReply:
        """Nobody wants the KV. What is claimed is given up by its claimant alone: somebody else cannot know whether
        it is being read just now."""
        entry = self._entries.get(request.id)
        if entry is None:
            return HandoffReply(False, self._gone.get(request.id, "unknown"))
        if entry.claim_id is not None and entry.claim_id != request.claim_id:
            return HandoffReply(False, "claimed")
        self._end(request.id, "released")
        return HandoffReply(True)

    # --- ends

    def _expire(self, id_: str) -> None:
        log.warning("KV that a prefill made was not fetched within its lease")
        self._end(id_, "expired")

    def _end(self, id_: str, how: End) -> None:
        entry = self._entries.pop(id_)
        entry.timer.cancel()
        self.metrics.ended(how, claimed=entry.claim_id is not None)
        self._gone[id_] = "used" if entry.claim_id is not None else how
        while len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]
        if entry.stream is not None:
            entry.stream.end()
        self.free(entry.params, how)


def _answer(stream: ResponseStream, reply: HandoffReply) -> None:
    stream.send(reply)
    stream.end()


_REMEMBERED = 10_000  # ended handles, only to say why a claim is refused; 1 MB
_decode = msgspec.msgpack.Decoder(HandoffRequest).decode
