"""Does `--router-mode kv` send requests to where their prefixes are, and say so?"""

import asyncio
import gc
import logging
import random

import pytest

from dynamo.frontend.engine_stream import EngineStream
from dynamo.frontend.route import Route
from dynamo.frontend.service import FrontendService
from dynamo.frontend.stream_answer import StreamAnswer
from dynamo.frontend.unary_answer import UnaryAnswer
from dynamo.router.ticket import Ticket
from tests.frontend.front_door import CHAT, COMPLETIONS, StartFrontend, Wire, ask, chat, fetch, model_ready
from tests.frontend.kv_fleet import (
    Mocker,
    StartMocker,
    asked,
    eventually,
    kv,
    router_of,
    series,
    total,
    worker_of,
)

Fleet = tuple[FrontendService, list[Mocker]]


def story(number: int, words: int = 60) -> str:
    """Text of a few hundred tokens that begins like no other."""
    draw = random.Random(number)
    return " ".join(draw.choice(("red", "green", "blue", "cat", "dog", "sun", "rain")) for _ in range(words))


@pytest.fixture
async def fleet(start_frontend: StartFrontend, start_mocker: StartMocker) -> Fleet:
    """A frontend in KV mode with three simulated workers."""
    service = await start_frontend(**kv())
    mockers = [await start_mocker() for _ in range(3)]
    await model_ready(service, "tiny", workers=3)
    return service, mockers


async def test_repeated_prefixes_go_to_the_worker_that_holds_them(fleet: Fleet) -> None:
    service, _ = fleet
    router = router_of(service)
    homes, blocks = {}, 0
    for number in range(6):
        answer = await asked(service, story(number))
        homes[number] = worker_of(answer)
        blocks += answer.json()["usage"]["prompt_tokens"] // 16
    await eventually(lambda: len(router.index or ()) >= blocks)
    for number in (3, 0, 5, 1, 4, 2):
        again = await asked(service, f"{story(number)} and one thing more")
        assert worker_of(again) == homes[number]
        timing = again.json()["nvext"]["timing"]
        assert timing["kv_hit_rate"] > 0.5
        assert timing["router_queue_depth"] == 0
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_the_hit_rate_is_in_the_metrics(fleet: Fleet) -> None:
    service, mockers = fleet
    first = await asked(service, story(1))
    await eventually(lambda: len(router_of(service).index or ()) > 0)
    again = await asked(service, story(1))
    hit_rate = again.json()["nvext"]["timing"]["kv_hit_rate"]
    name = "dynamo_component_router_kv_hit_rate"
    labels = 'dynamo_component="backend",dynamo_namespace="dynamo",model="tiny"'
    assert await total(service, f"{name}_count", labels) == 2
    assert await total(service, f"{name}_sum", labels) == pytest.approx(hit_rate)
    cached = first.json()["usage"]["prompt_tokens"] // 16 * 16
    for word in ("best_eligible_cached_prefix", "selected_cached_prefix", "worker_reused"):
        assert await total(service, f"dynamo_component_router_kv_{word}_tokens_total", 'phase="aggregated"') == cached
    registered = await series(service, "dynamo_component_router_worker_registered")
    for mocker in mockers:
        assert any(f'router_worker_id="{mocker.instance_id}"' in labels for labels in registered)
    for gauge in ("active_decode_blocks", "active_prefill_tokens"):
        assert set((await series(service, f"dynamo_frontend_worker_{gauge}")).values()) == {0.0}
    assert await total(service, "dynamo_frontend_router_admission_received_total", 'policy_class="default"') == 2


async def test_a_decision_explains_itself(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    service, mockers = fleet
    home = worker_of(await asked(service, story(1)))
    await eventually(lambda: len(router_of(service).index or ()) > 0)
    answer = await asked(service, story(1))
    why = answer.json()["nvext"]["routing"]
    assert why["policy"] == "marginal"
    assert why["reason"] == "lowest cost"
    assert why["worker"] == {"worker_id": home, "dp_rank": 0}
    assert why["hit_rate"] > 0.5
    assert why["queued_ms"] == 0
    best, *others = why["candidates"]
    assert {c["worker_id"] for c in why["candidates"]} == {mocker.instance_id for mocker in mockers}
    assert best["worker_id"] == home
    assert best["overlap_blocks"]["device"] > 0
    assert best["cost"] < others[0]["cost"]
    assert best["terms"]["new_tokens"] == best["new_tokens"] < others[0]["new_tokens"]
    with caplog.at_level(logging.DEBUG, "dynamo.router"):
        await ask(service.port, CHAT, chat(story(2), max_tokens=1))
    assert any("'candidates'" in record.getMessage() for record in caplog.records)


async def test_a_stream_explains_itself_at_its_end(fleet: Fleet) -> None:
    service, _ = fleet
    body = chat(story(1), max_tokens=3, stream=True, nvext={"extra_fields": ["routing"]})
    *_, last = (await ask(service.port, CHAT, body)).data()
    assert last["nvext"]["routing"]["candidates"]


async def test_several_prompts_are_each_explained(fleet: Fleet) -> None:
    service, _ = fleet
    prompts = [story(number) for number in range(3)]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 2, "nvext": {"extra_fields": ["routing"]}}
    answer = (await ask(service.port, COMPLETIONS, body)).json()
    assert len(answer["choices"]) == 3
    # Sent at once, each is weighed with those before it.
    assert len({why["worker"]["worker_id"] for why in answer["nvext"]["routing"]}) == 3


