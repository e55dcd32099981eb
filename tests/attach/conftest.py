"""What do the tests of attaching share? A frontend, attached servers in this process, and real vLLM servers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo.attach.args import AttachOptions
from dynamo.attach.main import serve
from dynamo.engine.worker_args import WorkerOptions
from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.service import FrontendService
from dynamo.runtime import DistributedRuntime
from tests.attach.pretend_server import PretendServer
from tests.attach.vllm_servers import StartAttach, VllmServer, start_vllm, stop_vllm, wait_for_vllm


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


@pytest.fixture(scope="package")  # not the session: an idle server beside all other tests slows them
def vllm_server(weights_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """One real vLLM server with everything on that attaching can use."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    server = start_vllm(weights_dir, log, "--enable-scale-out", "--enable-prompt-tokens-details")
    try:
        wait_for_vllm(server, log)
        yield server
    finally:
        stop_vllm(server)
