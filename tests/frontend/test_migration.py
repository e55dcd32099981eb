"""A worker is lost in mid-answer: what the client sees, and what the next worker gets."""

import asyncio
from typing import Any

import pytest

from dynamo.frontend import migration
from dynamo.frontend.service import FrontendService
from dynamo.runtime.errors import EngineShutdown, InvalidArgument, WorkerOverloaded
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    PATIENCE_S,
    Answer,
    ScriptedWorker,
    StartFrontend,
    StartWorker,
    Taken,
    Wire,
    chat,
    fetch,
    model_ready,
)
from tests.frontend.kv_fleet import eventually

TEXT = "Zwölf Boxkämpfer jagen 🦊 quer über den Deich"


class Fleet:
    """Workers that leave their answers to the test, behind a frontend that moves requests."""

    def __init__(self, service: FrontendService, workers: list[ScriptedWorker]) -> None:
        self.service, self.workers = service, workers
        self.where = workers[0]

    async def take(self) -> Taken:
        """The next request, whoever got it; `self.where` says who."""
        waiting = {asyncio.ensure_future(worker.requests.get()): worker for worker in self.workers}
        try:
            async with asyncio.timeout(PATIENCE_S):
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            first = done.pop()
            self.where = waiting[first]
            return first.result()
        finally:
            for one in waiting:
                one.cancel()

    async def post(self, body: dict[str, Any], path: str = CHAT, headers: str = "") -> tuple[Wire, Taken]:
        wire = await Wire.open(self.service.port)
        wire.post(path, body, headers)
        return wire, await self.take()

    async def metrics(self) -> str:
        return (await fetch(self.service.port, "/metrics")).body.decode()


@pytest.fixture
async def fleet(start_frontend: StartFrontend, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "0.01")  # these workers lose requests one after another
    service = await start_frontend(migration_limit=3)
    workers = [await start_worker() for _ in range(2)]
    await model_ready(service, "tiny", workers=2)
    return Fleet(service, workers)


def tokens_of(taken: Taken, text: str) -> list[int]:
    return taken._tokenizer.encode(text)


def lose(taken: Taken) -> None:
    """Its worker says that it is going, in the middle of the answer."""
    taken.stream.fail(EngineShutdown("the engine died"))


async def say_seen(wire: Wire, taken: Taken, text: str) -> bytes:
    """Say it, and give back the beginning of the client's stream once all of it is there."""
    taken.say(text)
    await wire.head()
    seen = b""
    while text_of(seen) != text:
        seen += await wire.chunk()
    return seen


def text_of(events: bytes) -> str:
    return Answer(200, {}, events or b"\n\n", []).text()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_goes_on_after_any_token(fleet: Fleet, stream: bool) -> None:
    count = len(tokens_of((await fleet.post(chat()))[1], TEXT))
    for k in range(count):
        body = chat("Hello", stream=stream, max_tokens=100) | (
            {"stream_options": {"include_usage": True}} if stream else {}
        )
        wire, first = await fleet.post(body)
        tokens = tokens_of(first, TEXT)
        for token in tokens[:k]:
            first.send(token_ids=[token])
        lose(first)
        second = await fleet.take()
        assert second.request.token_ids == first.request.token_ids + tokens[:k]
        assert second.request.resumed_tokens == k
        assert second.request.stop_conditions.max_tokens == 100 - k
        for token in tokens[k:]:
            second.send(token_ids=[token])
        second.finish()
        second.stream.end()
        answer = await wire.read()
        wire.close()
        assert (answer.text() if stream else answer.json()["choices"][0]["message"]["content"]) == TEXT
        usage = answer.data()[-1]["usage"] if stream else answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(first.request.token_ids), count)


async def test_a_broken_connection_moves_its_requests(fleet: Fleet) -> None:
    wire, first = await fleet.post(chat(stream=True))
    seen = await say_seen(wire, first, "one ")
    await fleet.where.die()
    second = await fleet.take()
    second.answer("two")
    assert text_of(seen + await wire.read_rest()) == "one two"
    first.stream.end()
    wire.close()


