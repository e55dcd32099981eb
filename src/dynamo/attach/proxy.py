"""How are OpenAI's bytes passed to the server and back?

The worker of `ModelInput.Text` in its byte form (`dynamo.llm.protocols.passthrough`): body, status and answer are the
client's and the server's own. Only a model name that differs is replaced in the request.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from dynamo.attach.server import OpenAIServer
from dynamo.engine.admission import Admission
from dynamo.llm.protocols.passthrough import Headers, OpenAIHead, OpenAIRequest
from dynamo.runtime.errors import (
    UNDECODABLE,
    CannotConnect,
    ConnectionTimeout,
    Disconnected,
    DynamoException,
    EngineShutdown,
    InvalidArgument,
)
from dynamo.runtime.routes import ServerStream
from dynamo.runtime.streams import ResponseStream

log = logging.getLogger(__name__)

PATHS = ("/v1/chat/completions", "/v1/completions")
_OF_THE_CONNECTION = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "content-length", "content-type", "upgrade", "date", "server")
)

_decode = msgspec.msgpack.Decoder(OpenAIRequest).decode


class Proxy:
    """The push handler of a passed-through server. Owns the requests in flight.

    Args:
        names: our name of a model to the server's, where they differ.
        suspect: hears why a request could not be served.
    """

    def __init__(
        self, server: OpenAIServer, admission: Admission, names: dict[str, str], suspect: Callable[[str], None]
    ) -> None:
        self._server = server
        self._admission = admission
        self._names = names
        self._suspect = suspect
        self._requests: set[_Request] = set()
        self._closed: str | None = None

    @property
    def num_queued(self) -> int:
        """Requests waiting for the server."""
        return self._admission.num_queued

    def handle(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        """Take one request. Whatever is wrong with it ends its stream with a typed error."""
        if self._closed is not None:
            stream.fail(EngineShutdown(self._closed))
            return
        try:
            asked = _decode(payload)
        except UNDECODABLE as e:
            stream.fail(InvalidArgument(f"not a request of OpenAI's in bytes: {e}"))
            return
        if asked.path not in PATHS:
            stream.fail(InvalidArgument(f"path: {asked.path!r} is not one of {', '.join(PATHS)}", "path"))
            return
        request = _Request(self, asked, stream)
        self._requests.add(request)
        try:
            self._admission.enter(request)
        except DynamoException as e:
            self._requests.discard(request)
            stream.fail(e)
        else:
            stream.context.on_stop(lambda: self.end(request))

    def end(self, request: "_Request", error: BaseException | None = None) -> None:
        """Nobody waits for this one any more, or it failed, or it is over: close its connection."""
        if request not in self._requests:
            return
        self._requests.discard(request)
        if error is not None:
            request.stream.fail(error)
        request.stream.end()
        if request.task is not None:
            request.task.cancel()
        self._admission.leave(request)

    def close(self, reason: str) -> None:
        """Fail everything in flight, and all that comes later, with EngineShutdown."""
        self._closed = reason
        for request in tuple(self._requests):
            self.end(request, EngineShutdown(reason))

    async def run(self, request: "_Request") -> None:
        """Pass one request on and its answer back."""
        error: Exception | None = None
        try:
            await self._pass(request.asked, request.stream)
        except (CannotConnect, Disconnected, ConnectionTimeout) as e:
            self._suspect(e.message)
            error = e
        except DynamoException as e:
            error = e
        except Exception as e:
            log.exception("passing request %s on failed", request.stream.context.id())
            error = e
        request.task = None  # it is over: nothing to cancel
        self.end(request, error)

    async def _pass(self, asked: OpenAIRequest, stream: ResponseStream) -> None:
        headers = {name: value for name, value in asked.headers if not self._replaces(name)}
        headers |= {"X-Request-Id": stream.context.id(), "Accept-Encoding": "identity"}
        body = renamed(asked.body, self._names) if self._names else asked.body
        async with self._server.stream(asked.path, body, headers) as response:
            kept: Headers = [
                (str(name), value)
                for name, value in response.headers.items()
                if name.lower() not in _OF_THE_CONNECTION and name.lower() != "x-request-id"
            ]
            stream.send(OpenAIHead(response.status, response.headers.get("Content-Type", ""), kept))
            async for piece in response.content.iter_any():
                stream.send(piece)
                if isinstance(stream, ServerStream) and stream.congested:
                    await stream.clear()

    def _replaces(self, name: str) -> bool:
        """Whether a header of the client gives way to ours: the server's own key, if there is one."""
        return self._server.has_key and name.lower() == "authorization"


class _Request:
    """One request: the `Applicant` at the door, and its task once it is inside."""

    def __init__(self, proxy: Proxy, asked: OpenAIRequest, stream: ResponseStream) -> None:
        self._proxy = proxy
        self.asked = asked
        self.stream = stream
        self.inside = False
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go to work."""
        self.task = asyncio.get_running_loop().create_task(self._proxy.run(self))


def renamed(body: bytes, names: dict[str, str]) -> bytes:
    """The body with the server's name of the model. All other values keep their bytes.

    Raises:
        InvalidArgument: the body is not a JSON object with a model.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        name = msgspec.json.decode(fields["model"], type=str)
    except (*UNDECODABLE, KeyError) as e:
        raise InvalidArgument(f"the body is not a JSON object with a model: {e}", "model") from None
    if name not in names:
        return body
    fields["model"] = msgspec.Raw(msgspec.json.encode(names[name]))
    return msgspec.json.encode(fields)
