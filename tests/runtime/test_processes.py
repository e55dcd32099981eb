"""Workers and callers as real processes, killed, stopped and signalled under load."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo.runtime import Client, Context, DistributedRuntime
from dynamo.runtime.errors import Disconnected
from tests.runtime.plane_helpers import Sink, WorkerProcess, connect, push, until


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "kv"))
    return tmp_path / "kv"


@pytest.fixture
async def here(store: Path) -> AsyncIterator[DistributedRuntime]:
    runtime = DistributedRuntime(discovery_backend="file")
    yield runtime
    await runtime.close()


async def ready(worker: WorkerProcess) -> int:
    """The worker's instance id, once it serves."""
    word, instance_id, loop = (await worker.line()).split()
    assert (word, loop) == ("ready", "uvloop")
    return int(instance_id)


async def load(client: Client, instance_id: int, streams: int) -> list[Sink]:
    """Streams that are under way."""
    sinks = [push(client, {"n": 10**6, "every_s": 0.002}, instance_id) for _ in range(streams)]
    for sink in sinks:
        await asyncio.wait_for(sink.first.wait(), 10)
    return sinks


async def test_a_worker_killed_under_load_ends_its_requests_and_harms_no_other(
    store: Path, here: DistributedRuntime
) -> None:
    with WorkerProcess(store, "serve") as doomed, WorkerProcess(store, "serve") as spared:
        doomed_id, spared_id = await ready(doomed), await ready(spared)
        client = await connect(here, count=2)
        lost, kept = await load(client, doomed_id, 16), await load(client, spared_id, 16)
        start = time.monotonic()
        doomed.process.kill()
        for sink in lost:
            await sink.finished()
        ended_s = time.monotonic() - start
        assert all(isinstance(sink.error, Disconnected) and sink.error.migratable for sink in lost)
        assert client.available_ids() == [spared_id], "out of rotation in the same turn"
        assert ended_s < 1
        await until(lambda: client.instance_ids() == [spared_id])
        before = [len(sink.items) for sink in kept]
        await until(lambda: all(len(sink.items) > n for sink, n in zip(kept, before, strict=True)))
        assert not any(sink.done.is_set() for sink in kept)


async def test_a_stopped_worker_is_given_up_and_comes_back(
    store: Path, here: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_PING_INTERVAL_SECS", "0.1")
    monkeypatch.setenv("DYN_TCP_CONNECT_TIMEOUT", "0.2")
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "0.1")
    runtime = DistributedRuntime(discovery_backend="file")
    with WorkerProcess(store, "serve") as worker:
        instance_id = await ready(worker)
        client = await connect(runtime)
        [sink] = await load(client, instance_id, 1)
        worker.process.send_signal(signal.SIGSTOP)
        await sink.finished()
        assert isinstance(sink.error, Disconnected)
        for _ in range(8):  # 0.8 s: several times the inhibition, tried by connecting and not by anybody's request
            assert client.available_ids() == []
            await asyncio.sleep(0.1)
        worker.process.send_signal(signal.SIGCONT)
        await until(lambda: client.available_ids() == [instance_id])
        assert (await worker.line()).startswith("killed"), "its caller's connection was gone"
        sink = push(client, {"n": 3}, instance_id)
        assert (await sink.finished()).items == [0, 1, 2]
    await runtime.close()


async def test_a_killed_caller_frees_its_requests(store: Path) -> None:
    with WorkerProcess(store, "serve") as worker:
        await ready(worker)
        with WorkerProcess(store, "call") as other:
            assert await other.line() == "streaming"
            start = time.monotonic()
            other.process.kill()
            assert await worker.line() == "killed of-the-caller"
            assert time.monotonic() - start < 1


