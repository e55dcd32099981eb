"""How is the attached server asked, and what do its failures mean here?

Every call has a deadline, and every failure is one of the runtime's errors: CannotConnect (nothing was sent),
Disconnected, ConnectionTimeout, or what a status says (`refusal`).
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import msgspec

from dynamo.runtime.errors import (
    UNDECODABLE,
    CannotConnect,
    ConnectionTimeout,
    Disconnected,
    DynamoException,
    HttpError,
    InvalidArgument,
    Unknown,
    WorkerOverloaded,
)
from dynamo.runtime.options import env_number

ANSWER_TIMEOUT_S = 10.0  # for anything but inference
CONNECT_TIMEOUT_S = 5.0  # within a data centre a connection takes milliseconds
SILENCE_S = 600.0  # DYN_ATTACH_READ_TIMEOUT_SECS: the first token of a long prompt in a long queue may take minutes
KEEP_ALIVE_S = 3.0  # below uvicorn's 5, so that no request meets a connection that the server is closing
MAX_ANSWER_BYTES = 16 << 20  # of anything but inference; vLLM's /metrics are 100 kB
MAX_ERROR_CHARS = 2000  # of a server's words in an error of ours


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    body: bytes
    content_type: str

    def json(self) -> Any:
        """The body's JSON. Raises ValueError."""
        try:
            return msgspec.json.decode(self.body)
        except UNDECODABLE as e:
            raise ValueError(f"not JSON: {e}") from None


class OpenAIServer:
    """One server. `url` has no slash at its end. Needs a running event loop; close it."""

    def __init__(self, url: str, api_key: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.url = url
        self.has_key = bool(api_key)
        self._silence_s = env_number("DYN_ATTACH_READ_TIMEOUT_SECS", SILENCE_S)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=tls or True),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            auto_decompress=False,
            skip_auto_headers=("User-Agent",),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all connections; what is in flight ends."""
        await self._session.close()

    async def get(self, path: str, timeout_s: float = ANSWER_TIMEOUT_S) -> Reply:
        """GET. Raises CannotConnect, Disconnected, ConnectionTimeout, or Unknown for an endless answer."""
        return await self._whole("GET", path, None, timeout_s)

    async def post(self, path: str, body: object, timeout_s: float = ANSWER_TIMEOUT_S) -> Reply:
        """POST a body as JSON. Raises as `get`."""
        return await self._whole("POST", path, msgspec.json.encode(body), timeout_s)

    async def _whole(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Reply:
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            async with asyncio.timeout(timeout_s), self._open(method, path, body, headers) as response:
                data = await read_all(response.content.iter_any(), f"{self.url}{path}")
                return Reply(response.status, data, response.headers.get("Content-Type", ""))
        except TimeoutError:
            raise ConnectionTimeout(f"{self.url}{path} did not answer within {timeout_s:g} s") from None

    @asynccontextmanager
    async def stream(self, path: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """POST, and read the answer as it comes. Leaving early closes the connection, which cancels the request.

        Raises CannotConnect, Disconnected, or ConnectionTimeout after `DYN_ATTACH_READ_TIMEOUT_SECS` of silence.
        """
        async with self._open("POST", path, body, headers) as response:
            yield response

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._silence_s)
        try:
            async with self._session.request(
                method, self.url + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise _as_ours(e, self.url) from e


async def read_all(pieces: AsyncIterator[bytes], where: str) -> bytes:
    """A body that has no reason to be large. Raises Unknown if it is."""
    data = bytearray()
    async for piece in pieces:
        data += piece
        if len(data) > MAX_ANSWER_BYTES:
            raise Unknown(f"{where} answers more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def _as_ours(error: Exception, url: str) -> DynamoException:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return CannotConnect(f"{url} does not accept connections within {CONNECT_TIMEOUT_S:g} s")
    if isinstance(error, TimeoutError):  # aiohttp's are too
        return ConnectionTimeout(f"{url} sent nothing for too long (DYN_ATTACH_READ_TIMEOUT_SECS)")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return CannotConnect(f"{url}: {error.certificate_error} (--tls-ca, --no-tls-verify)")
    if isinstance(error, aiohttp.ClientConnectorError):
        return CannotConnect(f"cannot connect to {url}: {error.os_error.strerror or error}")
    if isinstance(error, aiohttp.InvalidURL):
        return InvalidArgument(f"URL: {url} is no address")
    return Disconnected(f"the connection to {url} broke: {str(error) or type(error).__name__}")


class ErrorWords(NamedTuple):
    """What a server's error body says: OpenAI's object, or FastAPI's `detail`, or anything else."""

    message: str
    param: str | None


def error_words(body: bytes) -> ErrorWords:
    """The words of an error body, shortened."""
    text = body.decode(errors="replace").strip()
    try:
        found = msgspec.json.decode(body)
    except UNDECODABLE:
        found = None
    if isinstance(found, dict):
        error = found.get("error")
        inner = error if isinstance(error, dict) else found
        said = inner.get("message") or inner.get("detail") or error
        param = inner.get("param")
        return ErrorWords(_short(said if isinstance(said, str) else text), param if isinstance(param, str) else None)
    return ErrorWords(_short(text), None)


def _short(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]}…"


def refusal(status: int, body: bytes) -> DynamoException:
    """A status other than 200, as the error it means to whoever sent the request."""
    message, param = error_words(body)
    if status in (400, 422):
        return InvalidArgument(message or f"the server answered {status}", param)
    if status in (429, 503):
        return WorkerOverloaded(message or f"the server answered {status}")
    return HttpError(status if 400 <= status <= 599 else 502, message or f"the server answered {status}")
