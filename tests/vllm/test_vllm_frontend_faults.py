"""What does a client of the frontend see when real workers are killed, and do those that stay free its KV or go on?

Two prefill workers and a decode worker for both tests, which end two of the three.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.service import FrontendService
from dynamo.llm.tokenizer import Tokenizer
from dynamo.runtime import DistributedRuntime
from tests.vllm.pair import ANSWER_S, LEASE_S, START_S, Worker, ask, tokens, until
from tests.vllm.vllm_cases import words
from tests.vllm.vllm_helpers import request

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(START_S + 60),
    pytest.mark.asyncio(loop_scope="module"),
]

IN_ENGINE = 4  # requests of the decode worker; the others wait before it
LONG = 400  # tokens of answers that another worker finishes; some seconds' worth
RECOMPUTES = "dynamo_component_kv_transfer_recomputes_total"


@dataclass
class Fleet:
    """Frontends and their workers. `dying` and `staying` compute prompts; `moving` moves requests to other workers."""

    service: FrontendService
    moving: FrontendService
    beside: DistributedRuntime
    """Of the latter."""
    session: aiohttp.ClientSession
    tokenizer: Tokenizer
    dying: Worker
    staying: Worker
    decoder: Worker

    def post(self, prompt: list[int], by: Worker, max_tokens: int = 20, **fields: Any) -> Any:
        """A completion whose prompt is computed by that worker; an `async with` gives the response."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"nvext": {"prefill_worker_id": by.instance_id}, **fields}
        return self.session.post(f"http://127.0.0.1:{self.service.port}/v1/completions", json=body)

    async def text(self, prompt: list[int], by: Worker) -> str:
        """The whole answer."""
        async with self.post(prompt, by) as response:
            body = await response.json()
            assert response.status == 200, body
            return str(body["choices"][0]["text"])

    async def right(self, prompt: list[int], max_tokens: int = 20) -> str:
        """What the decode worker answers alone."""
        wanted = request(
            prompt,
            stop_conditions={"max_tokens": max_tokens, "ignore_eos": True},
            sampling_options={"temperature": 0.0},
        )
        return self.tokenizer.decode(tokens(await ask(self.decoder, wanted)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(weights_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    home = tmp_path_factory.mktemp("faults")
    settings = {"DYN_FILE_KV": str(home / "discovery"), "DYN_CACHE_DIR": str(home / "cache")}
    environ = os.environ | settings | {
        "DYN_SYSTEM_PORT": "0", "DYN_LOG": "info", "TMPDIR": str(home),
        "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles parts of its sampler at their first use, for seconds each
    }  # fmt: skip
    prefill = ["--disaggregation-mode", "prefill", "--kv-lease", str(LEASE_S)]
    decode = ["--disaggregation-mode", "decode", "--no-enable-prefix-caching", "--engine-request-limit", str(IN_ENGINE)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        runtime = DistributedRuntime(discovery_backend="file")
        limits = Limits(graceful_shutdown_s=0.1)
        service = FrontendService(runtime, FrontendConfig(http_port=0), limits)
        beside = DistributedRuntime(discovery_backend="file")
        moving = FrontendService(beside, FrontendConfig(http_port=0, migration_limit=1), limits)
        workers = [
            await Worker.start(weights_dir, home / f"{name}.log", environ, *flags)
            for name, flags in (("dying", prefill), ("staying", prefill), ("decode", decode))
        ]
        try:
            for worker in workers:
                await worker.ready(runtime)
            for each in (service, moving):
                await each.start()
                await until(lambda of=each: any(s.prefill is not None for s in of.models.sets()), 30, *workers)
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_S)) as session:
                yield Fleet(service, moving, beside, session, Tokenizer.load(weights_dir), *workers)
        finally:
            for worker in workers:
                await worker.kill()
            for each, its in ((service, runtime), (moving, beside)):
                await each.close()
                await its.close()


async def test_a_prefill_worker_that_is_killed_costs_time_whatever_it_was_doing(fleet: Fleet) -> None:
    reading = {f"reading {number}": 200 + 20 * number for number in range(IN_ENGINE)}
    lengths = {**reading, "waiting": 250, "computing": 3900}
    prompts = {name: words(800 + length, length) for name, length in lengths.items()}
    right = {name: await fleet.right(prompt) for name, prompt in prompts.items()}
    assert await fleet.text(words(803, 300), fleet.dying) == await fleet.right(words(803, 300))
    core = fleet.decoder.core()
    answers: dict[str, asyncio.Task[str]] = {}

    async def until_held(waiting: int, read: int) -> None:
        async def held() -> bool:
            return await fleet.dying.held() == (waiting, read)

        await until(held, 20, fleet.dying)

    def begin(name: str) -> None:
        answers[name] = asyncio.ensure_future(fleet.text(prompts[name], fleet.dying))

    with contextlib.ExitStack() as stack:
        stack.callback(os.kill, core, signal.SIGCONT)
        os.kill(core, signal.SIGSTOP)
        for name in reading:
            begin(name)
        await until_held(0, IN_ENGINE)  # the decode worker has claimed them, and its engine has not fetched them
        begin("waiting")
        await until_held(1, IN_ENGINE)  # and this one it has not even claimed
        begin("computing")
        await until(lambda: _is_computing(fleet.dying), 20, fleet.dying)
        await fleet.dying.kill()
    for name, answer in answers.items():
        assert await answer == right[name], name
    assert await fleet.decoder.metric(RECOMPUTES, reason="unreachable") == 1
    assert await fleet.decoder.metric(RECOMPUTES) >= 1
    assert fleet.service.metrics.prefills.labels("lost").value == 1
    # The other prefill worker goes on.
    assert await fleet.text(words(804, 300), fleet.staying) == await fleet.right(words(804, 300))
    assert await fleet.staying.metric("dynamo_component_kv_handles_ended_total", end="read") == 1


async def _is_computing(worker: Worker) -> bool:
    return await worker.metric("dynamo_engine_request") >= 1


@dataclass
class Moved:
    """An answer of the frontend that moves requests."""

    text: str = ""
    usage: dict[str, int] | None = None
    chunks: int = 0

    async def ask(self, fleet: Fleet, prompt: list[int], *, stream: bool) -> None:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
        body |= {"stream": stream, "stream_options": {"include_usage": True}} if stream else {}
        url = f"http://127.0.0.1:{fleet.moving.port}/v1/completions"
        async with fleet.session.post(url, json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not stream:
                    self.take(msgspec.json.decode(line))
                elif line.startswith(b"data: {"):
                    self.take(msgspec.json.decode(line[6:]))

    def take(self, value: dict[str, Any]) -> None:
        assert "error" not in value, value
        self.chunks += 1
        self.usage = value.get("usage") or self.usage
        self.text += "".join(choice["text"] for choice in value["choices"])


async def test_a_decode_worker_that_is_killed_is_a_typed_error_or_another_goes_on(fleet: Fleet) -> None:
    """And the KV that it read is free. `staying` turns into a decode worker just before, so that there is another."""
    prompts = [words(812, 100), words(813, 120)]
    right = [await fleet.right(prompt, LONG) for prompt in prompts]
    seen: list[bytes] = []
    answering = asyncio.Event()

    async def stream() -> None:
        async with fleet.post(words(810, 100), fleet.staying, 2000, stream=True) as response:
            async for line in response.content:
                seen.append(line)
                if len(seen) > 10:  # tokens of the decode worker's own
                    answering.set()

    streaming = asyncio.ensure_future(stream())
    async with asyncio.timeout(ANSWER_S):
        await answering.wait()
    answers = [Moved(), Moved()]
    moving = [
        asyncio.ensure_future(answer.ask(fleet, prompt, stream=bool(number)))
        for number, (answer, prompt) in enumerate(zip(answers, prompts, strict=True))
    ]
    await until(lambda: answers[1].chunks > 20, ANSWER_S, fleet.decoder)
    os.kill(fleet.decoder.core(), signal.SIGSTOP)
    reading = asyncio.ensure_future(_answer(fleet, words(811, 300)))

    async def claimed() -> bool:
        return (await fleet.staying.held())[1] == 1

    await until(claimed, 20, fleet.staying)
    await fleet.staying.become(fleet.beside, "decode")
    await until(lambda: any(s.worker_count == 2 for s in fleet.moving.models.sets()), 20, fleet.staying)
    assert not any(task.done() for task in moving)
    await fleet.decoder.kill()
    status, body = await reading
    assert status == 503, body
    assert body["error"]["type"], body
    await streaming
    (error,) = [line for line in seen if b'"error"' in line]
    assert msgspec.json.decode(error.removeprefix(b"data: "))["error"]["message"]
    assert not any(b"[DONE]" in line for line in seen)
    await asyncio.gather(*moving)
    assert fleet.moving.metrics.migrations.labels("tiny", "ongoing_request", "success").value == 2
    for answer, prompt, text in zip(answers, prompts, right, strict=True):
        assert answer.text == text
        assert answer.usage is not None
        assert (answer.usage["prompt_tokens"], answer.usage["completion_tokens"]) == (len(prompt), LONG)

    async def empty() -> bool:
        return await fleet.staying.held() == (0.0, 0.0)

    await until(empty, LEASE_S + 5, fleet.staying)


async def _answer(fleet: Fleet, prompt: list[int]) -> tuple[int, Any]:
    async with fleet.post(prompt, fleet.staying) as response:
        return response.status, await response.json()
