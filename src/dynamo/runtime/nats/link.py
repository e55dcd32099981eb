"""How does one process stay connected to NATS?

One connection for all that the process says and hears. It is made at the first need, and made anew, after pauses that
grow to two seconds, for as long as the process lives. What is on its way when it breaks may be lost: those who use the
link know what they sent, and by sequence numbers what they did not hear, and hear when it is up again.
"""

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from dynamo.runtime.errors import CannotConnect
from dynamo.runtime.logs import Rarely
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.nats.settings import NatsSettings, without_secrets

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription
    from nats.js import JetStreamContext

    from dynamo.runtime.nats.client import NatsClient

log = logging.getLogger(__name__)
rarely = Rarely(log)

CONNECT_S: Final = 3.0  # for one server, with TLS and authentication
FIRST_PAUSE_S: Final = 0.05  # after the connection broke; doubles up to ...
LONGEST_PAUSE_S: Final = 2.0  # ... this
PING_S: Final = 2.0  # as on the request plane's own connections
SILENCE_S: Final = 6  # a server that does not answer a ping for so long is given up, as a worker is
MAX_UNSENT_BYTES: Final = 64 << 20  # a server that leaves more unread is not reading
CLOSE_S: Final = 1.0  # for the last words
INBOX: Final = "dynamo.inbox."  # what comes for one process; a random token follows
REPLIES: Final = "dynamo.reply"  # below it, what the server answers

# What a server says that a second try does not change.
_HOPELESS: Final = ("authorization violation", "authentication", "nkey", "jwt", "certificate verify failed")


class Message(Protocol):
    """One message of NATS."""

    subject: str
    reply: str
    data: bytes
    headers: dict[str, str] | None


Handler = Callable[[Message], None]

NOBODY: Final = "503"  # the status of a message by which the server says that nobody has heard ours


def status_of(message: Message) -> str | None:
    """The status, if the message is one of the server's own."""
    return message.headers.get("Status") if message.headers else None


@dataclass(eq=False)
class Interest:
    """A subject that is heard, also after the connection was made anew."""

    subject: str
    handler: Handler
    client: "NatsClient | None" = None
    """The connection that hears it."""
    subscription: "Subscription | None" = None


@dataclass(frozen=True)
class _Outgoing:
    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None


@dataclass
class _Queue:
    """What is to be sent. `more` is set when there is something, `empty` when there is nothing."""

    messages: deque[_Outgoing] = field(default_factory=deque)
    size: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)
    empty: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, message: _Outgoing) -> None:
        self.messages.append(message)
        self.size += len(message.data)
        self.empty.clear()
        self.more.set()

    def take(self) -> _Outgoing:
        message = self.messages.popleft()
        self.size -= len(message.data)
        return message

    def clear(self) -> None:
        self.messages.clear()
        self.size = 0


