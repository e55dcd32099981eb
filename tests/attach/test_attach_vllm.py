"""Is a real vLLM server behind the frontend the same as by itself? Changing one URL must change nothing."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from dynamo.attach import plan
from dynamo.attach.dialects import Dialect, dialects_of
from dynamo.attach.load import read_metrics
from dynamo.frontend.service import FrontendService
from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.kv_events import LoadMetrics, RouterEvent
from dynamo.llm.tokenizer import Tokenizer
from dynamo.router.event_feed import KvEventFeed
from dynamo.router.tier_index import TierIndex
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.events import EventSubscriber, create_subscriber
from tests.attach.asking import chat, get, post, until
from tests.attach.vllm_servers import StartAttach, VllmServer, start_vllm, stop_vllm, wait_for_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

BLOCK = 32
STORY = "Once upon a time there was a small server that wanted to be known by another name. " * 4


@pytest.fixture(params=["/inference/v1/generate", "/v1/completions", "openai"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How requests go to the server: by one of its token endpoints, or as they are."""
    chosen = str(request.param)
    if chosen == "openai":
        return chosen

    def only(engine: str, model: str, length: int | None) -> list[Dialect]:
        return [dialect for dialect in dialects_of(engine, model, length) if dialect.name == chosen]

    monkeypatch.setattr(plan, "dialects_of", only)
    return "tokens"


async def served(frontend: FrontendService, workers: int = 1) -> None:
    """Until the frontend can answer for `tiny`."""

    def ready() -> bool:
        model = frontend.models.get("tiny")
        return model is not None and model.ready and sum(s.worker_count for s in model.sets.values()) == workers

    await until(ready, 60)


Ask = dict[str, Any]
PICK = {"type": "json_schema", "json_schema": {"name": "pick", "schema": {"enum": ["alpha", "beta"]}}}
ASKED: list[Ask] = [
    {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24},
    {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24, "stream": True},
    {"messages": [{"role": "user", "content": "7 ÷ 6 = ? 🦙"}], "max_tokens": 12, "logprobs": True, "top_logprobs": 3},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": STORY}], "max_tokens": 8},
    {"messages": [{"role": "user", "content": "Pick."}], "response_format": PICK, "max_tokens": 20},
    {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 40, "presence_penalty": 0.5, "seed": 3},
    {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 30, "extra_body": {"min_tokens": 20}},
    {"prompt": "Once upon a time", "max_tokens": 16},
    {"prompt": STORY, "max_tokens": 5, "logprobs": 2},
    {"prompt": [5, 6, 7, 300, 301], "max_tokens": 6},
    {"prompt": ["one", "two"], "max_tokens": 4},
    {"prompt": "Once upon a time", "max_tokens": 60, "stop": ["e", "a"]},
    {"prompt": "Once upon a time", "max_tokens": 16, "logit_bias": {"300": 50}},
]


async def answer(base: str, asked: Ask) -> Any:
    """What a client makes of an answer. The client neither knows nor cares who is at the address."""
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        create: Any = client.chat.completions.create if "messages" in asked else client.completions.create
        got = await create(model="tiny", temperature=0, **asked)
        if not asked.get("stream"):
            return [
                (
                    whole_characters(choice.message.content if "messages" in asked else choice.text),
                    choice.finish_reason,
                    rounded(choice.logprobs),
                )
                for choice in got.choices
            ], (got.usage.prompt_tokens, got.usage.completion_tokens)
        text, finish = "", None
        async for chunk in got:
            text += chunk.choices[0].delta.content or ""
            finish = chunk.choices[0].finish_reason or finish
        return whole_characters(text), finish


def whole_characters(text: str) -> str:
    """Where a token limit cuts a character in two, vLLM drops the half and we show that there was one."""
    return text.rstrip("\ufffd")


def rounded(logprobs: Any) -> Any:
    """The numbers alone: batches of other sizes change the last digits."""
    if logprobs is None:
        return None
    numbers = logprobs.token_logprobs if hasattr(logprobs, "token_logprobs") else [e.logprob for e in logprobs.content]
    return [round(number, 3) for number in numbers]


async def test_the_same_client_gets_the_same_answers_at_both_addresses(
    vllm_server: VllmServer, frontend: FrontendService, attach: StartAttach, way: str
) -> None:
    await attach(vllm_server.url, mode=way)
    await served(frontend)
    for asked in ASKED:
        assert await answer(frontend.url, asked) == await answer(vllm_server.url, asked), asked


