"""`python -m dynamo.router` in front of simulated workers, all processes."""

import asyncio
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import pytest

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import Disconnected, InvalidArgument
from tests.services.processes import refused

DEADLINE_S = 30.0
BLOCK = 16
PROMPT = [100 + i % 900 for i in range(10 * BLOCK)]


@pytest.fixture
async def plane(tmp_path, monkeypatch):
    """A runtime that finds processes through a directory."""
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")
    runtime = DistributedRuntime()
    yield runtime
    await runtime.close()


@asynccontextmanager
async def process(log, *words):
    """A program that has printed its ready line; its log in a file."""
    with log.open("wb") as errors:
        started = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *words, stdout=subprocess.PIPE, stderr=errors
        )
    try:
        async with asyncio.timeout(DEADLINE_S):
            line = await started.stdout.readline()
        assert b"is ready" in line, log.read_text()
        yield started
    finally:
        with suppress(ProcessLookupError):
            started.kill()
        await started.wait()


@pytest.fixture
def mocker(tmp_path, model_dir, plane):
    """Starts simulated workers."""

    def start(number: int, *flags):
        speed = () if "--speedup-ratio" in flags else ("--speedup-ratio", "0")
        size = () if "--block-size" in flags else ("--block-size", str(BLOCK))
        words = ("dynamo.mocker", "--model-path", str(model_dir), "--model-name", "m", *speed, *size, *flags)
        return process(tmp_path / f"mocker{number}.log", *words)

    return start


@pytest.fixture
def router(tmp_path, plane):
    """Starts a router."""

    def start(*flags):
        block_size = () if "--router-block-size" in flags else ("--router-block-size", str(BLOCK))
        words = ("dynamo.router", "--endpoint", "dynamo.backend.generate", *block_size, *flags)
        return process(tmp_path / "router.log", *words)

    return start


def body(prompt=PROMPT, tokens=4, **more):
    return {"model": "m", "token_ids": prompt, "stop_conditions": {"max_tokens": tokens, "ignore_eos": True}, **more}


async def ask(plane, name, request, **more):
    """All answers of one of the router's endpoints."""
    client = await plane.endpoint(f"dynamo.router.{name}").client()
    async with asyncio.timeout(DEADLINE_S):
        await client.wait_for_instances(DEADLINE_S)
        return [item async for item in await client.generate(request, annotated=False, **more)]


async def workers(plane, count):
    """The workers' ids, once there are so many."""
    client = await plane.endpoint("dynamo.backend.generate").client()
    async with asyncio.timeout(DEADLINE_S):
        while len(client.instance_ids()) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return client.instance_ids()


