"""A frontend and scripted workers in this process, talking over real sockets."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.service import FrontendService
from dynamo.runtime import DistributedRuntime
from tests.frontend.front_door import ScriptedWorker, Served, StartFrontend, StartWorker, model_ready
from tests.frontend.kv_fleet import Mocker, StartMocker


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """The loop that the program runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def start_frontend(runtime: DistributedRuntime) -> AsyncIterator[StartFrontend]:
    """Start a frontend on a free port: `await start_frontend(limits={...}, **config)`."""
    started: list[FrontendService] = []

    async def start(limits: dict[str, Any] | None = None, **config: Any) -> FrontendService:
        limits = {"graceful_shutdown_s": 0.05, **(limits or {})}
        service = FrontendService(runtime, FrontendConfig(http_port=0, **config), Limits(**limits))
        await service.start()
        started.append(service)
        return service

    yield start
    for service in started:
        await service.close()


@pytest.fixture
async def start_worker(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartWorker]:
    """Start a worker with a runtime of its own: `await start_worker(model="tiny", ...)`."""
    monkeypatch.setenv("DYN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0.05")
    monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "0.5")
    started: list[ScriptedWorker] = []

    async def start(model: str = "tiny", directory: Path = model_dir, **options: Any) -> ScriptedWorker:
        worker = ScriptedWorker(DistributedRuntime(discovery_backend="mem"))
        started.append(worker)
        await worker.start(directory, model, **options)
        return worker

    yield start
    for worker in started:
        await worker.leave()


@pytest.fixture
async def served(start_frontend: StartFrontend, start_worker: StartWorker) -> Served:
    """A frontend with one ready worker of the model `tiny`."""
    service = await start_frontend()
    worker = await start_worker()
    await model_ready(service, "tiny")
    return service, worker


@pytest.fixture
async def start_mocker(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartMocker]:
    """Start a simulated worker: `await start_mocker("--speedup-ratio", "0", name="tiny")`."""
    monkeypatch.setenv("DYN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0.05")
    monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "0.5")
    started: list[Mocker] = []

    async def start(*flags: str, name: str = "tiny") -> Mocker:
        mocker = Mocker()
        started.append(mocker)
        mocker.start(model_dir, *(flags or ("--speedup-ratio", "0")), name=name)
        return mocker

    yield start
    for mocker in started:
        await mocker.leave()
