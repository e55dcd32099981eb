"""`python -m dynamo.mocker` as users run it: real processes, found through a directory, called over sockets."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest

from dynamo.llm.kv_events import LoadMetrics, RouterEvent
from dynamo.llm.model_card import ModelDeploymentCard
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import Scheduler, SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.context import Context
from dynamo.runtime.errors import Disconnected, InvalidArgument, WorkerOverloaded
from dynamo.runtime.events import create_subscriber
from tests.mocker.simulated import VOCABULARY, eventually
from tests.mocker.simulated import request as preprocessed

DEADLINE_S = 20.0
ENDPOINT = "dynamo.backend.generate"


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")


class Mocker:
    """A mocker process that is ready."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ended(self) -> int:
        """Its exit status."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()


def command(model_dir, *flags: str) -> list[str]:
    return [sys.executable, "-m", "dynamo.mocker", "--model-path", str(model_dir), "--model-name", "m", *flags]


@asynccontextmanager
async def mocker(model_dir, *flags: str):
    """Start one, wait for its ready line, and leave nothing behind."""
    process = await asyncio.create_subprocess_exec(*command(model_dir, *flags), stdout=subprocess.PIPE)
    try:
        async with asyncio.timeout(DEADLINE_S):
            line = await process.stdout.readline()
        assert line.startswith(b"mocker is ready: m by ")
        yield Mocker(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def told(loads, *, busy: bool) -> None:
    """Return once the worker has said that it is busy, or that nothing runs and no block is in use."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            load = msgspec.msgpack.decode((await anext(loads)).payload, type=LoadMetrics)
            in_use = (load.running_requests, load.waiting_requests, load.active_decode_blocks)
            if any(in_use) == busy:
                return


@asynccontextmanager
async def caller(instances: int = 1):
    """A runtime and a client that has found so many workers."""
    runtime = DistributedRuntime()
    try:
        client = await runtime.endpoint(ENDPOINT).client()
        await eventually(lambda: len(client.instance_ids()) == instances)
        yield runtime, client
    finally:
        await runtime.close()


def request(length: int = 20, max_tokens: int = 8, first: int = 0) -> dict:
    return msgspec.to_builtins(preprocessed(range(first, first + length), max_tokens, ignore_eos=True))


async def collect(stream) -> list[dict]:
    async with asyncio.timeout(DEADLINE_S):
        return [item async for item in stream]


async def test_all_workers_of_a_process_answer_alike(model_dir):
    async with mocker(model_dir, "--num-workers", "3", "--speedup-ratio", "0"), caller(3) as (runtime, client):
        answers = [await collect(await client.direct(request(), id_, annotated=False)) for id_ in client.instance_ids()]
        tokens = [[token for item in answer for token in item["token_ids"]] for answer in answers]
        assert len(tokens[0]) == 8
        assert tokens[0] == tokens[1] == tokens[2]
        assert answers[0][-1]["finish_reason"] == "length"
        assert answers[0][-1]["completion_usage"]["total_tokens"] == 28
        cards = await runtime.discovery.get_prefix("v1/mdc/")
        assert len(cards) == 3
        card = ModelDeploymentCard.from_json(next(iter(cards.values())))
        assert (card.display_name, card.kv_cache_block_size) == ("m", 64)


async def test_a_stopped_request_leaves_the_engine_within_a_step(model_dir):
    async with mocker(model_dir, "--block-size", "4"), caller() as (runtime, client):
        loads = await create_subscriber(runtime, ENDPOINT, "kv_metrics")
        await loads.wait_connected()
        context = Context()
        stream = await client.generate(request(max_tokens=1000), annotated=False, context=context)
        await anext(stream)
        await told(loads, busy=True)
        context.stop_generating()
        stopped = time.monotonic()
        items = await collect(stream)
        assert items[-1]["finish_reason"] == "cancelled"
        assert time.monotonic() - stopped < 5.0  # all its tokens would take 20 s
        await told(loads, busy=False)
        assert time.monotonic() - stopped < 5.0  # all its tokens would take 20 s
        await loads.close()


