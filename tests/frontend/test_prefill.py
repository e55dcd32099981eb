"""A prompt's way through a prefill worker and on to a decode worker."""

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dynamo.frontend.service import FrontendService
from dynamo.llm.model_card import WorkerType
from dynamo.llm.protocols.engine import SEED_IS_OURS
from dynamo.llm.tokenizer import Tokenizer
from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import StreamIncomplete
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    ScriptedWorker,
    StartFrontend,
    StartWorker,
    Taken,
    Wire,
    changed,
    chat,
    fetch,
    model_ready,
)
from tests.frontend.kv_fleet import StartMocker, asked, eventually, kv, start_sized, worker_of

PREFILL = "dynamo.prefill.generate"


class Split(NamedTuple):
    """A frontend with one worker of each kind."""

    service: FrontendService
    prefill: ScriptedWorker
    decode: ScriptedWorker

    def handle(self, number: int = 1) -> dict[str, Any]:
        """As a prefill worker writes them."""
        endpoint = "dynamo.prefill.handoff"
        return {"id": f"h{number}", "incarnation": "i", "endpoint": endpoint, "instance_id": self.prefill.instance_id}


@pytest.fixture
async def split(start_frontend: StartFrontend, start_worker: StartWorker) -> Split:
    service = await start_frontend()
    decode = await start_worker(worker_type=WorkerType.Decode)
    prefill = await start_worker(endpoint=PREFILL, worker_type=WorkerType.Prefill)
    await model_ready(service, "tiny", workers=2)
    await changed(service, lambda: any(s.prefill is not None for s in service.models.sets()))
    return Split(service, prefill, decode)


def first_token(taken: Taken, text: str, handle: dict[str, Any] | None, reason: str = "length") -> list[int]:
    """Answer as a prefill worker does; gives back the token."""
    token = taken._tokenizer.encode(text)[:1]
    taken.send(token_ids=token, finish_reason=reason, disaggregated_params=handle)
    taken.stream.end()
    return token


async def released(split: Split) -> "asyncio.Queue[Any]":
    """Serve the prefill worker's `handoff`, and tell what it was asked."""
    asked: asyncio.Queue[Any] = asyncio.Queue()

    async def handoff(request: Any) -> Any:
        asked.put_nowait(request)
        yield {"ok": True}

    await split.prefill.runtime.endpoint("dynamo.prefill.handoff").start_endpoint(handoff)
    return asked


async def test_the_first_token_comes_from_prefill_and_the_rest_from_decode(split: Split, model_dir: Path) -> None:
    tokens = Tokenizer.load(model_dir).encode("one two")
    wire = await Wire.open(split.service.port)
    nvext = {"extra_fields": ["worker_id", "timing"]}
    body = {"model": "tiny", "prompt": [100, 101], "max_tokens": 9, "temperature": 0, "stream": True, "nvext": nvext}
    wire.post(COMPLETIONS, body)
    taken = await split.prefill.take()
    assert taken.request.token_ids == [100, 101]
    assert taken.request.stop_conditions.max_tokens == 1
    assert taken.request.prefill_result is None
    taken.send(token_ids=tokens[:1], finish_reason="length", disaggregated_params=split.handle())
    taken.stream.end()
    await wire.head()
    first = await wire.chunk()  # before any decode worker has said a word
    assert b'"finish_reason":null' in first
    decoding = await split.decode.take()
    assert decoding.request.token_ids == [100, 101]
    assert decoding.request.stop_conditions.max_tokens == 9
    assert decoding.request.prefill_result == {"disaggregated_params": split.handle(), "token_ids": tokens[:1]}
    assert decoding.request.routing is not None
    assert decoding.request.routing.prefill_worker_id == split.prefill.instance_id
    for token in tokens[1:]:
        decoding.send(token_ids=[token])
    decoding.finish()
    decoding.stream.end()
    rest = (await wire.read_rest()).decode()
    assert rest.endswith("data: [DONE]\n\n")
    assert f'"prefill_worker_id":{split.prefill.instance_id}' in first.decode() + rest
    assert f'"decode_worker_id":{split.decode.instance_id}' in first.decode() + rest
    metrics = (await fetch(split.service.port, "/metrics")).body.decode()
    assert 'dynamo_frontend_remote_prefills_total{outcome="done"} 1' in metrics