async def test_passed_through_bodies_are_the_servers_to_the_byte(
    vllm_server: VllmServer, frontend: FrontendService, attach: StartAttach
) -> None:
    await attach(vllm_server.url, mode="openai")
    await served(frontend)
    for body in (b"{", b'{"model":"tiny"}', b'{"model":"tiny","messages":[],"temperature":9}'):
        theirs = await post(vllm_server.url, "/v1/chat/completions", body)
        ours = await post(frontend.url, "/v1/chat/completions", body)
        if body != b"{":  # no model can be found in it: ours to refuse
            assert ours == theirs
        assert ours[0] == theirs[0] == 400


async def test_the_server_is_told_apart_and_described(
    vllm_server: VllmServer, frontend: FrontendService, attach: StartAttach, capsys: pytest.CaptureFixture[str]
) -> None:
    await attach(vllm_server.url)
    await served(frontend)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"attach found {vllm_server.url}: vLLM 0.")
    assert f"serving tiny ({vllm_server.directory}), max_model_len 2048, 512 KV blocks of 32 tokens" in line
    assert "prefix caching on; tokens in and out by /inference/v1/generate; mode tokens" in line
    assert "(verified)" in line


async def test_a_client_that_leaves_frees_the_server(
    vllm_server: VllmServer, frontend: FrontendService, attach: StartAttach, way: str
) -> None:
    await attach(vllm_server.url, mode=way)
    await served(frontend)
    body = {"model": "tiny", "prompt": "Go on", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    asking = asyncio.create_task(post(frontend.url, "/v1/completions", body))
    await running(vllm_server, 1, asking)
    asking.cancel()
    began = time.monotonic()
    await running(vllm_server, 0)
    assert time.monotonic() - began < 5


async def running(server: VllmServer, count: int, unless: "asyncio.Task[Any] | None" = None) -> None:
    """Until the server runs so many requests; fails with the answer of the request that was to run, if it ended."""
    async with asyncio.timeout(30):
        while True:
            found = read_metrics((await get(server.url, "/metrics")).decode()).ranks[0].running
            if found == count:
                return
            assert unless is None or not unless.done(), unless.result()
            await asyncio.sleep(0.05)


async def test_what_the_server_had_cached_is_told(
    vllm_server: VllmServer, frontend: FrontendService, attach: StartAttach, way: str
) -> None:
    await attach(vllm_server.url, mode=way)
    await served(frontend)
    body = {"model": "tiny", "prompt": f"{way} {STORY}", "max_tokens": 2}
    await post(frontend.url, "/v1/completions", body)
    _, second = await post(frontend.url, "/v1/completions", body)
    usage = json.loads(second)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] // BLOCK * BLOCK - BLOCK > 0


@pytest.fixture
async def kv_heard(runtime: DistributedRuntime) -> AsyncIterator[EventSubscriber]:
    subscriber = await create_subscriber(runtime, runtime.endpoint("dynamo.backend.generate"), "kv-events")
    yield subscriber
    await subscriber.close()


async def hear(subscriber: EventSubscriber, wanted: set[int]) -> None:
    """Until blocks with these content hashes were stored."""
    async with asyncio.timeout(20):
        async for event in subscriber:
            for one in msgspec.msgpack.decode(event.payload, type=list[RouterEvent]):
                if (stored := one.event.change.stored) is not None:
                    wanted -= {block.tokens_hash for block in stored.blocks}
            if not wanted:
                return


def hashes(directory: Path, text: str) -> set[int]:
    """The content hashes of a completion's prompt."""
    found = set(compute_block_hash_for_seq(Tokenizer.load(directory).encode(text, True), BLOCK))
    assert found
    return found


async def test_blocks_stored_before_and_after_attaching_are_told_by_their_content(
    vllm_server: VllmServer, frontend: FrontendService, attach: StartAttach, kv_heard: EventSubscriber
) -> None:
    before, after = f"before {STORY}", f"after {STORY}"
    await post(vllm_server.url, "/v1/completions", {"model": "tiny", "prompt": before, "max_tokens": 1})
    await attach(vllm_server.url, kv_events=vllm_server.kv_events, kv_replay=vllm_server.kv_replay)
    await served(frontend)
    await hear(kv_heard, hashes(vllm_server.directory, before))
    await post(frontend.url, "/v1/completions", {"model": "tiny", "prompt": after, "max_tokens": 1})
    await hear(kv_heard, hashes(vllm_server.directory, after))


async def test_without_replay_what_comes_is_heard_and_the_check_is_content(
    vllm_server: VllmServer,
    frontend: FrontendService,
    attach: StartAttach,
    kv_heard: EventSubscriber,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    await attach(vllm_server.url, kv_events=vllm_server.kv_events)
    await served(frontend)
    await until(lambda: "KV events are heard" in caplog.text, 30)  # by a prompt of attach's own
    text = f"no replay {STORY}"
    await post(frontend.url, "/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": 1})
    await hear(kv_heard, hashes(vllm_server.directory, text))


