"""How does an event leave by way of NATS, without anybody waiting for it, and without loss where it must not be lost?

While the link is down, events wait here, `DYN_EVENT_PLANE_HWM` (10,000) of them at most, and leave in order when it is
back. Those of a durable topic are kept until the server says that it has them, and sent again if it does not; it drops
what it has already. What leaves no room takes the oldest with it, which subscribers see by its number.
"""

import asyncio
import logging
from collections import deque
from typing import Final, NamedTuple, Self

from dynamo.runtime.discovery import Discovery
from dynamo.runtime.errors import CannotConnect
from dynamo.runtime.event_channel import queue_length
from dynamo.runtime.event_writer import EventWriter, publisher_id_of
from dynamo.runtime.events import EventScope
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.nats.channel import channel_record, in_parts, subject_of
from dynamo.runtime.nats.durable import ensure, is_kept, stream_for
from dynamo.runtime.nats.link import Message, NatsLink, status_of

log = logging.getLogger(__name__)
rarely = Rarely(log)

KEPT_BYTES: Final = 64 << 20  # two largest events
LAST_WORDS_S: Final = 0.5  # how long closing waits for the server to have the last events
HEADERS_BYTES: Final = 128  # the server counts them too, and closes the connection of who sends more than it takes
LOOK_S: Final = 2.0  # an event that the server has not confirmed for so long is sent again


class _Kept(NamedTuple):
    sequence: int
    part: int
    data: bytes


class NatsPublisher(EventWriter):
    """See `EventPublisher`."""

    def __init__(
        self, link: NatsLink, metrics: Metrics, scope: EventScope, topic: str, publisher_id: int, durable: bool
    ) -> None:
        super().__init__(metrics, scope, topic, publisher_id)
        self._link = link
        self._stream = stream_for(scope, topic) if durable else None
        self._subject = subject_of(scope, topic, publisher_id)
        self._answers = f"p{publisher_id:x}-{topic}"
        self._loop = asyncio.get_running_loop()
        self._most = queue_length()
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = 0
        self._behind = False
        """Whether what is kept must leave before anything new."""
        self._confirmed = asyncio.Event()
        self._closed = False
        self._catching_up: asyncio.Task[None] | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._oldest_seen: _Kept | None = None
        self._discovery: Discovery | None = None

    @classmethod
    async def create(
        cls,
        link: NatsLink,
        discovery: Discovery,
        metrics: Metrics,
        scope: EventScope,
        topic: str,
        publisher_id: int | None,
    ) -> Self:
        """Enter discovery; see `dynamo.runtime.events.create_publisher`."""
        publisher_id = publisher_id_of(publisher_id)
        publisher = cls(link, metrics, scope, topic, publisher_id, await is_kept(link, scope, topic))
        await discovery.put(publisher._key, channel_record(scope, topic, publisher_id))
        publisher._discovery = discovery
        link.on_up.append(publisher._on_up)
        if publisher._stream is not None:
            link.routes[publisher._answers] = publisher._on_answer
            publisher._look()
        return publisher

    def publish(self, payload: object) -> int:
        """See `EventPublisher.publish`."""
        frame = bytes(self._next_frame(payload, closed=self._closed))
        for part, data in enumerate(in_parts(frame, self._link.max_payload - HEADERS_BYTES)):
            one = _Kept(self.sequence, part, data)
            sent = not self._behind and self._send(one)
            if not sent:
                self._behind = True
            if not sent or self._stream is not None:
                self._keep(one)
        return self._has_left()

    def _send(self, one: _Kept) -> bool:
        if self._stream is None:
            return self._link.publish(self._subject, one.data)
        number = f"{one.sequence}.{one.part}"
        reply = f"{self._link.inbox}.{self._answers}.{number}"
        return self._link.publish(self._subject, one.data, reply, {"Nats-Msg-Id": f"{self.publisher_id:x}.{number}"})

    # --- what has not left yet, or may have been lost

    def _keep(self, one: _Kept) -> None:
        self._kept.append(one)
        self._kept_bytes += len(one.data)
        while len(self._kept) > self._most or self._kept_bytes > KEPT_BYTES:
            self._forget_oldest()
            self._overflows.value += 1
            rarely.warning(self._key, "NATS does not take the events of %r: the oldest are lost", self.topic)

    def _forget_oldest(self) -> None:
        self._kept_bytes -= len(self._kept.popleft().data)
        if not self._kept:
            self._confirmed.set()

    def _on_up(self) -> None:
        if self._kept or self._stream is not None:
            self._catch_up()

    def _catch_up(self) -> None:
        """Send what is kept, then go on."""
        if self._catching_up is None or self._catching_up.done():
            self._behind = True
            self._catching_up = self._loop.create_task(self._send_kept(), name=f"catch up {self.topic}")

    async def _send_kept(self) -> None:
        if self._stream is not None:
            try:
                await ensure(self._link, self._stream)
            except CannotConnect as e:
                rarely.warning(f"ensure {self._key}", "%s; trying on", e.message)
                return  # `_look` comes here again
        if all(map(self._send, self._kept)):
            self._behind = False
            if self._stream is None:
                self._kept.clear()
                self._kept_bytes = 0

    def _look(self) -> None:
        """Has the server had an event for a while, and not said so?"""
        self._looking = self._loop.call_later(LOOK_S, self._look)
        oldest = self._kept[0] if self._kept else None
        if oldest is not None and oldest is self._oldest_seen and self._link.up:
            self._catch_up()
        self._oldest_seen = oldest

    def _on_answer(self, message: Message) -> None:
        """The server has an event, or says why not."""
        if status_of(message) is not None or message.data.startswith(b'{"error"'):
            said = message.data[:200].decode(errors="replace") or "no stream takes it"
            rarely.warning(f"answer {self._key}", "NATS does not keep events of %r: %s", self.topic, said)
            return  # `_look` sends it again, after the stream was looked after
        _, sequence, part = message.subject.rsplit(".", 2)
        done = (int(sequence), int(part))
        while self._kept and (self._kept[0].sequence, self._kept[0].part) <= done:
            self._forget_oldest()

    async def close(self) -> None:
        """See `EventPublisher.close`."""
        discovery, self._discovery = self._discovery, None
        if discovery is None:
            return
        self._closed = True
        try:
            await discovery.delete(self._key)
        finally:
            await self._last_words()

    async def _last_words(self) -> None:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                while self._kept and self._link.up:
                    self._confirmed.clear()
                    await self._confirmed.wait()
        except TimeoutError:
            log.info("%d event(s) of %r were not confirmed before the end", len(self._kept), self.topic)
        if self._looking is not None:
            self._looking.cancel()
        if self._catching_up is not None:
            self._catching_up.cancel()
            await asyncio.gather(self._catching_up, return_exceptions=True)
        self._link.routes.pop(self._answers, None)
        if self._on_up in self._link.on_up:
            self._link.on_up.remove(self._on_up)