async def test_both_workers_draw_by_the_same_seed_unless_nothing_is_drawn(split: Split) -> None:
    for given, sampled in (({}, True), ({"temperature": 0}, False), ({"seed": 7}, True)):
        wire = await Wire.open(split.service.port)
        wire.post(CHAT, chat(max_tokens=4) | given)
        taken = await split.prefill.take()
        first_token(taken, "x", split.handle())
        decoding = await split.decode.take()
        seed = decoding.request.sampling_options.seed
        assert seed == taken.request.sampling_options.seed
        assert (seed is not None) == sampled
        assert given.get("seed", seed) == seed
        assert (SEED_IS_OURS in (decoding.request.prefill_result or {})) == (sampled and not given)
        decoding.answer("")
        await wire.read()


async def test_a_first_token_that_is_the_last_needs_no_decode_worker(split: Split) -> None:
    wire = await Wire.open(split.service.port)
    wire.post(CHAT, chat(max_tokens=9))
    first_token(await split.prefill.take(), "x", None, "stop")
    answer = (await wire.read()).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert split.decode.requests.empty()


async def test_what_only_the_frontend_can_see_to_be_the_end_gives_the_kv_back(split: Split) -> None:
    asked = await released(split)
    wire = await Wire.open(split.service.port)
    wire.post(CHAT, chat(max_tokens=9, stop=["s"]))
    first_token(await split.prefill.take(), "stop", split.handle())
    assert (await wire.read()).json()["choices"][0]["finish_reason"] == "stop"
    async with asyncio.timeout(10):
        assert await asked.get() == {"verb": "release", "id": "h1", "incarnation": "i"}
    assert split.decode.requests.empty()


@pytest.mark.parametrize("fault", ["error", "end", "killed", "no handle"])
async def test_a_prompt_whose_prefill_is_lost_is_computed_by_the_decode_worker(split: Split, fault: str) -> None:
    wire = await Wire.open(split.service.port)
    wire.post(CHAT, chat(max_tokens=9))
    taken = await split.prefill.take()
    if fault == "error":
        taken.send(finish_reason="error")
    elif fault == "end":
        taken.stream.end()
    elif fault == "no handle":
        first_token(taken, "x", None)
    else:
        await split.prefill.die()
    decoding = await split.decode.take()
    assert decoding.request.prefill_result is None
    assert decoding.request.sampling_options.seed is None  # one worker draws, so none is needed
    decoding.answer("whole")
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "whole"


async def test_without_prefill_workers_the_decode_workers_do_it_all(split: Split) -> None:
    await split.prefill.leave()
    await changed(split.service, lambda: all(s.prefill is None for s in split.service.models.sets()))
    wire = await Wire.open(split.service.port)
    wire.post(CHAT, chat())
    (await split.decode.take()).answer("alone")
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "alone"