async def test_without_events_it_goes_by_what_it_sent(start_frontend: StartFrontend, start_mocker: StartMocker) -> None:
    service = await start_frontend(**kv(use_kv_events=False))
    for _ in range(3):
        await start_mocker()
    await model_ready(service, "tiny", workers=3)
    homes = [worker_of(await asked(service, story(number))) for number in range(4)]
    again = [worker_of(await asked(service, story(number))) for number in range(4)]
    assert again == homes
    status = (await fetch(service.port, "/status")).json()
    assert status["models"]["tiny"][0]["router"]["cache"]["known_by"] == "what is sent"
    assert await total(service, "dynamo_component_router_approximate_cache_effective_policy", 'policy="ttl"') == 1


async def test_asking_where_changes_nothing(fleet: Fleet) -> None:
    service, _ = fleet
    home = worker_of(await asked(service, story(1)))
    router = router_of(service)
    await eventually(lambda: len(router.index or ()) > 0)
    before = (router.stats.requests, len(router.index or ()))
    for name in ("query_instance_id", "query_instance_id:"):
        body = chat(story(1), nvext={"annotations": [name], "extra_fields": ["routing"]})
        answer = (await ask(service.port, CHAT, body)).json()
        assert answer["choices"][0]["message"]["content"] is None
        assert answer["nvext"]["worker_id"]["decode_worker_id"] == home
        assert answer["nvext"]["routing"]["hit_rate"] > 0.5
        tokens = answer["nvext"]["token_ids"]
    (event,) = (await ask(service.port, CHAT, {**body, "stream": True})).data()
    assert event["nvext"]["token_ids"] == tokens
    assert (router.stats.requests, len(router.index or ())) == before
    # What a gateway does with it:
    pinned = await asked(service, "", f"x-dynamo-worker-instance-id: {home}\r\n", nvext={"token_data": tokens})
    assert worker_of(pinned) == home
    assert pinned.json()["usage"]["prompt_tokens"] == len(tokens)


async def test_in_another_mode_asking_where_works_too(start_frontend: StartFrontend, start_mocker: StartMocker) -> None:
    service = await start_frontend()
    mocker = await start_mocker()
    await model_ready(service, "tiny")
    body = chat(story(1), nvext={"annotations": ["query_instance_id"]})
    answer = (await ask(service.port, CHAT, body)).json()
    assert answer["nvext"]["worker_id"]["decode_worker_id"] == mocker.instance_id
    why = (await asked(service, "x")).json()["nvext"]["routing"]
    assert "--router-mode kv does" in why["reason"]


async def test_one_request_can_override_the_router(fleet: Fleet) -> None:
    service, _ = fleet
    drawn = await asked(service, story(1), nvext={"router_config_override": {"router_temperature": 1.5}})
    assert drawn.json()["nvext"]["routing"]["reason"] == "drawn at temperature 1.5"
    for override, words in (
        ({"router_temperature": -1}, "at least 0"),
        ({"no_such": 1}, "not one of"),
        ({"overlap_score_credit": 2}, "marginal, has no such weight"),
    ):
        refused = await asked(service, story(1), nvext={"router_config_override": override})
        assert refused.status == 400
        assert words in refused.json()["message"]
        assert refused.json()["error"]["param"].startswith("router_config_override")