async def test_events_of_another_port_are_missed_loudly(
    vllm_server: VllmServer,
    frontend: FrontendService,
    attach: StartAttach,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynamo.attach.kv_feed.HEARD_WITHIN_S", 1.0)
    await attach(vllm_server.url, kv_events="tcp://127.0.0.1:9")
    await served(frontend)
    await until(lambda: "no KV event was heard from tcp://127.0.0.1:9" in caplog.text, 30)


async def test_load_of_others_is_seen(
    vllm_server: VllmServer, frontend: FrontendService, attach: StartAttach, runtime: DistributedRuntime
) -> None:
    subscriber = await create_subscriber(runtime, runtime.endpoint("dynamo.backend.generate"), "kv_metrics")
    await attach(vllm_server.url)
    await served(frontend)
    body = {"model": "tiny", "prompt": STORY, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    not_ours = asyncio.create_task(post(vllm_server.url, "/v1/completions", body))
    async with asyncio.timeout(30):
        async for event in subscriber:
            load = msgspec.msgpack.decode(event.payload, type=LoadMetrics)
            if load.running_requests:
                break
    assert load.kv_used_blocks > 0
    not_ours.cancel()
    await subscriber.close()


# --- two servers


@pytest.fixture(scope="module")
def second_server(
    vllm_server: VllmServer, weights_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """Another server of the same model, which a test may kill. Without the token endpoint."""
    log = tmp_path_factory.mktemp("vllm2") / "server.log"
    server = start_vllm(weights_dir, log)
    try:
        wait_for_vllm(server, log)
        yield server
    finally:
        stop_vllm(server)


async def test_an_index_knows_which_of_two_servers_holds_a_prompt(
    vllm_server: VllmServer,
    second_server: VllmServer,
    frontend: FrontendService,
    attach: StartAttach,
    runtime: DistributedRuntime,
) -> None:
    servers = {vllm_server: f"first {STORY}", second_server: f"second {STORY}"}
    for server, prompt in servers.items():
        await post(server.url, "/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1})
        await attach(server.url, kv_events=server.kv_events, kv_replay=server.kv_replay)
    await served(frontend, 2)
    feed = KvEventFeed(runtime, "dynamo.backend.generate", TierIndex(), BLOCK)
    await feed.start()
    try:
        holders = []
        for prompt in servers.values():
            path = compute_block_hash_for_seq(Tokenizer.load(vllm_server.directory).encode(prompt, True), BLOCK)
            await until(lambda path=path: len(feed.index.find(sequence_hashes(path))) == 1, 30)
            (holder,) = feed.index.find(sequence_hashes(path)).items()
            assert holder[1].device == len(path)
            holders.append(holder[0])
        assert len(set(holders)) == 2
    finally:
        await feed.close()


async def test_a_killed_server_is_left_at_once_and_the_other_answers(
    vllm_server: VllmServer,
    second_server: VllmServer,
    frontend: FrontendService,
    attach: StartAttach,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await attach(vllm_server.url)
    await attach(second_server.url)
    await served(frontend, 2)
    answers = [json.loads((await post(frontend.url, "/v1/chat/completions", chat(max_tokens=9)))[1]) for _ in range(4)]
    assert len({a["choices"][0]["message"]["content"] for a in answers}) == 1  # by two servers in turn
    assert (await served_by(vllm_server), await served_by(second_server)) != (0, 0)
    long = {"model": "tiny", "prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    in_flight = [asyncio.create_task(post(frontend.url, "/v1/completions", long)) for _ in range(2)]
    await running(second_server, 1)
    os.killpg(second_server.process.pid, signal.SIGKILL)
    second_server.process.wait(60)  # an engine's process takes its time to give back its memory, and its port then
    began = time.monotonic()
    await served(frontend, 1)
    assert time.monotonic() - began < 8, asked_of(second_server)  # a lease would take 10 s; by itself it takes under 1
    bodies = [body async for body in finished(in_flight)]
    assert sorted(b"event: error" in body for body in bodies) == [False, True]
    status, _ = await post(frontend.url, "/v1/chat/completions", chat(max_tokens=9))
    assert status == 200


def asked_of(server: VllmServer) -> str:
    """How a killed server's port answers, to tell why nobody noticed."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with socket.socket() as asked:
        asked.settimeout(1)
        return f"connect: {asked.connect_ex((host, int(port)))}, process: {server.process.poll()}"


async def finished(tasks: list["asyncio.Task[tuple[int, bytes]]"]) -> AsyncIterator[bytes]:
    for task in tasks:
        yield (await asyncio.wait_for(task, 120))[1]


async def served_by(server: VllmServer) -> int:
    """How many requests a server has ended well."""
    text = (await get(server.url, "/metrics")).decode()
    return sum(float(line.split()[-1]) > 0 for line in text.splitlines() if line.startswith("vllm:request_success"))
