"""Is a request over when its time is, wherever it is then?"""

import asyncio

import pytest

from dynamo.runtime import Context, DistributedRuntime
from dynamo.runtime.context import TIMEOUT_HEADER
from dynamo.runtime.errors import DeadlineExceeded
from dynamo.runtime.routes import ServerStream
from tests.runtime.plane_helpers import ENDPOINT, Held, Sink, connect, push, until


def timed(seconds: float) -> Context:
    context = Context()
    context.set_timeout(seconds)
    return context


async def test_what_is_left_of_the_time_travels_with_the_request(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    context = timed(100)
    await asyncio.sleep(0.05)
    push(client, None, context=context.detached("part"))
    [stream] = await held.wait(1)
    left = stream.context.time_left()
    assert left is not None
    assert 90 < left <= 99.95
    push(client, None)
    assert (await held.wait(2))[1].context.time_left() is None
    for each in held.streams:
        each.end()


async def test_a_worker_ends_a_request_at_its_time_and_stops_working(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    sink = push(await connect(runtime), None, context=timed(0.1))
    [stream] = await held.wait(1)
    stream.send("in time")
    assert isinstance((await sink.finished()).error, DeadlineExceeded)
    assert sink.items == ["in time"]
    assert held.stopped == ["kill"]
    assert stream.closed


async def test_a_request_that_ends_in_time_is_left_alone_afterwards(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    sink = push(await connect(runtime), None, context=timed(0.1))
    [stream] = await held.wait(1)
    stream.end()
    assert (await sink.finished()).error is None
    await asyncio.sleep(0.15)  # past its time
    assert held.stopped == []


async def test_a_caller_does_not_wait_longer_for_a_worker_that_is_silent(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerStream, "_time_is_over", lambda stream: None)
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    answers = await client.generate(None, context=timed(0.1))
    with pytest.raises(DeadlineExceeded):
        await anext(answers)
    await held.wait(1)
    await until(lambda: held.stopped == ["kill"])


async def test_a_request_without_time_is_not_sent(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    sink = push(client, None, context=timed(-1))
    assert isinstance((await sink.finished()).error, DeadlineExceeded)
    with pytest.raises(DeadlineExceeded):
        await client.generate(None, context=timed(-1))
    assert held.streams == []


async def test_a_request_whose_time_was_over_on_its_way_reaches_no_handler(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    sink = Sink()
    client.start(client.pick(), None, sink, Context(), headers={TIMEOUT_HEADER: "0"})
    assert isinstance((await sink.finished()).error, DeadlineExceeded)
    assert held.streams == []
