"""A frontend that routes by KV and two workers, everything by way of NATS: does it serve, and live through restarts?"""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.deployment import Deployment, chat_body
from tests.runtime.nats_server import NatsServer, nats_running

# As in test_moving: 200 tokens last about a second.
STEADY = ["--speedup-ratio", "10"]
LONG = "one and the same beginning, so that whoever has it is preferred " * 20


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_running(NatsServer(tmp_path / "nats")) as server:
        yield server


async def ask(session: aiohttp.ClientSession, base: str, content: str, tokens: int = 20) -> dict[str, Any]:
    """One unary chat: status and body."""
    messages = [{"role": "user", "content": content}]
    body = chat_body(stream=False, messages=messages, max_tokens=tokens, nvext={"extra_fields": ["worker_id"]})
    async with session.post(f"{base}/v1/chat/completions", json=body) as response:
        return {"status": response.status, "body": await response.json()}


def worker_of(answer: dict[str, Any]) -> int:
    found: int = answer["body"]["nvext"]["worker_id"]["decode_worker_id"]
    return found


async def test_kv_routing_works_by_nats_alone_and_a_restart_of_the_server_is_a_pause(
    deployment: Deployment, model_dir: Path, nats: NatsServer
) -> None:
    env = {"NATS_SERVER": nats.url, "DYN_REQUEST_PLANE": "nats", "DYN_EVENT_PLANE": "nats"}
    deployment.frontend("--router-mode", "kv", env=env)
    workers = [deployment.mocker(model_dir, *STEADY, env=env) for _ in range(2)]
    deployment.wait_for(workers=2)

    def synced() -> bool:
        return "synced" in deployment.text("/status") and "recovering" not in deployment.text("/status")

    deployment.until(synced, "the router knows the workers' caches")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session:
        base = deployment.base
        first = await ask(session, base, LONG)
        assert first["status"] == 200
        await asyncio.sleep(0.2)  # events leave a worker within some hundredths of a second
        again = [await ask(session, base, f"{LONG} {i}") for i in range(4)]
        assert {worker_of(answer) for answer in again} == {worker_of(first)}, "where its beginning is cached"
        assert again[0]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"] > 100

        running = [asyncio.create_task(ask(session, base, f"number {i}", 400)) for i in range(8)]
        await asyncio.sleep(0.3)
        nats.restart()
        answers = await asyncio.gather(*running)
        assert [answer["status"] for answer in answers] == [200] * 8
        assert {answer["body"]["usage"]["completion_tokens"] for answer in answers} == {400}
        assert (await ask(session, base, f"{LONG} after"))["status"] == 200
        assert worker_of(await ask(session, base, f"{LONG} once more")) == worker_of(first)

    for worker in workers:
        worker.signal(signal.SIGTERM)
    assert [await asyncio.to_thread(worker.wait) for worker in workers] == [0, 0]
