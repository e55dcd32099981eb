"""Which events does the NATS server keep, and how does somebody who was away hear them?

KV events (facts row K17): a JetStream stream for each namespace and durable topic, `dynamo-{namespace}-{topic}`, holds
what was published in the last hour. A subscriber reads it by a consumer of its own, goes on where it was after the link
was down, and one that starts late hears what is kept, the last hundred thousand at most.
"""

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from dynamo.runtime.errors import CannotConnect
from dynamo.runtime.events import EventScope
from dynamo.runtime.logs import Rarely
from dynamo.runtime.nats.channel import pattern_of
from dynamo.runtime.nats.link import Handler, Interest, Message, NatsLink, status_of
from dynamo.runtime.options import env_number, parse_bool

if TYPE_CHECKING:
    from nats.js import JetStreamContext

log = logging.getLogger(__name__)
rarely = Rarely(log)

DURABLE_TOPICS: Final = frozenset({"kv-events"})
MAX_AGE_S: Final = 3600.0  # DYN_NATS_STREAM_MAX_AGE, the default users know
MAX_BYTES: Final = 256 << 20  # DYN_NATS_STREAM_MAX_BYTES: some 20 minutes of a hundred busy workers
REPLAYED_EVENTS: Final = 100_000  # heard by who starts late: about three seconds of its CPU
HEARTBEAT_S: Final = 2.0  # by which a consumer that the server has lost is noticed ...
SILENCE_S: Final = 5.0  # ... after so long
RETRY_S: Final = 1.0
TRIES: Final = 5
UNHEARD_S: Final = 60.0  # the server forgets a consumer whose owner is gone


class NoJetStream(CannotConnect):
    """The server keeps nothing for anybody."""


@dataclass(frozen=True)
class Stream:
    """One stream: its name, and the subjects it keeps."""

    name: str
    subject: str


def stream_for(scope: EventScope, topic: str) -> Stream:
    """The stream that keeps a topic's events in the scope's namespace."""
    return Stream(f"dynamo-{quote(scope.namespace, safe='')}-{topic}", pattern_of(EventScope(scope.namespace), topic))


async def is_kept(link: NatsLink, scope: EventScope, topic: str) -> bool:
    """Whether the server keeps the topic's events: makes sure that it does, unless it must not or cannot.

    `DYN_NATS_JETSTREAM` is `auto` (if the server has JetStream), `true` or `false`.

    Raises:
        ValueError: a wrong variable.
        CannotConnect: it is `true`, and the server has no JetStream, or refuses the stream.
    """
    wanted = os.environ.get("DYN_NATS_JETSTREAM", "").strip().lower() or "auto"
    try:
        if topic not in DURABLE_TOPICS or (wanted != "auto" and not parse_bool(wanted)):
            return False
    except ValueError:
        raise ValueError(f"DYN_NATS_JETSTREAM: {wanted!r} is not one of auto, true, false") from None
    try:
        await _ensure_patiently(link, stream_for(scope, topic))
    except CannotConnect as e:
        if wanted != "auto":
            raise CannotConnect(f"DYN_NATS_JETSTREAM is set, but {e.message}") from None
        rarely.warning(
            "no jetstream",
            "%s. Events of %r are not kept: who is away asks the workers for them. DYN_NATS_JETSTREAM=false says that "
            "this is meant",
            e.message,
            topic,
        )
        return False
    return True


async def _ensure_patiently(link: NatsLink, stream: Stream) -> None:
    """As `ensure`: a cluster that elects a leader is asked again."""
    for _ in range(TRIES - 1):
        try:
            await ensure(link, stream)
        except NoJetStream:
            raise
        except CannotConnect as e:
            log.info("%s; trying on", e.message)
            await asyncio.sleep(RETRY_S)
        else:
            return
    await ensure(link, stream)


async def ensure(link: NatsLink, stream: Stream) -> None:
    """Make the stream if it is not there. One that an operator has made otherwise stays as it is.

    Raises CannotConnect, of the kind NoJetStream if no other try will be better.
    """
    from nats.errors import Error
    from nats.js.api import StorageType, StreamConfig
    from nats.js.errors import NotFoundError, ServiceUnavailableError

    js = link.jetstream()
    try:
        try:
            await js.stream_info(stream.name)
        except NotFoundError:
            await js.add_stream(
                StreamConfig(
                    name=stream.name,
                    subjects=[stream.subject],
                    storage=StorageType.FILE,
                    max_age=env_number("DYN_NATS_STREAM_MAX_AGE", MAX_AGE_S),
                    max_bytes=int(env_number("DYN_NATS_STREAM_MAX_BYTES", MAX_BYTES)),
                    num_replicas=int(env_number("DYN_NATS_STREAM_REPLICAS", 1)),
                )
            )
            log.info("made the stream %s on NATS, of %s", stream.name, stream.subject)
    except ServiceUnavailableError as e:
        if e.code is None:  # nobody has heard the question
            raise NoJetStream("the NATS server has no JetStream: start it with -js") from e
        raise CannotConnect(f"the NATS server keeps no stream {stream.name}: {e}") from e
    except (Error, TimeoutError) as e:
        raise CannotConnect(f"the NATS server keeps no stream {stream.name}: {e or type(e).__name__}") from e


