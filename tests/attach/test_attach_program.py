"""Does the program do what its documentation says, as a process of its own?"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dynamo.frontend.service import FrontendService
from tests.attach.asking import PATIENCE_S, post
from tests.attach.pretend_server import PretendServer

Start = Callable[..., Coroutine[Any, Any, asyncio.subprocess.Process]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start `dynamo attach`, with a discovery of the test's own."""
    started: list[asyncio.subprocess.Process] = []

    async def run(*words: str, **env: str) -> asyncio.subprocess.Process:
        environ = os.environ | {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(tmp_path / "kv"), **env}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dynamo.cli.main", "attach", *words,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environ,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        return (await process.stdout.readline()).decode()


async def test_it_says_what_it_found_and_ends_in_order(server: PretendServer, start: Start, tmp_path: Path) -> None:
    dumped = tmp_path / "options.json"
    process = await start(server.url, "--dump-config-to", str(dumped), DYN_ATTACH_API_KEY="secret")
    assert (await line(process)).startswith(f"attach found {server.url}: vLLM 0.32.0 serving tiny")
    assert await line(process) == "attach is ready: tiny by 1 worker at dyn://dynamo.backend.generate\n"
    assert json.loads(dumped.read_text())["api_key"] == "***"
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0


async def test_a_signal_ends_it_while_it_waits_for_a_server(server: PretendServer, start: Start) -> None:
    await server.stop()
    process = await start(server.url)
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE_S):
        while b"cannot connect" not in (said := await process.stderr.readline()):
            assert said, "it ended"
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0


async def test_what_is_no_openai_server_is_one_line_and_status_1(server: PretendServer, start: Start) -> None:
    server.models_status = 404
    process = await start(server.url)
    out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == f"attach: error: {server.url}/v1/models answers 404: is this an OpenAI server?\n"


async def test_large_bodies_pass_through(server: PretendServer, frontend: FrontendService, attach: Any) -> None:
    await attach(server.url, mode="openai")
    async with asyncio.timeout(PATIENCE_S):
        while (model := frontend.models.get("tiny")) is None or not model.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    body = json.dumps({"model": "tiny", "messages": [], "image": "x" * (8 << 20)}).encode()
    assert (await post(frontend.url, "/v1/chat/completions", body))[0] == 200
    assert server.seen[-1][2] == body