async def test_a_client_that_leaves_during_prefill_stops_it(split: Split) -> None:
    wire = await Wire.open(split.service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await split.prefill.take()
    wire.writer.close()
    await taken.cancelled.wait()
    assert split.decode.requests.empty()


async def test_a_handle_that_comes_after_the_client_left_is_given_back(split: Split) -> None:
    asked = await released(split)
    wire = await Wire.open(split.service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await split.prefill.take()
    wire.writer.close()
    await taken.cancelled.wait()
    first_token(taken, "x", split.handle())  # it was on its way
    async with asyncio.timeout(10):
        assert await asked.get() == {"verb": "release", "id": "h1", "incarnation": "i"}
    assert split.decode.requests.empty()


async def test_a_client_that_leaves_before_the_decode_worker_answers_gives_the_handle_back(split: Split) -> None:
    asked = await released(split)
    wire = await Wire.open(split.service.port)
    wire.post(CHAT, chat(max_tokens=9, stream=True))
    first_token(await split.prefill.take(), "x", split.handle())
    decoding = await split.decode.take()
    wire.writer.close()
    await decoding.cancelled.wait()
    async with asyncio.timeout(10):
        assert (await asked.get())["verb"] == "release"


async def test_several_choices_go_on_from_one_prefill(split: Split) -> None:
    wire = await Wire.open(split.service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": [100], "n": 2, "max_tokens": 5, "seed": 1})
    first_token(await split.prefill.take(), "one", split.handle())
    decoding = await split.decode.take()
    assert decoding.request.sampling_options.n == 2
    decoding.finish(index=0)
    decoding.say("two", index=1)
    decoding.finish(index=1)
    decoding.stream.end()
    texts = [choice["text"] for choice in (await wire.read()).json()["choices"]]
    assert texts[1] == "two"
    assert texts[0] != ""


async def test_the_choices_left_by_a_first_one_that_ended_at_once_are_computed_anew(split: Split) -> None:
    wire = await Wire.open(split.service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": [100], "n": 2, "max_tokens": 5, "seed": 1})
    first_token(await split.prefill.take(), "one", None, "eos")
    decoding = await split.decode.take()
    assert decoding.request.prefill_result is None
    for index in range(2):
        decoding.say(str(index), index)
        decoding.finish(index=index)
    decoding.stream.end()
    assert [choice["text"] for choice in (await wire.read()).json()["choices"]] == ["0", "1"]


async def test_a_conversations_next_turn_goes_to_the_decode_worker_that_holds_the_last(
    start_frontend: StartFrontend, start_mocker: StartMocker
) -> None:
    service = await start_frontend(**kv(use_kv_events=False))
    for role in ("prefill", "decode", "decode", "decode"):
        await start_mocker("--speedup-ratio", "0", "--disaggregation-mode", role)
    await model_ready(service, "tiny", workers=4)
    await changed(service, lambda: any(s.split is not None for s in service.models.sets()))
    text = "What was said before. " * 20
    first = await asked(service, text)
    for _ in range(6):
        text += "And one word more. " * 8
        answer = await asked(service, text)
        chosen, *others = answer.json()["nvext"]["routing"]["candidates"]
        assert worker_of(answer) == worker_of(first) == chosen["worker_id"]
        assert chosen["transfer"]["held_blocks"] > 0
        assert all(chosen["transfer"]["tokens"] < other["transfer"]["tokens"] for other in others)


async def test_the_router_of_the_decode_workers_hears_of_a_moved_requests_first_token(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(**kv(use_kv_events=False), migration_limit=1)
    decodes = [await start_sized(start_worker, worker_type=WorkerType.Decode) for _ in range(2)]
    prefill = await start_sized(start_worker, endpoint=PREFILL, worker_type=WorkerType.Prefill)
    await model_ready(service, "tiny", workers=3)
    await changed(service, lambda: any(s.split is not None for s in service.models.sets()))
    pair = Split(service, prefill, decodes[0])
    wire = await Wire.open(service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": [100, 101], "max_tokens": 9})
    first_token(await prefill.take(), "one", pair.handle(1))
    await eventually(lambda: any(not worker.requests.empty() for worker in decodes))
    (lost,) = [worker for worker in decodes if not worker.requests.empty()]
    (await lost.take()).stream.fail(StreamIncomplete("it is lost"))
    first_token(await prefill.take(), "two", pair.handle(2))
    (other,) = [worker for worker in decodes if worker is not lost]
    decoding = await other.take()
    load = next(s.router for s in service.models.sets() if s.serves and s.router is not None).scheduler.load
    at = load.position[WorkerKey(other.instance_id)]
    assert load.prefill_requests[at] == 1
    decoding.say("three")
    await eventually(lambda: load.prefill_requests[at] == 0)
    assert load.requests[at] == 1
    decoding.finish()
    decoding.stream.end()
    assert (await wire.read()).status == 200


async def test_prefill_workers_of_another_model_are_said_to_be_unlike(
    start_frontend: StartFrontend, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    service = await start_frontend()
    decode = await start_worker(worker_type=WorkerType.Decode, kv_cache_block_size=16)
    decode.auto = "alone"
    await start_worker(endpoint=PREFILL, worker_type=WorkerType.Prefill, kv_cache_block_size=32)
    await model_ready(service, "tiny", workers=2)
    await changed(service, lambda: "compute nothing for the decode workers" in caplog.text)
    assert all(s.prefill is None for s in service.models.sets())
