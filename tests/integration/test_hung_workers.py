"""A worker takes requests and never answers: is it found and left out in time, and is it back when it answers again?

Three ways to hang: the whole process is stopped, so nothing answers pings; only the engine hangs, with requests inside;
only the engine hangs, while nobody asks anything.
"""

import asyncio
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.integration.deployment import Deployment, Process, free_port
from tests.integration.test_bad_weather import Answer, ask, until

QUICK = ["--speedup-ratio", "100"]
LOOKS = {"DYN_ENGINE_HEALTH_CHECK_INTERVAL": "0.2"}  # how often a worker looks at its engine


@dataclass(frozen=True)
class Pair:
    """A worker that can hang, and beside it one that is well, behind a frontend."""

    deployment: Deployment
    hanging: Process
    instance: int
    port: int
    """The hanging one's system server."""

    def is_in(self) -> bool:
        """Whether requests may go to the worker that can hang."""
        return self.instance in self.deployment.instances()

    def status(self, path: str) -> int:
        """What the hanging worker's system server answers."""
        try:
            return int(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5).status)
        except urllib.error.HTTPError as e:
            return e.code


@contextmanager
def running(directory: Path, model: Path, **env: str) -> Iterator[Pair]:
    """A pair; `env` is the hanging one's."""
    deployment = Deployment(directory)
    port = free_port()
    try:
        hanging = deployment.start(
            "-m", "tests.integration.hanging_mocker", "--model-path", str(model), "--model-name", "m", *QUICK,
            env=LOOKS | {"DYN_SYSTEM_PORT": str(port)} | env,
        )  # fmt: skip
        deployment.frontend("--router-mode", "round-robin", "--migration-limit", "2")
        deployment.wait_for()
        [instance] = deployment.instances()
        deployment.mocker(model, *QUICK)
        deployment.wait_for(workers=2)
        yield Pair(deployment, hanging, instance, port)
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Pair]:
    """A hanging engine is noticed after a second."""
    with running(tmp_path_factory.mktemp("stalls"), model_dir, DYN_ENGINE_STALL_TIMEOUT="1") as found:
        yield found


async def ask_all(deployment: Deployment, count: int) -> list[Answer]:
    """So many short requests, one after the other."""
    async with aiohttp.ClientSession() as session:
        return [await ask(session, deployment.base, max_tokens=2) for _ in range(count)]


async def answer_well(deployment: Deployment, count: int) -> None:
    answers = await ask_all(deployment, count)
    assert all(answer.ended_well for answer in answers), answers


async def test_an_engine_that_hangs_with_requests_inside_is_left_out_until_it_answers(pair: Pair) -> None:
    deployment = pair.deployment
    await answer_well(deployment, 4)
    pair.hanging.signal(signal.SIGUSR1)
    began = time.monotonic()
    async with aiohttp.ClientSession() as session:
        caught = await asyncio.gather(*(ask(session, deployment.base, max_tokens=2) for _ in range(4)))
    assert all(answer.ended_well for answer in caught), caught  # the other worker answered what the hung one held
    assert 1 <= time.monotonic() - began < 4
    await until(lambda: not pair.is_in(), "it is left out")
    assert pair.status("/health") == 503
    assert pair.status("/live") == 200
    await answer_well(deployment, 6)
    pair.hanging.signal(signal.SIGUSR2)
    await until(pair.is_in, "it is back")
    assert pair.status("/health") == 200
    await answer_well(deployment, 6)


async def test_an_engine_that_hangs_unasked_is_found_by_its_canary_before_any_request(
    tmp_path: Path, model_dir: Path
) -> None:
    canary = {"DYN_HEALTH_CHECK_ENABLED": "1", "DYN_CANARY_WAIT_TIME": "0.4", "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "0.5"}
    with running(tmp_path, model_dir, DYN_ENGINE_STALL_TIMEOUT="0", **canary) as pair:
        pair.hanging.signal(signal.SIGUSR1)
        await until(lambda: not pair.is_in(), "it is left out", timeout_s=3)
        assert pair.status("/health") == 503
        await answer_well(pair.deployment, 6)
        pair.hanging.signal(signal.SIGUSR2)
        await until(pair.is_in, "it is back", timeout_s=3)
        assert pair.status("/health") == 200


async def test_a_stopped_process_is_left_out_by_its_silence_until_it_goes_on(pair: Pair) -> None:
    deployment = pair.deployment
    pair.hanging.signal(signal.SIGSTOP)
    async with aiohttp.ClientSession() as session:
        began = time.monotonic()
        caught = await asyncio.gather(*(ask(session, deployment.base, max_tokens=2) for _ in range(4)))
        assert all(answer.ended_well for answer in caught), caught
        assert time.monotonic() - began < 9  # three pings, every 2 s
        began = time.monotonic()
        await answer_well(deployment, 6)
        assert time.monotonic() - began < 2  # nobody is sent there to wait
    pair.hanging.signal(signal.SIGCONT)
    fields = {"max_tokens": 2, "nvext": {"extra_fields": ["worker_id"]}}
    async with asyncio.timeout(12), aiohttp.ClientSession() as session:
        workers = set()
        while len(workers) < 2:
            workers.add((await ask(session, deployment.base, **fields)).worker)
