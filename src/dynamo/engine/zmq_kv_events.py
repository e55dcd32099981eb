"""Which blocks did an engine just store or drop, and what are their content hashes?

vLLM and SGLang publish their cache's changes over ZMQ as `[ts, [event, …], dp_rank]` with a sequence number. An event
is a map with the key `type` (vLLM 0.24 and later, SGLang) or an array with the type first (vLLM 0.20 and before); both
are read. What routers need beside is the content hash of each block (`dynamo.llm.block_hash`), computed here from the
tokens.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import msgspec
from zmq.asyncio import Context
from zmq.constants import DEALER, RCVHWM, SUB, SUBSCRIBE

from dynamo.llm.block_hash import compute_block_hash_for_seq
from dynamo.llm.kv_events import KvEventData, Removed, StorageTier, Stored, StoredBlock
from dynamo.runtime.errors import UNDECODABLE, InvalidArgument

log = logging.getLogger(__name__)

REPLAY_TIMEOUT_S = 5.0  # engines answer within 100 ms; later means they cannot
_U64 = 2**64 - 1
_END = 2**64 - 1  # the sequence number -1 that ends a replay, read unsigned
_TIERS: dict[str, StorageTier] = {"GPU": "device", "CPU": "host_pinned", "STORAGE": "disk"}
# Field order of the array form (vLLM 0.20 and before); later fields may be missing.
_STORED_FIELDS = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
_REMOVED_FIELDS = ("block_hashes", "medium")
_WHOLE_PREFIX_KINDS = (None, "full_attention", "mla_attention")  # other groups hold windows, not prefixes

TieredEvents = list[tuple[StorageTier, KvEventData]]

BlockHash = int | bytes


class _Batch(msgspec.Struct, array_like=True):
    at: Any
    events: list[dict[str, Any] | list[Any]]


class _Stored(msgspec.Struct):
    block_hashes: list[BlockHash]
    token_ids: list[int]
    block_size: Annotated[int, msgspec.Meta(ge=1)]
    parent_block_hash: BlockHash | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    kv_cache_spec_kind: str | None = None
    group_idx: int | None = None


class _Removed(msgspec.Struct):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode


class BlockSizeError(ValueError):
    """The engine's blocks have another size than routers were told, so none of its hashes would ever be found."""


class KvEventDecoder:
    """Decodes the batches of one rank in order. `block_size` is what blocks must have, in tokens; None takes any.

    It remembers the cache salt of stored blocks: engines name it on a sequence's first block alone, while the content
    hash of every block of the sequence depends on it.
    """

    def __init__(self, block_size: int | None = None) -> None:
        self._block_size = block_size
        self._salts: dict[int, str] = {}
        self._group: int | None = None

    def decode(self, payload: bytes) -> TieredEvents:
        """The events of one batch, each with its tier.

        Raises:
            BlockSizeError: a block has another size than it must have.
            ValueError: the payload is not a batch of KV events.
        """
        try:
            decoded = [self._event(_as_map(event)) for event in _decode_batch(payload).events]
        except BlockSizeError:
            raise
        except (*UNDECODABLE, IndexError, KeyError, ValueError, InvalidArgument) as error:
            raise ValueError(f"not a batch of KV events: {error!r}") from error
        return [event for event in decoded if event is not None]

    def _event(self, event: dict[str, Any]) -> tuple[StorageTier, KvEventData] | None:
        kind = event["type"]
        if kind == "BlockStored":
            stored = msgspec.convert(event, _Stored)
            if not self._of_prefix_group(stored):
                return None
            return _tier(stored.medium), KvEventData(stored=self._stored(stored))
        if kind == "BlockRemoved":
            removed = msgspec.convert(event, _Removed)
            if self._group is not None and removed.group_idx not in (None, self._group):
                return None
            hashes = [_u64(h) for h in removed.block_hashes]
            for block_hash in hashes:
                self._salts.pop(block_hash, None)
            return _tier(removed.medium), KvEventData(removed=Removed(hashes))
        if kind == "AllBlocksCleared":
            self._salts.clear()
            return _tier(None), KvEventData(cleared=True)
        log.debug("the engine sent a KV event of a kind this version does not know: %s", kind)
        return None

    def _of_prefix_group(self, event: _Stored) -> bool:
        """Hybrid models report each group of layers; the first that keeps whole prefixes stands for the block."""
        if event.kv_cache_spec_kind not in _WHOLE_PREFIX_KINDS:
            return False
        if self._group is None:
            self._group = event.group_idx
        return event.group_idx in (None, self._group)

    def _stored(self, event: _Stored) -> Stored:
        if self._block_size is not None and event.block_size != self._block_size:
            raise BlockSizeError(f"KV events of {event.block_size}-token blocks, expected {self._block_size}")
        hashes = [_u64(h) for h in event.block_hashes]
        parent = _u64(event.parent_block_hash) if event.parent_block_hash is not None else None
        salt = self._salts.get(parent) if parent is not None else _salt(event)
        tokens_hashes = compute_block_hash_for_seq(
            event.token_ids, event.block_size, lora_name=event.lora_name, cache_namespace=salt
        )
        if salt is not None:
            self._salts.update((block_hash, salt) for block_hash in hashes)
        return Stored(
            blocks=[StoredBlock(b, t) for b, t in zip(hashes, tokens_hashes, strict=True)],
            parent_hash=parent,
            start_position=0 if parent is None else None,
        )


