"""A streamed answer: its events, its framing, its end."""

import asyncio
import json

import msgspec

from dynamo.frontend.bodies import ChatCompletionChunk, Completion
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    Served,
    StartFrontend,
    StartWorker,
    Wire,
    ask,
    chat,
    model_ready,
)


async def test_a_chat_stream_has_role_then_text_then_finish_then_done(served: Served) -> None:
    service, worker = served
    worker.auto = "one two three"
    answer = await ask(service.port, CHAT, chat(stream=True))
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    chunks = answer.data()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert answer.text() == "one two three"
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    assert answer.events()[-1] == "data: [DONE]"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == "tiny" for chunk in chunks)


async def test_events_have_the_described_form(served: Served) -> None:
    service, worker = served
    worker.auto = "one two three"
    for path, body, kind in (
        (CHAT, chat(stream=True), ChatCompletionChunk),
        (COMPLETIONS, {"model": "tiny", "prompt": "a", "stream": True}, Completion),
    ):
        for event in (await ask(service.port, path, body)).events()[:-1]:
            msgspec.json.decode(event.removeprefix("data: "), type=kind)


async def test_text_is_escaped_as_json(served: Served) -> None:
    service, worker = served
    worker.auto = 'a "quoted"\n\\ line — ✓ 你好 \x07'
    answer = await ask(service.port, CHAT, chat(stream=True))
    assert answer.text() == worker.auto


async def test_all_that_arrives_in_one_read_leaves_in_one_chunk(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    taken.send(token_ids=[100])
    taken.send(token_ids=[101])
    await wire.head()
    assert (await wire.chunk()).count(b"data: ") == 3  # the role and two tokens
    taken.send(token_ids=[102])
    assert (await wire.chunk()).count(b"data: ") == 1
    taken.finish()
    taken.stream.end()
    assert (await wire.chunk()).endswith(b"data: [DONE]\n\n")
    assert await wire.chunk() == b""
    wire.close()


async def test_a_connection_is_used_again_after_a_stream(served: Served) -> None:
    service, worker = served
    worker.auto = "hi"
    wire = await Wire.open(service.port)
    for _ in range(3):
        wire.post(CHAT, chat(stream=True))
        assert (await wire.read()).text() == "hi"
    wire.post(CHAT, chat())
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "hi"
    wire.close()


async def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    for _ in range(3):
        wire.post(CHAT, chat(stream=True))
    for word in ("first", "second", "third"):
        (await worker.take()).answer(word)
        assert (await wire.read()).text() == word
    wire.close()


async def test_many_requests_may_wait_on_one_connection(served: Served) -> None:
    service, worker = served
    worker.auto = "x"
    wire = await Wire.open(service.port)
    for _ in range(100):
        wire.get("/live")
        wire.post(CHAT, chat("long " * 3000))
    for _ in range(100):
        assert (await wire.read()).json()["status"] == "live"
        assert (await wire.read()).json()["choices"][0]["message"]["content"] == "x"
    wire.close()


async def test_http_1_0_gets_an_unframed_body_and_a_closed_connection(served: Served) -> None:
    service, worker = served
    worker.auto = "old"
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True), version="1.0")
    answer = await wire.read()
    assert "transfer-encoding" not in answer.headers
    assert answer.text() == "old"
    assert await wire.closed()


async def test_usage_comes_last_if_asked_for(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True, stream_options={"include_usage": True}))
    taken = await worker.take()
    count = taken.say("some words here")
    taken.finish(cached=5)
    taken.stream.end()
    chunks = (await wire.read()).data()
    prompt = len(taken.request.token_ids)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": count,
        "total_tokens": prompt + count,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    assert all("usage" not in chunk for chunk in chunks[:-1])
    wire.close()


async def test_usage_can_be_forced(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend(limits={"force_include_usage": True})
    (await start_worker()).auto = "x"
    await model_ready(service, "tiny")
    assert "usage" in (await ask(service.port, CHAT, chat(stream=True))).data()[-1]


async def test_continuous_usage_is_in_every_chunk(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    options = {"include_usage": True, "continuous_usage_stats": True}
    wire.post(CHAT, chat(stream=True, stream_options=options))
    taken = await worker.take()
    taken.send(token_ids=[100])
    await wire.head()
    await wire.chunk()
    taken.send(token_ids=[101])
    second = json.loads((await wire.chunk()).removeprefix(b"data: "))
    assert second["usage"]["completion_tokens"] == 2
    taken.finish()
    taken.stream.end()
    wire.close()


async def test_choices_interleave_by_index(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True, n=2))
    taken = await worker.take()
    assert taken.request.sampling_options.n == 2
    taken.say("zero", 0)
    taken.say("one", 1)
    taken.finish(index=1)
    taken.say(" more", 0)
    taken.finish("length", index=0)
    taken.stream.end()
    answer = await wire.read()
    assert (answer.text(0), answer.text(1)) == ("zero more", "one")
    finishes = [(c["index"], c["finish_reason"]) for d in answer.data() for c in d["choices"] if c["finish_reason"]]
    assert finishes == [(1, "stop"), (0, "length")]
    roles = [c["index"] for d in answer.data() for c in d["choices"] if "role" in c["delta"]]
    assert roles == [0, 1]
    wire.close()


async def test_a_stop_string_ends_the_answer_and_the_engine(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True, stop=["END"]))
    taken = await worker.take()
    taken.say("before END after")
    answer = await wire.read()
    assert answer.text() == "before "
    assert answer.data()[-1]["choices"][0]["finish_reason"] == "stop"
    async with asyncio.timeout(5):
        await taken.cancelled.wait()
    taken.stream.end()
    wire.close()


