"""Who waits, who is refused and who is let go, when workers of a KV router are busy, lost, or asked for by name?"""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from dynamo.frontend.service import FrontendService
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    ScriptedWorker,
    StartFrontend,
    StartWorker,
    Wire,
    ask,
    chat,
    fetch,
    model_ready,
)
from tests.frontend.kv_fleet import asked, eventually, kv, router_of, start_sized, total, worker_of

LONG = "red green blue cat dog sun rain " * 40  # far over one step of the workers here


@pytest.fixture
def one_may_wait(tmp_path: Path) -> str:
    """A policy file: requests wait while a worker has anything to compute, one of them at most."""
    path = tmp_path / "policy.yaml"
    path.write_text("policy_classes: [{name: default, prefill_busy_threshold: 0, request_queue_limit_per_worker: 1}]")
    return str(path)


async def one_worker(
    start_frontend: StartFrontend, start_worker: StartWorker, sized: dict[str, Any] | None = None, **settings: Any
) -> tuple[FrontendService, ScriptedWorker]:
    service = await start_frontend(**kv(**settings))
    worker = await start_sized(start_worker, **(sized or {}))
    await model_ready(service, "tiny")
    return service, worker


async def post(service: FrontendService, content: str = LONG, headers: str = "", **fields: Any) -> Wire:
    """A request whose answer is read later."""
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(content, **fields), headers)
    return wire


# --- the queue


async def test_a_full_queue_is_a_529_that_says_when_to_come_back(
    start_frontend: StartFrontend, start_worker: StartWorker, one_may_wait: str
) -> None:
    service, worker = await one_worker(start_frontend, start_worker, router_policy_config=one_may_wait)
    first = await post(service)
    taken = await worker.take()
    second = await post(service)
    await eventually(lambda: router_of(service).queue.pending == 1)
    refused = await ask(service.port, CHAT, chat(LONG))
    assert refused.status == 529
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert refused.json()["code"] == 529
    assert "queue of class 'default' is full: 1 of 1 requests" in refused.json()["message"]
    assert await total(service, "dynamo_frontend_router_queue_pending_requests", 'policy_class="default"') == 1
    assert await total(service, "dynamo_frontend_router_queue_pending_isl_tokens") > 200
    assert await total(service, "dynamo_frontend_router_queue_backpressure_total", 'reason="request_limit"') == 1
    taken.answer("done")
    assert (await first.read()).status == 200
    (await worker.take()).answer("done too")
    assert (await second.read()).status == 200
    await eventually(lambda: router_of(service).scheduler.load.idle)


