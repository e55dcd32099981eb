"""The index against the caches of simulated workers: under load, started late, with messages lost, and killed."""

import asyncio
import itertools
import random
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest

from dynamo.engine.serving import EngineWorker, ServeOptions
from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.protocols.engine import PreprocessedRequest, StopConditions
from dynamo.mocker.engine import MockerConfig, MockerEngine
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import Scheduler, SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.router import event_feed as module
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import Overlap, WorkerKey
from dynamo.runtime import DistributedRuntime
from tests.router.feeding import BLOCK_SIZE, ENDPOINT, LossyFeed, eventually

DEADLINE_S = 30.0
VOCABULARY = range(100, 1100)
BLOCKS = 48


def request(prompt, max_tokens=1) -> dict:
    asked = PreprocessedRequest("m", list(prompt), StopConditions(max_tokens=max_tokens, ignore_eos=True))
    return msgspec.to_builtins(asked)


def limits() -> SchedulerConfig:
    return SchedulerConfig(num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=8, max_model_len=120)


def held(index: TierIndex, worker: WorkerKey) -> set[int]:
    """All blocks that the index says a worker holds."""
    account = index.index.account(worker)
    return {seq for run in account.runs for seq in run.sequence_hashes} - account.holes


@asynccontextmanager
async def following(runtime):
    """A feed whose index can be listed."""
    feed = LossyFeed(runtime, ENDPOINT, TierIndex(keep_contents=True), BLOCK_SIZE)
    await feed.start()
    try:
        yield feed
    finally:
        await feed.close()


async def ask(client, instance_id, *asked) -> None:
    """Send requests at once; return when all are answered."""

    async def one(body) -> None:
        async for _ in await client.direct(body, instance_id, annotated=False):
            pass

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(one(body) for body in asked))


def prompts(seed: int, count: int) -> list[list[int]]:
    """Prompts that share beginnings, more than fit into the cache together."""
    draw = random.Random(seed)
    systems = [[1000 * i + j for j in range(24)] for i in range(3)]
    return [
        draw.choice(systems) + [draw.randrange(100, 1100) for _ in range(draw.randrange(1, 60))] for _ in range(count)
    ]


@pytest.mark.parametrize("lost", [0, 2])
async def test_under_load_and_eviction_the_index_is_the_cache(runtime, model_dir, monkeypatch, lost):
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")
    monkeypatch.setattr(module, "QUIET_S", 0.3)
    config = MockerConfig(str(model_dir), "m", limits(), StepTiming(speedup_ratio=0))
    engine = MockerEngine(config, Sampler(VOCABULARY))
    worker = EngineWorker(runtime, engine, ServeOptions(model_dir))
    async with following(runtime) as feed:
        if lost:
            feed.lose = lambda message: message.sequence % lost == 0
        assert await worker.start()
        client = await runtime.endpoint(ENDPOINT).client()
        key, pool = WorkerKey(runtime.instance_id), engine.schedulers[0].pool
        for batch in range(6):
            await ask(client, runtime.instance_id, *(request(prompt, 8) for prompt in prompts(batch, 12)))
            await eventually(lambda: held(feed.index, key) == pool.named())
        assert feed.index.blocks(key) == {"device": len(pool.named())}
        assert len(pool.named()) > BLOCKS // 2
        asked = prompts(5, 12)[0]
        matched = feed.index.find(sequence_hashes(compute_block_hash_for_seq(asked, BLOCK_SIZE)))
        names = sequence_hashes(compute_block_hash_for_seq(asked, BLOCK_SIZE))
        length = pool.match(names, len(names))
        assert matched == ({key: Overlap(length)} if length else {})
        runtime.shutdown()
        assert await worker.run() == 0


# --- processes


@pytest.fixture
async def plane(tmp_path, monkeypatch):
    """A runtime that finds processes through a directory."""
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")
    monkeypatch.setattr(module, "QUIET_S", 0.5)
    runtime = DistributedRuntime()
    yield runtime
    await runtime.close()


