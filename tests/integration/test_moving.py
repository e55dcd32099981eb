"""Workers die, hang or leave under load, and requests may move: does each client get the answer it would have got?"""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.deployment import Deployment, Process, chat_body

# Decoding takes 20 to 60 ms a step: at a tenth of that, 400 tokens last a second or two.
STEADY = ["--speedup-ratio", "10"]
TOKENS = 300
REQUESTS = 16


async def ask(session: aiohttp.ClientSession, base: str, number: int, begun: asyncio.Semaphore) -> dict[str, Any]:
    """Stream one chat; its text, its usage, and the error if it ended with one. Tells when half of it is there."""
    body = chat_body(
        messages=[{"role": "user", "content": f"number {number}"}],
        max_tokens=TOKENS,
        seed=number,
        stream_options={"include_usage": True},
        nvext={},
    )
    found: dict[str, Any] = {"text": "", "usage": None, "error": None}
    chunks = 0
    async with session.post(f"{base}/v1/chat/completions", json=body) as response:
        async for raw in response.content:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            value = json.loads(line[6:])
            if "error" in value:
                found["error"] = value["error"]["message"]
                continue
            found["usage"] = value.get("usage") or found["usage"]
            for choice in value.get("choices", ()):
                found["text"] += choice["delta"].get("content") or ""
            chunks += 1
            if chunks == TOKENS // 4:
                begun.release()
    return found


async def load(base: str, disturb: Any = None) -> list[dict[str, Any]]:
    """All requests at once; `disturb` is called once all are on their way."""
    begun = asyncio.Semaphore(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        running = [asyncio.create_task(ask(session, base, number, begun)) for number in range(REQUESTS)]
        for _ in running:
            await asyncio.wait_for(begun.acquire(), 30)
        if disturb is not None:
            disturb()
        async with asyncio.timeout(60):
            return await asyncio.gather(*running)


@pytest.mark.parametrize("mode", ["round-robin", "kv"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=["killed", "hung", "leaving"])
async def test_answers_are_those_of_an_undisturbed_run(
    deployment: Deployment, model_dir: Path, mode: str, number: signal.Signals
) -> None:
    grace = {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.1", "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "0.2"}
    workers: list[Process] = [deployment.mocker(model_dir, *STEADY, env=grace) for _ in range(3)]
    deployment.frontend("--migration-limit", "3", "--router-mode", mode)
    deployment.wait_for(workers=3)
    undisturbed = await load(deployment.base)
    disturbed = await load(deployment.base, lambda: workers[0].signal(number))
    assert [answer["error"] for answer in disturbed] == [None] * REQUESTS
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after["text"] == before["text"]
        assert after["usage"]["completion_tokens"] == before["usage"]["completion_tokens"] == TOKENS
        assert after["usage"]["prompt_tokens"] == before["usage"]["prompt_tokens"]
    assert 'outcome="success"' in await asyncio.to_thread(deployment.text, "/metrics")
    if number == signal.SIGSTOP:
        workers[0].signal(signal.SIGCONT)


async def test_a_rolling_restart_of_all_workers_fails_nobody(deployment: Deployment, model_dir: Path) -> None:
    grace = {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.1", "DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "0.2"}
    workers = [deployment.mocker(model_dir, *STEADY, env=grace) for _ in range(2)]
    deployment.frontend("--migration-limit", "5")
    deployment.wait_for(workers=2)
    undisturbed = await load(deployment.base)

    async def restart_all() -> None:
        for worker in workers:
            deployment.mocker(model_dir, *STEADY, env=grace)
            await asyncio.to_thread(deployment.wait_for, workers=3)
            worker.signal(signal.SIGTERM)
            await asyncio.to_thread(worker.wait)

    restarting = asyncio.create_task(restart_all())
    while not restarting.done():
        answers = await load(deployment.base)
        assert [answer["error"] for answer in answers] == [None] * REQUESTS
        assert [answer["text"] for answer in answers] == [answer["text"] for answer in undisturbed]
    await restarting