CALLER = """
import asyncio
from dynamo.runtime import DistributedRuntime

async def main():
    client = await DistributedRuntime().endpoint("dynamo.backend.generate").client()
    await client.wait_for_instances(10)
    stop = {"max_tokens": 1000, "ignore_eos": True}
    request = {"model": "m", "token_ids": [1, 2, 3], "stop_conditions": stop}
    for stream in [await client.generate(request) for _ in range(5)]:
        await anext(stream)
    print("streaming", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_caller_that_is_killed_frees_the_engine(model_dir):
    async with mocker(model_dir), caller() as (runtime, _):
        loads = await create_subscriber(runtime, ENDPOINT, "kv_metrics")
        await loads.wait_connected()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", CALLER, stdout=subprocess.PIPE)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.stdout.readline() == b"streaming\n"
        process.kill()
        await process.wait()
        killed = time.monotonic()
        await told(loads, busy=False)
        assert time.monotonic() - killed < 5.0  # a lease would take 10 s
        await loads.close()


async def test_a_killed_worker_ends_its_requests_at_once_and_no_others(model_dir):
    async with (
        mocker(model_dir, "--speedup-ratio", "0.5") as doomed,
        caller() as (_, client),
    ):
        (doomed_id,) = client.instance_ids()
        async with mocker(model_dir, "--speedup-ratio", "20"):
            await eventually(lambda: len(client.instance_ids()) == 2)
            (other_id,) = set(client.instance_ids()) - {doomed_id}
            lost = await client.direct(request(max_tokens=500), doomed_id, annotated=False)
            kept = await client.direct(request(max_tokens=100), other_id, annotated=False)
            await anext(lost)
            doomed.process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            with pytest.raises(Disconnected):
                await collect(lost)
            assert client.available_ids() == [other_id]
            assert time.monotonic() - killed < 5.0  # a lease would take 10 s
            assert len(await collect(kept)) == 100
            await eventually(lambda: client.instance_ids() == [other_id])


async def test_sigterm_finishes_what_is_in_flight(model_dir):
    async with mocker(model_dir, "--speedup-ratio", "2") as worker, caller() as (runtime, client):
        stream = await client.generate(request(max_tokens=50), annotated=False)
        await anext(stream)
        worker.process.send_signal(signal.SIGTERM)
        assert len(await collect(stream)) == 49
        assert await worker.ended() == 0
        assert await runtime.discovery.get_prefix("v1/mdc/") == {}
        assert await runtime.discovery.get_prefix("v1/instances/dynamo/backend/") == {}


async def test_sigterm_while_starting_ends_the_program(model_dir):
    process = await asyncio.create_subprocess_exec(
        *command(model_dir, "--startup-time", "600"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    runtime = DistributedRuntime()
    try:
        await asyncio.sleep(1.5)  # it says nothing before it is ready
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await process.communicate()
        assert out == b""
        assert process.returncode in (0, -signal.SIGTERM)  # the latter if Python itself was still starting
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await runtime.close()


async def test_more_than_it_admits_is_refused_so_that_the_caller_may_go_elsewhere(model_dir):
    flags = ("--engine-request-limit", "1", "--dynamo-request-queue-limit", "0", "--speedup-ratio", "1")
    async with mocker(model_dir, *flags), caller() as (_, client):
        context = Context()
        first = await client.generate(request(max_tokens=1000), annotated=False, context=context)
        await anext(first)
        with pytest.raises(WorkerOverloaded):
            await collect(await client.generate(request(), annotated=False))
        context.stop_generating()
        await collect(first)
        assert len(await collect(await client.generate(request(max_tokens=1), annotated=False))) == 1


async def test_an_overlong_prompt_is_refused_by_name(model_dir):
    async with mocker(model_dir, "--max-model-len", "50"), caller() as (_, client):
        with pytest.raises(InvalidArgument, match="context length is 50") as refused:
            await collect(await client.generate(request(60), annotated=False))
        assert refused.value.param == "token_ids"


async def test_the_events_heard_add_up_to_the_cache(model_dir):
    """The same requests in the same order against a scheduler of our own leave the same blocks."""
    flags = ("--speedup-ratio", "0", "--block-size", "4", "--num-gpu-blocks-override", "40", "--max-model-len", "100")
    async with mocker(model_dir, *flags) as worker, caller() as (runtime, client):
        events = await create_subscriber(runtime, ENDPOINT, "kv-events")
        await events.wait_connected()
        here = Scheduler(
            SchedulerConfig(num_blocks=40, block_size=4, max_model_len=100), StepTiming(0), Sampler(VOCABULARY)
        )
        for i in range(12):  # 12 times 12 blocks do not fit: some must go
            asked = request(length=40, max_tokens=1, first=i // 2 * 1000)
            await collect(await client.generate(asked, annotated=False))
            here.add(str(i), msgspec.convert(asked, type(preprocessed([1]))), 0.0)
            while (step := here.schedule(0.0)) is not None:
                here.complete(step, 0.0)
        held: set[int] = set()
        seen = 0
        async with asyncio.timeout(DEADLINE_S):
            while held != here.pool.named():
                for event in msgspec.msgpack.decode((await anext(events)).payload, type=list[RouterEvent]):
                    assert event.event.event_id == seen
                    assert event.worker_id == client.instance_ids()[0]
                    seen += 1
                    if event.event.data.stored:
                        held.update(block.block_hash for block in event.event.data.stored.blocks)
                    if event.event.data.removed:
                        held.difference_update(event.event.data.removed.block_hashes)
        assert len(held) <= 40
        await events.close()
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.ended() == 0


@pytest.mark.parametrize("what", ["missing", "empty"])
async def test_a_model_directory_that_is_no_good_is_one_line(tmp_path, what):
    directory = tmp_path / "model"
    if what == "empty":
        directory.mkdir()
    process = await asyncio.create_subprocess_exec(
        *command(directory), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    assert process.returncode == 1
    assert out == b""
    assert err.startswith(b"mocker: error: --model-path: ")
    assert str(directory).encode() in err
    assert err.count(b"\n") == 1


async def test_prefill_and_decode_processes_answer_as_one(model_dir):
    async with (
        mocker(model_dir, "--disaggregation-mode", "prefill", "--speedup-ratio", "0", "--bootstrap-ports", "0"),
        mocker(model_dir, "--disaggregation-mode", "decode", "--speedup-ratio", "0"),
        caller() as (runtime, decode),
    ):
        prefill = await runtime.endpoint("dynamo.prefill.generate").client()
        await prefill.wait_for_instances(DEADLINE_S)
        wanted = msgspec.to_builtins(preprocessed(range(3, 300), 6))
        (first,) = [item async for item in await prefill.generate(wanted, annotated=False)]
        wanted["prefill_result"] = {name: first[name] for name in ("token_ids", "disaggregated_params")}
        rest = [item async for item in await decode.generate(wanted, annotated=False)]
        assert len([token for item in rest for token in item["token_ids"]]) == 5
        assert rest[0]["engine_data"]["kv_transfer"]["tokens"] == 297
        cards = [msgspec.json.decode(card) for card in (await runtime.discovery.get_prefix("v1/mdc/")).values()]
        assert sorted(card["worker_type"] for card in cards) == ["decode", "prefill"]
        (bootstrap,) = [c["runtime_config"] for c in cards if c["worker_type"] == "prefill"]
        assert bootstrap["bootstrap_port"] > 0
