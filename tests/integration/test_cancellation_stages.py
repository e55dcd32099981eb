"""A client leaves while its request is at some stage: does the engine stop within a step, and is each block free?

Two mockers that do whole requests (model `whole`) and a pair of prefill and decode (model `pair`), slow enough to be
met at a stage. The router's queue, transfers of KV, and waiting for another worker are in tests/frontend and
tests/mocker.
"""

import asyncio
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.integration.deployment import Deployment, Process, chat_body, free_port

# A step of decoding lasts some 0.1 s, and one of a prompt computes 64 tokens of the long prompts here.
SLOW = ["--speedup-ratio", "0.2", "--max-num-batched-tokens", "64", "--block-size", "16", "--engine-request-limit", "1"]
SOON_S = 2.0  # some steps: a request that went on would be seen for minutes
LONG_PROMPT = "word " * 1500
GENERATED = "vllm:generation_tokens_total"
RUNNING = "vllm:num_requests_running"
USED = "vllm:kv_cache_usage_perc"
QUEUED = "dynamo_request_queue"


@dataclass
class Worker:
    """A mocker, seen through its own metrics."""

    process: Process
    port: int

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as response:
            text = response.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def free(self) -> bool:
        return self.metric(RUNNING) == self.metric(USED) == self.metric(QUEUED) == 0


@dataclass
class Scene:
    deployment: Deployment
    whole: list[Worker]
    prefill: Worker
    decode: Worker

    async def until(self, true: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
        await asyncio.to_thread(self.deployment.until, true, what, timeout_s)

    def generated(self) -> float:
        return sum(worker.metric(GENERATED) for worker in self.workers())

    def workers(self) -> list[Worker]:
        return [each for each in (*self.whole, self.prefill, self.decode) if each.process.popen.poll() is None]

    def ask(self, session: aiohttp.ClientSession, model: str, prompt: str) -> "asyncio.Task[aiohttp.ClientResponse]":
        body = chat_body(model, messages=[{"role": "user", "content": prompt}], max_tokens=2000)
        return asyncio.create_task(session.post(f"{self.deployment.base}/v1/chat/completions", json=body))

    async def leave_at(self, stage: Callable[[], bool], model: str, prompt: str = "Hello!") -> None:
        """Ask, leave at a stage, and see that all is free soon and at most one token more was made."""
        async with aiohttp.ClientSession() as session:
            asking = self.ask(session, model, prompt)
            await self.until(stage, "the request is at the stage")
            asking.cancel()
        made = self.generated()
        await self.until(lambda: all(worker.free() for worker in self.workers()), "all is free", SOON_S)
        assert self.generated() - made <= 1


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Scene]:
    deployment = Deployment(tmp_path_factory.mktemp("stages"))

    def worker(name: str, *words: str) -> Worker:
        port = free_port()
        env = {"DYN_SYSTEM_PORT": str(port), "DYN_NAMESPACE": name}
        return Worker(deployment.mocker(model_dir, *SLOW, *words, name=name, env=env), port)

    whole = [worker("whole") for _ in range(2)]
    prefill, decode = (worker("pair", "--disaggregation-mode", role) for role in ("prefill", "decode"))
    deployment.frontend("--migration-limit", "1")
    deployment.wait_for("whole", workers=4)
    deployment.wait_for("pair", workers=4)
    yield Scene(deployment, whole, prefill, decode)
    deployment.stop()


async def test_in_a_workers_queue(scene: Scene) -> None:
    async with aiohttp.ClientSession() as session:
        ahead = [scene.ask(session, "whole", "Hello!") for _ in scene.whole]
        running = lambda: all(worker.metric(RUNNING) == 1 for worker in scene.whole)  # noqa: E731
        await scene.until(running, "both workers are full")
        async with aiohttp.ClientSession() as other:
            waiting = scene.ask(other, "whole", "Hello!")
            queued = lambda: sum(worker.metric(QUEUED) for worker in scene.whole) == 1  # noqa: E731
            await scene.until(queued, "a third waits")
            waiting.cancel()
        await scene.until(lambda: not queued(), "it waits no more", SOON_S)
        assert running()
        for each in ahead:
            each.cancel()
    await scene.until(lambda: all(worker.free() for worker in scene.workers()), "all is free", SOON_S)


async def test_in_prefill(scene: Scene) -> None:
    made = scene.generated()
    computing = lambda: any(worker.metric(RUNNING) and worker.metric(USED) for worker in scene.whole)  # noqa: E731
    await scene.leave_at(computing, "whole", LONG_PROMPT)
    assert scene.generated() == made  # it was left before its first token


async def test_in_decode(scene: Scene) -> None:
    made = scene.generated()
    await scene.leave_at(lambda: scene.generated() >= made + 2, "whole")


async def test_in_remote_prefill(scene: Scene) -> None:
    made, decoded = scene.generated(), scene.decode.metric(GENERATED)
    await scene.leave_at(
        lambda: bool(scene.prefill.metric(RUNNING) and scene.prefill.metric(USED)), "pair", LONG_PROMPT
    )
    assert scene.generated() == made
    assert scene.decode.metric(GENERATED) == decoded


async def test_in_decode_after_remote_prefill(scene: Scene) -> None:
    decoded = scene.decode.metric(GENERATED)
    await scene.leave_at(lambda: scene.decode.metric(GENERATED) >= decoded + 2, "pair")


async def test_where_it_has_moved_to(scene: Scene) -> None:
    def moved() -> bool:
        """Kill the worker that answers, once; the other computes the prompt and what was said anew."""
        alive = [worker for worker in scene.whole if worker in scene.workers()]
        if len(alive) == 1:
            return alive[0].metric(RUNNING) == 1 and alive[0].metric(USED) > 0
        for worker in alive:
            if worker.metric(RUNNING) and worker.metric(GENERATED) >= before[worker.port] + 2:
                worker.process.signal(signal.SIGKILL)
                worker.process.wait()
        return False

    before = {worker.port: worker.metric(GENERATED) for worker in scene.whole}
    await scene.leave_at(moved, "whole", "word " * 100)