async def test_weights_of_a_request_count_where_the_policy_has_them(
    start_frontend: StartFrontend, start_mocker: StartMocker
) -> None:
    service = await start_frontend(**kv(router_policy="linear"))
    for _ in range(2):
        await start_mocker()
    await model_ready(service, "tiny", workers=2)
    await asked(service, story(1))
    await eventually(lambda: len(router_of(service).index or ()) > 0)
    for credit in (1, 0):
        answer = await asked(service, story(1), nvext={"router_config_override": {"overlap_score_credit": credit}})
        best = answer.json()["nvext"]["routing"]["candidates"][0]
        assert bool(best["terms"]["overlap_credit"]) is bool(credit)


async def test_two_frontends_share_what_they_send(start_frontend: StartFrontend, start_mocker: StartMocker) -> None:
    services = [await start_frontend(**kv(router_replica_sync=True)) for _ in range(2)]
    for _ in range(2):
        await start_mocker("--speedup-ratio", "0.05")
    for service in services:
        await model_ready(service, "tiny", workers=2)
    here, there = (router_of(service) for service in services)
    await eventually(lambda: here.sync and there.sync and here.sync.routers == there.sync.routers == 1)
    wire = await Wire.open(services[0].port)
    wire.post(CHAT, chat(story(1), max_tokens=400, ignore_eos=True, stream=True))
    await eventually(lambda: sum(there.scheduler.load.requests) == 1)
    busy = there.scheduler.load.requests.index(1)
    answer = await asked(services[1], story(2))
    assert worker_of(answer) != there.scheduler.load.workers[busy].worker_id
    wire.close()
    await eventually(lambda: sum(there.scheduler.load.requests) == sum(here.scheduler.load.requests) == 0)


async def test_two_models_of_one_frontend_have_series_of_their_own(
    start_frontend: StartFrontend, start_mocker: StartMocker
) -> None:
    service = await start_frontend(**kv())
    first, other = await start_mocker(name="one"), await start_mocker(name="two")
    for name in ("one", "two"):
        await model_ready(service, name)
    for _ in range(2):
        await ask(service.port, CHAT, chat(story(1), model="one", max_tokens=1))
    await ask(service.port, CHAT, chat(story(1), model="two", max_tokens=1))
    await eventually(lambda: len(router_of(service, "one").index or ()) and len(router_of(service, "two").index or ()))
    for metric in ("dynamo_component_router_requests_total", "dynamo_component_router_kv_index_blocks"):
        assert len(await series(service, metric)) == 2
    assert await total(service, "dynamo_component_router_requests_total", 'model="one"') == 2
    assert first.instance_id != other.instance_id
    await other.leave()
    await eventually(lambda: service.models.get("two") is None)
    await eventually(lambda: len(service.models._leaving) == 0)
    assert len(await series(service, "dynamo_component_router_kv_index_blocks")) == 1


async def test_the_account_ends_at_zero_whatever_clients_do(
    start_frontend: StartFrontend, start_mocker: StartMocker
) -> None:
    service = await start_frontend(**kv(router_track_output_blocks=True, router_queue_threshold=2.0))
    for _ in range(3):
        await start_mocker("--speedup-ratio", "5", "--max-num-batched-tokens", "256")
    await model_ready(service, "tiny", workers=3)
    router = router_of(service)
    draw = random.Random(7)

    async def client(number: int) -> None:
        wire = await Wire.open(service.port)
        for turn in range(4):
            length = draw.randrange(1, 60)
            stream = draw.random() < 0.7
            wire.post(CHAT, chat(story(number % 5), max_tokens=length, stream=stream, ignore_eos=True, n=1 + turn % 2))
            what = draw.random()
            if what < 0.3:
                await asyncio.sleep(draw.random() * 0.02)
                wire.close()
                wire = await Wire.open(service.port)
            elif what < 0.4 and stream:
                await wire.head()
                wire.close()
                wire = await Wire.open(service.port)
            else:
                assert (await wire.read()).status == 200
        wire.close()

    await asyncio.gather(*(client(number) for number in range(40)))
    await eventually(lambda: router.scheduler.load.idle)
    assert router.queue.pending == 0
    assert not router._tickets
    assert router.stats.leaked_bookings == 0


async def test_requests_leave_no_cycles_for_the_garbage_collector(fleet: Fleet) -> None:
    service, _ = fleet
    wire = await Wire.open(service.port)
    kinds = (EngineStream, Route, Ticket, StreamAnswer, UnaryAnswer)
    gc.collect()
    gc.disable()
    try:
        for number in range(6):
            wire.post(CHAT, chat(story(number), max_tokens=2, stream=bool(number % 2)))
            assert (await wire.read()).status == 200
        await eventually(lambda: not any(isinstance(each, kinds) for each in gc.get_objects()))
    finally:
        gc.enable()
        wire.close()
