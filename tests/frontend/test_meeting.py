"""A prompt whose prefill and decode worker are asked at once, and meet at a bootstrap port. [G9]"""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo.frontend.meeting import MAX_ROOM, new_room
from dynamo.frontend.service import FrontendService
from dynamo.llm.model_card import ModelRuntimeConfig, WorkerType
from dynamo.llm.tokenizer import Tokenizer
from dynamo.runtime.errors import EngineShutdown, InvalidArgument, StreamIncomplete
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    ScriptedWorker,
    StartFrontend,
    StartWorker,
    Taken,
    Wire,
    ask,
    changed,
    chat,
    model_ready,
)
from tests.frontend.kv_fleet import StartMocker, asked, eventually, kv, series

PREFILL = "dynamo.prefill.generate"
PREFILLS = "dynamo_frontend_remote_prefills_total"


class Pair(NamedTuple):
    """A frontend, a prefill worker with a bootstrap port, and a decode worker."""

    service: FrontendService
    prefill: ScriptedWorker
    decode: ScriptedWorker

    async def both(self) -> tuple[Taken, Taken]:
        """The request, at the prefill and at the decode worker."""
        return await self.prefill.take(), await self.decode.take()


@pytest.fixture
async def pair(start_frontend: StartFrontend, start_worker: StartWorker) -> Pair:
    service = await start_frontend()
    decode = await start_worker(worker_type=WorkerType.Decode)
    place = ModelRuntimeConfig(bootstrap_host="10.0.0.7", bootstrap_port=8998)
    prefill = await start_worker(endpoint=PREFILL, worker_type=WorkerType.Prefill, runtime_config=place)
    await ready(service, 2)
    return Pair(service, prefill, decode)


async def ready(service: FrontendService, workers: int) -> None:
    await model_ready(service, "tiny", workers=workers)
    await changed(service, lambda: any(s.prefill is not None for s in service.models.sets()))


def computed(taken: Taken) -> None:
    """End the prompt as a prefill worker does whose KV was fetched."""
    taken.send(token_ids=[5], finish_reason="length")
    taken.stream.end()


async def test_both_are_asked_at_once_and_the_answer_is_the_decode_workers(pair: Pair) -> None:
    wire = await Wire.open(pair.service.port)
    nvext = {"extra_fields": ["worker_id", "routing"]}
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": [100, 101], "max_tokens": 9, "nvext": nvext})
    prefill, decode = await pair.both()  # neither has answered
    meeting = decode.request.bootstrap_info
    assert meeting is not None
    assert prefill.request.bootstrap_info == meeting
    assert (meeting["bootstrap_host"], meeting["bootstrap_port"]) == ("10.0.0.7", 8998)
    assert 0 <= meeting["bootstrap_room"] < MAX_ROOM
    assert (prefill.request.stop_conditions.max_tokens, decode.request.stop_conditions.max_tokens) == (1, 9)
    assert decode.request.prefill_result is None
    assert decode.request.routing is not None
    assert decode.request.routing.prefill_worker_id == pair.prefill.instance_id
    computed(prefill)
    decode.answer("hello there")
    answer = (await wire.read()).json()
    assert answer["choices"][0]["text"] == "hello there"
    assert answer["nvext"]["worker_id"]["prefill_worker_id"] == pair.prefill.instance_id
    assert answer["nvext"]["worker_id"]["decode_worker_id"] == pair.decode.instance_id
    assert answer["nvext"]["routing"]["meeting"] == meeting
    assert await series(pair.service, PREFILLS) == {'outcome="done"': 1.0}


async def test_every_prompt_has_a_room_of_its_own(pair: Pair) -> None:
    rooms = set()
    for _ in range(3):
        wire = await Wire.open(pair.service.port)
        wire.post(CHAT, chat())
        prefill, decode = await pair.both()
        assert decode.request.bootstrap_info is not None
        rooms.add(decode.request.bootstrap_info["bootstrap_room"])
        computed(prefill)
        decode.answer("x")
        await wire.read()
    assert len(rooms) == 3


def test_the_room_tells_the_rank_that_computes() -> None:
    config = ModelRuntimeConfig(bootstrap_host="h", bootstrap_port=1, data_parallel_size=4)
    rooms = [new_room(config, rank) for rank in (0, 1, 2, 3) for _ in range(20)]
    ranks = Counter(room["bootstrap_room"] % 4 for room in rooms if room is not None)
    assert ranks == {0: 20, 1: 20, 2: 20, 3: 20}
    assert new_room(ModelRuntimeConfig(), None) is None


@pytest.mark.parametrize("fault", ["error", "end", "killed", "refused"])
async def test_where_prefill_fails_the_decode_worker_begins_anew_alone(pair: Pair, fault: str) -> None:
    wire = await Wire.open(pair.service.port)
    wire.post(CHAT, chat(max_tokens=9))
    prefill, waiting = await pair.both()
    if fault == "error":
        prefill.send(finish_reason="error")
    elif fault == "end":
        prefill.stream.end()
    elif fault == "refused":
        prefill.stream.fail(InvalidArgument("not this"))
    else:
        await pair.prefill.die()
    async with asyncio.timeout(10):
        await waiting.cancelled.wait()
    alone = await pair.decode.take()
    assert alone.request.bootstrap_info is None
    waiting.say("late")  # what it says now is nobody's
    alone.answer("alone")
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "alone"
    assert await series(pair.service, PREFILLS) == {'outcome="lost"': 1.0}


