"""A caller that no longer wants its answer: the wish reaches the worker, and both ends forget the request."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dynamo.runtime import Context, DistributedRuntime
from dynamo.runtime.errors import Cancelled
from tests.runtime.plane_helpers import ENDPOINT, SOON_S, Held, caller, connect, push, until


class Endless:
    """A handler that yields for ever, and remembers how it ended."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.ended = asyncio.Event()
        self.how = ""

    async def __call__(self, request: Any, context: Context) -> AsyncIterator[int]:
        self.contexts.append(context)
        try:
            i = 0
            while not context.is_stopped():
                yield i
                i += 1
                await asyncio.sleep(0.001)
            self.how = "polled"
        except asyncio.CancelledError:
            self.how = "cancelled"
            raise
        finally:
            self.ended.set()

    async def wait(self) -> str:
        async with asyncio.timeout(SOON_S):
            await self.ended.wait()
        return self.how


async def start(runtime: DistributedRuntime) -> Endless:
    handler = Endless()
    await runtime.endpoint(ENDPOINT).start_endpoint(handler.__call__)
    return handler


async def test_stop_lets_the_handler_finish_in_order(runtime: DistributedRuntime) -> None:
    handler = await start(runtime)
    client = await connect(runtime)
    context = Context()
    items = []
    async for item in await client.generate(None, annotated=False, context=context):
        items.append(item)
        if item == 3:
            context.stop_generating()
    assert items[:4] == [0, 1, 2, 3]
    assert await handler.wait() == "polled"
    assert not handler.contexts[0].is_killed()


async def test_kill_closes_the_handler_and_ends_the_iterator(runtime: DistributedRuntime) -> None:
    handler = await start(runtime)
    client = await connect(runtime)
    context = Context()
    stream = await client.generate(None, context=context)
    await anext(stream)
    context.kill()
    with pytest.raises(Cancelled):
        await anext(stream)
    assert await handler.wait() == "cancelled"
    assert handler.contexts[0].is_killed()
    assert client.inflight(runtime.instance_id) == 0


async def test_stop_and_kill_reach_a_push_handlers_callbacks(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    context = Context()
    sink = push(client, None, context=context)
    [stream] = await held.wait()
    stops: list[int] = []
    stream.context.on_stop(lambda: stops.append(1))
    context.stop_generating()
    await until(lambda: held.stopped == ["stop"])
    assert not stream.closed
    context.kill()
    await until(lambda: held.stopped == ["stop", "kill"])
    assert stream.closed
    assert stops == [1]
    stream.send("ignored")
    stream.end()
    assert not sink.done.is_set(), "after its caller killed it, the sink hears nothing"


async def test_leaving_the_loop_early_cancels(runtime: DistributedRuntime) -> None:
    handler = await start(runtime)
    client = await connect(runtime)
    stream = await client.generate(None)
    async for _ in stream:
        break
    await stream.aclose()
    assert await handler.wait() == "cancelled"


async def test_dropping_the_iterator_cancels(runtime: DistributedRuntime) -> None:
    handler = await start(runtime)
    client = await connect(runtime)
    stream = await client.generate(None)
    await anext(stream)
    del stream
    gc.collect()
    assert await handler.wait() == "cancelled"


async def test_cancelling_the_callers_task_cancels(runtime: DistributedRuntime) -> None:
    handler = await start(runtime)
    client = await connect(runtime)

    async def consume() -> None:
        async for _ in await client.generate(None):
            pass

    task = asyncio.create_task(consume())
    await until(lambda: len(handler.contexts) == 1)
    task.cancel()
    await asyncio.wait([task])
    del task  # which remembers where it was cancelled, and so holds the iterator
    gc.collect()
    assert await handler.wait() == "cancelled"


async def test_a_caller_that_goes_away_frees_its_requests(runtime: DistributedRuntime) -> None:
    handler = await start(runtime)
    async with caller() as other:
        client = await connect(other)
        stream = await client.generate(None)
        await anext(stream)
    assert await handler.wait() == "cancelled"
    assert not runtime.server.connections
    assert not runtime.served[0].route.streams


async def test_cancellation_passes_on_through_a_worker_that_calls_another(runtime: DistributedRuntime) -> None:
    last = Endless()
    await runtime.endpoint("test.last.generate").start_endpoint(last.__call__)
    inner = await connect(runtime, "test.last.generate")

    async def relay(request: Any, context: Context) -> AsyncIterator[int]:
        async for item in await inner.generate(request, annotated=False, context=context):
            yield item

    await runtime.endpoint(ENDPOINT).start_endpoint(relay)
    client = await connect(runtime)
    context = Context("same-everywhere")
    stream = await client.generate(None, context=context)
    await anext(stream)
    context.kill()
    await last.wait()
    assert last.contexts[0].id() == "same-everywhere"


async def test_a_context_that_is_already_stopped_sends_nothing(runtime: DistributedRuntime) -> None:
    handler = await start(runtime)
    client = await connect(runtime)
    context = Context()
    context.stop_generating()
    with pytest.raises(Cancelled, match="before it was sent"):
        await client.generate(None, context=context)
    sink = await push(client, None, context=context).finished()
    assert isinstance(sink.error, Cancelled)
    assert handler.contexts == []


async def test_nothing_is_kept_of_a_finished_request(runtime: DistributedRuntime) -> None:
    async def one(request: None) -> AsyncIterator[int]:
        yield 1

    await runtime.endpoint(ENDPOINT).start_endpoint(one)
    client = await connect(runtime)
    context = Context()
    for _ in range(3):
        assert [x async for x in await client.generate(None, annotated=False, context=context)] == [1]
    assert context._watchers == []
    [connection] = runtime.server.connections
    assert connection.streams == {}


async def test_a_handler_waits_for_a_caller_that_does_not_read(runtime: DistributedRuntime) -> None:
    made = []

    async def produce(request: None) -> AsyncIterator[bytes]:
        for i in range(200):
            made.append(i)
            yield bytes(1 << 20)

    await runtime.endpoint(ENDPOINT).start_endpoint(produce)
    async with caller() as other:
        client = await connect(other)
        stream = await client.generate(None, annotated=False)
        await anext(stream)
        before = -1
        while before != len(made):
            before = len(made)
            await asyncio.sleep(0.2)
        assert len(made) < 100, "about 1 MiB waits unread, plus what the sockets' buffers hold"
        assert len([item async for item in stream]) == 199