def _as_map(event: dict[str, Any] | list[Any]) -> dict[str, Any]:
    if isinstance(event, dict):
        return event
    kind, *values = event
    fields = _STORED_FIELDS if kind == "BlockStored" else _REMOVED_FIELDS
    return {"type": kind, **dict(zip(fields, values, strict=False))}


def _tier(medium: str | None) -> StorageTier:
    return _TIERS.get(medium or "GPU", "external")


def _u64(block_hash: BlockHash) -> int:
    """vLLM names a block by 64 bits (signed in SGLang), or by the 32 bytes whose last eight they are."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash & _U64


def _salt(event: _Stored) -> str | None:
    """The cache salt of a sequence's first block: the string among its extra keys that is not the LoRA's name."""
    extra = (event.extra_keys or [None])[0] or ()
    words = [key for key in extra if isinstance(key, str)]
    if event.lora_name and words and words[0] == event.lora_name:
        words = words[1:]
    return words[0] if words else None


class KvEventRelay:
    """Reads one rank's events and hands them on in order, asking for what was missed.

    Subscribe before the engine starts, or the first batches may pass unseen (they are asked for again with the next
    one). `catch_up` is for an engine that is running already: it asks at once, and what it cannot get of the time
    before is no loss that would make it begin anew.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None,
        topic: str,
        report: Callable[[TieredEvents], None],
        *,
        block_size: int | None = None,
        catch_up: bool = False,
        context: Context | None = None,
    ) -> None:
        """`report` is called on the event loop with the events of one batch.

        `block_size` is what blocks must have, in tokens. Many relays may share a `context`, and with it its threads;
        whoever made it ends it. Raises zmq.ZMQError for an endpoint that is none.
        """
        self.problem = ""
        """Why what the engine says is of no use, if it is not."""
        self.first_heard: int | None = None
        """The number of the first batch that came; with 0, nothing can have been before."""
        self._block_size = block_size
        self._decoder = KvEventDecoder(block_size)
        self._report = report
        self._own_context = context is None
        self._context = context or Context()
        self._socket = self._context.socket(SUB)
        self._socket.setsockopt(RCVHWM, 0)  # a burst of evictions must not be dropped; the loop drains at once
        self._socket.setsockopt_string(SUBSCRIBE, topic)
        self._socket.connect(endpoint)
        self._replay_endpoint = replay_endpoint
        self._next = 0
        self._last_heard = -1
        self._began = not catch_up
        """Whether what is missing before the next batch is missing from the view."""
        self._complained = False
        self._task = asyncio.create_task(self._run(catch_up), name="engine kv events")

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._socket.close(linger=0)
        if self._own_context:
            self._context.term()

    async def _run(self, catch_up: bool) -> None:
        if catch_up and self._replay_endpoint is not None:
            await self._catch_up()
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != 8:
                log.warning("ignoring a message of %d frames on the engine's KV event socket", len(frames))
                continue
            seq = int.from_bytes(frames[1], "big")
            if self.first_heard is None:
                self.first_heard = seq
            if seq <= self._last_heard:  # a publisher counts up; only another one begins anew
                self._begin_anew()
            self._last_heard = seq
            if seq > self._next:
                await self._recover(seq)
            self._began = True
            if seq < self._next:
                continue  # the replay brought it already
            self._next = seq + 1
            self._hand_on(frames[2])

    def _begin_anew(self) -> None:
        log.warning("the engine's KV events count from the beginning again: it was restarted, so its cache is empty")
        self._began = True
        self._decoder = KvEventDecoder(self._block_size)
        self._next = 0
        self._report([("device", KvEventData(cleared=True))])

    def _hand_on(self, payload: bytes) -> None:
        try:
            events = self._decoder.decode(payload)
        except BlockSizeError as e:
            self._complain(e)
        except ValueError:
            log.exception("ignoring a batch of KV events that cannot be read")
        else:
            self._report(events)

    def _complain(self, error: BlockSizeError) -> None:
        self.problem = str(error)
        if not self._complained:
            self._complained = True
            log.error("%s: they are of no use and dropped; is this the engine of this worker?", error)

    async def _catch_up(self) -> None:
        """Ask for all that the engine still has of the time before. A view that begins empty may begin anywhere."""
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                async for seq, payload in self._replay(0):
                    if seq < self._next:
                        break  # it was restarted meanwhile
                    if seq > self._next:
                        log.warning(
                            "KV event batches %d to %d are not kept any more: "
                            "blocks stored then are unknown until they are stored anew",
                            self._next,
                            seq - 1,
                        )
                    self._next = seq + 1
                    self._hand_on(payload)
        except TimeoutError:
            log.warning("the engine did not replay its KV events within %.0f s", REPLAY_TIMEOUT_S)
        else:
            log.info("caught up with %d batches of KV events", self._next)

    async def _recover(self, until: int) -> None:
        missed = f"KV event batches {self._next} to {until - 1}"
        try:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                async for seq, payload in self._replay(self._next):
                    if seq != self._next:
                        break  # the buffer no longer reaches back far enough
                    self._next += 1
                    self._hand_on(payload)
        except TimeoutError:
            log.warning("the engine did not replay %s within %.0f s", missed, REPLAY_TIMEOUT_S)
        if self._next == 0 and not self._began:
            log.info("%s were before this view began, and are not known to it", missed)
        elif self._next < until:
            # What was stored or dropped in the gap is unknown. An empty index costs hits, a wrong one costs more.
            log.warning("%s are lost; the routers' view of this worker's cache starts anew", missed)
            self._report([("device", KvEventData(cleared=True))])
        else:
            log.info("recovered %s", missed)

    async def _replay(self, start: int) -> AsyncIterator[tuple[int, bytes]]:
        if self._replay_endpoint is None:
            return
        socket = self._context.socket(DEALER)
        try:
            socket.setsockopt(RCVHWM, 0)
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                *_, raw_seq, payload = await socket.recv_multipart()
                seq = int.from_bytes(raw_seq, "big")
                if seq == _END:
                    return
                yield seq, payload
        finally:
            socket.close(linger=0)


def local_endpoint(endpoint: str, rank: int) -> str:
    """Where to connect for what an engine binds as `endpoint` for a rank: any-address is loopback, ports count up."""
    if not endpoint.startswith("tcp://"):
        return endpoint
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host in ("*", "0.0.0.0", "[::]", "::"):  # noqa: S104 - recognised, not bound
        host = "127.0.0.1"
    return f"tcp://{host}:{int(port) + rank}"