async def eventually(question):
    """Ask until the answer is true."""
    async with asyncio.timeout(DEADLINE_S):
        while not (found := await question()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


async def overlaps(plane, prompt=PROMPT):
    """Blocks on the device, by worker."""
    (scores,) = await ask(plane, "get_overlap_scores", {"token_ids": prompt})
    return {line["worker_id"]: line["device_blocks"] for line in scores["workers"]}


async def test_a_prompt_goes_where_it_was_before(plane, mocker, router):
    async with mocker(1), mocker(2), router("--router-min-initial-workers", "2") as program:
        ids = await workers(plane, 2)
        answer = await ask(plane, "generate", body())
        assert sum(len(item["token_ids"]) for item in answer) == 4
        holders = await eventually(lambda: overlaps(plane))
        assert list(holders.values()) == [10]
        (holder,) = holders
        assert holder in ids
        assert await ask(plane, "best_worker_id", PROMPT) == [holder]
        assert await ask(plane, "best_worker_id", {"token_ids": PROMPT}) == [holder]
        for _ in range(4):
            await ask(plane, "generate", body())
        assert await overlaps(plane) == holders
        other = {"token_ids": PROMPT, "cache_namespace": "tenant"}
        (scores,) = await ask(plane, "get_overlap_scores", other)
        assert (scores["workers"], scores["num_blocks"], scores["block_size"]) == ([], 10, BLOCK)
        with pytest.raises(InvalidArgument, match="token_ids"):
            await ask(plane, "best_worker_id", {"tokens": PROMPT})
        program.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await program.wait() == 0


async def test_a_router_that_starts_late_knows_the_same(plane, mocker, router, tmp_path):
    async with mocker(1), mocker(2):
        first, second = await workers(plane, 2)
        client = await plane.endpoint("dynamo.backend.generate").client()
        for worker_id in (second, second, first):
            prompt = PROMPT if worker_id == second else PROMPT[:BLOCK]
            async for _ in await client.direct(body(prompt), worker_id):
                pass
        async with router():
            await eventually(lambda: _equal(overlaps(plane), {second: 10, first: 1}))
            assert await ask(plane, "best_worker_id", PROMPT) == [second]


async def _equal(question, expected):
    return await question == expected


async def test_a_worker_that_leaves_is_asked_for_nothing_more(plane, mocker, router):
    async with mocker(1), mocker(2) as doomed, router():
        await workers(plane, 2)
        for turn in range(8):
            await ask(plane, "generate", body([turn, *PROMPT]))
        doomed.send_signal(signal.SIGKILL)
        await doomed.wait()
        broken = 0
        for turn in range(8):
            try:
                await ask(plane, "generate", body([turn, *PROMPT]))
            except Disconnected:
                broken += 1
        assert broken <= 1  # the one that was sent before the router noticed
        (left,) = await workers(plane, 1)

        async def known():
            return {worker for turn in range(8) for worker in await overlaps(plane, [turn, *PROMPT])} == {left}

        await eventually(known)


async def test_workers_of_another_block_size_are_refused_loudly_and_still_serve(plane, mocker, router, tmp_path):
    async with mocker(1, "--block-size", "32"), router():
        assert await ask(plane, "generate", body())

        async def told():
            log = (tmp_path / "router.log").read_text()
            return "32 tokens, this router's 16. Give both the same size" in log and "are refused" in log

        await eventually(told)
        assert await overlaps(plane) == {}


async def test_ranks_of_a_worker_are_chosen_apart(plane, mocker, router):
    async with mocker(1, "--data-parallel-size", "2"), router():
        await ask(plane, "generate", body(dp_rank=1))

        async def ranks():
            (scores,) = await ask(plane, "get_overlap_scores", {"token_ids": PROMPT})
            return [(line["dp_rank"], line["device_blocks"]) for line in scores["workers"]] == [(1, 10)]

        await eventually(ranks)


async def test_a_signal_lets_running_answers_end(plane, mocker, router):
    async with mocker(1, "--speedup-ratio", "4"), router() as program:
        client = await plane.endpoint("dynamo.router.generate").client()
        await client.wait_for_instances(DEADLINE_S)
        stream = await client.generate(body(tokens=60), annotated=False)
        tokens = 0
        async with asyncio.timeout(DEADLINE_S):
            async for item in stream:
                tokens += len(item["token_ids"])
                if program.returncode is None and tokens == 1:
                    program.send_signal(signal.SIGTERM)
            assert tokens == 60
            assert await program.wait() == 0


def test_a_wrong_command_line_is_one_line():
    for flags, words in (
        ([], "--endpoint: is required"),
        (["--endpoint", "a.b"], "write namespace.component.endpoint"),
        (["--endpoint", "dynamo.router.generate"], "is where the router itself serves"),
        (["--endpoint", "a.b.c", "--router-temprature", "1"], "did you mean --router-temperature?"),
        (["--endpoint", "a.b.c", "--router-policy-config", "/nowhere"], "/nowhere cannot be read"),
        (["--endpoint", "a.b.c", "--router-block-size", "0"], "not a whole number from 1"),
    ):
        status, text = refused("dynamo.router", *flags)
        assert (status, text.count("\n")) == (2, 1), text
        assert words in text
