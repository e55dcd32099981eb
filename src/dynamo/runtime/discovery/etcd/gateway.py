"""How does a call reach an etcd that answers?

etcd's v3 API in its JSON form, which every etcd from 3.4 on serves beside gRPC on the same port: no protobuf, no gRPC
library, nothing that could clash with an engine's. One endpoint is used at a time, the next as soon as that fails.
When none answers, one task asks on until one does, and everything else waits for it.
"""

import asyncio
import itertools
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec

from dynamo.runtime.discovery.etcd.errors import (
    AuthenticationOff,
    EtcdRefused,
    EtcdUnavailable,
    NotHere,
    TokenRejected,
    explain,
)
from dynamo.runtime.discovery.etcd.messages import AUTHENTICATE, RANGE, WATCH, Done, Header, Token, decode
from dynamo.runtime.discovery.etcd.settings import Certificates, EtcdSettings
from dynamo.runtime.discovery.streaming import keep_alive, lines
from dynamo.runtime.errors import UNDECODABLE

log = logging.getLogger(__name__)

STARTUP_PAUSES_S = (1, 2, 4, 8, 16)  # then 30, the backoff users know (facts row R12)
PROBE_FIRST_S, PROBE_MAX_S = 0.1, 1.0  # leases are short: whoever is back soon loses nothing

T = TypeVar("T")


