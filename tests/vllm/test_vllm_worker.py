"""Does `python -m dynamo.vllm` serve, and is nothing left of it, however it ends?"""

import asyncio
import os
import re
import signal
import sys
import time
import urllib.request
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo.llm.block_hash import compute_block_hash_for_seq
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.client import Client
from dynamo.runtime.events import create_subscriber
from tests.vllm.conftest import ENGINE_TIMEOUT_S
from tests.vllm.vllm_cases import BLOCK, words
from tests.vllm.vllm_helpers import ENGINE_FLAGS, alive, descendants, request, shared_memory, still_there

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(ENGINE_TIMEOUT_S)]

LEFTOVER_S = 20.0  # vLLM's own clean end takes five seconds, twice that beside seven neighbours


class Worker:
    """One `python -m dynamo.vllm`, in a session of its own."""

    def __init__(self, process: Process, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self._log = log

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    async def until(self, condition: Callable[[], Any], timeout_s: float = ENGINE_TIMEOUT_S) -> Any:
        """Wait for something outside this process; fails with the log."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < deadline, self.log()[-4000:]
            assert self.process.returncode is None, self.log()[-4000:]
            await asyncio.sleep(0.1)
        return found

    async def ready(self) -> None:
        await self.until(lambda: "vllm is ready: tiny" in self.log())

    def system_url(self) -> str:
        found = re.search(r"listens on (http://\S+)", self.log())
        assert found, self.log()
        return found.group(1)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.system_url() + path, timeout=10) as response:
            body: bytes = response.read()
        return body.decode()


@pytest.fixture
async def worker(
    weights_dir: Path, lora_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Worker]:
    """A worker that is starting, with an adapter."""
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    environ = os.environ | {"DYN_SYSTEM_PORT": "0", "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2"}
    log = tmp_path / "worker.log"
    adapter = ["--enable-lora", "--lora-modules", f"adapter={lora_dir}"]
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dynamo.vllm", "--model", str(weights_dir), "--served-model-name", "tiny", "alias",
            *ENGINE_FLAGS, *adapter, stdout=out, stderr=out, env=environ, start_new_session=True,
        )  # fmt: skip
    yield Worker(process, log)
    children = descendants(process.pid) if process.returncode is None else {}
    for pid in alive([process.pid, *children]):
        os.kill(pid, signal.SIGKILL)
    await process.wait()


@pytest.fixture
async def runtime(worker: Worker) -> AsyncIterator[DistributedRuntime]:
    """A runtime that sees the worker."""
    drt = DistributedRuntime(discovery_backend="file")
    yield drt
    await drt.close()


async def ask(client: Client, wanted: Any) -> list[dict[str, Any]]:
    stream = await client.round_robin(msgspec.to_builtins(wanted), annotated=False)
    return [item async for item in stream]


def tokens(items: list[dict[str, Any]]) -> list[int]:
    return [token_id for item in items for token_id in item.get("token_ids", [])]


def nothing_left(processes: dict[int, str], segments: set[str], tmp_path: Path) -> None:
    deadline = time.monotonic() + LEFTOVER_S
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {pid: processes[pid] for pid in alive(processes)} == {}
    assert still_there(segments) == []
    assert socket_directories(tmp_path) == []


def socket_directories(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("dynamo-vllm-*"))


async def test_a_worker_serves_and_a_signal_lets_it_finish_what_it_has(
    worker: Worker, runtime: DistributedRuntime, tmp_path: Path
) -> None:
    await worker.ready()
    endpoint = runtime.endpoint("dynamo.backend.generate")
    client = await endpoint.client()
    await client.wait_for_instances(10)
    events = await create_subscriber(runtime, endpoint, "kv-events")

    prompt = words(90, BLOCK + 5)
    greedy = {"sampling_options": {"temperature": 0.0}, "stop_conditions": {"max_tokens": 8, "ignore_eos": True}}
    base, adapted = [await ask(client, request(prompt, **greedy, routing={"lora_name": n})) for n in (None, "adapter")]
    assert len(tokens(base)) == len(tokens(adapted)) == 8
    assert tokens(base) != tokens(adapted)
    assert base[-1]["completion_usage"]["prompt_tokens"] == len(prompt)

    cards = await runtime.discovery.get_prefix("v1/mdc/")
    names = {name for card in cards.values() for name in ("tiny", "alias", "adapter") if f'"{name}"'.encode() in card}
    assert names == {"tiny", "alias", "adapter"}

    expected = compute_block_hash_for_seq(prompt, BLOCK)[0]
    async with asyncio.timeout(10):
        async for event in events:
            if str(expected) in str(msgspec.msgpack.decode(event.payload)):
                break

    assert '"ready"' in worker.get("/health")
    metrics = worker.get("/metrics")
    assert re.search(r'^vllm:request_success_total\{.*finished_reason="length".*model="tiny".*\} 2\.0$', metrics, re.M)
    assert "dynamo_component_" in metrics

    processes = descendants(worker.pid)
    segments = shared_memory(processes)
    assert segments
    endless = request(words(91, 10), stop_conditions={"max_tokens": 300, "ignore_eos": True})
    stream = await client.round_robin(msgspec.to_builtins(endless), annotated=False)
    items = [await anext(stream)]
    worker.process.send_signal(signal.SIGTERM)
    items += [item async for item in stream]
    assert len(tokens(items)) == 300
    assert await asyncio.wait_for(worker.process.wait(), 30) == 0
    nothing_left(processes, segments, tmp_path)
    assert "leaked" not in worker.log()


async def test_killing_a_worker_takes_vllms_processes_along(worker: Worker, tmp_path: Path) -> None:
    await worker.ready()
    processes = descendants(worker.pid)
    assert len([name for name in processes.values() if "VLLM::" in name]) == 2
    segments = shared_memory(processes)
    assert segments
    assert socket_directories(tmp_path)
    worker.process.kill()
    await worker.process.wait()
    nothing_left(processes, segments, tmp_path)


async def test_a_signal_while_loading_ends_it_at_once(worker: Worker, tmp_path: Path) -> None:
    await worker.until(lambda: any("VLLM::EngineCore" in name for name in descendants(worker.pid).values()))
    processes = descendants(worker.pid)
    segments = shared_memory(processes)
    signalled = time.monotonic()
    worker.process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(worker.process.wait(), 20) == 0
    assert time.monotonic() - signalled < 15
    nothing_left(processes, segments, tmp_path)
    assert "Traceback" not in worker.log()
