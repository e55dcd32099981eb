"""Which instances of an endpoint are there, which of them may be chosen, and how busy are they from here?

One `InstanceSet` an endpoint and runtime, shared by all clients of it. It owns the local view: what discovery
says, minus those that failed in the last few seconds (inhibited), minus those that said they are leaving.
"""

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from dynamo.runtime.address import NATS, EndpointAddress, split_host_port
from dynamo.runtime.discovery import Change, Delete, Discovery
from dynamo.runtime.discovery.watching import Watch
from dynamo.runtime.errors import UNDECODABLE
from dynamo.runtime.options import env_number

log = logging.getLogger(__name__)

FIRST_LOOK_S = 10.0  # a store that shows a key and then does not tell of it is broken
_INBOX = re.compile(r"dynamo\.inbox\.[0-9a-f]{1,64}")  # nobody is made to write to another subject of the server's
DEFAULT_INHIBITED_S = 5.0  # DYN_RUNTIME_INHIBITED_DURATION_SECS; 0 turns inhibition off
ALONE_S = 0.5  # where no instance is left, those that cannot be reached are tried so often: it may have been us


@dataclass(frozen=True, slots=True)
class TransportType:
    """How an instance is reached: `kind` is `tcp`, `address` is `host:port/{iid:x}/{ns}/{comp}/{ep}`; or it is `nats`,
    and the process's inbox stands where the host is."""

    kind: str
    address: str


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's offer of one endpoint, as it stands in discovery (facts row R8)."""

    component: str
    endpoint: str
    namespace: str
    instance_id: int
    transport_by_kind: dict[str, str] = msgspec.field(name="transport")
    device_type: str = "cpu"
    request_plane_codec: str = "json"  # a record without the field comes from a worker that speaks JSON
    type: str = "Endpoint"

    @property
    def transport(self) -> TransportType:
        """The first transport offered."""
        kind, address = next(iter(self.transport_by_kind.items()), ("", ""))
        return TransportType(kind, address)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.component}/{self.endpoint}/{self.instance_id}"


def device_type() -> str:
    """`cuda` if this process can see an NVIDIA device, else `cpu`. Looks at device files only: loads no library."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")
    return "cuda" if not hidden and os.path.exists("/dev/nvidiactl") else "cpu"


def instance_record(address: EndpointAddress, instance_id: int, host_port: str) -> bytes:
    """The JSON of an instance record. `host_port` is where the process listens, or `nats:` and its inbox."""
    kind = "nats" if host_port.startswith(NATS) else "tcp"
    return msgspec.json.encode(
        Instance(
            component=address.component,
            endpoint=address.endpoint,
            namespace=address.namespace,
            instance_id=instance_id,
            transport_by_kind={kind: f"{host_port.removeprefix(NATS)}/{address.wire_path(instance_id)}"},
            device_type=device_type(),
            request_plane_codec="msgpack",
        )
    )


def parse_instance(key: str, value: bytes, inhibit: Callable[[int], None]) -> "Target":
    """Read a record. Raises ValueError for anything a request cannot be sent to."""
    instance = msgspec.json.decode(value, type=Instance)
    kind = next((kind for kind in ("tcp", "nats") if kind in instance.transport_by_kind), None)
    if kind is None:
        raise ValueError(f"its transport is {list(instance.transport_by_kind)}, not tcp or nats")
    transport = instance.transport_by_kind[kind]
    where, slash, path = transport.partition("/")
    if kind == "tcp":
        split_host_port(where)
    elif not _INBOX.fullmatch(where):
        raise ValueError(f"{where!r} is not a process's inbox")
    if not slash or int(key.rpartition("/")[2], 16) != instance.instance_id:
        raise ValueError(f"its transport {transport!r} or instance id {instance.instance_id:x} does not fit its key")
    host_port = where if kind == "tcp" else NATS + where
    return Target(instance, host_port, path, partial(inhibit, instance.instance_id))


@dataclass(slots=True, eq=False)
class Target:
    """One instance as a place to send to. `inflight` counts this process's requests there."""

    instance: Instance
    host_port: str
    """`host:port`, or `nats:` and an inbox."""
    path: str
    inhibit: Callable[[], None]
    """Leave it out of choices for a while: it failed."""
    inflight: int = 0

    @property
    def instance_id(self) -> int:
        return self.instance.instance_id

    @property
    def device_type(self) -> str:
        return self.instance.device_type


class Connections(Protocol):
    """What a set asks of the process's connections to workers."""

    def use(self, host_port: str, used: bool) -> None:
        """Count who needs an address; one that nobody needs is closed."""

    def probe(self, host_port: str) -> None:
        """Connect if we are not; the set's `connected` or `inhibit_address` is called when it is known whether."""