class NatsLink:
    """The connection of one process. Make it on the running loop; `start` before anything else."""

    def __init__(self, settings: NatsSettings, process: str, metrics: Metrics) -> None:
        self.inbox = INBOX + secrets.token_hex(16)
        """What is sent to this and to subjects below it comes here. Nobody can guess it."""
        self.up = False
        self.up_since = 0.0
        """When it was last connected, by the loop's clock."""
        self.on_up: list[Callable[[], None]] = []
        """Called when the link is up again, not the first time."""
        self.on_stranger: Handler | None = None
        """Gets what comes into the inbox and is for none of the `routes`."""
        self.routes: dict[str, Handler] = {}
        """Who gets what comes to `{inbox}.{name}` and below it."""
        self._settings = settings
        self._process = process
        self._metrics = metrics.nats
        self._loop = asyncio.get_running_loop()
        self._client: NatsClient | None = None
        self._lost = asyncio.Event()
        self._queue = _Queue()
        self._interests: set[Interest] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._closed = False
        self._last_error = ""
        self._interests.add(Interest(f"{self.inbox}.>", self._route))

    # --- being connected

    async def start(self) -> None:
        """Return once connected, after at most `startup_s`. Raises CannotConnect; may then be called again."""
        if self._keeping is None or self._keeping.done():
            self._started = self._loop.create_future()
            self._keeping = self._loop.create_task(self._keep(self._started), name="nats")
        assert self._started is not None
        await asyncio.shield(self._started)  # bounded by startup_s

    async def _keep(self, started: asyncio.Future[None]) -> None:
        """Connect, and connect again."""
        deadline = self._loop.time() + self._settings.startup_s
        pause_s = FIRST_PAUSE_S
        lost_at = self._loop.time()
        while True:
            try:
                client = await self._connect()
            except CannotConnect as e:
                if not started.done() and (self._hopeless(e.message) or self._loop.time() + pause_s > deadline):
                    started.set_exception(e)
                    started.exception()  # whoever waits hears it; nobody may
                    return
                self._metrics.errors.value += 1
                rarely.warning("nats connect", "%s; trying on", e.message)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            if self._closed:  # nats-py swallows a cancellation now and then
                await self._drop(client)
                return
            pause_s = FIRST_PAUSE_S
            self._come_up(client)
            if started.done():
                log.info("connected to NATS again after %.1f s", self._loop.time() - lost_at)
                for listener in tuple(self.on_up):
                    listener()
            else:
                started.set_result(None)
            await self._serve(client)
            lost_at = self._loop.time()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    @staticmethod
    def _hopeless(message: str) -> bool:
        return any(words in message.lower() for words in _HOPELESS)

    async def _connect(self) -> "NatsClient":
        """A client that is connected and hears all that is to be heard. Raises CannotConnect."""
        why = "no server"
        servers = list(self._settings.servers)
        random.shuffle(servers)
        for server in servers:
            try:
                return await self._connect_to(server)
            except CannotConnect as e:
                why = e.message
        raise CannotConnect(why)

    async def _connect_to(self, server: str) -> "NatsClient":
        from nats.errors import SecureConnWantedError

        from dynamo.runtime.nats.client import NatsClient

        client = NatsClient()
        shown = without_secrets(server)
        self._last_error = ""

        async def closed() -> None:
            if self._client is client:
                self._lost.set()

        try:
            tls = self._settings.tls()
            client.must_encrypt = tls is not None
            async with asyncio.timeout(CONNECT_S):
                await client.connect(
                    server,
                    name=self._process,
                    tls=tls,
                    allow_reconnect=False,
                    connect_timeout=int(CONNECT_S),
                    reconnect_time_wait=0,
                    max_reconnect_attempts=1,  # of two in all: with 0 it would try for ever
                    inbox_prefix=REPLIES,
                    error_cb=self._on_error,
                    closed_cb=closed,
                    **self._settings.ways_in(),
                )
                while new := [interest for interest in self._interests if interest.client is not client]:
                    for interest in new:
                        await self._subscribe(client, interest)
                    await client.flush()
        except SecureConnWantedError:
            client.abort()
            raise CannotConnect(
                f"cannot connect to NATS at {shown}: authentication is not begun, as encryption was asked for "
                "(tls:// or NATS_TLS_...) and this server does not offer it"
            ) from None
        except Exception as e:  # a server that is none makes nats-py raise anything
            client.abort()
            said = self._last_error or str(e) or type(e).__name__
            raise CannotConnect(f"cannot connect to NATS at {shown} (NATS_SERVER): {said}") from e
        except BaseException:
            client.abort()
            raise
        return client

    async def _on_error(self, error: Exception) -> None:
        """nats-py's word for what goes wrong in the background."""
        from nats.errors import SlowConsumerError

        self._last_error = str(error) or type(error).__name__
        if not self.up:
            return
        self._metrics.errors.value += 1
        if isinstance(error, SlowConsumerError):
            rarely.warning("nats slow", "messages of NATS came faster than they were handled, and some were dropped")
        elif "permissions violation" in self._last_error.lower():
            rarely.error("nats permissions", "NATS refused: %s", self._last_error)
        else:
            log.debug("NATS: %s", self._last_error)

    def _come_up(self, client: "NatsClient") -> None:
        self._client = client
        self._lost.clear()
        self._queue.clear()
        self._last_error = ""
        self.up = True
        self.up_since = self._loop.time()
        self._metrics.connected.set(1)

    async def _serve(self, client: "NatsClient") -> None:
        """Send what is to be sent, until the connection is lost."""
        tasks = [
            self._loop.create_task(self._send(client), name="nats send"),
            self._loop.create_task(self._ping(client), name="nats ping"),
            self._loop.create_task(self._until_lost(), name="nats lost"),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.up = False
            self._client = None
            self._queue.clear()
            self._metrics.connected.set(0)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("the connection to NATS failed", exc_info=result)
            await self._drop(client)
        self._metrics.errors.value += 1
        why = self._last_error or str(client.last_error or "") or "the server closed it"
        log.warning("the connection to NATS broke (%s); connecting again", why)

    async def _until_lost(self) -> None:
        await self._lost.wait()  # no deadline: that is what a connection is for

    async def _send(self, client: "NatsClient") -> None:
        from nats.errors import Error

        queue = self._queue
        while True:
            while queue.messages:
                out = queue.take()
                try:
                    await client.publish(out.subject, out.data, out.reply, out.headers)
                except Error as e:
                    if client.is_closed:
                        return
                    self._metrics.errors.value += 1
                    rarely.error("nats publish", "a message to %s cannot be sent: %s", out.subject, e)
            queue.more.clear()
            queue.empty.set()
            await queue.more.wait()  # no deadline: until somebody has something to say

    async def _ping(self, client: "NatsClient") -> None:
        """Returns when the server does not answer."""
        from nats.errors import Error

        while self._client is client:  # nats-py swallows a cancellation now and then
            await asyncio.sleep(PING_S)
            try:
                async with asyncio.timeout(SILENCE_S):
                    await client.rtt(SILENCE_S)
            except (Error, TimeoutError, OSError) as e:
                self._last_error = self._last_error or f"no answer to a ping: {e or type(e).__name__}"
                return

    async def _drop(self, client: "NatsClient") -> None:
        client.abort()
        try:
            async with asyncio.timeout(CLOSE_S):
                await client.close()
        except Exception as e:  # noqa: BLE001 - it is gone either way
            log.debug("closing a broken connection to NATS: %s", e)

    async def close(self) -> None:
        """Say the last words and leave. Safe to call twice."""
        self._closed = True
        self.on_up.clear()
        self.routes.clear()
        self.on_stranger = None
        client = self._client
        if client is not None:
            try:
                async with asyncio.timeout(CLOSE_S):
                    if self._queue.messages:
                        await self._queue.empty.wait()
                    await client.rtt(SILENCE_S)
            except Exception as e:  # noqa: BLE001 - the last words are lost with the connection
                log.debug("closing the connection to NATS: %s", e)
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
            if self._started is not None and not self._started.done():
                self._started.set_exception(CannotConnect("the process is ending"))
                self._started.exception()

    # --- speaking

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message that the server takes."""
        return self._client.max_payload if self._client is not None else 1 << 20

    def publish(self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None) -> bool:
        """Send soon, in order; never waits. False: there is no connection, or one that takes no more."""
        if not self.up or self._unsent_bytes() > MAX_UNSENT_BYTES:
            return False
        self._queue.put(_Outgoing(subject, data, reply, headers))
        return True

    def _unsent_bytes(self) -> int:
        return self._queue.size + (self._client.pending_data_size if self._client is not None else 0)

    def jetstream(self) -> "JetStreamContext":
        """The server's streams. Raises CannotConnect while the link is down."""
        if self._client is None:
            raise CannotConnect("there is no connection to NATS at the moment")
        return self._client.jetstream(timeout=SILENCE_S)

    # --- listening

    def new_inbox(self) -> str:
        """A subject that nobody has used."""
        return f"{REPLIES}.{secrets.token_hex(12)}"

    async def subscribe(self, subject: str, handler: Handler) -> Interest:
        """Hear a subject, from the time this returns; also after the connection was made anew."""
        from nats.errors import Error

        interest = Interest(subject, handler)
        self._interests.add(interest)
        if self._client is not None:
            try:
                await self._subscribe(self._client, interest)
            except Error as e:
                log.debug("subscribing to %s: %s; it comes with the next connection", subject, e)
        return interest

    async def _subscribe(self, client: "NatsClient", interest: Interest) -> None:
        async def hear(message: Message) -> None:
            if interest in self._interests:
                self._handle(interest.handler, message)

        interest.client = client
        interest.subscription = await client.subscribe(interest.subject, cb=hear)

    async def unsubscribe(self, interest: Interest) -> None:
        """Hear it no more."""
        from nats.errors import Error

        self._interests.discard(interest)
        if interest.subscription is not None and self._client is not None:
            try:
                await interest.subscription.unsubscribe()
            except Error as e:
                log.debug("unsubscribing from %s: %s", interest.subject, e)

    def _route(self, message: Message) -> None:
        name = message.subject[len(self.inbox) + 1 :].partition(".")[0]
        handler = self.routes.get(name) or self.on_stranger
        if handler is not None:
            self._handle(handler, message)

    def _handle(self, handler: Handler, message: Message) -> None:
        try:
            handler(message)
        except Exception:
            log.exception("handling a message of NATS to %s failed", message.subject)
