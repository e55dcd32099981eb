"""Leaving in order, one endpoint at a time or all at once, and helpers for handlers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from dynamo.runtime import (
    Context,
    DistributedRuntime,
    PyAsyncRequestStream,
    UnaryClient,
    dynamo_endpoint,
    serve_unary_endpoint,
    tracing,
    wire,
)
from dynamo.runtime.errors import EngineShutdown, InvalidArgument, StreamIncomplete, Unknown
from dynamo.runtime.instances import Target
from tests.runtime.plane_helpers import ENDPOINT, SOON_S, Held, Sink, caller, connect, push, until


async def test_a_leaving_worker_finishes_and_admits_nothing_new(runtime: DistributedRuntime) -> None:
    held = Held()
    async with caller() as worker:
        serving = asyncio.create_task(worker.endpoint(ENDPOINT).serve_endpoint(_never, graceful_shutdown=True))
        served = await worker.endpoint("test.other.generate").start_push_endpoint(held)
        client = await connect(runtime, "test.other.generate")
        [client_record] = client.instances()
        sink = push(client, None)
        [stream] = await held.wait()
        worker.shutdown()
        await until(lambda: client.available_ids() == [])
        await until(lambda: not worker.server.admitting)
        late = Sink()
        target = Target(client_record, worker.server.host_port, served.route.path, inhibit=lambda: None)
        runtime.pool.get(target.host_port).call(target, None, late, Context())
        assert isinstance((await late.finished()).error, EngineShutdown)
        stream.send("last")
        stream.end()
        assert (await sink.finished()).items == ["last"]
        await asyncio.wait_for(serving, SOON_S)


async def _never(request: Any) -> AsyncIterator[Any]:
    yield request


async def test_an_ungraceful_endpoint_does_not_wait_for_what_is_in_flight(runtime: DistributedRuntime) -> None:
    held = Held()
    async with caller() as worker:
        await worker.endpoint(ENDPOINT).start_push_endpoint(held, graceful_shutdown=False)
        sink = push(await connect(runtime), None)
        await held.wait()
        await asyncio.wait_for(worker.close(), SOON_S)
        assert isinstance((await sink.finished()).error, EngineShutdown)
        assert held.stopped == ["kill"]


async def test_a_caller_that_does_not_confirm_costs_the_grace_and_no_more(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0.3")
    async with caller() as worker:
        await worker.endpoint(ENDPOINT).start_endpoint(_never)
        host, _, port = worker.server.host_port.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(wire.PREAMBLE + wire.frame(wire.HELLO, (1 << 20, "test")))
        await until(lambda: any(connection.greeted for connection in worker.server.connections))
        start = asyncio.get_running_loop().time()
        await worker.close()
        assert 0.25 < asyncio.get_running_loop().time() - start < 3
        writer.close()


async def test_unregistering_hides_an_instance_whose_requests_go_on(runtime: DistributedRuntime) -> None:
    held = Held()
    async with caller() as worker:
        endpoint = worker.endpoint(ENDPOINT)
        await endpoint.start_push_endpoint(held)
        client = await connect(runtime)
        sink = push(client, None)
        [stream] = await held.wait()
        await endpoint.unregister_endpoint_instance()
        await until(lambda: client.instance_ids() == [])
        stream.end()
        assert (await sink.finished()).ended
        await endpoint.register_endpoint_instance()
        await until(lambda: client.available_ids() == [worker.instance_id])
        again = push(client, None)
        (await held.wait(2))[1].end()
        await again.finished()


async def test_a_connection_is_closed_when_its_last_instance_has_left(runtime: DistributedRuntime) -> None:
    held = Held()
    async with caller() as worker:
        served = await worker.endpoint(ENDPOINT).start_push_endpoint(held)
        sink = push(await connect(runtime), None)
        [stream] = await held.wait()
        await served.unregister()
        stream.send("still here")
        stream.end()
        assert (await sink.finished()).items == ["still here"]
        await until(lambda: not worker.server.connections)


async def test_one_of_several_instances_can_stop(runtime: DistributedRuntime) -> None:
    held = Held()
    one = await runtime.endpoint(ENDPOINT).start_push_endpoint(held, instance_id=1)
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held, instance_id=2)
    client = await connect(runtime, count=2)
    sink = push(client, None, 1)
    await held.wait()
    await one.stop()
    assert isinstance((await sink.finished()).error, EngineShutdown)
    await until(lambda: client.instance_ids() == [2])
    await asyncio.wait_for(one.finished(), SOON_S)


async def test_a_shutdown_that_comes_before_an_endpoint_is_served(runtime: DistributedRuntime) -> None:
    runtime.shutdown()
    await asyncio.wait_for(runtime.endpoint(ENDPOINT).serve_endpoint(_never), SOON_S)
    with pytest.raises(EngineShutdown, match="shutting down"):
        await runtime.endpoint(ENDPOINT).start_endpoint(_never)


async def test_a_shutdown_while_an_endpoint_is_being_registered(runtime: DistributedRuntime) -> None:
    serving = asyncio.create_task(runtime.endpoint(ENDPOINT).serve_endpoint(_never))
    await asyncio.sleep(0)
    runtime.shutdown()
    await asyncio.wait_for(serving, SOON_S)
    await runtime.wait_drained()
    assert await runtime.discovery.get_prefix("v1/instances/test/") == {}
    assert runtime.served == []


async def test_shutdown_from_another_thread(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(_never)
    waiting = asyncio.create_task(runtime.wait_shutdown())
    await asyncio.to_thread(runtime.shutdown)
    await asyncio.wait_for(waiting, SOON_S)


async def test_closing_twice_is_harmless(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(_never)
    await runtime.close()
    await runtime.close()


async def test_requests_are_counted_by_endpoint(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(_never, metrics_labels=[("model", "m")])
    client = await connect(runtime)
    assert [x async for x in await client.generate(1, annotated=False)] == [1]
    await until(lambda: b"dynamo_component_requests_total" in runtime.metrics.render())
    text = runtime.metrics.render().decode()
    [line] = [line for line in text.splitlines() if line.startswith("dynamo_component_requests_total{")]
    assert 'dynamo_endpoint="generate"' in line
    assert 'model="m"' in line
    assert line.endswith(" 1.0")
    assert runtime.health.snapshot().endpoints == {"generate": "ready"}


async def test_an_endpoint_that_stops_answering_is_found_by_its_canary(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ENABLED", "true"), ("REQUEST_TIMEOUT", "0.2")):
        monkeypatch.setenv(f"DYN_HEALTH_CHECK_{name}", value)
    monkeypatch.setenv("DYN_CANARY_WAIT_TIME", "0.1")
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held, health_check_payload={"n": 1})
    assert runtime.health.ready
    await until(lambda: not runtime.health.ready)
    assert held.payloads[0] == {"n": 1, "_HEALTH_CHECK": True}
    await until(lambda: held.stopped[:1] == ["kill"])  # what it asked for is not left in flight


async def test_a_request_is_recorded_as_a_span_of_its_callers_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[RecordedSpan] = []

    class Recorder:
        def start_span(self, name: str, parent: Any, attributes: Any, span_id: str | None) -> tracing.SpanProxy:
            spans.append(RecordedSpan(parent._replace(span_id=span_id)))
            spans[-1].name = name
            return spans[-1]

        def close(self, timeout_s: float) -> None: ...

    monkeypatch.setattr(tracing, "_configured", True)
    monkeypatch.setattr(tracing, "_recorder", Recorder())
    async with caller() as worker:
        await worker.endpoint(ENDPOINT).start_endpoint(_never)
        context = Context()
        client = await connect(worker)
        assert [x async for x in await client.generate(1, annotated=False, context=context)] == [1]
        [span] = spans
        assert span.name.endswith(ENDPOINT.replace(".", "/"))
        assert span.trace_id == context.trace_id
        assert span.closed


class RecordedSpan(tracing.SpanProxy):
    name = ""
    closed = False

    def close(self) -> None:
        self.closed = True


# --- bidirectional


async def test_a_bidirectional_endpoint_answers_while_requests_still_come(runtime: DistributedRuntime) -> None:
    async def double(requests: PyAsyncRequestStream, context: Context) -> AsyncIterator[int]:
        async for request in requests:
            yield request * 2
        yield -1

    await runtime.endpoint(ENDPOINT).start_bidirectional_endpoint(double)
    client = await connect(runtime)
    turns: asyncio.Queue[int] = asyncio.Queue()

    async def ask() -> AsyncIterator[int]:
        for i in range(3):
            yield i
            assert await turns.get() == i * 2

    answers = []
    async for answer in await client.bidirectional(ask(), annotated=False):
        answers.append(answer)
        turns.put_nowait(answer)
    assert answers == [0, 2, 4, -1]


async def test_a_bidirectional_endpoint_takes_a_plain_request_too(runtime: DistributedRuntime) -> None:
    async def double(requests: PyAsyncRequestStream, context: Context) -> AsyncIterator[int]:
        async for request in requests:
            yield request * 2

    await runtime.endpoint(ENDPOINT).start_bidirectional_endpoint(double)
    client = await connect(runtime)
    assert [x async for x in await client.generate(4, annotated=False)] == [8]


async def test_a_bidirectional_caller_waits_for_a_worker_that_does_not_read(runtime: DistributedRuntime) -> None:
    go = asyncio.Event()
    asked = []

    async def slow(requests: PyAsyncRequestStream, context: Context) -> AsyncIterator[int]:
        await go.wait()
        count = 0
        async for _ in requests:
            count += 1
        yield count

    async def ask() -> AsyncIterator[int]:
        for i in range(5000):
            asked.append(i)
            yield i
            if i % 50 == 0:
                await asyncio.sleep(0)

    await runtime.endpoint(ENDPOINT).start_bidirectional_endpoint(slow)
    client = await connect(runtime)
    answers = await client.bidirectional(ask(), annotated=False)
    before = -1
    while before != len(asked):
        before = len(asked)
        await asyncio.sleep(0.1)
    assert len(asked) < 5000
    go.set()
    assert [x async for x in answers] == [5000]


async def test_a_caller_whose_requests_fail_kills_the_stream(runtime: DistributedRuntime) -> None:
    ended = asyncio.Event()

    async def listen(requests: PyAsyncRequestStream, context: Context) -> AsyncIterator[int]:
        try:
            async for request in requests:
                yield request
        finally:
            ended.set()

    answered = asyncio.Event()

    async def ask() -> AsyncIterator[object]:
        yield 1
        await answered.wait()
        yield object()

    await runtime.endpoint(ENDPOINT).start_bidirectional_endpoint(listen)
    client = await connect(runtime)
    answers = await client.bidirectional(ask(), annotated=False)
    assert await anext(answers) == 1
    answered.set()
    with pytest.raises(InvalidArgument, match="cannot be encoded"):
        await anext(answers)
    await asyncio.wait_for(ended.wait(), SOON_S)


# --- unary


async def test_unary_asks_for_one_answer(runtime: DistributedRuntime) -> None:
    async def answer(request: int, *, context: Context) -> list[Any]:
        return [request + 1, context.id()]

    serving = asyncio.create_task(serve_unary_endpoint(runtime.endpoint(ENDPOINT), answer))
    client = UnaryClient(await connect(runtime))
    assert await client.complete(1, context=Context("id")) == [2, "id"]
    runtime.shutdown()
    await asyncio.wait_for(serving, SOON_S)


@pytest.mark.parametrize(("count", "error"), [(0, StreamIncomplete), (2, Unknown)])
async def test_unary_refuses_none_or_several_answers(
    runtime: DistributedRuntime, count: int, error: type[Exception]
) -> None:
    async def several(request: None) -> AsyncIterator[int]:
        for i in range(count):
            yield i

    await runtime.endpoint(ENDPOINT).start_endpoint(several)
    with pytest.raises(error):
        await UnaryClient(await connect(runtime)).complete(None)


# --- dynamo_endpoint


class Point(msgspec.Struct):
    x: int
    y: int = 0


@dynamo_endpoint(Point, int)
async def total(request: Point) -> AsyncIterator[int]:
    yield request.x + request.y


@pytest.mark.parametrize("request_", [{"x": 1, "y": 2}, '{"x": 1, "y": 2}', Point(1, 2)])
async def test_dynamo_endpoint_parses_dicts_and_json(request_: Any) -> None:
    assert [item async for item in total(request_)] == [3]


@pytest.mark.parametrize("request_", [{"x": "one"}, "{", b"bytes", {}])
async def test_dynamo_endpoint_refuses_what_does_not_fit(request_: Any) -> None:
    with pytest.raises(ValueError, match="invalid request"):
        await anext(total(request_))


async def test_dynamo_endpoint_knows_pydantic_models_and_sends_them(runtime: DistributedRuntime) -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Ask", text=(str, ...))

    class Handler:
        @dynamo_endpoint(model, model)
        async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
            assert isinstance(request, model)
            yield request

    await runtime.endpoint(ENDPOINT).start_endpoint(Handler().generate)
    client = await connect(runtime)
    assert [x async for x in await client.generate({"text": "a"}, annotated=False)] == [{"text": "a"}]
    assert [x async for x in await client.generate('{"text": "b"}', annotated=False)] == [{"text": "b"}]
    with pytest.raises(Unknown, match="ValueError: invalid request"):
        [x async for x in await client.generate({"texd": "a"})]


async def test_dynamo_endpoint_of_strings_takes_strings_as_they_are() -> None:
    @dynamo_endpoint(str, str)
    async def echo(request: str) -> AsyncIterator[str]:
        yield request

    assert [item async for item in echo("hello,world")] == ["hello,world"]
