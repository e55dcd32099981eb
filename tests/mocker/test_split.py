"""Do a simulated prefill and a decode worker answer together as one worker does, and leave nothing behind?"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo.engine import handoff, takeover
from dynamo.engine.serving import EngineWorker, ServeOptions
from dynamo.engine.worker_args import WorkerOptions
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.mocker.engine import MockerConfig, MockerEngine
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.mocker.transfer import DEFAULT_BYTES_PER_TOKEN, TransferTiming, kv_bytes_per_token
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.client import Client
from dynamo.runtime.errors import InvalidArgument, StreamIncomplete
from tests.mocker.simulated import VOCABULARY, eventually, request, small_scheduler, tokens

DEADLINE_S = 20.0
BLOCK = 4
CONFIG = MockerConfig(
    model="m",
    served_model_name="m",
    scheduler=SchedulerConfig(num_blocks=200, block_size=BLOCK, max_num_seqs=8, max_num_batched_tokens=64),
    timing=StepTiming(speedup_ratio=0),
    transfer=TransferTiming(bandwidth_gb_s=0),
)


@dataclass
class Trio:
    """A prefill, a decode and a whole worker. The runtime is shared; instances are told apart by endpoint."""

    runtime: DistributedRuntime
    engines: dict[str, MockerEngine] = field(default_factory=dict)
    clients: dict[str, Client] = field(default_factory=dict)
    workers: dict[str, EngineWorker] = field(default_factory=dict)

    async def ask(self, role: str, wanted: PreprocessedRequest) -> list[dict[str, Any]]:
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.clients[role].generate(msgspec.to_builtins(wanted), annotated=False)
            return [item async for item in stream]

    async def prefill(self, wanted: PreprocessedRequest) -> dict[str, Any]:
        (item,) = await self.ask("prefill", wanted)
        return {"token_ids": item["token_ids"], "disaggregated_params": item.get("disaggregated_params")}

    async def split(self, wanted: PreprocessedRequest) -> list[dict[str, Any]]:
        first = await self.prefill(wanted)
        if first["disaggregated_params"] is None:
            return [first]
        return [first, *await self.ask("decode", msgspec.structs.replace(wanted, prefill_result=first))]

    async def release(self, handle: dict[str, Any]) -> None:
        client = await self.runtime.endpoint(handle["endpoint"]).client()
        verb = {"verb": "release", "id": handle["id"]}
        assert [item async for item in await client.direct(verb, handle["instance_id"], annotated=False)]

    def in_use(self, role: str) -> int:
        return self.engines[role].schedulers[0].pool.in_use

    def claimed(self) -> float:
        """Handles whose reader is at work."""
        text = self.runtime.metrics.render().decode()
        lines = [line for line in text.splitlines() if "kv_handles{" in line and 'state="claimed"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def recomputed(self, reason: str) -> float:
        text = self.runtime.metrics.render().decode()
        lines = [line for line in text.splitlines() if "kv_transfer_recomputes_total{" in line and reason in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@asynccontextmanager
async def trio(
    runtime: DistributedRuntime, model_dir: Path, config: MockerConfig = CONFIG, **options: Any
) -> AsyncIterator[Trio]:
    three = Trio(runtime)
    for number, role in enumerate(("prefill", "decode", "agg"), 1):
        where = WorkerOptions(endpoint=f"dynamo.{role}.generate", disaggregation_mode=role, **options)
        bootstrap = ("127.0.0.1", 0) if role == "prefill" else None
        engine = three.engines[role] = MockerEngine(replace(config, bootstrap=bootstrap), Sampler(VOCABULARY))
        worker = three.workers[role] = EngineWorker(runtime, engine, ServeOptions(model_dir, where, number))
        assert await worker.start()
        three.clients[role] = await runtime.endpoint(where.endpoint).client()
        await three.clients[role].wait_for_instances(DEADLINE_S)
    running = [asyncio.ensure_future(worker.run()) for worker in three.workers.values()]
    try:
        yield three
    finally:
        runtime.shutdown()
        await asyncio.wait_for(asyncio.gather(*running), DEADLINE_S)


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")


def of(items: list[dict[str, Any]], index: int = 0) -> list[int]:
    return [token for item in items if item.get("index", 0) == index for token in item.get("token_ids", [])]


async def test_answers_are_those_of_one_worker(runtime: DistributedRuntime, model_dir: Path) -> None:
    rnd = random.Random(1)
    async with trio(runtime, model_dir) as three:
        wanted = [
            request([rnd.randrange(3, 90) for _ in range(rnd.randrange(1, 60))], rnd.randrange(1, 30), seed=i)
            for i in range(60)
        ]
        wanted += [request([*wanted[0].token_ids, i], 5, seed=1) for i in range(10)]
        whole = await asyncio.gather(*(three.ask("agg", one) for one in wanted))
        halves = await asyncio.gather(*(three.split(one) for one in wanted))
        for one, answer, pair in zip(wanted, whole, halves, strict=True):
            if one.stop_conditions.max_tokens == 1:  # it is the frontend that knows; see the release below
                await three.release(pair[0]["disaggregated_params"])
            assert of(pair)[: len(of(answer))] == of(answer)
        assert three.recomputed("") == 0
        await eventually(lambda: three.in_use("prefill") == three.in_use("decode") == 0)


async def test_the_decode_worker_computes_no_prompt(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        items = await three.split(request(range(40)))
        stats = three.engines["decode"].schedulers[0].stats
        assert stats.prompt_tokens.value == 0
        assert items[1]["engine_data"]["kv_transfer"] == {
            "transport": "mocker",
            "prefill_worker_id": 1,
            "tokens": 40,
            "bytes": 40 * DEFAULT_BYTES_PER_TOKEN,
            "seconds": pytest.approx(0, abs=5),
        }
        assert items[-1]["completion_usage"]["completion_tokens"] == 8


async def test_only_what_the_decode_worker_lacks_is_transferred(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        await three.split(request(range(40)))
        longer = await three.split(request(range(54)))
        report = longer[1]["engine_data"]["kv_transfer"]
        assert (report["tokens"], report["bytes"]) == (14, 14 * DEFAULT_BYTES_PER_TOKEN)
        again = await three.split(request(range(54)))
        assert again[1]["engine_data"]["kv_transfer"]["tokens"] == 54 - 54 // BLOCK * BLOCK
        assert of(again) == of(longer) == of(await three.ask("agg", request(range(54))))


async def test_the_decode_worker_tells_routers_of_the_blocks_it_got(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir) as three:
        await three.split(request(range(40)))
        await three.split(request(range(40)))
        assert len(three.engines["decode"].schedulers[0].pool.named()) >= 40 // BLOCK


async def test_logprobs_are_those_of_each_token(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = request(range(20), 4)
        wanted.output_options.logprobs = 2
        whole = await three.ask("agg", wanted)
        first = (await three.ask("prefill", wanted))[0]
        rest = await three.ask("decode", msgspec.structs.replace(wanted, prefill_result=first))
        ours, theirs = [
            [row for item in items for row in item.get("top_logprobs") or []] for items in ([first, *rest], whole)
        ]
        assert ours == theirs


async def test_further_choices_are_made_by_the_decode_worker(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = request(range(20), 4, seed=3)
        wanted.sampling_options.n = 3
        whole, pair = await three.ask("agg", wanted), await three.split(wanted)
        assert [of(pair, i) for i in range(3)] == [of(whole, i) for i in range(3)]


async def test_blocks_are_held_until_they_are_read(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = request(range(40))
        first = await three.prefill(wanted)
        assert three.in_use("prefill") == 40 // BLOCK
        await three.ask("decode", msgspec.structs.replace(wanted, prefill_result=first))
        await eventually(lambda: three.in_use("prefill") == 0)


async def test_a_prompt_waits_for_room_without_spinning_until_kept_blocks_are_given_back(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir) as three:
        firsts = [await three.prefill(request(range(i, i + 380))) for i in (0, 1000)]
        waiting = asyncio.ensure_future(three.prefill(request(range(2000, 2100))))
        scheduler = three.engines["prefill"].schedulers[0]
        await eventually(lambda: len(scheduler.waiting) == 1)
        assert scheduler.schedule(0.0) is None
        assert not waiting.done()
        await three.release(firsts[0]["disaggregated_params"])
        assert (await waiting)["token_ids"]


async def test_blocks_are_free_after_a_release(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        first = await three.prefill(request(range(40)))
        await three.release(first["disaggregated_params"])
        assert three.in_use("prefill") == 0


async def test_blocks_are_free_after_their_lease_and_the_answer_is_right_all_the_same(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir, replace(CONFIG, lease_s=0.05)) as three:
        wanted = request(range(40))
        first = await three.prefill(wanted)
        await eventually(lambda: three.in_use("prefill") == 0)
        rest = await three.ask("decode", msgspec.structs.replace(wanted, prefill_result=first))
        assert first["token_ids"] + of(rest) == of(await three.ask("agg", wanted))
        assert three.recomputed("expired") == 1


async def test_a_handle_used_twice_is_recomputed(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = request(range(40))
        first = await three.prefill(wanted)
        again = msgspec.structs.replace(wanted, prefill_result=first)
        answers = [of(await three.ask("decode", again)) for _ in range(2)]
        assert answers[0] == answers[1]
        assert three.recomputed("used") == 1


async def test_a_handle_used_twice_is_an_error_where_that_was_asked(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir, on_lost_kv="error") as three:
        again = msgspec.structs.replace(request(range(40)), prefill_result=await three.prefill(request(range(40))))
        await three.ask("decode", again)
        with pytest.raises(StreamIncomplete, match="the handle was used before"):
            await three.ask("decode", again)


async def test_a_transfer_takes_its_time(runtime: DistributedRuntime, model_dir: Path) -> None:
    timing = TransferTiming(bytes_per_token=10_000_000, bandwidth_gb_s=1.0)
    assert timing.seconds(20) == pytest.approx(0.2)
    assert replace(timing, speedup_ratio=2.0).seconds(20) == pytest.approx(0.1)
    assert replace(timing, speedup_ratio=0.0).seconds(20) == 0
    async with trio(runtime, model_dir, replace(CONFIG, transfer=timing)) as three:
        items = await three.split(request(range(20)))
        assert items[1]["engine_data"]["kv_transfer"]["seconds"] >= 0.2


LEASE_S = 0.8
SLOW = replace(CONFIG, transfer=TransferTiming(bytes_per_token=50_000_000, bandwidth_gb_s=1.0), lease_s=LEASE_S)


@pytest.fixture
def small_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a lease may be shorter than the margin that clocks and engines need."""
    for module in (handoff, takeover):
        monkeypatch.setattr(module, "LEASE_MARGIN_S", 0.05)


