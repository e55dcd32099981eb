"""How do replicas of a service tell each other what they book, without a runtime?

Each publishes on a ZeroMQ port of its own and connects to those of the others. The messages are those that existing
trackers and selectors exchange: a topic frame, then msgpack of one event and the group it is of. Every two seconds we
add, under a topic that only we know, all that is open here, so that replicas agree again after a loss.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import zmq
from zmq.asyncio import Context

from dynamo.router.replica_book import AddRequest, Digest, Place, ReplicaBook, SequenceEvent, SequenceEvents
from dynamo.router.scheduler import KvScheduler
from dynamo.runtime.address import join_host_port
from dynamo.runtime.errors import UNDECODABLE, CannotConnect
from dynamo.runtime.events import new_publisher_id
from dynamo.runtime.logs import Rarely
from dynamo.services.bodies import check_zmq_endpoint
from dynamo.services.cache_group import GroupKey
from dynamo.services.options import MAX_PEERS
from dynamo.services.refusals import conflict, full, not_found

log = logging.getLogger(__name__)
rarely = Rarely(log)

EVENTS = b"dynamo.slot-tracker.v1"
DIGESTS = b"dynamo.slot-digest.v1"
DIGEST_INTERVAL_S = 2.0
SILENT_S = 4 * DIGEST_INTERVAL_S  # a replica that sent digests and stopped is gone, with what it had open
MAX_MESSAGE_BYTES = 16 << 20


class _Hint(msgspec.Struct):
    initial_effective_prefill_tokens: int = 0
    expected_prefill_duration: float | None = None


class _Add(msgspec.Struct):
    token_sequence: list[int] | None = None
    track_prefill_tokens: bool = True
    expected_output_tokens: int | None = None
    prefill_load_hint: _Hint | None = None
    private_blocks: int = 0
    prefilling: bool = True


class _Event(msgspec.Struct):
    request_id: str
    worker: Place
    data: dict[str, _Add] | str
    router_id: int
    lora_name: str | None = None


class _Message(msgspec.Struct):
    model_name: str
    routing_group: str
    block_size: int
    event: _Event
    sequence: int = -1


class _DigestMessage(msgspec.Struct):
    model_name: str
    routing_group: str
    digest: Digest


class Group(msgspec.Struct):
    """One group's book, with what is sent of it."""

    block_size: int
    book: ReplicaBook
    sequence: int = -1