async def test_each_move_counts(fleet: Fleet) -> None:
    wire, taken = await fleet.post(chat())
    for k in range(3):
        taken.say("a")
        lose(taken)
        taken = await fleet.take()
        assert taken.request.resumed_tokens == k + 1
    lose(taken)
    answer = await wire.read()
    wire.close()
    assert answer.status == 503
    assert "Stream ended before generation completed" in answer.json()["message"]
    assert "--migration-limit" in answer.json()["message"]
    text = await fleet.metrics()
    name = "dynamo_frontend_model_migration"
    assert f'{name}_total{{migration_type="ongoing_request",model="tiny",outcome="success"}} 2.0' in text
    assert f'{name}_total{{migration_type="ongoing_request",model="tiny",outcome="failure"}} 1.0' in text
    assert f'{name}_duration_seconds_count{{model="tiny"}} 3' in text


async def test_an_overloaded_worker_is_one_of_which_nothing_was_had(fleet: Fleet) -> None:
    wire, first = await fleet.post(chat())
    first.stream.fail(WorkerOverloaded("full"))
    (await fleet.take()).answer("from the next")
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "from the next"
    assert 'migration_type="new_request",model="tiny",outcome="success"} 1.0' in await fleet.metrics()
    wire.close()


async def test_a_worker_that_gives_requests_up_as_it_leaves_loses_none(fleet: Fleet) -> None:
    wire, first = await fleet.post(chat())
    first.say("one ")
    first.finish("cancelled")
    (await fleet.take()).answer("two")
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "one two"
    wire.close()


async def test_a_silent_worker_is_left_and_told_so(
    start_frontend: StartFrontend, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "5")
    service = await start_frontend(limits={"stream_timeout_s": 0.3}, migration_limit=1)
    fleet = Fleet(service, [await start_worker() for _ in range(2)])
    await model_ready(service, "tiny", workers=2)
    wire, first = await fleet.post(chat(stream=True))
    silent = fleet.where
    first.say("one ")
    second = await fleet.take()
    assert fleet.where is not silent
    second.answer("two")
    assert (await wire.read()).text() == "one two"
    async with asyncio.timeout(PATIENCE_S):
        await first.cancelled.wait()
    first.stream.end()
    wire.close()


async def test_a_stop_string_is_found_where_two_workers_meet(fleet: Fleet) -> None:
    wire, first = await fleet.post(chat(stop=["END"]))
    first.say("so far E")
    lose(first)
    second = await fleet.take()
    for token in tokens_of(second, "ND and more"):
        second.send(token_ids=[token])
    choice = (await wire.read()).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("so far ", "stop")
    async with asyncio.timeout(PATIENCE_S):
        await second.cancelled.wait()
    second.stream.end()
    wire.close()


async def test_logprobs_go_on(fleet: Fleet) -> None:
    wire, taken = await fleet.post(chat(logprobs=True))
    tokens = tokens_of(taken, "one two")
    for number, token in enumerate(tokens):
        if number == 1:
            lose(taken)
            taken = await fleet.take()
        taken.send(token_ids=[token], log_probs=[-float(number)], top_logprobs=[[]])
    taken.finish()
    taken.stream.end()
    entries = (await wire.read()).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [-float(number) for number in range(len(tokens))]
    wire.close()


async def test_limits_and_the_penalty_for_what_was_said_go_with_it(fleet: Fleet) -> None:
    body = chat(max_tokens=9, min_tokens=5, frequency_penalty=0.5, seed=7, temperature=1, logit_bias={"1": 2})
    wire, first = await fleet.post(body)
    (token,) = tokens_of(first, "a")
    for _ in range(3):
        first.send(token_ids=[token])
    lose(first)
    second = await fleet.take()
    stop, sampling = second.request.stop_conditions, second.request.sampling_options
    assert (stop.max_tokens, stop.min_tokens) == (6, 2)
    assert sampling.logit_bias == {1: 2, token: -1.5}
    assert (sampling.seed, sampling.frequency_penalty) == (7, 0.5)
    second.answer("")
    assert (await wire.read()).json()["usage"]["completion_tokens"] == 3
    wire.close()