async def test_a_transfer_that_ends_after_the_lease_is_thrown_away(
    runtime: DistributedRuntime, model_dir: Path, small_margin: None
) -> None:
    async with trio(runtime, model_dir, SLOW) as three:
        wanted = request(range(20))
        first = await three.prefill(wanted)
        first["disaggregated_params"]["lease_s"] = 0.0  # as of a worker that cannot keep it longer
        rest = await three.ask("decode", msgspec.structs.replace(wanted, prefill_result=first))
        assert first["token_ids"] + of(rest) == of(await three.ask("agg", wanted))
        assert three.recomputed("late") == 1
        await eventually(lambda: three.in_use("prefill") == 0)


async def test_a_transfer_longer_than_the_lease_is_waited_for(
    runtime: DistributedRuntime, model_dir: Path, small_margin: None
) -> None:
    async with trio(runtime, model_dir, SLOW) as three:
        items = await three.split(request(range(40)))
        assert of(items) == of(await three.ask("agg", request(range(40))))
        assert items[1]["engine_data"]["kv_transfer"]["seconds"] >= 2 > 2 * LEASE_S
        assert three.recomputed("") == 0
        await eventually(lambda: three.in_use("prefill") == 0)


async def test_kv_is_there_after_a_queue_of_three_leases(
    runtime: DistributedRuntime, model_dir: Path, small_margin: None
) -> None:
    async with trio(runtime, model_dir, replace(CONFIG, lease_s=LEASE_S), engine_request_limit=1) as three:
        three.engines["decode"].held = lambda: busy  # it makes no step
        busy = True
        before = asyncio.ensure_future(three.ask("decode", request(range(100, 110))))
        wanted = request(range(40))
        first = await three.prefill(wanted)
        began = asyncio.get_running_loop().time()
        waiting = asyncio.ensure_future(three.ask("decode", msgspec.structs.replace(wanted, prefill_result=first)))
        await asyncio.sleep(3 * LEASE_S)  # the queue that this is about
        assert three.in_use("prefill") == 40 // BLOCK
        busy = False
        await before
        rest = await waiting
        assert asyncio.get_running_loop().time() - began > 3 * LEASE_S
        assert first["token_ids"] + of(rest) == of(await three.ask("agg", wanted))
        assert rest[0]["engine_data"]["kv_transfer"]["tokens"] == 40
        assert three.recomputed("") == 0
        await eventually(lambda: three.in_use("prefill") == 0)