class ReplicaLink:
    """Owns the sockets. Without a port it is off, and books are not asked for anything."""

    def __init__(
        self, host: str, port: int | None, peers: Iterable[str] = (), on_change: Callable[[], None] | None = None
    ) -> None:
        """Raises CannotConnect if the port is taken."""
        self.router_id = new_publisher_id() & ((1 << 63) - 1)
        self.enabled = port is not None
        self.peers: list[str] = []
        self.undecodable = 0
        self.groups: dict[GroupKey, Group] = {}
        self._on_change = on_change
        self._heard: dict[int, float] = {}
        self._dirty: set[GroupKey] = set()
        self._soon: asyncio.Handle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        if port is None:
            return
        self._loop = asyncio.get_running_loop()
        self._context = Context()
        self._out: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUB)
        self._in = self._context.socket(zmq.SUB)
        self._in.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        for topic in (EVENTS, DIGESTS):
            self._in.setsockopt(zmq.SUBSCRIBE, topic)
        try:
            self._out.bind(f"tcp://{join_host_port(host, port)}")
        except zmq.ZMQError as e:
            self._out.close(0)
            self._in.close(0)
            self._context.term()
            raise CannotConnect(f"--replica-sync-port: cannot listen on {join_host_port(host, port)}: {e}") from e
        self._tasks = [
            self._loop.create_task(self._listen(), name="replica events"),
            self._loop.create_task(self._tick(), name="replica digests"),
        ]
        for peer in peers:
            self.add_peer(peer)

    def follow(self, key: GroupKey, block_size: int, scheduler: KvScheduler) -> ReplicaBook:
        """Exchange what is booked in this group from now on, if replicas are on at all."""
        book = ReplicaBook(scheduler, self.router_id)
        self.groups[key] = Group(block_size, book)
        return book

    # --- peers

    def add_peer(self, endpoint: str) -> bool:
        """Hear a replica. Returns whether it is new. Raises SelectionServiceError (409, 507), InvalidArgument."""
        self._check_enabled()
        check_zmq_endpoint("endpoint", endpoint)
        if endpoint in self.peers:
            return False
        if len(self.peers) >= MAX_PEERS:
            raise full(f"{MAX_PEERS} peers are heard already")
        self._in.connect(endpoint)
        self.peers.append(endpoint)
        return True

    def remove_peer(self, endpoint: str) -> None:
        """Hear a replica no more. Raises SelectionServiceError (404, 409)."""
        self._check_enabled()
        if endpoint not in self.peers:
            raise not_found(f"{endpoint[:200]} is not a peer")
        self.peers.remove(endpoint)
        self._in.disconnect(endpoint)

    def _check_enabled(self) -> None:
        if not self.enabled:
            raise conflict("replicas are off here: start the service with --replica-sync-port")

    # --- speaking

    def changed(self, key: GroupKey) -> None:
        """Something was booked, computed or freed: tell it at the end of this turn of the loop."""
        if not self.enabled:
            return
        self._dirty.add(key)
        if self._soon is None:
            self._soon = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._soon = None
        dirty, self._dirty = self._dirty, set()
        for key in dirty:
            group = self.groups.get(key)
            events = group.book.take_events() if group is not None else None
            for event in events.events if events is not None else ():
                assert group is not None
                group.sequence += 1
                message = _Message(*key, group.block_size, _outgoing(event), group.sequence)
                self._send(EVENTS, message)

    def _send(self, topic: bytes, message: msgspec.Struct) -> None:
        self._out.send_multipart([topic, msgspec.msgpack.encode(message)], zmq.NOBLOCK)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(DIGEST_INTERVAL_S)
            self._flush()
            for key, group in self.groups.items():
                self._send(DIGESTS, _DigestMessage(*key, group.book.digest(group.sequence)))
            limit = self._loop.time() - SILENT_S
            for router_id in [router for router, heard in self._heard.items() if heard < limit]:
                del self._heard[router_id]
                log.warning("the replica %x has fallen silent: what it had open is forgotten", router_id)
                for group in self.groups.values():
                    group.book.router_left(router_id)
                self._tell()

    # --- listening

    async def _listen(self) -> None:
        while True:
            frames = await self._in.recv_multipart()
            try:
                self._hear(frames)
            except (*UNDECODABLE, ValueError) as e:
                self.undecodable += 1
                rarely.warning("undecodable", "a replica sent what is no event: %s", e)

    def _hear(self, frames: list[Any]) -> None:
        if len(frames) != 2:
            raise ValueError(f"it has {len(frames)} frames")
        now = self._loop.time()
        if frames[0] == DIGESTS:
            told = msgspec.msgpack.decode(frames[1], type=_DigestMessage)
            group = self.groups.get(GroupKey(told.model_name, told.routing_group))
            if told.digest.router_id == self.router_id:
                return
            self._heard[told.digest.router_id] = now
            if group is not None:
                group.book.hear_digest(told.digest, now)
                self.changed(GroupKey(told.model_name, told.routing_group))  # it may have asked for something
        else:
            message = msgspec.msgpack.decode(frames[1], type=_Message)
            key = GroupKey(message.model_name, message.routing_group)
            group = self.groups.get(key)
            if group is None:
                return
            if message.block_size != group.block_size:
                rarely.error(
                    f"size {key}",
                    "%s: a replica has blocks of %d tokens, not %d: what it books is not counted here",
                    key,
                    message.block_size,
                    group.block_size,
                )
                return
            event = SequenceEvents([_incoming(message.event)])
            group.book.hear(event, message.sequence, now)
        self._tell()

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change()

    async def close(self) -> None:
        """Leave the others."""
        if not self.enabled:
            return
        self._flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._soon is not None:
            self._soon.cancel()
        self._in.close(0)
        self._out.close(200)  # ms for the last events to leave
        self._context.term()


def _outgoing(event: SequenceEvent) -> _Event:
    data: dict[str, _Add] | str
    if isinstance(event.data, str):
        data = event.data
    else:
        add = event.data["AddRequest"]
        hint = _Hint(add.new_tokens) if add.new_tokens else None
        data = {
            "AddRequest": _Add(add.token_sequence, hint is not None, None, hint, add.private_blocks, add.prefilling)
        }
    return _Event(event.request_id, event.worker, data, event.router_id, event.lora_name)


def _incoming(event: _Event) -> SequenceEvent:
    data: dict[str, AddRequest] | str
    if isinstance(event.data, str):
        data = event.data
    else:
        add = event.data.get("AddRequest")
        if add is None:
            raise ValueError(f"its data is {sorted(event.data)}")
        tokens = add.prefill_load_hint.initial_effective_prefill_tokens if add.prefill_load_hint is not None else 0
        new_tokens = tokens if add.track_prefill_tokens else 0
        data = {
            "AddRequest": AddRequest(
                add.token_sequence, new_tokens=new_tokens, private_blocks=add.private_blocks, prefilling=add.prefilling
            )
        }
    return SequenceEvent(event.request_id, event.worker, data, event.router_id, event.lora_name)