@dataclass(slots=True, eq=False)
class InstanceSet:
    """The live instances of one endpoint, kept up to date by a watch."""

    address: EndpointAddress
    discovery: Discovery
    connections: Connections
    targets: dict[int, Target] = field(default_factory=dict)
    available: list[Target] = field(default_factory=list)
    """Those that may be chosen, by rising instance id. Replaced, never changed in place."""
    _inhibited: dict[int, asyncio.TimerHandle | None] = field(default_factory=dict)
    _unreachable: set[int] = field(default_factory=set)
    """Those among the inhibited whose connection broke: they are back when a connection can be made again."""
    _probed: set[int] = field(default_factory=set)
    """Those among the unreachable whose time is over and whose connection is being tried."""
    _alone: asyncio.TimerHandle | None = None
    _listeners: list[Callable[[], None]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _watching: asyncio.Task[None] | None = None
    _inhibited_s: float = field(
        default_factory=lambda: env_number("DYN_RUNTIME_INHIBITED_DURATION_SECS", DEFAULT_INHIBITED_S)
    )

    async def start(self) -> None:
        """Take the first look (so that an unusable store is an error here), then follow. Raises DiscoveryError."""
        prefix = self.address.instances_prefix()
        changes = self.discovery.watch(prefix)
        unseen = set(await self.discovery.get_prefix(prefix))
        async with asyncio.timeout(FIRST_LOOK_S):
            while unseen:
                change = await anext(changes)
                self._apply(change)
                unseen.discard(change.key)
        self._tell()
        self._watching = asyncio.get_running_loop().create_task(self._follow(changes), name=f"instances {self.address}")

    async def close(self) -> None:
        """Stop following."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for timer in (*self._inhibited.values(), self._alone):
            if timer is not None:
                timer.cancel()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every change of `targets` or `available`."""
        self._listeners.append(callback)

    def off_change(self, callback: Callable[[], None]) -> None:
        """Forget a callback given to `on_change`."""
        if callback in self._listeners:
            self._listeners.remove(callback)

    async def wait_available(self, timeout_s: float | None) -> None:
        """Return once an instance may be chosen. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not self.available:
                self._changed.clear()
                await self._changed.wait()

    # --- inhibition

    def inhibit(self, instance_id: int) -> None:
        """Leave an instance out of choices for DYN_RUNTIME_INHIBITED_DURATION_SECS."""
        known = instance_id in self._inhibited and instance_id not in self._probed
        if self._inhibited_s <= 0 or instance_id not in self.targets or known:
            return
        self._probed.discard(instance_id)
        loop = asyncio.get_running_loop()
        self._inhibited[instance_id] = loop.call_later(self._inhibited_s, self._expire, instance_id)
        self._tell()

    def inhibit_address(self, host_port: str) -> None:
        """A connection broke or could not be made: leave out all instances there until one can."""
        for instance_id, target in tuple(self.targets.items()):
            if target.host_port == host_port and self._inhibited_s > 0:
                self._unreachable.add(instance_id)
                self.inhibit(instance_id)

    def connected(self, host_port: str) -> None:
        """A worker process has greeted us: its instances are reachable."""
        for instance_id, target in tuple(self.targets.items()):
            if target.host_port == host_port and instance_id in self._unreachable:
                self._unreachable.discard(instance_id)
                if instance_id in self._probed:
                    self._lift(instance_id)
                    self._tell()

    def leaving(self, paths: list[str]) -> None:
        """A worker said these take no more requests: leave them out until discovery says anything new."""
        gone = [instance_id for instance_id, target in self.targets.items() if target.path in paths]
        for instance_id in gone:
            self._lift(instance_id)
            self._inhibited[instance_id] = None
        if gone:
            self._tell()

    def _expire(self, instance_id: int) -> None:
        if instance_id in self._unreachable:
            # A stopped or cut off process would take a request and never answer: try it before any request does.
            self._probed.add(instance_id)
            self.connections.probe(self.targets[instance_id].host_port)
        else:
            self._lift(instance_id)
            self._tell()

    def _seek_anybody(self) -> None:
        """No instance may be chosen. A process that was stopped or cut off finds all its connections broken at once,
        and its requests should not wait out everybody's time for that."""
        if self._alone is None and self._unreachable - self._probed:
            self._alone = asyncio.get_running_loop().call_later(ALONE_S, self._try_all)

    def _try_all(self) -> None:
        self._alone = None
        if self.available:
            return
        for instance_id in sorted(self._unreachable - self._probed):
            timer = self._inhibited.get(instance_id)
            if timer is not None:
                timer.cancel()
                self._expire(instance_id)

    def _lift(self, instance_id: int) -> None:
        timer = self._inhibited.pop(instance_id, None)
        if timer is not None:
            timer.cancel()
        self._unreachable.discard(instance_id)
        self._probed.discard(instance_id)

    # --- discovery

    async def _follow(self, changes: AsyncIterator[Change]) -> None:
        async for change in changes:
            self._apply(change)
            if not (isinstance(changes, Watch) and changes.waiting):  # what comes at once is told at once: telling
                self._tell()  # costs as much as there are workers

    def _apply(self, change: Change) -> None:
        if isinstance(change, Delete):
            self._delete(change.key)
        else:
            self._put(change.key, change.value)

    def _put(self, key: str, value: bytes) -> None:
        try:
            target = parse_instance(key, value, self.inhibit)
        except (*UNDECODABLE, ValueError) as e:
            log.warning("ignoring the instance record %s: %s", key, e)
            self._delete(key)
            return
        self._lift(target.instance_id)
        known = self.targets.get(target.instance_id)
        if known is None:
            self.targets[target.instance_id] = target
            self.connections.use(target.host_port, True)
            return
        if known.host_port != target.host_port:
            self.connections.use(target.host_port, True)
            self.connections.use(known.host_port, False)
        known.instance, known.host_port, known.path = target.instance, target.host_port, target.path

    def _delete(self, key: str) -> None:
        try:
            instance_id = int(key.rpartition("/")[2], 16)
        except ValueError:
            return
        target = self.targets.pop(instance_id, None)
        self._lift(instance_id)
        if target is not None:
            self.connections.use(target.host_port, False)

    def _tell(self) -> None:
        self.available = [t for i, t in sorted(self.targets.items()) if i not in self._inhibited]
        if not self.available:
            self._seek_anybody()
        self._changed.set()
        for listener in tuple(self._listeners):
            try:
                listener()
            except Exception:
                log.exception("a callback failed that was to hear of the instances of %s", self.address)