async def test_the_first_worker_says_what_was_cached(fleet: Fleet) -> None:
    wire, first = await fleet.post(chat())
    first.say("a")
    lose(first)
    second = await fleet.take()
    second.finish(cached=len(second.request.token_ids))  # its prompt was the client's and the answer so far
    second.stream.end()
    usage = (await wire.read()).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]
    wire.close()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"frequency_penalty": 1, "repetition_penalty": 1.1}, "repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, "grammar"),
        ({"nvext": {"max_thinking_tokens": 5}}, "thought"),
    ],
)
async def test_what_cannot_go_on_as_it_was_ends_with_the_reason(fleet: Fleet, more: dict[str, Any], why: str) -> None:
    wire, taken = await fleet.post(chat(**more))
    taken.say("{")
    lose(taken)
    answer = await wire.read()
    assert answer.status == 503
    assert why in answer.json()["message"]
    wire.close()


async def test_what_has_not_begun_moves_whatever_it_asks_for(fleet: Fleet) -> None:
    wire, first = await fleet.post(chat(presence_penalty=1))
    lose(first)
    (await fleet.take()).answer("whole")
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "whole"
    wire.close()


async def test_several_choices_do_not_move(fleet: Fleet) -> None:
    wire, taken = await fleet.post(chat(n=2))
    taken.say("a")
    lose(taken)
    assert (await wire.read()).status == 503
    wire.close()


async def test_a_pinned_request_stays(fleet: Fleet) -> None:
    pin = f"x-dynamo-worker-instance-id: {fleet.workers[1].instance_id}\r\n"
    wire, taken = await fleet.post(chat(), headers=pin)
    lose(taken)
    assert (await wire.read()).status == 503
    wire.close()


async def test_an_error_that_is_the_requests_own_goes_to_the_client(fleet: Fleet) -> None:
    wire, taken = await fleet.post(chat())
    taken.stream.fail(InvalidArgument("Validation: top_k is not for me", "top_k"))
    assert (await wire.read()).status == 400
    wire.close()


async def test_a_long_request_stays_if_the_operator_says_so(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(migration_limit=3, migration_max_seq_len=20)
    fleet = Fleet(service, [await start_worker() for _ in range(2)])
    await model_ready(service, "tiny", workers=2)
    wire, taken = await fleet.post(chat("long " * 20))
    lose(taken)
    assert (await wire.read()).status == 503
    assert 'model_migration_max_seq_len_exceeded_total{model="tiny"} 1.0' in await fleet.metrics()
    wire.close()


async def test_a_request_waits_for_a_worker_to_come(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend(migration_limit=1)
    fleet = Fleet(service, [await start_worker()])
    await model_ready(service, "tiny")
    wire, first = await fleet.post(chat(stream=True))
    seen = await say_seen(wire, first, "one ")
    await fleet.where.die()
    fleet.workers = [await start_worker()]
    (await fleet.take()).answer("two")
    assert text_of(seen + await wire.read_rest()) == "one two"
    first.stream.end()
    wire.close()


async def test_a_request_for_which_no_worker_comes_ends_in_bounded_time(
    start_frontend: StartFrontend, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "WAIT_S", 0.3)
    service = await start_frontend(migration_limit=1)
    fleet = Fleet(service, [await start_worker()])
    await model_ready(service, "tiny")
    wire, first = await fleet.post(chat(stream=True))
    await say_seen(wire, first, "one ")
    await fleet.where.die()
    assert b"no worker to go on came in time" in await wire.read_rest()
    first.stream.end()
    wire.close()


async def test_a_client_that_leaves_while_its_request_waits_ends_it(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(migration_limit=1)
    fleet = Fleet(service, [await start_worker()])
    await model_ready(service, "tiny")
    wire, first = await fleet.post(chat())
    first.say("one ")
    await fleet.where.die()
    wire.close()
    await eventually(lambda: service.metrics.migrations.labels("tiny", "ongoing_request", "cancelled").value == 1)
    first.stream.end()


async def test_a_completion_moves_too_and_repeats_no_echo(fleet: Fleet) -> None:
    wire, first = await fleet.post({"model": "tiny", "prompt": "Say", "echo": True}, COMPLETIONS)
    first.say(" one")
    lose(first)
    (await fleet.take()).answer(" two")
    assert (await wire.read()).json()["choices"][0]["text"] == "Say one two"
    wire.close()


async def test_it_is_off_unless_asked_for(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend()
    fleet = Fleet(service, [await start_worker() for _ in range(2)])
    await model_ready(service, "tiny", workers=2)
    wire, taken = await fleet.post(chat())
    taken.say("a")
    lose(taken)
    answer = await wire.read()
    assert (answer.status, answer.json()["message"]) == (503, "the engine died")
    wire.close()
