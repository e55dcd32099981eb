"""Requests, answers and errors between two runtimes over a real connection."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from dynamo.runtime import Annotated, Context, DistributedRuntime, RouterMode
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.errors import (
    Cancelled,
    CannotConnect,
    ConnectionTimeout,
    Disconnected,
    DiscoveryError,
    DynamoException,
    EngineShutdown,
    HttpError,
    InvalidArgument,
    RouterQueueLimitExceeded,
    Unknown,
    WorkerUnavailable,
)
from dynamo.runtime.instances import instance_record
from tests.runtime.plane_helpers import ENDPOINT, SOON_S, Held, Sink, caller, connect, push, until


async def count(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, int]]:
    for i in range(request["n"]):
        yield {"i": i}


# --- names and values


async def test_both_generations_of_names_reach_the_same_endpoint(runtime: DistributedRuntime) -> None:
    component = runtime.namespace("test").component("worker")
    await component.create_service()
    endpoint = component.endpoint("generate")
    await endpoint.start_endpoint(count)
    client = await runtime.endpoint(f"dyn://{ENDPOINT}").client()
    assert await client.wait_for_endpoints() == [endpoint.lease_id()]
    assert client.endpoint_ids() == client.instance_ids() == [endpoint.connection_id()]
    assert str(client.instances()[0]) == f"test/worker/generate/{endpoint.connection_id()}"


async def test_items_come_annotated_or_plain(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    client = await connect(runtime)
    annotated = [item async for item in await client.generate({"n": 2})]
    assert [item.data() for item in annotated] == [{"i": 0}, {"i": 1}]
    assert not annotated[0].is_error()
    assert [item async for item in await client.random({"n": 2}, annotated=False)] == [{"i": 0}, {"i": 1}]


async def test_remarks_of_an_annotated_item_survive(runtime: DistributedRuntime) -> None:
    async def remark(request: None) -> AsyncIterator[Annotated[str]]:
        yield Annotated("data", id="7", event="note", comment=["a", "b"])
        yield Annotated("plain")

    await runtime.endpoint(ENDPOINT).start_endpoint(remark)
    client = await connect(runtime)
    one, two = [item async for item in await client.generate(None)]
    assert (one.data(), one.id(), one.event(), one.comments()) == ("data", "7", "note", ["a", "b"])
    assert (two.data(), two.event(), two.comments()) == ("plain", None, [])


@pytest.mark.parametrize(
    "value", ["text", "", 0, -(2**63), 2**64 - 1, 1.5, None, True, [], {}, {"a": [1, {"b": None}]}, "ä🙂\x00", b"raw"]
)
async def test_any_json_like_value_is_a_request_and_an_item(runtime: DistributedRuntime, value: Any) -> None:
    async def echo(request: Any) -> AsyncIterator[Any]:
        yield request

    await runtime.endpoint(ENDPOINT).start_endpoint(echo)
    client = await connect(runtime)
    assert [item async for item in await client.generate(value, annotated=False)] == [value]


async def test_a_handler_may_be_a_coroutine_with_one_answer(runtime: DistributedRuntime) -> None:
    async def double(request: int) -> int:
        return request * 2

    await runtime.endpoint(ENDPOINT).start_endpoint(double)
    client = await connect(runtime)
    assert [item async for item in await client.generate(21, annotated=False)] == [42]


async def test_a_handler_may_be_a_method_and_change_what_it_yielded(runtime: DistributedRuntime) -> None:
    class Engine:
        async def generate(self, request: int, context: Context) -> AsyncIterator[dict[str, int]]:
            item: dict[str, int] = {}
            for i in range(request):
                item["i"] = i
                yield item

    await runtime.endpoint(ENDPOINT).start_endpoint(Engine().generate)
    client = await connect(runtime)
    assert [item["i"] async for item in await client.generate(3, annotated=False)] == [0, 1, 2]


async def test_a_handler_may_take_the_context_by_name(runtime: DistributedRuntime) -> None:
    async def who(request: Any, *, context: Context) -> AsyncIterator[str]:
        yield context.id()

    await runtime.endpoint(ENDPOINT).start_endpoint(who)
    client = await connect(runtime)
    assert [x async for x in await client.generate(1, annotated=False, context=Context("me"))] == ["me"]


async def test_identity_metadata_and_trace_reach_the_handler(runtime: DistributedRuntime) -> None:
    async def who(request: None, context: Context) -> AsyncIterator[Any]:
        yield [context.id(), context.metadata, context.trace_id, context.parent_span_id]

    await runtime.endpoint(ENDPOINT).start_endpoint(who)
    client = await connect(runtime)
    context = Context("req-1", {"tenant": "blue"})
    [answer] = [item async for item in await client.generate(None, annotated=False, context=context)]
    assert answer == ["req-1", {"tenant": "blue"}, context.trace_id, context.span_id]


# --- frames


async def test_one_turn_of_the_worker_is_one_flush_of_each_sink(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    async with caller() as other:
        client = await connect(other)
        sinks = [push(client, i) for i in range(8)]
        for stream in await held.wait(8):
            for item in range(5):
                stream.send(item)
            stream.end()
        for sink in sinks:
            await sink.finished()
            assert sink.items == [0, 1, 2, 3, 4]
            assert sink.flushes == [5], "five items and the end came with one read, so one flush"


async def test_a_sink_may_kill_another_when_the_connection_breaks(runtime: DistributedRuntime) -> None:
    held = Held()
    async with caller() as worker:
        await worker.endpoint(ENDPOINT).start_push_endpoint(held)
        client = await connect(runtime)
        contexts = [Context(), Context()]
        sinks = [push(client, None, context=context) for context in contexts]
        await held.wait(2)
        fail = sinks[0].on_error

        def kill_the_other(error: DynamoException) -> None:
            contexts[1].kill()
            fail(error)

        sinks[0].on_error = kill_the_other  # type: ignore[method-assign]
        for connection in worker.server.connections:
            connection.drop("the test says so")
        assert isinstance((await sinks[0].finished()).error, Disconnected)
        assert not sinks[1].done.is_set()
        assert client.inflight(worker.instance_id) == 0


async def test_a_sink_of_several_streams_is_flushed_once(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    async with caller() as other:
        client = await connect(other)
        sink = Sink()
        for i in range(3):
            client.start(client.pick(), i, sink, Context())
        for stream in await held.wait(3):
            stream.send("item")
        await until(lambda: bool(sink.flushes))
        assert sink.flushes == [3]


async def test_items_and_end_of_one_turn_keep_their_order(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    sink = push(client, None)
    [stream] = await held.wait()
    stream.send("last words")
    stream.fail(InvalidArgument("no", "field"))
    stream.send("never")
    stream.end()
    await sink.finished()
    assert sink.items == ["last words"]
    assert isinstance(sink.error, InvalidArgument)
    assert stream.closed


async def test_a_hundred_streams_share_one_connection(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    async with caller() as other:
        client = await connect(other)
        sinks = [push(client, {"n": 50}) for _ in range(100)]
        for sink in sinks:
            assert len((await sink.finished()).items) == 50
        assert len(runtime.server.connections) == 1


async def test_a_frame_over_the_limit_is_split_between_streams(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_MAX_MESSAGE_SIZE", "100000")
    held = Held()
    async with caller() as worker, caller() as other:
        await worker.endpoint(ENDPOINT).start_push_endpoint(held)
        client = await connect(other)
        sinks = [push(client, None) for _ in range(4)]
        for stream in await held.wait(4):
            stream.send("x" * 60_000)
            stream.end()
        for sink in sinks:
            assert [len(item) for item in (await sink.finished()).items] == [60_000]


async def test_an_item_over_the_limit_fails_its_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TCP_MAX_MESSAGE_SIZE", "100000")
    held = Held()
    async with caller() as worker, caller() as other:
        await worker.endpoint(ENDPOINT).start_push_endpoint(held)
        client = await connect(other)
        large, small = push(client, None), push(client, None)
        one, two = await held.wait(2)
        one.send("x" * 200_000)
        one.end()
        two.send("y")
        two.end()
        assert (await small.finished()).items == ["y"]
        assert "DYN_TCP_MAX_MESSAGE_SIZE" in str((await large.finished()).error)


async def test_a_request_over_the_limit_is_refused_before_it_is_sent(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    monkeypatch.setenv("DYN_TCP_MAX_MESSAGE_SIZE", "5000")
    async with caller() as other:
        client = await connect(other)
        with pytest.raises(InvalidArgument, match="over the limit of 5000"):
            await client.generate("x" * 6000)
        sink = await push(client, "x" * 6000).finished()
        assert isinstance(sink.error, InvalidArgument)
        assert client.inflight(client.pick()) == 0


async def test_an_item_that_cannot_be_sent_fails_its_stream_alone(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    bad, good = push(client, None), push(client, None)
    one, two = await held.wait(2)
    one.send(object())
    one.end()
    two.send("fine")
    two.end()
    assert (await good.finished()).items == ["fine"]
    assert "object objects cannot be sent" in str((await bad.finished()).error)


async def test_a_request_that_cannot_be_encoded_is_an_invalid_argument(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    client = await connect(runtime)
    with pytest.raises(InvalidArgument, match="cannot be encoded"):
        await client.generate(object())


async def test_a_request_of_30_mib_goes_through(runtime: DistributedRuntime) -> None:
    async def size(request: bytes) -> int:
        return len(request)

    await runtime.endpoint(ENDPOINT).start_endpoint(size)
    client = await connect(runtime)
    assert [n async for n in await client.generate(bytes(30 << 20), annotated=False)] == [30 << 20]


async def test_a_sink_that_raises_loses_its_stream_and_no_other(runtime: DistributedRuntime) -> None:
    held = Held()
    await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    bad, good = push(client, None), push(client, None)
    bad.on_item = lambda item: 1 // 0  # type: ignore[method-assign, assignment]
    one, two = await held.wait(2)
    for stream in (one, two):
        stream.send("item")
    two.end()
    assert (await good.finished()).items == ["item"]
    assert "ZeroDivisionError" in str((await bad.finished()).error)
    await until(lambda: held.stopped == ["kill"])


# --- errors


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("bad field", "temperature"),
        HttpError(418, "teapot"),
        RouterQueueLimitExceeded("", "batch", "requests", 5, 4),
        EngineShutdown("dead"),
    ],
)
async def test_typed_errors_cross_the_wire_with_their_fields(runtime: DistributedRuntime, error: Exception) -> None:
    async def fail(request: None) -> AsyncIterator[int]:
        yield 1
        raise error

    await runtime.endpoint(ENDPOINT).start_endpoint(fail)
    client = await connect(runtime)
    stream = await client.generate(None, annotated=False)
    assert await anext(stream) == 1
    with pytest.raises(type(error)) as caught:
        await anext(stream)
    assert caught.value.__dict__ == error.__dict__
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_foreign_exception_is_unknown_and_named(runtime: DistributedRuntime) -> None:
    async def fail(request: None) -> AsyncIterator[int]:
        raise ValueError("seven")
        yield 1

    await runtime.endpoint(ENDPOINT).start_endpoint(fail)
    client = await connect(runtime)
    with pytest.raises(Unknown, match="ValueError: seven"):
        [item async for item in await client.generate(None)]
    assert client.available_ids(), "a request that fails says nothing of its worker"


async def test_a_push_handler_that_raises_fails_its_request(runtime: DistributedRuntime) -> None:
    def fail(payload: msgspec.Raw, stream: object) -> None:
        raise KeyError("x")

    await runtime.endpoint(ENDPOINT).start_push_endpoint(fail)
    client = await connect(runtime)
    with pytest.raises(Unknown, match="KeyError"):
        [item async for item in await client.generate(None)]


async def test_a_handler_that_raises_cancelled_error_ends_its_stream_as_cancelled(runtime: DistributedRuntime) -> None:
    async def give_up(request: None, context: Context) -> AsyncIterator[int]:
        yield 1
        raise asyncio.CancelledError

    await runtime.endpoint(ENDPOINT).start_endpoint(give_up)
    client = await connect(runtime)
    with pytest.raises(Cancelled):
        [item async for item in await client.generate(None)]


async def test_without_any_instance_the_worker_is_unavailable(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint(ENDPOINT).client()
    with pytest.raises(WorkerUnavailable, match=f"no worker for {ENDPOINT}: it has no instance"):
        await client.generate(None)
    with pytest.raises(ConnectionTimeout, match=r"within 0\.01 s"):
        await client.wait_for_instances(0.01)


async def test_direct_to_an_instance_that_is_not_there_cannot_connect(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint(ENDPOINT).client()
    with pytest.raises(CannotConnect, match="instance 2a of"):
        await client.direct(None, 42)
    assert isinstance((await push(client, None, 42).finished()).error, CannotConnect)


async def test_an_instance_that_left_its_process_refuses_so_that_the_caller_goes_elsewhere(
    runtime: DistributedRuntime,
) -> None:
    held = Held()
    served = await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
    client = await connect(runtime)
    runtime.server.remove_route(served.route)
    sink = await push(client, None).finished()
    assert isinstance(sink.error, CannotConnect)
    assert sink.error.migratable
    assert client.available_ids() == [], "it is left out of choices"
    assert client.instance_ids() == [served.instance_id]
    with pytest.raises(WorkerUnavailable, match="failed or are leaving"):
        client.pick()


async def test_an_address_nobody_listens_on_cannot_connect(runtime: DistributedRuntime) -> None:
    endpoint = runtime.endpoint(ENDPOINT)
    record = (
        b'{"type":"Endpoint","namespace":"test","component":"worker","endpoint":"generate","instance_id":7,'
        b'"transport":{"tcp":"127.0.0.1:1/7/test/worker/generate"}}'
    )
    await runtime.discovery.put(endpoint.address.instance_key(7), record)
    client = await connect(runtime)
    sink = await push(client, None).finished()
    assert isinstance(sink.error, CannotConnect)
    assert client.available_ids() == []


async def test_a_peer_that_accepts_and_says_nothing_is_given_up_at_the_connect_deadline(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_CONNECT_TIMEOUT", "0.3")
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with caller() as other:
        address = other.endpoint(ENDPOINT).address
        record = msgspec.json.encode(
            {
                "namespace": "test",
                "component": "worker",
                "endpoint": "generate",
                "instance_id": 7,
                "transport": {"tcp": f"127.0.0.1:{port}/{address.wire_path(7)}"},
            }
        )
        await runtime.discovery.put(address.instance_key(7), record)
        sink = await push(await connect(other), None).finished()
        assert isinstance(sink.error, CannotConnect)
        assert "within 0.3 s" in str(sink.error)
    silent.close()


async def test_garbage_records_are_ignored(runtime: DistributedRuntime, caplog: pytest.LogCaptureFixture) -> None:
    address = runtime.endpoint(ENDPOINT).address
    for i, record in enumerate([b"", b"\xff", b"[]", b"{}", b'{"transport":{"nats":"x"}}', b'{"instance_id":1}']):
        await runtime.discovery.put(address.instance_key(i + 1), record)
    await runtime.discovery.put(address.instances_prefix() + "not-hex", b"{}")
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    client = await connect(runtime)
    assert client.instance_ids() == [runtime.instance_id]
    assert caplog.text.count("ignoring the instance record") >= 7


# --- choosing


async def test_inhibition_is_lifted_after_its_time_or_by_discovery(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "0.2")
    endpoint = runtime.endpoint(ENDPOINT)
    await endpoint.start_endpoint(count)
    client = await connect(runtime)
    changes: list[int] = []
    client.on_change(lambda: changes.append(len(client.available_ids())))
    client.report_failure(runtime.instance_id)
    assert client.available_ids() == []
    assert await until(lambda: client.available_ids() != []) >= 0.15
    client.report_failure(runtime.instance_id)
    await endpoint.unregister_endpoint_instance()
    await endpoint.register_endpoint_instance()
    await until(lambda: client.available_ids() != [], timeout_s=0.15)
    assert changes[0] == 0


async def test_a_callback_that_fails_stops_nobody_from_following(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint(ENDPOINT).client()
    client.on_change(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    await runtime.endpoint(ENDPOINT).start_push_endpoint(Held(), instance_id=1)
    await runtime.endpoint(ENDPOINT).start_push_endpoint(Held(), instance_id=2)
    await until(lambda: client.available_ids() == [1, 2])


async def test_inhibition_can_be_turned_off(runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "0")
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    client = await connect(runtime)
    client.report_failure(runtime.instance_id)
    assert client.available_ids() == [runtime.instance_id]


async def test_direct_bypasses_inhibition(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    client = await connect(runtime)
    client.report_failure(runtime.instance_id)
    assert len([item async for item in await client.direct({"n": 2}, runtime.instance_id)]) == 2


async def test_inflight_counts_what_is_in_flight(runtime: DistributedRuntime) -> None:
    held = Held()
    endpoint = runtime.endpoint(ENDPOINT)
    for instance_id in (1, 2):
        await endpoint.start_push_endpoint(held, instance_id=instance_id)
    client = await connect(runtime, count=2)
    context = Context()
    sinks = [push(client, None, 1), push(client, None, 1, context), push(client, None, 2)]
    assert [client.inflight(i) for i in (1, 2, 3)] == [2, 1, 0]
    assert client.pick(RouterMode.LeastLoaded) == 2
    for stream in await held.wait(3):
        if stream.context.id() != context.id():
            stream.end()
    await sinks[0].finished()
    await sinks[2].finished()
    context.kill()
    assert [client.inflight(i) for i in (1, 2)] == [0, 0]


async def test_least_loaded_and_power_of_two_calls(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    client = await connect(runtime)
    for send in (client.least_loaded, client.power_of_two, client.round_robin):
        assert len([item async for item in await send({"n": 1})]) == 1


async def test_two_workers_cannot_claim_one_instance_id(runtime: DistributedRuntime) -> None:
    await runtime.endpoint(ENDPOINT).start_push_endpoint(Held(), instance_id=5)
    with pytest.raises(DiscoveryError, match="already served by this process"):
        await runtime.endpoint(ENDPOINT).start_push_endpoint(Held(), instance_id=5)
    async with caller() as other:
        with pytest.raises(DiscoveryError, match="already taken"):
            await other.endpoint(ENDPOINT).start_push_endpoint(Held(), instance_id=5)
        assert other.served == []


@pytest.mark.parametrize("instance_id", [0, -1, 2**63])
async def test_an_instance_id_out_of_range_is_refused(runtime: DistributedRuntime, instance_id: int) -> None:
    with pytest.raises(InvalidArgument, match="instance_id"):
        await runtime.endpoint(ENDPOINT).start_push_endpoint(Held(), instance_id=instance_id)


async def test_a_taken_port_is_a_clear_error(runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    monkeypatch.setenv("DYN_TCP_RPC_PORT", runtime.server.host_port.rpartition(":")[2])
    async with caller() as other:
        with pytest.raises(CannotConnect, match="DYN_TCP_RPC_PORT"):
            await other.endpoint("test.other.generate").start_endpoint(count)


async def test_all_interfaces_advertise_an_address_that_others_reach(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_RPC_HOST", "0.0.0.0")
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    assert not runtime.server.host_port.startswith("0.0.0.0")
    client = await connect(runtime)
    assert len([item async for item in await client.generate({"n": 1})]) == 1


async def test_an_advertised_host_can_be_named(runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TCP_RPC_ADVERTISE_HOST", "worker-7.example")
    await runtime.endpoint(ENDPOINT).start_endpoint(count)
    assert runtime.server.host_port.startswith("worker-7.example:")


# --- runtime data


async def test_instances_are_found_by_the_runtime_data_of_their_cards(runtime: DistributedRuntime) -> None:
    endpoint = runtime.endpoint(ENDPOINT)
    for instance_id in (1, 2, 3):
        await endpoint.start_push_endpoint(Held(), instance_id=instance_id)
    client = await connect(runtime, count=3)
    waiting = asyncio.create_task(client.wait_for_instances_by_runtime_data("stage", "b", 2, timeout_s=SOON_S))
    for instance_id, stage in ((1, "b"), (2, "a"), (3, "b")):
        card = msgspec.json.encode({"display_name": "m", "runtime_config": {"runtime_data": {"stage": stage}}})
        await runtime.discovery.put(endpoint.address.card_key(instance_id), card)
    await runtime.discovery.put(endpoint.address.card_key(4), b"garbage")
    assert await waiting == [1, 3]
    assert await client.wait_for_instance_by_runtime_data("stage", "a") == 2
    with pytest.raises(ConnectionTimeout, match="stage='c'"):
        await client.wait_for_instance_by_runtime_data("stage", "c", timeout_s=0.05)


async def test_endpoints_that_start_at_once_share_one_listener(runtime: DistributedRuntime) -> None:
    endpoints = [runtime.endpoint(f"ns.comp{i}.ep") for i in range(8)]
    await asyncio.gather(
        *(endpoint.start_push_endpoint(lambda _payload, stream: stream.end()) for endpoint in endpoints)
    )
    instances = [(await endpoint.client()).instances()[0] for endpoint in endpoints]
    assert len({instance.transport.address.partition("/")[0] for instance in instances}) == 1


async def test_workers_that_come_together_are_told_of_together(runtime: DistributedRuntime) -> None:
    address = EndpointAddress.parse(ENDPOINT)
    instances = await runtime.instances_of(address)
    told: list[int] = []
    instances.on_change(lambda: told.append(len(instances.available)))
    for number in range(1, 101):
        record = instance_record(address, number, f"127.0.0.1:{number}")
        await runtime.discovery.put(address.instance_key(number), record)
    await until(lambda: len(instances.available) == 100)
    assert told == [100]