@pytest.mark.parametrize("fault", ["error", "cancelled", "failed"])
async def test_where_decode_fails_without_a_token_both_end_and_one_begins_anew_alone(pair: Pair, fault: str) -> None:
    wire = await Wire.open(pair.service.port)
    wire.post(CHAT, chat(max_tokens=9))
    prefill, decode = await pair.both()
    if fault == "failed":
        decode.stream.fail(StreamIncomplete("no KV came"))
    else:
        decode.send(finish_reason=fault)
        decode.stream.end()
    async with asyncio.timeout(10):
        await prefill.cancelled.wait()
    alone = await pair.decode.take()
    assert alone.request.bootstrap_info is None
    alone.answer("alone")
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "alone"


async def test_a_request_that_is_wrong_is_not_sent_again(pair: Pair) -> None:
    wire = await Wire.open(pair.service.port)
    wire.post(CHAT, chat(max_tokens=9))
    prefill, decode = await pair.both()
    decode.stream.fail(InvalidArgument("not this", "max_tokens"))
    assert (await wire.read()).status == 400
    async with asyncio.timeout(10):
        await prefill.cancelled.wait()
    assert pair.decode.requests.empty()


async def test_once_there_is_a_token_prefill_may_end_as_it_likes(pair: Pair, model_dir: Path) -> None:
    wire = await Wire.open(pair.service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": [100], "max_tokens": 9, "stream": True})
    prefill, decode = await pair.both()
    decode.send(token_ids=Tokenizer.load(model_dir).encode("x"))
    await wire.head()
    await wire.chunk()
    prefill.send(finish_reason="error")
    prefill.stream.end()
    decode.answer(" y")
    assert (await wire.read_rest()).decode().endswith("data: [DONE]\n\n")
    assert not decode.cancelled.is_set()
    assert pair.decode.requests.empty()


async def test_a_client_that_leaves_stops_both(pair: Pair) -> None:
    wire = await Wire.open(pair.service.port)
    wire.post(CHAT, chat(stream=True))
    prefill, decode = await pair.both()
    wire.writer.close()
    async with asyncio.timeout(10):
        await prefill.cancelled.wait()
        await decode.cancelled.wait()


async def test_a_prompt_that_the_decode_worker_did_not_wait_for_is_given_up(pair: Pair) -> None:
    wire = await Wire.open(pair.service.port)
    wire.post(CHAT, chat())
    prefill, decode = await pair.both()
    decode.answer("computed here after all")
    await wire.read()
    async with asyncio.timeout(10):
        await prefill.cancelled.wait()


async def test_a_request_that_moves_makes_a_new_room(
    start_frontend: StartFrontend, start_worker: StartWorker, model_dir: Path
) -> None:
    service = await start_frontend(migration_limit=1)
    workers = [await start_worker(worker_type=WorkerType.Decode) for _ in range(2)]
    place = ModelRuntimeConfig(bootstrap_host="h", bootstrap_port=1)
    prefill = await start_worker(endpoint=PREFILL, worker_type=WorkerType.Prefill, runtime_config=place)
    await ready(service, 3)
    wire = await Wire.open(service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": [100], "max_tokens": 9})
    before = await prefill.take()
    await eventually(lambda: any(not worker.requests.empty() for worker in workers))
    (first,) = [worker for worker in workers if not worker.requests.empty()]
    decoding = await first.take()
    (token,) = Tokenizer.load(model_dir).encode("x")[:1]
    computed(before)
    decoding.send(token_ids=[token])
    decoding.stream.fail(EngineShutdown("it leaves"))
    again = await prefill.take()
    assert again.request.token_ids == [100, token]
    (other,) = [worker for worker in workers if worker is not first]
    moved = await other.take()
    assert moved.request.bootstrap_info == again.request.bootstrap_info != decoding.request.bootstrap_info
    computed(again)
    moved.answer("y")
    assert (await wire.read()).json()["choices"][0]["text"].endswith("y")


@pytest.mark.parametrize("mode", ["round-robin", "power-of-two", "kv"])
async def test_simulated_workers_meet_whatever_routes(
    start_frontend: StartFrontend, start_mocker: StartMocker, mode: str
) -> None:
    service = await start_frontend(**(kv() if mode == "kv" else {"router_mode": mode}))
    await start_mocker("--speedup-ratio", "0", "--disaggregation-mode", "prefill", "--bootstrap-ports", "0")
    for _ in range(2):
        await start_mocker("--speedup-ratio", "0", "--disaggregation-mode", "decode")
    await ready(service, 3)
    text = "A question that is long enough for some blocks. " * 8
    one = await asked(service, text, max_tokens=6, seed=3)
    assert one.status == 200
    assert "meeting" in one.json()["nvext"]["routing"]
    body = chat(text, max_tokens=6, seed=3, nvext={"extra_fields": ["engine_data"]})
    answers: list[Any] = await asyncio.gather(*(ask(service.port, CHAT, body) for _ in range(20)))
    assert {each.json()["choices"][0]["message"]["content"] for each in answers} == {
        one.json()["choices"][0]["message"]["content"]
    }
    transports = {each.json()["nvext"]["engine_data"]["kv_transfer"]["transport"] for each in answers}
    assert transports == {"bootstrap"}
    assert await series(service, PREFILLS) == {'outcome="done"': 21.0}