class EtcdGateway:
    """One process's way to etcd. Make and use it on one event loop; nothing is opened before the first call."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self.outages = 0
        """How often etcd was away for so long that leases may have ended for no other reason."""
        secure = any(endpoint.startswith("https") for endpoint in settings.endpoints)
        self._certificates = Certificates(settings) if secure else None
        self._endpoint = random.choice(settings.endpoints)  # a fleet's watches are spread over the members
        self._session: aiohttp.ClientSession | None = None
        self._starting: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._streams: dict[str, set[aiohttp.ClientResponse]] = {}
        self._token: str | None = None
        self._authenticating = asyncio.Lock()
        self._hurried = asyncio.Event()
        self._up = asyncio.Event()
        self._up.set()
        self._answered_at: float | None = None
        self._absence_counts_from = 0.0
        self._closed = False

    # --- for its users

    async def call(self, path: str, body: Mapping[str, Any], kind: type[T], within_s: float = 0.0) -> T:
        """One question and its answer. Every endpoint is tried once, and again until `within_s` are over.

        Raises EtcdUnavailable, EtcdRefused, and what `explain` says of leases.
        """
        await self._started()
        deadline = time.monotonic() + (0.0 if self._hurried.is_set() else within_s)
        while True:
            try:
                return await self._round(lambda endpoint: self._post(endpoint, path, body, kind))
            except EtcdUnavailable:
                if not await self.answering(deadline - time.monotonic()):
                    raise

    async def ping(self) -> Header:
        """A read that needs a majority: its header is the truth of now. Raises as `call`."""
        return (await self.call(RANGE, {"key": b"v1/", "count_only": True}, Done)).header

    @asynccontextmanager
    async def watch(self, create_request: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of a watch, the first within one attempt's time; they end by EtcdUnavailable. Raises as `call`.

        It also ends when a call finds the endpoint not answering: a connection to a stopped machine stays silent.
        """
        await self._started()
        endpoint = self._endpoint
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(self.settings.attempt_s):
                # A member that has lost its majority would be silent for ever; asked so, it ends the watch.
                headers = {"Grpc-Metadata-hasleader": "true"}
                response = await self._open(endpoint, WATCH, {"create_request": create_request}, None, headers)
            keep_alive(response)
            self._streams.setdefault(endpoint, set()).add(response)
            yield lines(response)
            raise NotHere("the watch ended")
        except (NotHere, OSError, TimeoutError, aiohttp.ClientError) as e:
            self._leave(endpoint)
            raise EtcdUnavailable(f"{endpoint}: {self._reason(endpoint, e)}") from e
        finally:
            if response is not None:
                self._streams.get(endpoint, set()).discard(response)
                response.close()

    @property
    def down(self) -> bool:
        """Whether no endpoint answered when last asked."""
        return not self._up.is_set()

    async def answering(self, within_s: float) -> bool:
        """Whether etcd answers, within a time."""
        if within_s > 0:
            try:
                async with asyncio.timeout(within_s):
                    await self._up.wait()
            except TimeoutError:
                pass
            return self._up.is_set()
        return False

    def absence_counts(self) -> bool:
        """Whether a key that is gone means that its owner is.

        Not while etcd is away, nor until the owners had one lease's time to come back: their leases may have ended
        because they could not be renewed.
        """
        now = time.monotonic()
        if self._answered_at is None:
            return True  # nothing was known before the first answer
        return now >= self._absence_counts_from and now - self._answered_at <= self.settings.ttl_s / 2

    def distrust_absence(self) -> None:
        """From now on absence means nothing for one lease's time."""
        self._absence_counts_from = time.monotonic() + self.settings.ttl_s
        self.outages += 1

    def hurry(self) -> None:
        """Wait for no first answer, nor for another, any longer."""
        self._hurried.set()

    async def close(self) -> None:
        """End everything that is open. Calls from now on raise EtcdUnavailable."""
        self._closed = True
        tasks = [task for task in (self._starting, self._probing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    # --- the first answer

    async def _started(self) -> None:
        if self._closed:
            raise EtcdUnavailable("discovery is closed")
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.get_running_loop().create_task(self._start(), name="etcd start")
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        """Wait for a first answer, within ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS. Raises EtcdUnavailable, EtcdRefused."""
        started = time.monotonic()
        if self._session is None:
            # As long as beats come the connection stays: no name must be looked up while DNS is overloaded.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=max(15.0, float(self.settings.ttl_s)))
            self._session = aiohttp.ClientSession(connector=connector)
        for pause_s in itertools.chain(STARTUP_PAUSES_S, itertools.repeat(30)):
            try:
                await self._round(self._probe)
            except EtcdUnavailable as e:
                left_s = self.settings.startup_s - (time.monotonic() - started)
                if e.hopeless:
                    raise EtcdUnavailable(f"{e}. Mend that, or set ETCD_ENDPOINTS", hopeless=True) from e
                if left_s <= 0:
                    raise EtcdUnavailable(
                        f"{e}, for {self.settings.startup_s:g} s (ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS). "
                        "Start it, or set ETCD_ENDPOINTS"
                    ) from e
                log.warning("%s; trying again for %.1f s", e, left_s)
                if await self._told_to_end(min(pause_s, left_s)):
                    raise EtcdUnavailable(f"{e}; the process was told to end before it did") from e
            else:
                return

    async def _told_to_end(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                await self._hurried.wait()
        except TimeoutError:
            pass
        return self._hurried.is_set()

    async def _probe(self, endpoint: str) -> Done:
        return await self._post(endpoint, RANGE, {"key": b"v1/", "count_only": True}, Done)

    # --- one endpoint after the other

    async def _round(self, attempt: Callable[[str], Awaitable[T]]) -> T:
        """Try every endpoint once, the current one first."""
        failures: dict[str, NotHere] = {}
        for _ in self.settings.endpoints:
            endpoint = self._endpoint
            try:
                answer = await attempt(endpoint)
            except NotHere as e:
                failures[endpoint] = e
                self._leave(endpoint)
            except EtcdRefused:
                self._answered()
                raise
            else:
                self._answered()
                return answer
        said = "; ".join(f"{endpoint}: {e}" for endpoint, e in failures.items())
        self._nobody_answered(said)
        hopeless = all(e.hopeless for e in failures.values())
        raise EtcdUnavailable(f"etcd does not answer ({said})", hopeless)

    def _leave(self, endpoint: str) -> None:
        """Use the next endpoint, and end the watches at this one: they may be as silent as their connections."""
        if self._endpoint == endpoint:
            at = self.settings.endpoints.index(endpoint)
            self._endpoint = self.settings.endpoints[(at + 1) % len(self.settings.endpoints)]
        for response in self._streams.pop(endpoint, set()):
            response.close()

    def _answered(self) -> None:
        now = time.monotonic()
        away_s = 0.0 if self._answered_at is None else now - self._answered_at
        self._answered_at = now
        if away_s > self.settings.ttl_s / 2:
            self.distrust_absence()
        if self.down:
            log.warning("etcd answers again, after %.1f s", away_s)
            self._up.set()

    def _nobody_answered(self, said: str) -> None:
        if self._starting is None or not self._starting.done():
            return  # starting has a backoff of its own
        if not self.down:
            log.warning("etcd does not answer (%s); going on with what is known, and trying again", said)
            self._up.clear()
        if self._probing is None or self._probing.done():
            self._probing = asyncio.get_running_loop().create_task(self._probe_on(), name="etcd probe")

    async def _probe_on(self) -> None:
        """Ask until somebody answers."""
        pause_s = PROBE_FIRST_S
        while self.down:
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # not all processes of a fleet at one moment
            pause_s = min(pause_s * 2, PROBE_MAX_S)
            try:
                if self._certificates is not None:
                    self._certificates.refresh()
                await self._round(self._probe)
            except (EtcdUnavailable, EtcdRefused, ValueError) as e:
                log.debug("still no etcd: %s", e)

    # --- one request

    async def _post(self, endpoint: str, path: str, body: Mapping[str, Any], kind: type[T]) -> T:
        try:
            response = await self._open(endpoint, path, body, self.settings.attempt_s)
            async with response:
                return decode(await response.read(), kind)
        except (OSError, TimeoutError, aiohttp.ClientError) as e:
            raise NotHere(self._reason(endpoint, e), _is_hopeless(e)) from e
        except UNDECODABLE as e:
            raise NotHere(f"it answers what is no etcd's answer: {e}", hopeless=True) from e

    async def _open(
        self, endpoint: str, path: str, body: Mapping[str, Any], total_s: float | None, headers: Mapping[str, str] = {}
    ) -> aiohttp.ClientResponse:
        """The response, of status 200, as a user if there is one. Raises NotHere, EtcdRefused, and aiohttp's."""
        for once_more in (True, False):
            token = await self._authenticated(endpoint)
            try:
                return await self._send(
                    endpoint, path, body, total_s, {**headers, **({"Authorization": token} if token else {})}
                )
            except TokenRejected as e:
                if not self.settings.username:
                    raise EtcdRefused(f"etcd refused: {e}") from e
                if self._token == token:
                    self._token = None
                if not once_more:
                    raise NotHere(f"it does not take the token that it gave: {e}") from e
        raise AssertionError  # the loop returns or raises

    async def _send(
        self, endpoint: str, path: str, body: Mapping[str, Any], total_s: float | None, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        assert self._session is not None
        response = await self._session.post(
            endpoint + path,
            data=msgspec.json.encode(body),
            headers={"Content-Type": "application/json", **headers},
            timeout=aiohttp.ClientTimeout(total=total_s),
            ssl=self._certificates.context if self._certificates is not None else True,
        )
        if response.status == 200:
            return response
        async with response:
            raise explain(response.status, await response.read())

    async def _authenticated(self, endpoint: str) -> str:
        """The token to send; an empty one if there are no users."""
        if not self.settings.username:
            return ""
        async with self._authenticating:
            if self._token is None:
                who = {"name": self.settings.username, "password": self.settings.password}
                try:
                    response = await self._send(endpoint, AUTHENTICATE, who, self.settings.attempt_s, {})
                    async with response:
                        self._token = decode(await response.read(), Token).token
                except AuthenticationOff:
                    log.warning("etcd has no users: ETCD_AUTH_USERNAME is not used")
                    self._token = ""
            return self._token

    def _reason(self, endpoint: str, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return "no answer in time"
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return f"{error.certificate_error} (ETCD_AUTH_CA)"
        if isinstance(error, aiohttp.ClientConnectorError):
            number = error.os_error.errno  # none if a name has several addresses, each with its own
            said = str(error.os_error)
            if number and number > 0 and not isinstance(error.os_error, ssl.SSLError):
                said = os.strerror(number)
        else:
            said = str(error) or type(error).__name__
        if isinstance(error, aiohttp.ServerDisconnectedError) or _is_hopeless(error):
            said += self._hint(endpoint)
        return said

    def _hint(self, endpoint: str) -> str:
        """Of a connection that was dropped. Whether a TLS alert is heard before that is a matter of luck."""
        if endpoint.startswith("http:"):
            return "; if it wants TLS, write https://"
        return "" if self.settings.client_cert else "; if it wants a client certificate, set ETCD_AUTH_CLIENT_CERT"


def _is_hopeless(error: Exception) -> bool:
    """A server that cannot be trusted, or does not trust us, is no better a minute later."""
    return isinstance(error, aiohttp.ClientSSLError | ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError)
