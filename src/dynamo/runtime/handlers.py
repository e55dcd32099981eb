"""How does a handler that a user wrote become one that pushes?

A user's handler takes `(request, context)` or `(request)` and is an async generator, or returns an async
iterator, or is a coroutine with one answer. Requests arrive decoded; answers are encoded as they are yielded.
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from dynamo.runtime import wire
from dynamo.runtime.annotated import Annotated
from dynamo.runtime.context import CancelLevel, Context
from dynamo.runtime.errors import Cancelled, DynamoException
from dynamo.runtime.routes import ServerStream
from dynamo.runtime.streams import PushHandler, ResponseStream

log = logging.getLogger(__name__)

UserHandler = Callable[..., Any]

_ITEMS_BETWEEN_YIELDS = 32  # a handler that never waits still lets the loop turn this often
_REQUESTS_HIGH, _REQUESTS_LOW = 256, 64  # items of a bidirectional request that wait unread before its caller pauses


def caller_of(handler: UserHandler) -> Callable[[Any, Context], Any]:
    """How to call a handler: `(request, context)`, `(request, *, context)` or `(request)`, by its signature."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):
        return lambda request, _context: handler(request)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return handler
    if any(p.kind is p.KEYWORD_ONLY and p.name == "context" for p in parameters):
        return lambda request, context: handler(request, context=context)
    return lambda request, _context: handler(request)


def push_handler(handler: UserHandler) -> PushHandler:
    """A user's handler for one request, as one that pushes."""
    call = caller_of(handler)

    def handle(payload: msgspec.Raw, stream: ResponseStream) -> None:
        _drive(call(wire.decode(payload), stream.context), stream)

    return handle


def bidirectional_handler(handler: UserHandler) -> PushHandler:
    """A user's handler of a stream of requests, as one that pushes."""
    call = caller_of(handler)

    def handle(payload: msgspec.Raw, stream: ResponseStream) -> None:
        requests = PyAsyncRequestStream(stream)
        first = wire.decode(payload)
        if first is not None:
            requests.feed(payload)
            requests.feed(None)
        _drive(call(requests, stream.context), stream)

    return handle


class PyAsyncRequestStream(AsyncIterator[Any]):
    """The requests of a bidirectional stream. Its end is not a cancel: the answer goes on."""

    def __init__(self, stream: ResponseStream) -> None:
        assert isinstance(stream, ServerStream)
        self._stream = stream
        self._items: deque[msgspec.Raw] = deque()
        self._ended = False
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        stream.on_data = self.feed
        stream.context.watch(self._on_cancel)

    def feed(self, item: msgspec.Raw | None) -> None:
        """One more item, or None for the end."""
        if item is None:
            self._ended = True
        else:
            self._items.append(item)
            if len(self._items) >= _REQUESTS_HIGH and not self._paused:
                self._paused = True
                self._stream.request_flow(False)
        self._wake()

    def _on_cancel(self, level: CancelLevel) -> None:
        if level == "kill":
            self._ended = True
            self._items.clear()
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> Any:
        while not self._items:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter  # ends with the caller: a broken connection kills the context
        if self._paused and len(self._items) <= _REQUESTS_LOW:
            self._paused = False
            self._stream.request_flow(True)
        return wire.decode(self._items.popleft())


def _drive(answer: Any, stream: ResponseStream) -> None:
    assert isinstance(stream, ServerStream)
    task = asyncio.get_running_loop().create_task(_answer(answer, stream))

    def on_cancel(level: CancelLevel) -> None:
        if level == "kill":
            task.cancel()

    stream.context.watch(on_cancel)


async def _answer(answer: Any, stream: ServerStream) -> None:
    try:
        if inspect.isawaitable(answer):
            answer = await answer
        if hasattr(answer, "__aiter__"):
            await _pour(answer, stream)
        else:
            _send(answer, stream)
        stream.end()
    except asyncio.CancelledError:
        stream.fail(Cancelled("the handler was cancelled"))
    except DynamoException as e:
        stream.fail(e)
    except Exception as e:
        log.exception("the handler of %s failed on request %s", stream.route.path, stream.context.id())
        stream.fail(e)


async def _pour(answers: AsyncIterator[Any], stream: ServerStream) -> None:
    count = 0
    try:
        async for item in answers:
            if stream.closed:
                return
            _send(item, stream)
            count += 1
            if count % _ITEMS_BETWEEN_YIELDS == 0:
                await asyncio.sleep(0)
            if stream.congested:
                await stream.clear()
    finally:
        close = getattr(answers, "aclose", None)
        if close is not None:
            await close()


def _send(item: Any, stream: ServerStream) -> None:
    stream.send_now(item.to_wire() if isinstance(item, Annotated) else item)
