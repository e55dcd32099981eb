"""What do the tests of attaching share? A frontend, attached servers in this process, and real vLLM servers."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pretend_server import PretendServer

from dynamo.attach.args import AttachOptions
from dynamo.attach.main import serve
from dynamo.engine.worker_args import WorkerOptions
from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.service import FrontendService
from dynamo.runtime import DistributedRuntime

StartAttach = Callable[..., Awaitable["asyncio.Task[int]"]]
START_S = 240.0  # an engine imports torch and loads on two cores that others use too


@pytest.fixture
async def server(model_dir: Path) -> AsyncIterator[PretendServer]:
    """A server that pretends."""
    one = PretendServer(model_dir)
    await one.start()
    yield one
    await one.stop()


@pytest.fixture
async def frontend(
    runtime: DistributedRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FrontendService]:
    """A frontend on a free port."""
    monkeypatch.setenv("DYN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0.05")
    monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "0.5")
    service = FrontendService(runtime, FrontendConfig(http_port=0), Limits(graceful_shutdown_s=0.05))
    await service.start()
    yield service
    await service.close()


@pytest.fixture
async def attach(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartAttach]:
    """Attach a server as the program does: `await attach(url, **AttachOptions)` gives the running task."""
    monkeypatch.setattr("dynamo.attach.monitor.INTERVAL_S", 0.1)
    monkeypatch.setattr("dynamo.attach.load_watch.INTERVAL_S", 0.1)
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0.05")
    started: list[tuple[DistributedRuntime, asyncio.Task[int]]] = []

    async def start(url: str, worker: WorkerOptions | None = None, **options: Any) -> "asyncio.Task[int]":
        runtime = DistributedRuntime(discovery_backend="mem")
        chosen = AttachOptions(url=url, worker=worker or WorkerOptions(), **options)
        task = asyncio.create_task(serve(runtime, chosen))
        started.append((runtime, task))
        return task

    yield start
    for runtime, task in started:
        runtime.shutdown()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(task, 15)
        await runtime.close()


@dataclass(eq=False)
class VllmServer:
    """A real vLLM OpenAI server, started as its users start it."""

    url: str
    kv_events: str
    kv_replay: str
    directory: Path
    process: "subprocess.Popen[bytes]"


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start_vllm(directory: Path, log: Path, *flags: str) -> VllmServer:
    """Start a server; `wait_for_vllm` waits until it answers."""
    port, events, replay = free_ports(3)
    kv = (
        f'{{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:{events}", '
        f'"replay_endpoint": "tcp://127.0.0.1:{replay}", "topic": "kv@tiny"}}'
    )
    words = ["--model", str(directory), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-model-len", "2048", "--enforce-eager", "--dtype", "float32", "--block-size", "32"]
    words += ["--num-gpu-blocks-override", "512", "--kv-events-config", kv, *flags]
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=out, stderr=out, env=environ, start_new_session=True,
        )  # fmt: skip
    endpoints = f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}"
    return VllmServer(f"http://127.0.0.1:{port}", *endpoints, directory, process)


def wait_for_vllm(server: VllmServer, log: Path) -> None:
    """Until it is healthy. Fails with its log."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(f"vLLM did not start:\n{log.read_text(errors='replace')[-6000:]}")


def stop_vllm(server: VllmServer) -> None:
    """End it with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, 15)
    try:
        server.process.wait(20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, 9)
        server.process.wait(10)


@pytest.fixture(scope="session")
def vllm_server(weights_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """One real vLLM server with everything on that attaching can use."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    server = start_vllm(weights_dir, log, "--enable-scale-out", "--enable-prompt-tokens-details")
    try:
        wait_for_vllm(server, log)
        yield server
    finally:
        stop_vllm(server)