@asynccontextmanager
async def mocker(model_dir, *flags):
    """A mocker process that is ready."""
    size = ("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "120")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dynamo.mocker", "--model-path", str(model_dir), "--model-name", "m"),
        *("--speedup-ratio", "0", *size, *flags),
        stdout=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert (await process.stdout.readline()).startswith(b"mocker is ready")
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Shadow:
    """What a worker's cache holds after the same requests in the same order."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(limits(), StepTiming(0), Sampler(VOCABULARY))
        self.count = 0

    def run(self, body: dict) -> None:
        self.scheduler.add(str(self.count), msgspec.convert(body, PreprocessedRequest), 0.0)
        self.count += 1
        while (step := self.scheduler.schedule(0.0)) is not None:
            self.scheduler.complete(step, 0.0)

    @property
    def blocks(self) -> frozenset[int]:
        return self.scheduler.pool.named()


async def load(client, instance_id: int, shadow: Shadow, seed: int, count: int = 10) -> None:
    """Requests one by one, to a worker and to its shadow."""
    for prompt in prompts(seed, count):
        await ask(client, instance_id, request(prompt))
        shadow.run(request(prompt))


async def instances(client, count: int) -> list[int]:
    """The workers' ids, once there are so many."""
    await eventually(lambda: len(client.instance_ids()) == count)
    return client.instance_ids()


async def test_a_router_that_starts_after_the_load_has_the_workers_cache(plane, model_dir):
    async with mocker(model_dir):
        client = await plane.endpoint(ENDPOINT).client()
        (worker,) = await instances(client, 1)
        shadow = Shadow()
        await load(client, worker, shadow, 1)
        async with following(plane) as feed:
            assert await feed.settled(DEADLINE_S)
            assert held(feed.index, WorkerKey(worker)) == shadow.blocks
            await load(client, worker, shadow, 2)
            await eventually(lambda: held(feed.index, WorkerKey(worker)) == shadow.blocks)
            (line,) = feed.status()
            assert line["state"] == "synced"
            assert line["recoveries"]["dump"] == 1


async def test_lost_messages_of_a_process_are_recovered(plane, model_dir):
    async with mocker(model_dir), following(plane) as feed:
        client = await plane.endpoint(ENDPOINT).client()
        (worker,) = await instances(client, 1)
        shadow, draw = Shadow(), random.Random(0)
        feed.lose = lambda message: draw.random() < 0.5
        async with asyncio.timeout(DEADLINE_S):
            for seed in itertools.count():  # a feed that has only just connected has nothing to lose
                await load(client, worker, shadow, seed, 30)
                await eventually(lambda: held(feed.index, WorkerKey(worker)) == shadow.blocks)
                (line,) = feed.status()
                if line["gaps"]:
                    break


async def test_a_killed_worker_leaves_the_index_and_the_others_stay(plane, model_dir):
    async with mocker(model_dir) as doomed, following(plane) as feed:
        client = await plane.endpoint(ENDPOINT).client()
        (first,) = await instances(client, 1)
        async with mocker(model_dir):
            second = next(id_ for id_ in await instances(client, 2) if id_ != first)
            shadow = Shadow()
            await load(client, first, Shadow(), 1)
            await load(client, second, shadow, 1)
            await eventually(lambda: held(feed.index, WorkerKey(first)) == held(feed.index, WorkerKey(second)) != set())
            doomed.send_signal(signal.SIGKILL)
            await eventually(lambda: feed.index.workers() == [WorkerKey(second)], DEADLINE_S)
            assert held(feed.index, WorkerKey(second)) == shadow.blocks
            assert [line["worker_id"] for line in feed.status()] == [second]


async def test_a_worker_that_is_stopped_takes_its_blocks_at_once(plane, model_dir):
    async with mocker(model_dir) as process, following(plane) as feed:
        client = await plane.endpoint(ENDPOINT).client()
        (worker,) = await instances(client, 1)
        await load(client, worker, Shadow(), 1)
        await eventually(lambda: held(feed.index, WorkerKey(worker)) != set())
        process.send_signal(signal.SIGTERM)
        await eventually(lambda: feed.status() == [], 5.0)
        assert len(feed.index) == 0


async def test_ranks_of_a_process_are_known_apart(plane, model_dir):
    async with mocker(model_dir, "--data-parallel-size", "2"), following(plane) as feed:
        client = await plane.endpoint(ENDPOINT).client()
        (worker,) = await instances(client, 1)
        body = request(range(1, 41))
        body["routing"] = {"dp_rank": 1}
        await ask(client, worker, body)
        names = sequence_hashes(compute_block_hash_for_seq(range(1, 41), BLOCK_SIZE))
        await eventually(lambda: feed.index.find(names) == {WorkerKey(worker, 1): Overlap(10)})
        assert {(line["worker_id"], line["dp_rank"]) for line in feed.status()} == {(worker, 0), (worker, 1)}