async def test_sigterm_leaves_in_order_and_finishes_what_is_in_flight(store: Path, here: DistributedRuntime) -> None:
    with WorkerProcess(store, "serve") as worker:
        instance_id = await ready(worker)
        client = await connect(here)
        sink = push(client, {"n": 30, "every_s": 0.02}, instance_id)
        await asyncio.wait_for(sink.first.wait(), 10)
        start = time.monotonic()
        worker.process.send_signal(signal.SIGTERM)
        await until(lambda: client.available_ids() == [])
        assert (await sink.finished()).items == list(range(30))
        assert await worker.line() == "left"
        assert await worker.wait() == 0
        assert time.monotonic() - start < 4, "callers confirmed that they know, so the grace of 5 s was not needed"


async def test_nobody_connected_means_no_grace(store: Path) -> None:
    with WorkerProcess(store, "serve") as worker:
        await ready(worker)
        start = time.monotonic()
        worker.process.send_signal(signal.SIGINT)
        assert await worker.wait() == 0
        assert time.monotonic() - start < 3


async def test_what_outlasts_the_drain_is_cancelled(store: Path, here: DistributedRuntime) -> None:
    with WorkerProcess(store, "serve", DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS="0.3") as worker:
        instance_id = await ready(worker)
        client = await connect(here)
        [sink] = await load(client, instance_id, 1)
        worker.process.send_signal(signal.SIGTERM)
        await sink.finished()
        assert type(sink.error).__name__ == "EngineShutdown"
        assert (await worker.line()).startswith("killed")
        assert await worker.wait() == 0


async def test_a_second_signal_ends_at_once(store: Path, here: DistributedRuntime) -> None:
    with WorkerProcess(store, "serve") as worker:
        instance_id = await ready(worker)
        client = await connect(here)
        [sink] = await load(client, instance_id, 1)
        worker.process.send_signal(signal.SIGTERM)
        await until(lambda: client.available_ids() == [])
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.wait() == 128 + signal.SIGTERM
        await sink.finished()


async def test_a_worker_function_that_ignores_the_shutdown_is_cancelled(store: Path) -> None:
    with WorkerProcess(store, "never-return") as worker:
        assert await worker.line() == "ready"
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.wait() == 1


async def test_workers_that_come_and_go_leave_no_request_without_an_end(store: Path, here: DistributedRuntime) -> None:
    """Kill a worker and start another, ten times, under load: every request ends, with items or a typed error."""
    workers = [WorkerProcess(store, "serve") for _ in range(3)]
    try:
        for worker in workers:
            await ready(worker)
        client = await connect(here, count=3)
        sinks: list[Sink] = []
        ending = asyncio.Event()

        async def send() -> None:
            while not ending.is_set():
                if client.available_ids():
                    sinks.append(push(client, {"n": 50, "every_s": 0.001}, context=Context()))
                await asyncio.sleep(0.005)

        sending = asyncio.create_task(send())
        for round_ in range(10):
            victim = workers[round_ % 3]
            victim.process.send_signal(signal.SIGKILL if round_ % 2 else signal.SIGTERM)
            workers[round_ % 3] = WorkerProcess(store, "serve")
            await ready(workers[round_ % 3])
            await victim.wait()
        ending.set()
        await sending
        for sink in sinks:
            await sink.finished()
        complete = sum(sink.items == list(range(50)) and sink.ended for sink in sinks)
        failed = [sink.error for sink in sinks if sink.error is not None]
        assert complete + len(failed) == len(sinks)
        assert all(error.migratable for error in failed), failed
        assert complete > len(sinks) / 2
        assert client.inflight(client.pick()) == 0
    finally:
        for worker in workers:
            worker.__exit__()


def test_importing_the_runtime_loads_nothing_of_language_models_or_http() -> None:
    code = (
        "import sys, dynamo.runtime; from dynamo.runtime import *; "
        "bad = {'aiohttp', 'tokenizers', 'torch', 'transformers', 'jinja2', 'xxhash', 'prometheus_client', 'zmq', "
        "'vllm', 'pydantic', 'dynamo.llm', 'uvloop'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ}, timeout=60)


def test_importing_the_package_alone_loads_none_of_its_modules() -> None:
    code = "import sys, dynamo.runtime; assert not [m for m in sys.modules if m.startswith('dynamo.runtime.')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