async def test_a_queued_request_goes_with_a_first_token_and_says_how_long_it_waited(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service, worker = await one_worker(start_frontend, start_worker, router_queue_threshold=1.0)
    wires = [await post(service, stream=True)]
    first = await worker.take()
    wires.append(await post(service))
    await eventually(lambda: router_of(service).queue.pending == 1)
    third = await post(service, nvext={"extra_fields": ["timing", "routing"]})
    await eventually(lambda: router_of(service).queue.pending == 2)
    assert worker.requests.empty()
    first.say("he")
    second = await worker.take()
    assert worker.requests.empty()
    second.say("he")
    (await worker.take()).answer("done")
    nvext = (await third.read()).json()["nvext"]
    assert len(wires) == 2
    assert nvext["timing"]["router_queue_depth"] == 1
    assert nvext["routing"]["queued_ms"] > 0


async def test_a_client_that_leaves_while_queued_frees_its_place(
    start_frontend: StartFrontend, start_worker: StartWorker, one_may_wait: str
) -> None:
    service, worker = await one_worker(start_frontend, start_worker, router_policy_config=one_may_wait)
    router = router_of(service)
    first = await post(service)
    taken = await worker.take()
    gone = await post(service)
    await eventually(lambda: router.queue.pending == 1)
    gone.close()
    await eventually(lambda: router.queue.pending == 0)
    waits = await post(service, "another " + LONG)
    await eventually(lambda: router.queue.pending == 1)
    taken.answer("done")
    assert (await first.read()).status == 200
    (await worker.take()).answer("mine")
    assert (await waits.read()).json()["choices"][0]["message"]["content"] == "mine"
    assert worker.requests.empty()
    assert router.scheduler.load.idle
    assert not router._tickets


async def test_who_waits_too_long_is_refused(
    start_frontend: StartFrontend, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_ROUTER_QUEUE_TIMEOUT_SECS", "0.1")
    service, worker = await one_worker(start_frontend, start_worker, router_queue_threshold=0.0)
    held = await post(service)
    await worker.take()
    late = await ask(service.port, CHAT, chat(LONG))
    assert late.status == 529
    assert "DYN_ROUTER_QUEUE_TIMEOUT_SECS" in late.json()["message"]
    held.close()


async def test_the_more_urgent_goes_first(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service, worker = await one_worker(start_frontend, start_worker, router_queue_threshold=0.0)
    router = router_of(service)
    wires = [await post(service)]
    taken = await worker.take()
    for waiting, (content, headers, nvext) in enumerate(
        (
            ("plain", "", {}),
            ("strict", "x-dynamo-request-strict-priority: 1\r\n", {}),
            ("hinted", "", {"agent_hints": {"priority": 100}}),
            ("urgent", "x-dynamo-request-priority: 500\r\n", {}),
        )
    ):
        wires.append(await post(service, f"{content} {LONG}", headers, nvext=nvext))
        await eventually(lambda waiting=waiting: router.queue.pending == waiting + 1)
    order = []
    for wire in wires[:4]:
        taken.answer("x")
        taken = await worker.take()
        text = taken._tokenizer.decode(taken.request.token_ids)
        order.append(next(word for word in ("plain", "strict", "hinted", "urgent") if word in text))
        assert not wire.writer.is_closing()
    assert order == ["strict", "urgent", "hinted", "plain"]


async def test_a_worker_that_dies_takes_its_bookings_along_and_who_waits_goes_elsewhere(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service, worker = await one_worker(start_frontend, start_worker, router_queue_threshold=0.0)
    router = router_of(service)
    held = await post(service)
    await worker.take()
    waits = await post(service, "another " + LONG)
    await eventually(lambda: router.queue.pending == 1)
    other = await start_sized(start_worker)
    (await other.take()).answer("here")
    assert (await waits.read()).status == 200
    await worker.die()
    assert (await held.read()).status == 503
    await eventually(lambda: router.scheduler.load.idle)
    assert not router._tickets


async def test_a_worker_that_cannot_be_reached_is_passed_over(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service, worker = await one_worker(start_frontend, start_worker)
    other = await start_sized(start_worker)
    await model_ready(service, "tiny", workers=2)
    worker.auto = other.auto = "x"
    await worker.runtime.server.close()  # still in discovery, and nobody listens
    answers = [await asked(service, f"{number} {LONG}") for number in range(4)]
    assert {answer.status for answer in answers} == {200}
    assert {worker_of(answer) for answer in answers} == {other.instance_id}
    assert max(answer.json()["nvext"]["routing"]["attempts"] for answer in answers) <= 2
    assert router_of(service).scheduler.load.idle


# --- overload


async def test_thresholds_can_be_read_and_set(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service, worker = await one_worker(start_frontend, start_worker, active_decode_blocks_threshold=0.9)
    nothing = {"active_prefill_tokens_threshold": None, "active_prefill_tokens_threshold_frac": None}
    now = {"model": "tiny", "active_decode_blocks_threshold": 0.9, **nothing}
    assert (await fetch(service.port, "/busy_threshold")).json() == {"thresholds": [now]}
    assert (await ask(service.port, "/busy_threshold", {"model": "tiny"})).json() == now
    now["active_prefill_tokens_threshold"] = 10
    change = {"model": "tiny", "active_prefill_tokens_threshold": 10}
    assert (await ask(service.port, "/busy_threshold", change)).json() == now
    held = await post(service)
    taken = await worker.take()
    refused = await ask(service.port, CHAT, chat("hello"))
    assert refused.status == 529
    assert refused.headers["retry-after"] == "1"
    assert "active_prefill_tokens_threshold 10" in refused.json()["message"]
    assert await total(service, "dynamo_frontend_router_admission_rejected_total", 'reason="busy"') == 1
    change["active_prefill_tokens_threshold"] = 1_000_000
    assert (await ask(service.port, "/busy_threshold", change)).status == 200
    fine = await post(service, "hello")
    (await worker.take()).answer("fine")
    assert (await fine.read()).status == 200
    taken.answer("done")
    assert (await held.read()).status == 200


async def test_thresholds_outlive_the_workers_they_were_set_for(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service, worker = await one_worker(start_frontend, start_worker)
    await ask(service.port, "/busy_threshold", {"model": "tiny", "active_prefill_tokens_threshold": 10})
    await worker.leave()
    await eventually(lambda: service.models.get("tiny") is None)
    await start_sized(start_worker)
    await model_ready(service, "tiny")
    assert router_of(service).thresholds.active_prefill_tokens_threshold == 10


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "none", "active_decode_blocks_threshold": 0.5}, 404, "Model not found"),
        ({"model": "tiny", "active_decode_blocks_threshold": 5}, 400, "between 0 and 1"),
        ({"model": "tiny", "active_prefill_tokens_threshold": -1}, 400, "active_prefill_tokens_threshold"),
        ({"model": "tiny", "busy": 1}, 400, "busy"),
        ({}, 400, "model"),
        (b"x", 400, "Validation"),
    ],
)
async def test_thresholds_that_cannot_be_are_refused(
    start_frontend: StartFrontend, start_worker: StartWorker, body: Any, status: int, words: str
) -> None:
    service, _ = await one_worker(start_frontend, start_worker)
    answer = await ask(service.port, "/busy_threshold", body)
    assert answer.status == status
    assert words in answer.json()["message"]


async def test_thresholds_need_kv_mode_and_can_be_switched_off(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    await start_sized(start_worker)
    await model_ready(service, "tiny")
    change = {"model": "tiny", "active_prefill_tokens_threshold": 10}
    refused = await ask(service.port, "/busy_threshold", change)
    assert refused.status == 400
    assert "--router-mode kv" in refused.json()["message"]
    closed = await start_frontend(limits={"admin_api": False}, **kv())
    assert (await ask(closed.port, "/busy_threshold", change)).status == 404
    assert "/busy_threshold" not in (await fetch(closed.port, "/openapi.json")).json()["paths"]


# --- who may take it


async def two_workers(
    start_frontend: StartFrontend, start_worker: StartWorker, *sized: dict[str, Any], **settings: Any
) -> tuple[FrontendService, list[ScriptedWorker]]:
    service = await start_frontend(**kv(**settings))
    workers = [await start_sized(start_worker, **each) for each in (sized or ({}, {}))]
    await model_ready(service, "tiny", workers=len(workers))
    for worker in workers:
        worker.auto = "x"
    return service, workers


async def test_a_pin_is_obeyed_and_one_to_nobody_is_a_503(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service, workers = await two_workers(start_frontend, start_worker)
    for worker in (*workers, *workers):
        answer = await asked(service, LONG, nvext={"backend_instance_id": worker.instance_id})
        assert worker_of(answer) == worker.instance_id
        assert answer.json()["nvext"]["routing"]["reason"] == "the only worker allowed"
    assert (await asked(service, LONG, nvext={"backend_instance_id": 77})).status == 503


async def test_a_rank_is_chosen_told_to_the_worker_and_can_be_asked_for(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service, worker = await one_worker(start_frontend, start_worker, {"data_parallel_size": 2})
    first = await post(service)
    second = await post(service, "another " + LONG, nvext={"extra_fields": ["worker_id"]})
    taken = [await worker.take(), await worker.take()]
    assert sorted(each.request.routing.dp_rank for each in taken if each.request.routing) == [0, 1]
    for each in taken:
        each.answer("x")
    assert (await first.read()).status == 200
    rank = (await second.read()).json()["nvext"]["worker_id"]["decode_dp_rank"]
    worker.auto = "x"
    for wanted in (0, 1, rank):
        answer = await asked(service, LONG, f"x-dynamo-dp-rank: {wanted}\r\n")
        assert answer.json()["nvext"]["worker_id"]["decode_dp_rank"] == wanted
    assert (await asked(service, LONG, nvext={"dp_rank": 9})).status == 400


async def test_taints_filter_and_prefer(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service, (plain, tainted) = await two_workers(start_frontend, start_worker, {}, {"taints": {"eu"}})
    for _ in range(3):
        answer = await asked(service, LONG, nvext={"routing_constraints": {"required_taints": ["eu"]}})
        assert worker_of(answer) == tainted.instance_id
        liked = {"routing_constraints": {"preferred_taints": {"eu": -2}}}
        assert worker_of(await asked(service, LONG, nvext=liked)) == plain.instance_id
    none = await asked(service, LONG, nvext={"routing_constraints": {"required_taints": ["mars"]}})
    assert none.status == 503
    assert "mars" in none.json()["message"]
    wrong = await asked(service, LONG, nvext={"routing_constraints": {"preferred_taints": {"eu": 1e9}}})
    assert wrong.status == 400


async def test_a_session_stays_where_it_was(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service, _ = await two_workers(start_frontend, start_worker, session_affinity_ttl_secs=60)
    header = "x-dynamo-session-id: s1\r\n"
    home = worker_of(await asked(service, LONG, header))
    homes = {worker_of(await asked(service, f"{number} {LONG}", header)) for number in range(6)}
    assert homes == {home}


async def test_what_needs_kv_mode_is_refused_in_another(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    (await start_worker()).auto = "x"
    await model_ready(service, "tiny")
    for name, value in (
        ("routing_constraints", {"required_taints": ["eu"]}),
        ("router_config_override", {"router_temperature": 1}),
    ):
        refused = await asked(service, "x", nvext={name: value})
        assert refused.status == 400
        assert "--router-mode kv" in refused.json()["message"]
        assert refused.json()["error"]["param"] == f"nvext.{name}"


# --- loud refusals


async def test_without_a_block_size_a_model_is_refused_loudly(
    start_frontend: StartFrontend, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    service = await start_frontend(**kv())
    with caplog.at_level(logging.ERROR, "dynamo.frontend"):
        await start_worker()
        await eventually(lambda: "kv_cache_block_size" in caplog.text)
    answer = await ask(service.port, CHAT, chat("x"))
    assert answer.status == 503
    assert "--router-mode kv cannot work for tiny" in answer.json()["message"]
    status = (await fetch(service.port, "/status")).json()
    assert "--router-mode kv cannot work" in status["warnings"][0]


async def test_a_worker_whose_cache_cannot_be_known_is_told_loudly_and_counted(
    start_frontend: StartFrontend, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "dynamo.router"):
        service, worker = await one_worker(start_frontend, start_worker, {"kv_event_publishing_enabled": False})
    assert "it publishes no KV events" in caplog.text
    worker.auto = "x"
    assert (await ask(service.port, CHAT, chat("x"))).status == 200
    assert await total(service, "dynamo_component_router_kv_event_source_mismatch_workers") == 1
    warnings = (await fetch(service.port, "/status")).json()["warnings"]
    assert any("publishes no KV events" in line for line in warnings)


async def test_settings_without_effect_are_warned_of(
    start_frontend: StartFrontend, caplog: pytest.LogCaptureFixture
) -> None:
    settings = kv(router_temperature=1.0, session_affinity_ttl_secs=5)
    with caplog.at_level(logging.WARNING, "dynamo.frontend"):
        service = await start_frontend(**{**settings, "router_mode": "random"})
    for flag in ("--router-temperature", "--router-session-affinity-ttl-secs"):
        assert f"{flag} has no effect: --router-mode is random" in caplog.text
    assert len((await fetch(service.port, "/status")).json()["warnings"]) == 2


async def test_several_prompts_leave_nothing_behind_when_one_is_refused(
    start_frontend: StartFrontend, start_worker: StartWorker, one_may_wait: str
) -> None:
    service, worker = await one_worker(start_frontend, start_worker, router_policy_config=one_may_wait)
    answer = await ask(service.port, COMPLETIONS, {"model": "tiny", "prompt": [f"{i} {LONG}" for i in range(4)]})
    assert answer.status == 529
    router = router_of(service)
    await eventually(lambda: router.scheduler.load.idle)
    assert router.queue.pending == 0
    assert not router._tickets
    async with asyncio.timeout(5):
        await (await worker.take()).cancelled.wait()
