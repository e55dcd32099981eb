"""What a client sees, and a worker is told, when one of them is lost."""

import asyncio
import json

import pytest

from dynamo.llm.model_card import CARD_PREFIX
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import (
    ConnectionTimeout,
    DiscoveryError,
    EngineShutdown,
    HttpError,
    InvalidArgument,
    RouterQueueLimitExceeded,
    WorkerOverloaded,
)
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    Served,
    StartFrontend,
    StartWorker,
    Taken,
    Wire,
    ask,
    chat,
    fetch,
    model_gone,
    model_ready,
)


async def stopped(taken: Taken) -> None:
    """Wait until the worker is told that nobody wants the rest."""
    async with asyncio.timeout(5):
        await taken.cancelled.wait()
    taken.stream.end()


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (InvalidArgument("Validation: top_k is not for me", "top_k"), 400, "validation"),
        (WorkerOverloaded("full"), 529, "overload"),
        (RouterQueueLimitExceeded(current=3, limit=2), 529, "overload"),
        (EngineShutdown("leaving"), 503, "unavailable"),
        (ConnectionTimeout("slow"), 504, "response_timeout"),
        (HttpError(418, "teapot"), 418, "validation"),
        (KeyError("a bug"), 500, "internal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(
    served: Served, error: Exception, status: int, error_type: str, stream: bool
) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=stream))
    (await worker.take()).stream.fail(error)
    answer = await wire.read()
    assert answer.status == status
    assert ("retry-after" in answer.headers) == (status in (503, 529))
    assert answer.json()["code"] == status
    text = (await fetch(service.port, "/metrics")).body.decode()
    assert f'error_type="{error_type}"' in text
    worker.auto = "again"
    wire.post(CHAT, chat())
    assert (await wire.read()).status in (200, 503)  # 503: the worker may be left out for a while now
    wire.close()


async def test_overload_answers_what_the_operator_chose(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(limits={"overload_status": 429})
    worker = await start_worker()
    await model_ready(service, "tiny")
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat())
    (await worker.take()).stream.fail(WorkerOverloaded("full"))
    answer = await wire.read()
    assert answer.status == 429
    assert "retry-after" in answer.headers
    wire.close()


async def test_an_error_mid_stream_is_the_last_event(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    taken.say("so far")
    assert (await wire.head())[0] == 200
    assert b"so" in await wire.chunk()
    taken.stream.fail(EngineShutdown("the engine died"))
    event = await wire.chunk()
    assert event.startswith(b"event: error\ndata: ")
    last = json.loads(event.removeprefix(b"event: error\ndata: "))
    assert last["error"]["message"] == "the engine died"
    assert last["code"] == 503
    assert await wire.chunk() == b""  # the end of the body, with no [DONE]
    worker.auto = "again"
    wire.post(CHAT, chat())
    await wire.read()  # the connection is still in step
    wire.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_lost_before_the_first_token_is_a_503(served: Served, stream: bool) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=stream))
    taken = await worker.take()
    await worker.die()
    answer = await wire.read()
    assert answer.status == 503
    assert answer.json()["error"]["type"] == "server_error"
    taken.stream.end()
    wire.close()


