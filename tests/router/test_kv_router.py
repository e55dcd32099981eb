"""The router for programs of one's own, with real workers that answer."""

import asyncio
import json

import msgspec
import pytest

from dynamo.llm import KvRouter, KvRouterConfig, LoadThresholdConfig, RadixTree, RoutingConstraints
from dynamo.llm.block_hash import compute_block_hash_for_seq
from dynamo.router import model_router
from dynamo.runtime.errors import EngineShutdown, InvalidArgument, WorkerOverloaded, WorkerUnavailable
from tests.router.fleet import ENDPOINT, Worker, eventually, make_card, prompt

DEADLINE_S = 10.0


@pytest.fixture
async def two(runtime):
    """Two workers; the second holds eight blocks of prompt 7."""
    workers = [await Worker(runtime, i).join() for i in (1, 2)]
    await workers[1].store(prompt(7, 8))
    return workers


@pytest.fixture
async def make(runtime):
    """Makes routers, and closes them."""
    made = []

    def make(**options) -> KvRouter:
        config = KvRouterConfig(**options.pop("settings", {}))
        made.append(KvRouter(runtime.endpoint(ENDPOINT), 16, config, **options))
        return made[-1]

    yield make
    for router in made:
        await router.close()


def load(router: KvRouter) -> int:
    return len(router.router.scheduler.load.bookings)


# --- asking


async def test_the_best_worker_is_the_holder_and_asking_changes_nothing(two, make):
    router = make()
    assert await router.best_worker(prompt(7)) == (2, 0, 8)
    assert load(router) == 0


async def test_with_a_request_id_the_request_counts_until_it_is_freed(two, make):
    router = make()
    assert await router.best_worker(prompt(7), request_id="a") == (2, 0, 8)
    loads = {each["worker_id"]: each for each in await router.get_potential_loads(prompt(3))}
    assert loads[2]["potential_prefill_tokens"] == 160 + 32
    assert loads[2]["potential_decode_blocks"] == 20
    assert loads[1]["potential_decode_blocks"] == 10
    await router.mark_prefill_complete("a")
    loads = {each["worker_id"]: each for each in await router.get_potential_loads(prompt(3))}
    assert loads[2]["potential_prefill_tokens"] == 160
    with pytest.raises(InvalidArgument, match="'a' is in use"):
        await router.best_worker(prompt(7), request_id="a")
    await router.free("a")
    await router.free("a")
    await router.mark_prefill_complete("never there")
    assert load(router) == 0


async def test_a_request_that_nobody_frees_expires(two, make, monkeypatch):
    monkeypatch.setattr(model_router, "TICK_S", 0.02)
    router = make(settings={"active_request_expiry_secs": 0.05})
    await router.best_worker(prompt(7), request_id="a")
    await eventually(lambda: load(router) == 0)
    await router.best_worker(prompt(7), request_id="a")


async def test_overlap_scores_say_what_each_worker_holds(two, make):
    scores = await make().get_overlap_scores(prompt(7))
    assert scores == {
        "block_size": 16,
        "num_blocks": 10,
        "workers": [
            {
                "worker_id": 2,
                "dp_rank": 0,
                "device_blocks": 8,
                "host_pinned_blocks": 8,
                "disk_blocks": 8,
                "host_pinned_extension_blocks": 0,
                "disk_extension_blocks": 0,
                "shared_beyond_device_blocks": None,
            }
        ],
        "shared_cache": {"enabled": False, "total_hit_blocks": 0, "ranges": [], "error": None},
    }


async def test_adapters_and_tenants_change_the_answer(two, make):
    router = make()
    assert (await router.best_worker(prompt(7), lora_name="a"))[2] == 0
    assert (await router.best_worker(prompt(7), cache_namespace="tenant"))[2] == 0
    assert not (await router.get_overlap_scores(prompt(7), lora_name="a"))["workers"]


async def test_an_override_holds_for_one_question(two, make):
    router = make()
    hot = {"router_temperature": 1000.0}
    assert {(await router.best_worker(prompt(7), hot))[0] for _ in range(60)} == {1, 2}
    with pytest.raises(InvalidArgument, match=r"router_config_override\.nonsense"):
        await router.best_worker(prompt(7), {"nonsense": 1})


async def test_constraints_choose_among_taints(runtime, two, make):
    await two[0].publish_card(make_card(taints={"eu"}))
    router = make()
    eu = RoutingConstraints({"eu"})
    await router.start()
    await eventually(lambda: any(limits.taints for limits in router.router.scheduler.load.limits))
    assert (await router.best_worker(prompt(7), routing_constraints=eu))[0] == 1
    better = RoutingConstraints(preferred_taints={"eu": 3.0})
    assert (await router.best_worker(prompt(7), routing_constraints=better))[0] == 1
    with pytest.raises(WorkerUnavailable, match="has the taints"):
        await router.best_worker(prompt(7), routing_constraints=RoutingConstraints({"us"}))
    with pytest.raises(ValueError, match="preferred_taints"):
        RoutingConstraints(preferred_taints={"eu": float("nan")})


async def test_without_events_asking_can_note_where_a_prompt_goes(two, make):
    router = make(settings={"use_kv_events": False})
    assert (await router.best_worker(prompt(1)))[2] == 0
    worker_id, _, _ = await router.best_worker(prompt(1), update_indexer=True)
    assert await router.best_worker(prompt(1)) == (worker_id, 0, 10)