async def test_a_request_that_is_cancelled_in_the_queue_keeps_nothing(
    runtime: DistributedRuntime, model_dir: Path, small_margin: None
) -> None:
    async with trio(runtime, model_dir, replace(CONFIG, lease_s=LEASE_S), engine_request_limit=1) as three:
        three.engines["decode"].held = lambda: busy
        busy = True
        before = asyncio.ensure_future(three.ask("decode", request(range(100, 110))))
        wanted = request(range(40))
        wanted = msgspec.structs.replace(wanted, prefill_result=await three.prefill(wanted))
        stream = await three.clients["decode"].generate(msgspec.to_builtins(wanted), annotated=False)
        await asyncio.sleep(1.5 * LEASE_S)
        assert three.in_use("prefill") == 40 // BLOCK
        await stream.aclose()
        async with asyncio.timeout(LEASE_S + 1):
            await eventually(lambda: three.in_use("prefill") == 0)
        busy = False
        await before


async def test_a_cancel_in_the_middle_of_a_transfer_frees_both_sides(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    slow = TransferTiming(bytes_per_token=100_000_000, bandwidth_gb_s=1.0)
    async with trio(runtime, model_dir, replace(CONFIG, transfer=slow)) as three:
        wanted = msgspec.structs.replace(request(range(20)), prefill_result=await three.prefill(request(range(20))))
        stream = await three.clients["decode"].generate(msgspec.to_builtins(wanted), annotated=False)
        await eventually(lambda: three.claimed() == 1)
        await stream.aclose()
        await eventually(lambda: three.in_use("prefill") == three.in_use("decode") == 0)


async def test_a_first_token_that_ends_the_answer_keeps_nothing(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = request(range(20), stop_token_ids=[of(await three.ask("agg", request(range(20))))[0]])
        (item,) = await three.ask("prefill", wanted)
        assert item["finish_reason"] == "stop"
        assert "disaggregated_params" not in item
        assert three.in_use("prefill") == 0


async def test_a_whole_worker_takes_nothing_over(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        with pytest.raises(InvalidArgument, match="computes prompts itself"):
            await three.ask("agg", msgspec.structs.replace(request(range(20)), prefill_result={}))


# --- the bootstrap handoff


def meeting(three: Trio, wanted: PreprocessedRequest, room: int) -> PreprocessedRequest:
    config = three.workers["prefill"].config
    info = {"bootstrap_host": config.bootstrap_host, "bootstrap_port": config.bootstrap_port, "bootstrap_room": room}
    return msgspec.structs.replace(wanted, bootstrap_info=info)


async def test_decode_may_start_before_prefill(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = meeting(three, request(range(40)), 7)
        decoding = asyncio.ensure_future(three.ask("decode", wanted))
        await asyncio.sleep(0.05)  # nothing must happen
        assert not decoding.done()
        await three.ask("prefill", wanted)
        answer = await decoding
        assert of(answer) == of(await three.ask("agg", request(range(40))))
        assert answer[0]["engine_data"]["kv_transfer"]["transport"] == "bootstrap"
        await eventually(lambda: three.in_use("prefill") == 0)


async def test_a_prompt_may_be_computed_before_decode_starts_and_ends_when_its_kv_was_fetched(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = meeting(three, request(range(40)), 8)
        stream = await three.clients["prefill"].generate(msgspec.to_builtins(wanted), annotated=False)
        first = await anext(stream)
        assert "finish_reason" not in first
        assert three.in_use("prefill") == 40 // BLOCK
        answer = of(await three.ask("decode", wanted))
        assert answer == of(await three.ask("agg", request(range(40))))
        assert answer[0] == first["token_ids"][0]
        (end,) = [item async for item in stream]
        assert end["finish_reason"] == "length"
        assert three.in_use("prefill") == 0


async def test_a_prompt_that_waits_for_a_decode_worker_is_forgotten_when_it_is_cancelled(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = meeting(three, request(range(40)), 8)
        stream = await three.clients["prefill"].generate(msgspec.to_builtins(wanted), annotated=False)
        await anext(stream)
        await stream.aclose()
        await eventually(lambda: three.in_use("prefill") == 0)
        assert of(await three.ask("decode", wanted)) == of(await three.ask("agg", request(range(40))))
        assert three.recomputed("unreachable") == 1


async def test_further_choices_wait_for_the_one_that_meets_the_prefill_worker(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir) as three:
        wanted = meeting(three, request(range(40)), 8)
        wanted.sampling_options.n, wanted.sampling_options.seed = 3, 5
        whole = msgspec.structs.replace(wanted, bootstrap_info=None)
        decoding = asyncio.ensure_future(three.ask("decode", wanted))
        await three.ask("prefill", wanted)
        answer, expected = await decoding, await three.ask("agg", whole)
        assert [of(answer, i) for i in range(3)] == [of(expected, i) for i in range(3)]
        computed = three.engines["decode"].schedulers[0].stats.prompt_tokens.value
        assert computed <= 2 * BLOCK  # what each of the two others cannot have from a cache


async def test_a_room_whose_prompt_is_given_up_is_recomputed(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir, replace(CONFIG, timing=StepTiming())) as three:
        wanted = meeting(three, request(range(40), 3), 9)
        decoding = asyncio.ensure_future(three.ask("decode", wanted))
        stream = await three.clients["prefill"].generate(msgspec.to_builtins(wanted), annotated=False)
        await eventually(lambda: len(three.engines["prefill"].schedulers[0]) == 1)
        await stream.aclose()
        assert of(await decoding) == of(await three.ask("agg", request(range(40), 3)))
        assert three.recomputed("unreachable") == 1


async def test_a_bootstrap_port_where_nobody_listens_is_recomputed(
    runtime: DistributedRuntime, model_dir: Path
) -> None:
    async with trio(runtime, model_dir) as three:
        info = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 9, "bootstrap_room": 1}
        wanted = msgspec.structs.replace(request(range(20)), bootstrap_info=info)
        assert of(await three.ask("decode", wanted)) == of(await three.ask("agg", request(range(20))))


async def test_bootstrap_info_that_is_none_names_the_field(runtime: DistributedRuntime, model_dir: Path) -> None:
    async with trio(runtime, model_dir) as three:
        with pytest.raises(InvalidArgument, match="bootstrap_info") as wrong:
            await three.ask("decode", msgspec.structs.replace(request(range(20)), bootstrap_info={"bootstrap_room": 1}))
        assert wrong.value.param == "bootstrap_info"


# --- the scheduler


def test_transferred_kv_needs_room_but_no_time_to_compute() -> None:
    scheduler = small_scheduler(StepTiming())
    scheduler.add("r", request(range(18)), 0.0, transferred=6)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert (step.prefill_tokens, step.decodes, step.context) == (0, 1, 18)
    assert scheduler.pool.in_use == 5
    ((_, output),) = scheduler.complete(step, 0.1)
    assert len(output.token_ids) == 1


def test_transferred_kv_that_was_pushed_out_is_computed_again() -> None:
    scheduler = small_scheduler(num_blocks=12, max_num_seqs=2, watermark=0.0)
    for name in ("first", "second"):
        scheduler.add(name, request(range(20 if name == "first" else 21), 12), 0.0, transferred=0)
    whole = small_scheduler(num_blocks=100)
    whole.add("first", request(range(20), 12), 0.0)
    whole.add("second", request(range(21), 12), 0.0)
    ours: dict[str, list[int]] = {}
    theirs: dict[str, list[int]] = {}
    for engine, found in ((scheduler, ours), (whole, theirs)):
        while (step := engine.schedule(0.0)) is not None:
            for name, output in engine.complete(step, 0.0):
                found.setdefault(name, []).extend(tokens([output]))
    assert ours == theirs
    assert scheduler.pool.in_use == 0


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", 2 * 2 * 2 * 16 * 4), ("bfloat16", 2 * 2 * 2 * 16 * 2), ("fp8", 2 * 2 * 2 * 16)]
)
def test_the_size_of_kv_follows_the_model_and_the_kind_of_numbers(tmp_path: Path, dtype: str, expected: int) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config | {"torch_dtype": "float32"}))
    assert kv_bytes_per_token(tmp_path, dtype) == expected


def test_a_model_that_says_nothing_has_the_usual_size(tmp_path: Path) -> None:
    assert kv_bytes_per_token(tmp_path, "auto") == DEFAULT_BYTES_PER_TOKEN