async def test_logprobs_are_in_the_chunks(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True, logprobs=True, top_logprobs=1))
    taken = await worker.take()
    assert taken.request.output_options.logprobs == 1
    taken.send(token_ids=[100], log_probs=[-0.5], top_logprobs=[[{"token_id": 100, "logprob": -0.5}]])
    taken.finish()
    taken.stream.end()
    entries = [c["logprobs"]["content"][0] for d in (await wire.read()).data() for c in d["choices"] if c["logprobs"]]
    assert [entry["logprob"] for entry in entries] == [-0.5]
    assert entries[0]["top_logprobs"][0]["token"] == entries[0]["token"]
    wire.close()


async def test_completion_chunks(served: Served) -> None:
    service, worker = served
    worker.auto = "continued"
    answer = await ask(service.port, COMPLETIONS, {"model": "tiny", "prompt": "It", "stream": True})
    assert answer.text() == "continued"
    assert answer.data()[0]["object"] == "text_completion"
    assert answer.data()[0]["id"].startswith("cmpl-")
    assert answer.data()[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_batch_of_prompts_streams_with_running_indexes(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(COMPLETIONS, {"model": "tiny", "prompt": ["a", "b"], "n": 2, "stream": True})
    first, second = await worker.take(), await worker.take()
    assert first.context.id() != second.context.id()
    for taken, words in ((second, ("b0", "b1")), (first, ("a0", "a1"))):
        for index, word in enumerate(words):
            taken.say(word, index)
            taken.finish(index=index)
        taken.stream.end()
    answer = await wire.read()
    assert [answer.text(i) for i in range(4)] == ["a0", "a1", "b0", "b1"]
    wire.close()


async def test_annotations_come_first(served: Served) -> None:
    service, worker = served
    worker.auto = "x"
    body = chat("Hi", stream=True, nvext={"annotations": ["token_ids", "formatted_prompt"]})
    events = (await ask(service.port, CHAT, body)).events()
    formatted, tokens = events[0], events[1]
    assert formatted.startswith('event: formatted_prompt\n: "')
    assert "Hi" in formatted
    assert tokens.startswith('event: token_ids\n: "[')


async def test_extra_fields_are_in_nvext(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    fields = ["worker_id", "timing", "completion_token_ids", "stop_reason"]
    wire.post(CHAT, chat(stream=True, stop_token_ids=[102], nvext={"extra_fields": fields}))
    taken = await worker.take()
    taken.send(token_ids=[100])
    taken.send(token_ids=[101])
    taken.send(token_ids=[102], finish_reason="stop", stop_reason=102)
    taken.stream.end()
    chunks = (await wire.read()).data()
    tokens = [t for chunk in chunks if "nvext" in chunk for t in chunk["nvext"]["completion_token_ids"]]
    assert tokens[:2] == [100, 101]
    last = chunks[-1]["nvext"]
    assert last["worker_id"]["decode_worker_id"] == worker.instance_id
    assert last["stop_reason"] == 102
    assert 0 < last["timing"]["ttft_ms"] <= last["timing"]["total_time_ms"]
    wire.close()


async def test_keep_alive_comments_fill_a_silence(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    service = await start_frontend(limits={"sse_keep_alive_ms": 20})
    worker = await start_worker()
    await model_ready(service, "tiny")
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    assert (await wire.head())[0] == 200
    assert await wire.chunk() == b": keep-alive\n\n"
    taken.answer("late")
    assert (await wire.read_rest()).endswith(b"[DONE]\n\n")
    wire.close()


async def test_the_status_is_held_back_for_no_longer_than_the_peek(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(limits={"error_peek_ms": 5})
    worker = await start_worker()
    await model_ready(service, "tiny")
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True))
    assert (await wire.head())[0] == 200
    (await worker.take()).answer("late")
    assert b"late" in await wire.read_rest()
    wire.close()
