"""How do the events of many publishers reach one listener?

A connection to every publisher of the topic in discovery (`dynamo.runtime.zmtp`).
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from dynamo.runtime.address import join_host_port, split_host_port
from dynamo.runtime.curve import KEY, PEERS, CurveKeys
from dynamo.runtime.discovery import Discovery
from dynamo.runtime.event_channel import HEAD, MAX_EVENT_BYTES, NO_EVENT, read_frame
from dynamo.runtime.event_reader import EventReader
from dynamo.runtime.events import EVENT_CHANNELS, Event, EventScope, Listeners
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.zmq_channel import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, numeric_host, reached_in
from dynamo.runtime.zmtp import ZmtpSubscription

if TYPE_CHECKING:
    from dynamo.runtime.curve_session import CurveSession

log = logging.getLogger(__name__)

UNREAD_EVENTS: Final = 1024  # held for an iterator that is behind; then the publishers' own queues fill
UNCONNECTED_WARNING_S: Final = 5.0  # a publisher in discovery whose address does not answer for this long
FRAMES: Final = 4
MAX_MESSAGE_BYTES: Final = MAX_EVENT_BYTES + HEAD.size + 1024  # with its topic, and who says it


class ZmqSubscriber(EventReader):
    """See `EventSubscriber`."""

    def __init__(
        self,
        discovery: Discovery,
        metrics: Metrics,
        scope: EventScope,
        topic: str,
        listeners: Listeners,
        curve: CurveKeys | None = None,
    ) -> None:
        super().__init__(discovery, metrics, scope, topic, listeners)
        self._topic_frame = topic.encode()
        self._curve = curve
        self._addresses: dict[int, str] = {}
        self._links: dict[str, ZmtpSubscription] = {}
        self._paused = False
        self._beating = self._loop.create_task(self._beat(), name=f"heartbeats of {topic}")

    @classmethod
    async def create(
        cls,
        discovery: Discovery,
        metrics: Metrics,
        scope: EventScope,
        topic: str,
        listeners: Listeners,
        curve: CurveKeys | None = None,
    ) -> Self:
        """Look into discovery and connect; see `dynamo.runtime.events.create_subscriber`."""
        present = await discovery.get_prefix(f"{EVENT_CHANNELS}/{scope.path}/")
        subscriber = cls(discovery, metrics, scope, topic, listeners, curve)
        await subscriber._begin(present)
        return subscriber

    # --- publishers come and go

    async def _put(self, publisher_id: int, key: str, value: bytes) -> None:
        reached = reached_in(value, publisher_id)
        secure = self._session_with(reached.key)
        address = await _numeric(reached.endpoint)
        known = self._addresses.get(publisher_id)
        if known == address:
            return
        if address not in self._links:
            self._connect(address, secure)
            self._loop.call_later(UNCONNECTED_WARNING_S, self._warn_if_unconnected, publisher_id, address)
        self._addresses[publisher_id] = address
        if known is None:
            self._joined(publisher_id)
            return
        if known not in self._addresses.values():
            await self._disconnect(known)
        self._change.set()

    async def _delete(self, publisher_id: int) -> None:
        address = self._addresses.pop(publisher_id, None)
        if address is None:
            return
        if address not in self._addresses.values():
            await self._disconnect(address)
        self._left(publisher_id)

    def _session_with(self, key: bytes | None) -> "Callable[[], CurveSession] | None":
        """How connections to a publisher with this key are sealed. Raises ValueError if it is not to be heard."""
        curve = self._curve
        if curve is None:
            if key is not None:
                raise ValueError(f"it wants a key of ours ({KEY})")
            return None
        if key is None:
            raise ValueError(f"it speaks in the clear, and {KEY} is set here")
        return partial(_session, curve, key)

    def _connect(self, address: str, secure: "Callable[[], CurveSession] | None") -> None:
        host, port = split_host_port(address.removeprefix("tcp://"))
        link = self._links[address] = ZmtpSubscription(
            host, port, self._topic_frame, MAX_MESSAGE_BYTES, self._on_message, self._change.set, secure
        )
        link.pause(self._paused)
        link.open()

    async def _disconnect(self, address: str) -> None:
        await self._links.pop(address).close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_MS / 1000)
            for link in self._links.values():
                link.beat(HEARTBEAT_TIMEOUT_MS / 1000)

    def _warn_if_unconnected(self, publisher_id: int, address: str) -> None:
        link = self._links.get(address)
        if self._addresses.get(publisher_id) == address and link is not None and not link.connected:
            log.warning(
                "the publisher %x of %r cannot be reached at %s: its events are missing here. %s",
                publisher_id,
                self.topic,
                address,
                link.trouble
                or "If it runs on another machine, set DYN_EVENT_PLANE_HOST there to an address of its own",
            )

    @property
    def publishers(self) -> dict[int, bool]:
        """See `EventSubscriber.publishers`."""
        return {publisher: self._links[address].connected for publisher, address in self._addresses.items()}

    # --- events come

    def _on_message(self, frames: list[bytes]) -> None:
        event = self._event(frames)
        if event is not None:
            self._deliver(event)
            if not self._paused and len(self._unread) >= UNREAD_EVENTS:
                self._pause(True)

    def _event(self, frames: list[bytes]) -> Event | None:
        """Check and decode one message; None if it is not for us."""
        if frames[0] != self._topic_frame and len(frames) == FRAMES:
            return None  # ZeroMQ matches prefixes: somebody's topic begins like ours
        try:
            _, publisher, sequence, frame = frames
            event = read_frame(frame, self._decoder)
            if publisher != event.publisher_id.to_bytes(8, "big") or sequence != event.sequence.to_bytes(8, "big"):
                raise ValueError("frames that contradict each other")
        except NO_EVENT as e:
            self._reject(e)
            return None
        if event.publisher_id not in self._addresses:
            self._rejected.value += 1  # it has left discovery, or has taken the port of one that has
            return None
        return event

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        for link in self._links.values():
            link.pause(paused)

    async def __anext__(self) -> Event:
        event = await super().__anext__()
        if self._paused and len(self._unread) < UNREAD_EVENTS // 2:
            self._pause(False)
        return event

    async def _stop_hearing(self) -> None:
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        for address in list(self._links):
            await self._disconnect(address)
        self._addresses.clear()


def _session(curve: CurveKeys, key: bytes) -> "CurveSession":
    """For one connection. Raises ValueError for a key that is not known now; it may be when it is tried again."""
    if not curve.knows(key):
        raise ValueError(f"its key {key.decode()} is not among those that are known ({PEERS})")
    from dynamo.runtime.curve_session import CurveSession  # PyNaCl is not everywhere

    return CurveSession(curve.public, curve.secret, key)


async def _numeric(endpoint: str) -> str:
    """The address with its host's name resolved, so that one of two names is one connection."""
    host, port = split_host_port(endpoint.removeprefix("tcp://"))
    return f"tcp://{join_host_port(await numeric_host(host), port)}"
