"""An engine served over real sockets to a real client."""

import asyncio

import pytest

from dynamo.engine.admission import engine_request_limit
from dynamo.engine.contract import EngineConfig
from dynamo.engine.serving import ServeOptions, serve_engine
from dynamo.llm.kv_events import KvEventData, LoadMetrics, Removed, Stored, StoredBlock
from dynamo.llm.model_card import ModelDeploymentCard
from dynamo.runtime.context import Context
from dynamo.runtime.errors import DeadlineExceeded, EngineShutdown, InvalidArgument, Unknown, WorkerOverloaded
from dynamo.runtime.events import create_subscriber
from tests.engine.scripted import DEADLINE_S, ScriptedEngine, collect, eventually, request, serving


async def test_outputs_reach_their_streams_in_order(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        first = await client.generate(request(), annotated=False)
        second = await client.generate(request(), annotated=False)
        a, b = await engine.submissions(2)
        engine.step((a, 1), (b, 10))
        engine.step((a, 2), (b, 20), finish=True)
        assert [item["token_ids"] for item in await collect(first)] == [[1], [2]]
        items = await collect(second)
        assert [item["token_ids"] for item in items] == [[10], [20]]
        assert items[-1]["finish_reason"] == "length"


async def test_n_choices_are_numbered_seeded_apart_and_counted_together(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        stream = await client.generate(request(n=2, seed=7), annotated=False, context=Context("r"))
        ids = await engine.submissions(2)
        assert ids == ["r#0", "r#1"]
        assert [engine.submitted[i].sampling_options.seed for i in ids] == [7, 8]
        assert [engine.submitted[i].sampling_options.n for i in ids] == [1, 1]
        engine.step(("r#1", 5), finish=True)
        engine.step(("r#0", 6), finish=True)
        items = await collect(stream)
        assert [item.get("index", 0) for item in items] == [1, 0]
        assert "completion_usage" not in items[0]
        usage = items[1]["completion_usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 4, 14)


@pytest.mark.parametrize(("field", "value"), [("n", 0), ("n", -1), ("n", 1_000_000), ("best_of", 3)])
async def test_an_impossible_number_of_choices_is_refused(runtime, engine, model_dir, field, value):
    async with serving(runtime, engine, model_dir) as (worker, client):
        with pytest.raises(InvalidArgument, match=field) as refused:
            await collect(await client.generate(request(**{field: value})))
        assert refused.value.param == field
        assert engine.submitted == {}
        assert worker.dispatcher.num_requests == 0


async def test_a_stopped_request_is_aborted_and_ends_as_cancelled(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (worker, client):
        context = Context("r")
        stream = await client.generate(request(), annotated=False, context=context)
        await engine.submissions(1)
        context.stop_generating()
        assert [item["finish_reason"] for item in await collect(stream)] == ["cancelled"]
        assert engine.aborted == ["r"]
        assert worker.dispatcher.num_requests == 0
        engine.step(("r", 1))  # a step that was under way says nothing to nobody


async def test_a_caller_that_leaves_frees_the_engine(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        context = Context("r")
        stream = await client.generate(request(n=2), annotated=False, context=context)
        await engine.submissions(2)
        await stream.aclose()
        await engine.until(lambda: sorted(engine.aborted) == ["r#0", "r#1"])


async def test_what_an_engine_refuses_reaches_the_caller_with_its_field(runtime, engine, model_dir):
    engine.refuse = InvalidArgument("no such rank", "dp_rank")
    async with serving(runtime, engine, model_dir) as (worker, client):
        with pytest.raises(InvalidArgument, match="no such rank") as caught:
            await collect(await client.generate(request()))
        assert caught.value.param == "dp_rank"
        assert worker.dispatcher.num_requests == 0


async def test_a_bug_in_an_engine_ends_only_its_request(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        engine.refuse = RuntimeError("boom")
        with pytest.raises(Unknown, match="boom"):
            await collect(await client.generate(request()))
        engine.refuse = None
        stream = await client.generate(request(), annotated=False)
        (id_,) = await engine.submissions(1)
        engine.step((id_, 1), finish=True)
        assert len(await collect(stream)) == 1


async def test_an_error_of_one_choice_ends_the_request_and_frees_the_others(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        stream = await client.generate(request(n=2), annotated=False, context=Context("r"))
        await engine.submissions(2)
        engine.callbacks.on_error("r#1", InvalidArgument("bad grammar", "guided_decoding"))
        with pytest.raises(InvalidArgument, match="bad grammar"):
            await collect(stream)
        assert "r#0" in engine.aborted


async def test_two_requests_of_one_name_are_both_answered(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        streams = [await client.generate(request(), annotated=False, context=Context("same")) for _ in range(2)]
        a, b = await engine.submissions(2)
        engine.step((a, 1), (b, 2), finish=True)
        assert [(await collect(s))[0]["token_ids"] for s in streams] == [[1], [2]]


@pytest.mark.parametrize("bad", [{"model": "m"}, {"model": "m", "token_ids": "text"}, "text", None])
async def test_a_malformed_request_is_an_invalid_argument(runtime, engine, model_dir, bad):
    async with serving(runtime, engine, model_dir) as (_, client):
        with pytest.raises(InvalidArgument, match="not a preprocessed request"):
            await collect(await client.generate(bad))


async def test_beyond_the_limits_a_request_is_refused_and_the_queue_moves_up(runtime, engine, model_dir):
    limits = {"engine_request_limit": 1, "request_queue_limit": 1}
    async with serving(runtime, engine, model_dir, **limits) as (worker, client):
        running = await client.generate(request(), annotated=False, context=Context("running"))
        await engine.submissions(1)
        queued = await client.generate(request(), annotated=False, context=Context("queued"))
        refused = await client.generate(request(), annotated=False, context=Context("refused"))
        with pytest.raises(WorkerOverloaded, match="1 requests in its engine and 1 waiting"):
            await collect(refused)
        assert list(engine.submitted) == ["running"]
        engine.step(("running", 1), finish=True)
        assert list(engine.submitted) == ["running", "queued"]
        engine.step(("queued", 1), finish=True)
        assert [len(await collect(s)) for s in (running, queued)] == [1, 1]
        shown = runtime.metrics.admission
        assert (shown.engine_requests.value, shown.queued_requests.value, shown.rejected.value) == (0, 0, 1)
        assert worker.dispatcher.num_requests == 0


async def test_a_queued_request_whose_caller_leaves_never_reaches_the_engine(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir, engine_request_limit=1) as (worker, client):
        first = await client.generate(request(), annotated=False, context=Context("first"))
        await engine.submissions(1)
        context = Context("second")
        second = await client.generate(request(), annotated=False, context=context)
        await eventually(lambda: worker.dispatcher.num_queued == 1)
        context.stop_generating()
        assert [item["finish_reason"] for item in await collect(second)] == ["cancelled"]
        engine.step(("first", 1), finish=True)
        await collect(first)
        assert list(engine.submitted) == ["first"]
        assert engine.aborted == []


async def test_what_is_past_its_deadline_leaves_the_queue_and_the_engine(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir, engine_request_limit=1) as (worker, client):
        contexts = [Context("inside"), Context("queued")]
        for context, seconds in zip(contexts, (0.4, 0.1), strict=True):
            context.set_timeout(seconds)
        inside, queued = [await client.generate(request(), annotated=False, context=context) for context in contexts]
        for stream in (queued, inside):
            with pytest.raises(DeadlineExceeded):
                await collect(stream)
        await engine.until(lambda: engine.aborted == ["inside"])
        assert list(engine.submitted) == ["inside"]
        assert (worker.dispatcher.num_requests, worker.dispatcher.num_queued) == (0, 0)
        after = await client.generate(request(), annotated=False, context=Context("after"))
        await engine.submissions(2)
        engine.step(("after", 1), finish=True)
        assert len(await collect(after)) == 1


async def test_a_dead_engine_fails_what_is_in_flight_leaves_discovery_and_ends_with_status_1(
    runtime, engine, model_dir
):
    running = asyncio.ensure_future(serve_engine(runtime, engine, ServeOptions(model_dir)))
    client = await runtime.endpoint("dynamo.backend.generate").client()
    await client.wait_for_instances(DEADLINE_S)
    stream = await client.generate(request(), annotated=False)
    await engine.submissions(1)
    engine.callbacks.on_death("out of memory")
    with pytest.raises(EngineShutdown, match="out of memory"):
        await collect(stream)
    async with asyncio.timeout(DEADLINE_S):
        assert await running == 1
    assert engine.stopped
    assert await runtime.discovery.get_prefix("v1/instances/dynamo/backend/generate") == {}
    assert await runtime.discovery.get_prefix("v1/mdc/") == {}


async def test_an_engine_that_dies_silently_is_found_by_its_health_check(runtime, engine, model_dir, monkeypatch):
    monkeypatch.setenv("DYN_ENGINE_HEALTH_CHECK_INTERVAL", "0.01")
    async with serving(runtime, engine, model_dir) as (_, client):
        stream = await client.generate(request(), annotated=False)
        await engine.submissions(1)
        engine.dead = "its process is gone"
        with pytest.raises(EngineShutdown, match="its process is gone"):
            await collect(stream)


async def no_cards(runtime) -> bool:
    return not await runtime.discovery.get_prefix("v1/mdc/")


async def test_shutdown_finishes_what_is_in_flight(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        stream = await client.generate(request(), annotated=False)
        (id_,) = await engine.submissions(1)
        runtime.shutdown()
        await eventually(lambda: no_cards(runtime))
        assert not engine.stopped
        engine.step((id_, 1))
        engine.step((id_, 2), finish=True)
        assert [item["token_ids"] for item in await collect(stream)] == [[1], [2]]
    assert engine.stopped


async def test_a_shutdown_during_start_leaves_nothing(runtime, model_dir):
    class Slow(ScriptedEngine):
        async def start(self, callbacks):
            await asyncio.Event().wait()

    engine = Slow()
    running = asyncio.ensure_future(serve_engine(runtime, engine, ServeOptions(model_dir)))
    await asyncio.sleep(0)
    runtime.shutdown()
    async with asyncio.timeout(DEADLINE_S):
        assert await running == 0
    assert engine.stopped
    assert await runtime.discovery.get_prefix("v1/instances/") == {}


async def test_the_card_says_what_the_engine_says(runtime, engine, model_dir):
    engine.config.model_aliases = ["other"]
    async with serving(runtime, engine, model_dir, endpoint_types=("completions",)) as (worker, _):
        ((key, value),) = (await runtime.discovery.get_prefix("v1/mdc/")).items()
        card = ModelDeploymentCard.from_json(value)
        assert key == f"v1/mdc/dynamo/backend/generate/{worker.endpoint.instance_id:x}"
        assert (card.names, card.model_type, card.kv_cache_block_size) == (["m", "other"], "Completions", 4)
        assert (card.context_length, card.runtime_config.total_kv_blocks) == (100, 50)


async def test_kv_events_and_load_reach_subscribers_with_the_workers_id(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (worker, _):
        kv = await create_subscriber(runtime, "dynamo.backend.generate", "kv-events")
        load = await create_subscriber(runtime, "dynamo.backend.generate", "kv_metrics")
        await kv.wait_connected()
        await load.wait_connected()
        stored = KvEventData(stored=Stored([StoredBlock(11, 22)], parent_hash=None))
        engine.callbacks.on_kv_events([stored, KvEventData(removed=Removed([11]))])
        engine.callbacks.on_load(LoadMetrics(0, 0, 7, kv_used_blocks=25))
        async with asyncio.timeout(DEADLINE_S):
            batch = (await anext(kv)).decode()
            told = (await anext(load)).decode()
            while told["active_decode_blocks"] != 7:
                told = (await anext(load)).decode()
        me = worker.endpoint.instance_id
        assert [event["worker_id"] for event in batch] == [me, me]
        assert [event["event"]["event_id"] for event in batch] == [0, 1]
        assert batch[0]["event"]["data"] == {"stored": {"blocks": [{"block_hash": 11, "tokens_hash": 22}]}}
        assert batch[1]["event"]["data"] == {"removed": {"block_hashes": [11]}}
        assert (told["worker_id"], told["kv_used_blocks"]) == (me, 25)
        text = runtime.metrics.render().decode()
        (usage,) = [line for line in text.splitlines() if line.startswith("dynamo_component_gpu_cache_usage_percent{")]
        assert usage.endswith(" 0.5")
        await kv.close()
        await load.close()


async def test_the_cache_hit_rate_is_shown(runtime, engine, model_dir):
    async with serving(runtime, engine, model_dir) as (_, client):
        stream = await client.generate(request(), annotated=False)
        (id_,) = await engine.submissions(1)
        engine.step((id_, 1), finish=True)
        await collect(stream)
        (rate,) = [
            line
            for line in runtime.metrics.render().decode().splitlines()
            if line.startswith("dynamo_component_kv_cache_hit_rate{")
        ]
        assert rate.endswith(" 0.4")


def test_the_limit_is_half_as_much_again_as_the_engine_runs():
    assert engine_request_limit(None, EngineConfig(model="m", max_num_seqs=5, data_parallel_size=3)) == 23
    assert engine_request_limit(None, EngineConfig(model="m")) == 10_000
    assert engine_request_limit(4, EngineConfig(model="m", max_num_seqs=5)) == 4


async def test_a_worker_that_cannot_register_leaves_nothing(runtime, engine, tmp_path):
    with pytest.raises(InvalidArgument, match="neither a directory"):
        await serve_engine(runtime, engine, ServeOptions(tmp_path / "missing"))
    assert engine.stopped
    assert await runtime.discovery.get_prefix("v1/instances/") == {}


async def test_an_engine_without_a_prefix_cache_promises_no_events(runtime, engine, model_dir):
    engine.config.publishes_kv_events = False
    async with serving(runtime, engine, model_dir):
        (value,) = (await runtime.discovery.get_prefix("v1/mdc/")).values()
        assert not ModelDeploymentCard.from_json(value).runtime_config.kv_event_publishing_enabled
        channels = await runtime.discovery.get_prefix("v1/event_channels/")
        assert [key for key in channels if "kv-events" in key] == []
