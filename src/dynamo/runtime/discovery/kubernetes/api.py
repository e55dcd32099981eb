"""How does a request reach the API server?

Plain HTTP and JSON: no client library that would be large to install and could clash with an engine's.
"""

import asyncio
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec

from dynamo.runtime.discovery.kubernetes.errors import (
    KubernetesRefused,
    KubernetesUnavailable,
    TokenRejected,
    explain,
)
from dynamo.runtime.discovery.kubernetes.settings import KubernetesSettings, tls_context
from dynamo.runtime.discovery.streaming import keep_alive, lines

log = logging.getLogger(__name__)

APPLY = "application/apply-patch+yaml"  # JSON is YAML
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0
_SPREAD = (0.5, 1.5)  # not all processes of a fleet at one moment

T = TypeVar("T")


class ApiServer:
    """One process's way to the API server. Make and use it on one event loop; nothing is opened before a request."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self.settings = settings
        self.down = False
        """Whether it did not answer when last asked."""
        self._down_since = 0.0
        self._session: aiohttp.ClientSession | None = None
        secure = settings.server.startswith("https")
        self._tls = tls_context(settings.credentials) if secure else None
        self._ca_stamp = self._stamp()
        self._token = (0, "")
        self._answered = False
        self._hurried = asyncio.Event()
        self._closed = False

    # --- for its users

    async def call(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        params: Mapping[str, str] = {},
        body: dict[str, Any] | None = None,
        within_s: float = 0.0,
    ) -> T:
        """One request and its answer; again while the server is away, until `within_s` are over.

        The first request of all waits for `startup_s`. Raises KubernetesUnavailable, KubernetesRefused, HistoryGone.
        """
        within_s = within_s if self._answered else self.settings.startup_s
        deadline = time.monotonic() + within_s
        pauses = Pauses()
        while True:
            try:
                return await self._once(method, path, kind, params, body)
            except KubernetesUnavailable as e:
                pause_s = pauses.next(e.retry_after_s)
                if self._hurried.is_set() or time.monotonic() + pause_s > deadline:
                    raise self._given_up(e) from e
                if not self._answered and pauses.count == 1:
                    log.warning("%s; trying again for %.0f s", e, self.settings.startup_s)
                await self._wait(pause_s)

    @asynccontextmanager
    async def watch(self, path: str, params: Mapping[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of a watch. They end where the server ends them. Raises as `call`; also while they are read."""
        lasting_s = self.settings.watch_s * random.uniform(0.75, 1.0)
        query = {**params, "watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(max(1, int(lasting_s)))}
        try:
            async with asyncio.timeout(self.settings.attempt_s):
                response = await self._open("GET", path, query, None, None)
        except (OSError, TimeoutError, aiohttp.ClientError) as e:
            raise self._away(e) from e
        try:
            keep_alive(response)
            async with asyncio.timeout(lasting_s + self.settings.attempt_s):
                yield lines(response)
        except (OSError, TimeoutError, aiohttp.ClientError) as e:
            raise KubernetesUnavailable(f"a watch broke: {self._reason(e)}") from e
        finally:
            response.close()

    def hurry(self) -> None:
        """Wait for an absent server no longer."""
        self._hurried.set()

    async def close(self) -> None:
        """End everything that is open. Requests from now on raise KubernetesUnavailable."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    # --- one request

    async def _once(
        self, method: str, path: str, kind: type[T], params: Mapping[str, str], body: dict[str, Any] | None
    ) -> T:
        try:
            response = await self._open(method, path, params, body, self.settings.attempt_s)
            async with response:
                return msgspec.json.decode(await response.read(), type=kind)
        except (OSError, TimeoutError, aiohttp.ClientError) as e:
            raise self._away(e) from e
        except msgspec.DecodeError as e:
            raise KubernetesRefused(f"{self.settings.server} answers what is no API server's answer: {e}") from e

    async def _open(
        self, method: str, path: str, params: Mapping[str, str], body: dict[str, Any] | None, total_s: float | None
    ) -> aiohttp.ClientResponse:
        """The response, of status 2xx."""
        for once_more in (True, False):
            token = self._read_token()
            try:
                response = await self._send(method, path, params, body, total_s, token)
            except TokenRejected as e:
                self._came_back()
                if not once_more or self._read_token(again=True) == token:
                    raise KubernetesRefused(
                        f"Kubernetes does not know us ({e}): the token is old or of another cluster; {self._who()}"
                    ) from e
            except (KubernetesRefused, KubernetesUnavailable):
                raise
            else:
                self._came_back()
                return response
        raise AssertionError  # the loop returns or raises

    async def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        body: dict[str, Any] | None,
        total_s: float | None,
        token: str,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        if body is not None:
            headers["Content-Type"] = APPLY if method == "PATCH" else "application/json"
        response = await self._opened_session().request(
            method,
            self.settings.server + path,
            params=params,
            data=None if body is None else msgspec.json.encode(body),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=total_s),
            ssl=self._tls if self._tls is not None else True,
        )
        if 200 <= response.status < 300:
            return response
        async with response:
            asked = response.headers.get("Retry-After", "")
            error = explain(path, response.status, await response.read(), float(asked) if asked.isdecimal() else 0.0)
        if isinstance(error, KubernetesUnavailable):
            self._gone(str(error))
        elif not isinstance(error, TokenRejected):
            self._came_back()
        raise error

    def _opened_session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise KubernetesUnavailable("discovery is closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self._session

    def _read_token(self, again: bool = False) -> str:
        """The token as it is now: the kubelet replaces the file long before the token in it ends."""
        file = self.settings.credentials.token_file
        if file is None:
            return self.settings.credentials.token
        try:
            stamp = file.stat().st_mtime_ns
            if again or stamp != self._token[0]:
                self._token = (stamp, file.read_text().strip())
        except OSError as e:
            raise KubernetesRefused(f"the service account's token {file} cannot be read: {e.strerror}") from e
        return self._token[1]

    def _stamp(self) -> int:
        file = self.settings.credentials.ca_file
        return file.stat().st_mtime_ns if file is not None and file.exists() else 0

    # --- whether it is there

    def _came_back(self) -> None:
        self._answered = True
        if self.down:
            log.warning("Kubernetes answers again, after %.1f s", time.monotonic() - self._down_since)
            self.down = False

    def _gone(self, said: str) -> None:
        if self._answered and not self.down:
            log.warning("Kubernetes does not answer (%s); going on with what is known, and trying again", said)
            self._down_since = time.monotonic()
            self.down = True

    def _away(self, error: Exception) -> Exception:
        """What a failure of the transport means."""
        said = self._reason(error)
        if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
            if self._tls is not None and self._stamp() != self._ca_stamp:
                self._ca_stamp = self._stamp()
                self._tls = tls_context(self.settings.credentials)
            elif not self._answered:
                return KubernetesRefused(f"{self.settings.server}: {said}; {self._who()}")
        self._gone(said)
        return KubernetesUnavailable(f"Kubernetes does not answer ({self.settings.server}: {said})")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return "no answer in time"
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            return str(error.certificate_error)
        if isinstance(error, aiohttp.ClientConnectorError) and (error.os_error.errno or 0) > 0:
            return os.strerror(error.os_error.errno or 0)
        return str(error) or type(error).__name__

    def _given_up(self, error: KubernetesUnavailable) -> KubernetesUnavailable:
        if self._answered or self._hurried.is_set():
            return error
        waited = f"for {self.settings.startup_s:g} s (DYN_KUBE_CONNECT_TIMEOUT_SECONDS)"
        return KubernetesUnavailable(f"{error}, {waited}. Start it, or set KUBECONFIG")

    def _who(self) -> str:
        file = self.settings.credentials.token_file
        return f"the token is {file}" if file is not None else "look at KUBECONFIG"

    async def _wait(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._hurried.wait()
        except TimeoutError:
            pass


class Pauses:
    """How long to wait before each new try: longer and longer, and at least what the server asks for."""

    def __init__(self) -> None:
        self.count = 0

    def next(self, asked_s: float = 0.0) -> float:
        """The next pause, in seconds."""
        pause_s = min(RETRY_FIRST_S * 2.0**self.count, RETRY_MAX_S) * random.uniform(*_SPREAD)
        self.count += 1
        return max(pause_s, asked_s)

    def reset(self) -> None:
        """It worked."""
        self.count = 0