async def test_a_worker_lost_mid_stream_ends_it_with_an_error(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    taken.say("half")
    await wire.head()
    await wire.chunk()
    await worker.die()
    assert b"event: error\ndata: {" in await wire.read_rest()
    taken.stream.end()
    wire.close()


async def test_no_worker_is_a_503(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat())
    taken = await worker.take()
    await worker.die()  # and so it is left out for a while, although discovery still has it
    assert (await wire.read()).status == 503
    answer = await ask(service.port, CHAT, chat())
    assert answer.status == 503
    assert answer.json()["error"]["code"] == "unavailable"
    taken.stream.end()
    wire.close()


async def test_a_worker_that_cannot_be_reached_is_passed_over(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    good, bad = await start_worker(), await start_worker()
    await model_ready(service, "tiny", workers=2)
    good.auto = "from the other"
    await bad.runtime.server.close()  # its record stays in discovery, its port does not answer
    for _ in range(4):
        answer = await ask(service.port, CHAT, chat())
        assert answer.json()["choices"][0]["message"]["content"] == "from the other"


async def test_a_client_that_leaves_mid_stream_stops_the_worker(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    taken.say("x")
    await wire.head()
    wire.close()
    await stopped(taken)
    text = (await fetch(service.port, "/metrics")).body.decode()
    assert "dynamo_frontend_disconnected_clients 1.0" in text
    assert 'error_type="cancelled"' in text


async def test_a_client_that_leaves_before_a_unary_answer_stops_the_worker(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat())
    taken = await worker.take()
    wire.close()
    await stopped(taken)


async def test_a_client_that_leaves_stops_every_prompt_of_its_batch(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": ["a", "b", "c"], "stream": True})
    taken = [await worker.take() for _ in range(3)]
    wire.close()
    for one in taken:
        await stopped(one)


async def test_one_failed_prompt_fails_the_batch_and_stops_the_others(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": ["a", "b"]})
    first, second = await worker.take(), await worker.take()
    first.stream.fail(InvalidArgument("Validation: no"))
    assert (await wire.read()).status == 400
    await stopped(second)
    wire.close()


async def test_a_silent_worker_is_given_up(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend(limits={"stream_timeout_s": 0.05})
    worker = await start_worker()
    await model_ready(service, "tiny")
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat())
    taken = await worker.take()
    answer = await wire.read()
    assert answer.status == 504
    assert "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS" in answer.json()["message"]
    await stopped(taken)
    wire.close()


async def test_nonsense_from_a_worker_is_a_500_and_stops_it(served: Served) -> None:
    service, worker = served
    for nonsense in ({"token_ids": "many"}, 17, {"index": 5, "token_ids": [1]}):
        wire = await Wire.open(service.port)
        wire.post(CHAT, chat())
        taken = await worker.take()
        taken.stream.send(nonsense)
        answer = await wire.read()
        assert answer.status == 500
        await stopped(taken)
        wire.close()


async def test_an_engine_that_gives_up_is_no_answer(served: Served) -> None:
    service, worker = served
    for reason, status in (("cancelled", 503), ("error", 500)):
        wire = await Wire.open(service.port)
        wire.post(CHAT, chat())
        taken = await worker.take()
        taken.finish(reason)
        taken.stream.end()
        assert (await wire.read()).status == status
        wire.close()


async def test_a_pin_to_nobody_is_a_503_and_to_somebody_is_kept(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(router_mode="direct")
    workers = [await start_worker(), await start_worker()]
    await model_ready(service, "tiny", workers=2)
    for number, worker in enumerate(workers):
        worker.auto = f"worker {number}"
    for number in (1, 1, 0, 1):
        header = f"x-dynamo-worker-instance-id: {workers[number].instance_id}\r\n"
        answer = await ask(service.port, CHAT, chat(), header)
        assert answer.json()["choices"][0]["message"]["content"] == f"worker {number}"
    assert (await ask(service.port, CHAT, chat(), "x-dynamo-worker-instance-id: 1\r\n")).status == 503
    answer = await ask(service.port, CHAT, chat())
    assert answer.status == 400
    assert "x-dynamo-worker-instance-id" in answer.json()["message"]


@pytest.mark.parametrize("mode", ["round-robin", "random", "power-of-two", "least-loaded", "device-aware-weighted"])
async def test_requests_are_spread_over_workers(
    start_frontend: StartFrontend, start_worker: StartWorker, mode: str
) -> None:
    service = await start_frontend(router_mode=mode)
    workers = [await start_worker(), await start_worker()]
    await model_ready(service, "tiny", workers=2)
    for worker in workers:
        worker.auto = "x"
    answers = await asyncio.gather(*(ask(service.port, CHAT, chat()) for _ in range(20)))
    assert [answer.status for answer in answers] == [200] * 20
    assert all(worker.answered for worker in workers)
    assert sum(worker.answered for worker in workers) == 20


async def test_a_frontend_that_does_not_know_the_models_yet_calls_none_unknown(
    runtime: DistributedRuntime,
    start_frontend: StartFrontend,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await start_worker()
    asked, answers = asyncio.Event(), asyncio.Event()
    look = runtime.discovery.get_prefix

    async def look_late(prefix: str) -> dict[str, bytes]:
        if prefix == CARD_PREFIX and not answers.is_set():
            asked.set()
            raise DiscoveryError("the store does not answer")
        return await look(prefix)

    monkeypatch.setattr(runtime.discovery, "get_prefix", look_late)
    monkeypatch.setattr("dynamo.frontend.models.FIRST_LOOK_RETRY_S", 0.01)
    service = await start_frontend()
    await asked.wait()
    refused = await ask(service.port, CHAT, chat())
    assert (refused.status, refused.json()["error"]["code"]) == (503, "unavailable")
    health = await fetch(service.port, "/health")
    assert (health.status, health.json()["stage"]) == (503, "starting")
    answers.set()
    await model_ready(service, "tiny")
    assert (await ask(service.port, CHAT, chat(model="another"))).status == 404
    assert (await fetch(service.port, "/health")).status == 200


async def test_a_draining_frontend_refuses_new_and_finishes_old(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    service.drain()
    health = await fetch(service.port, "/health")
    assert (health.status, health.json()["status"], health.json()["stage"]) == (503, "not_ready", "draining")
    assert (await fetch(service.port, "/live")).status == 200
    refused = await ask(service.port, CHAT, chat())
    assert refused.status == 503
    assert refused.json()["error"]["code"] == "server_shutting_down"
    assert refused.headers["connection"] == "close"
    taken.answer("finished")
    assert (await wire.read()).text() == "finished"


async def test_a_frontend_that_hands_over_answers_who_is_connected_and_sends_them_away(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.frontend.service.POLITE_S", 0.3)
    service, worker = served
    port = service.port
    used, unused, streaming = [await Wire.open(port) for _ in range(3)]
    for wire in (used, unused):
        wire.get("/live")
        assert "connection" not in (await wire.read()).headers
    streaming.post(CHAT, chat(stream=True))
    taken = await worker.take()
    handing_over = asyncio.create_task(service.hand_over())
    await asyncio.sleep(0)  # it has begun
    with pytest.raises(ConnectionRefusedError):
        await Wire.open(port)
    used.post(CHAT, chat())
    (await worker.take()).answer("the last here")
    last = await used.read()
    assert last.json()["choices"][0]["message"]["content"] == "the last here"
    assert last.headers["connection"] == "close"
    assert await used.closed()
    assert await unused.closed()
    assert not handing_over.done()
    taken.answer("begun before")
    assert (await streaming.read()).text() == "begun before"
    streaming.get("/health")  # its connection was promised to go on: it has as long as the others to be used again
    answer = await streaming.read()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    async with asyncio.timeout(5):
        await handing_over


async def test_what_outlives_the_grace_ends_with_an_error(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    taken.say("half")
    await wire.head()
    await wire.chunk()
    await service.close()
    assert b"shutting down" in await wire.read_rest()
    await stopped(taken)


async def test_the_model_disappears_with_its_worker(served: Served) -> None:
    service, worker = served
    await worker.leave()
    await model_gone(service, "tiny")
    assert (await ask(service.port, CHAT, chat())).status == 404
    assert (await fetch(service.port, "/v1/models")).json()["data"] == []
    assert 'model_ready{model="tiny"} 0.0' in (await fetch(service.port, "/metrics")).body.decode()