async def test_thresholds_refuse(two, make):
    router = make(load_threshold_config=LoadThresholdConfig(active_prefill_tokens_threshold=10))
    await router.best_worker(prompt(1), request_id="a")
    await router.best_worker(prompt(2), request_id="b")
    with pytest.raises(WorkerOverloaded):
        await router.best_worker(prompt(3), request_id="c")
    assert load(router) == 2


async def test_asking_waits_in_the_queue_and_gives_up_when_cancelled(two, make):
    router = make(settings={"router_queue_threshold": 0.1})
    await router.best_worker(prompt(1), request_id="a")
    await router.best_worker(prompt(2), request_id="b")
    waiting = asyncio.ensure_future(router.best_worker(prompt(3), request_id="c"))
    gone = asyncio.ensure_future(router.best_worker(prompt(4), request_id="d"))
    await eventually(lambda: router.router.queue.pending == 2)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    await router.free("a")
    async with asyncio.timeout(DEADLINE_S):
        await waiting
    assert sorted(router.router.scheduler.load.bookings) == ["b", "c"]
    assert router.router.queue.pending == 0


async def test_what_is_dumped_tells_an_empty_index_everything(two, make):
    router = make()
    tree = RadixTree()
    for event in json.loads(await router.dump_events()):
        tree.apply_event(event["worker_id"], json.dumps(event["event"]).encode())
    scores = tree.find_matches(compute_block_hash_for_seq(prompt(7), 16)).scores
    assert {tuple(worker): blocks for worker, blocks in scores.items()} == {(2, 0): 8}


async def test_settings_that_cannot_be_meant_are_refused(runtime):
    endpoint = runtime.endpoint(ENDPOINT)
    with pytest.raises(InvalidArgument, match="kv_cache_block_size"):
        KvRouter(endpoint, 0, KvRouterConfig())
    with pytest.raises(ValueError, match=r"conditional_disagg_enabled.*one pool"):
        KvRouter(endpoint, 16, KvRouterConfig(conditional_disagg_enabled=True))
    with pytest.raises(ValueError, match="ais_perf_config"):
        KvRouter(endpoint, 16, KvRouterConfig(), object())
    with pytest.raises(ValueError, match="session_affinity_mode"):
        KvRouter(endpoint, 16, KvRouterConfig(), session_affinity_mode="firm")


# --- generating


async def collect(stream) -> list[int]:
    async with asyncio.timeout(DEADLINE_S):
        return [token for item in [item async for item in stream] for token in item.get("token_ids", ())]


async def test_a_prompt_is_answered_by_the_best_worker_and_leaves_nothing_booked(two, make):
    router = make()
    assert await collect(await router.generate(prompt(7), "m")) == prompt(7)
    assert load(router) == 0
    assert router.router.stats.output_sequence_tokens.sum == 160
    assert router.router.stats.selected_cached_tokens == 128


async def test_a_request_as_workers_get_it_is_answered(two, make):
    router = make()
    request = {"model": "m", "token_ids": prompt(1), "stop_conditions": {"max_tokens": 5}}
    assert await collect(await router.generate_from_request(request)) == prompt(1)


async def test_options_and_the_rank_reach_the_worker(runtime, make):
    seen = []

    def note(request, response) -> None:
        seen.append(msgspec.msgpack.decode(request))
        response.send({"token_ids": [1], "finish_reason": "stop"})
        response.end()

    await Worker(runtime, 1, make_card(data_parallel_size=2), note).join()
    router = make()
    stream = await router.generate(
        prompt(1), "m", {"max_tokens": 7}, {"temperature": 0.5}, {"logprobs": 2}, worker_id=1, dp_rank=1
    )
    assert await collect(stream) == [1]
    (request,) = seen
    assert request["stop_conditions"] == {"max_tokens": 7}
    assert request["sampling_options"] == {"temperature": 0.5}
    assert request["output_options"] == {"logprobs": 2}
    assert request["routing"]["dp_rank"] == 1


@pytest.mark.parametrize("wrong", [{"stop_conditions": {"max_tokens": "many"}}, {"sampling_options": {"n": []}}])
async def test_options_that_cannot_be_meant_are_refused(two, make, wrong):
    with pytest.raises(InvalidArgument, match="generate: "):
        await make().generate(prompt(1), "m", **wrong)
    with pytest.raises(InvalidArgument, match="generate_from_request: "):
        await make().generate_from_request({"model": "m"})


async def test_load_is_counted_while_an_answer_runs_and_freed_when_its_reader_leaves(runtime, make):
    responses = []

    def one_token(request, response) -> None:
        responses.append(response)
        response.send({"token_ids": [1]})

    await Worker(runtime, 1, handler=one_token).join()
    router = make()
    stream = await router.generate(prompt(1), "m")
    async with asyncio.timeout(DEADLINE_S):
        await anext(stream)
    active = router.router.scheduler.load
    assert (active.requests, active.prefill_tokens) == ([1], [0])
    await stream.aclose()
    assert active.idle
    await eventually(lambda: responses[0].closed)


async def test_an_error_of_the_worker_is_raised_and_leaves_nothing_booked(runtime, make):
    def fail(request, response) -> None:
        response.send({"token_ids": [1]})
        response.fail(EngineShutdown("out of order"))

    await Worker(runtime, 1, handler=fail).join()
    router = make()
    with pytest.raises(EngineShutdown, match="out of order"):
        await collect(await router.generate(prompt(1), "m"))
    assert router.router.scheduler.load.idle


async def test_without_workers_generating_fails_soon(make):
    with pytest.raises(WorkerUnavailable, match="no worker has joined"):
        await collect(await make().generate(prompt(1), "m"))