class DurableFeed:
    """Reads a stream, in order, from where it was to its end and on. `handler` gets each message once."""

    def __init__(self, link: NatsLink, stream: Stream, pattern: str, handler: Handler) -> None:
        self._link = link
        self._stream = stream
        self._pattern = pattern
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._next = 0
        """The number in the stream of the next message; 0 before the first."""
        self._created: object = None
        """When the stream was made: another one of its name has other numbers."""
        self._delivered = 0
        self._heard_at = 0.0
        self._interest: Interest | None = None
        self._closed = False
        self._broken = asyncio.Event()
        self._broken.set()
        self._ready = asyncio.Event()
        self._keeping = self._loop.create_task(self._keep(), name=f"stream {stream.name}")
        link.on_up.append(self._broken.set)

    @property
    def reads(self) -> bool:
        """Whether there is a consumer."""
        return self._ready.is_set()

    async def ready(self) -> None:
        """Return once it reads."""
        await self._ready.wait()  # the caller bounds it

    async def _keep(self) -> None:
        """Have a consumer, and another one when it is lost."""
        while not self._closed:  # nats-py swallows a cancellation now and then
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._broken.wait()
            except TimeoutError:
                if not self._link.up or self._loop.time() - self._heard_at < SILENCE_S:
                    continue
                rarely.info(f"silent {self._pattern}", "the consumer of %s fell silent; another one", self._stream.name)
            self._broken.clear()
            try:
                await self._consume()
            except CannotConnect as e:
                if self._link.up:
                    rarely.warning(
                        f"consume {self._pattern}", "reading %s: %s; trying on", self._stream.name, e.message
                    )
                await asyncio.sleep(RETRY_S)
                self._broken.set()
            else:
                self._ready.set()

    async def _consume(self) -> None:
        """Begin to read from the next message on. Raises CannotConnect."""
        from nats.errors import Error

        if self._interest is not None:
            await self._link.unsubscribe(self._interest)
            self._interest = None
        await ensure(self._link, self._stream)
        try:
            js = self._link.jetstream()
            await self._find_place(js)
            await self._add_consumer(js)
        except (Error, TimeoutError) as e:
            raise CannotConnect(str(e) or type(e).__name__) from e

    async def _find_place(self, js: "JetStreamContext") -> None:
        info = await js.stream_info(self._stream.name)
        state = info.state
        if info.created != self._created or self._next > state.last_seq + 1:
            self._next = 0  # the stream was made anew, and counts from 1 again
        self._created = info.created
        oldest = max(state.first_seq, state.last_seq - REPLAYED_EVENTS + 1, 1)
        self._next = max(self._next, oldest)

    async def _add_consumer(self, js: "JetStreamContext") -> None:
        from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

        self._delivered = 0
        self._heard_at = self._loop.time()
        inbox = self._link.new_inbox()
        self._interest = await self._link.subscribe(inbox, self._on_message)
        await js.add_consumer(
            self._stream.name,
            ConsumerConfig(
                deliver_subject=inbox,
                filter_subject=self._pattern,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self._next,
                ack_policy=AckPolicy.NONE,
                max_deliver=1,
                flow_control=True,
                idle_heartbeat=HEARTBEAT_S,
                inactive_threshold=UNHEARD_S,
                mem_storage=True,
                num_replicas=1,
            ),
        )

    def _on_message(self, message: Message) -> None:
        self._heard_at = self._loop.time()
        if status_of(message) is not None:
            self._on_word(message)
            return
        words = message.reply.split(".")  # $JS.ACK[.domain.account].stream.consumer.deliveries.in stream.here.…
        place = 5 if len(words) == 9 else 7
        try:
            number, here = int(words[place]), int(words[place + 1])
        except (IndexError, ValueError):
            return  # somebody else's message to our inbox
        if here != self._delivered + 1:
            self._broken.set()  # something is missing between: read again from there
            return
        self._delivered = here
        self._next = number + 1
        self._handler(message)

    def _on_word(self, message: Message) -> None:
        """The server speaks of the consumer: it lives, waits for us to have read all, or is gone."""
        headers = message.headers or {}
        if status_of(message) != "100":
            self._broken.set()
            return
        for answer in (message.reply, headers.get("Nats-Consumer-Stalled", "")):
            if answer:
                self._link.publish(answer, b"")
        last = headers.get("Nats-Last-Consumer", "")
        if last.isdigit() and int(last) != self._delivered:
            self._broken.set()

    async def close(self) -> None:
        """Read no more."""
        self._closed = True
        if self._broken.set in self._link.on_up:
            self._link.on_up.remove(self._broken.set)
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        if self._interest is not None:
            await self._link.unsubscribe(self._interest)
