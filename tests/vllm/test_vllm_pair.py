"""Are the answers of a real prefill and a real decode worker those of one worker, whatever happens between them?

One prefill worker and two decode workers for all tests here; those at the end kill them, one after the other.
`plain` drives vLLM's core directly and has no prefix cache, so that its counters prove what came over; `cached` uses
vLLM's public face, with a prefix cache and an adapter.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.router.kv_router import KvRouter
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import DynamoException
from dynamo.vllm.engine import DRIVER_ENV
from tests.vllm.pair import (
    BLOCK,
    BLOCKS,
    LEASE_S,
    SEQUENCES,
    START_S,
    Worker,
    ask,
    prefill,
    resumed,
    split,
    tokens,
    total,
    until,
)
from tests.vllm.vllm_cases import SCHEMA, words
from tests.vllm.vllm_helpers import descendants, pid_named, request

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(START_S + 60),
    pytest.mark.asyncio(loop_scope="module"),
]

GREEDY = {"temperature": 0.0}
RECOMPUTES = "dynamo_component_kv_transfer_recomputes_total"
QUEUES = ["--scheduling-policy", "priority", "--engine-request-limit", "1000"]  # vLLM's own queue, and not ours
BY_SOURCE = "vllm:prompt_tokens_by_source_total"


@dataclass
class Pair:
    runtime: DistributedRuntime
    prefiller: Worker
    plain: Worker
    cached: Worker

    async def nothing_held(self) -> None:
        """Wait until the prefill worker keeps no KV, and see that all its blocks can be used again."""

        async def empty() -> bool:
            return await self.prefiller.held() == (0.0, 0.0)

        await until(empty, 4 * LEASE_S, self.prefiller)
        whole = asked(words(random.randrange(10**6), (BLOCKS - 8) * BLOCK // 2), 1)
        # Half the pool at a time: if two of them fit one after the other, nothing is left behind.
        for _ in range(2):
            whole.token_ids = words(random.randrange(10**6), len(whole.token_ids))
            first = await prefill(self.prefiller, whole)
            await self.release(first["disaggregated_params"])

    async def release(self, handle: dict[str, Any]) -> dict[str, Any]:
        """What a frontend says when nobody will decode."""
        client = await self.runtime.endpoint(handle["endpoint"]).client()
        verb = {"verb": "release", "id": handle["id"]}
        (answer,) = [item async for item in await client.direct(verb, handle["instance_id"], annotated=False)]
        return dict(answer)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(weights_dir: Path, lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    home = tmp_path_factory.mktemp("pair")
    environ = os.environ | {
        "DYN_FILE_KV": str(home / "discovery"), "DYN_SYSTEM_PORT": "0", "DYN_LOG": "info", "TMPDIR": str(home),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0.2",
        "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles parts of its sampler at their first use, for seconds each
    }  # fmt: skip
    adapter = ["--enable-lora", "--lora-modules", f"adapter={lora_dir}"]

    def start(name: str, driver: str, *flags: str) -> Any:
        return Worker.start(weights_dir, home / f"{name}.log", environ | {DRIVER_ENV: driver}, *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYN_FILE_KV", str(home / "discovery"))
        runtime = DistributedRuntime(discovery_backend="file")
        decode = ["--disaggregation-mode", "decode"]
        workers = [
            await start("prefill", "core", "--disaggregation-mode", "prefill", "--kv-lease", str(LEASE_S), *adapter),
            await start("plain", "core", *decode, "--no-enable-prefix-caching", *QUEUES),
            await start("cached", "async", *decode, "--endpoint", "dynamo.cached.generate", *adapter),
        ]
        try:
            for worker in workers:
                await worker.ready(runtime)
            yield Pair(runtime, *workers)
        finally:
            for worker in workers:
                await worker.kill()
            await runtime.close()


def asked(prompt: list[int], max_tokens: int = 10, **sections: Any) -> PreprocessedRequest:
    stop = {"max_tokens": max_tokens, "ignore_eos": True} | sections.pop("stop_conditions", {})
    return request(prompt, stop_conditions=stop, **({"sampling_options": GREEDY} | sections))


async def test_answers_are_those_of_one_worker_and_no_prompt_is_computed_twice(pair: Pair) -> None:
    rnd = random.Random(4)
    beginnings = [words(500 + i, 200) for i in range(3)]
    wanted = []
    for i in range(24):
        prompt = words(600 + i, rnd.choice([1, 2, 31, 32, 33, rnd.randrange(3, 900)]))
        if i % 3 == 0:
            prompt = beginnings[i % 9 // 3] + prompt
        sampling = GREEDY if i % 4 else {"temperature": 0.9, "top_p": 0.9, "seed": i}
        wanted.append(asked(prompt, sampling_options=sampling))
    whole = [tokens(await ask(pair.plain, one)) for one in wanted]

    before = await pair.plain.metrics()
    for decoder in (pair.plain, pair.cached):
        for start in range(0, len(wanted), 4):
            group = wanted[start : start + 4]
            answers = await asyncio.gather(*(split(pair.prefiller, decoder, one) for one in group))
            assert answers == whole[start : start + 4]
        assert await decoder.metric(RECOMPUTES) == 0
        assert await decoder.metric("dynamo_component_kv_first_token_mismatches_total") == 0
    after = await pair.plain.metrics()
    moved, computed = [
        total(after, BY_SOURCE, source=source) - total(before, BY_SOURCE, source=source)
        for source in ("external_kv_transfer", "local_compute")
    ]
    # Behind a greedy answer's first token the engine goes on, so there the first token counts as the prompt's. Else the
    # one position of a prompt of one token has to be computed in any case.
    follows = sum(one.sampling_options.temperature == 0.0 for one in wanted)
    single = sum(len(one.token_ids) == 1 and one.sampling_options.temperature != 0.0 for one in wanted)
    assert computed == follows + single
    assert moved + computed == follows + sum(len(one.token_ids) for one in wanted)
    assert total(after, "dynamo_component_kv_transfer_bytes_sum") > 0
    assert "of KV in" in pair.plain.log()
    await pair.nothing_held()


async def test_every_worker_may_compute_on_every_core(pair: Pair) -> None:
    for worker in (pair.prefiller, pair.plain, pair.cached):
        computing = pid_named(descendants(worker.process.pid), "VLLM::Worker")
        assert os.sched_getaffinity(computing) == os.sched_getaffinity(0)


CASES: dict[str, dict[str, Any]] = {
    "logprobs": {"output_options": {"logprobs": 2}},
    "penalties": {"sampling_options": GREEDY | {"presence_penalty": 1.5, "repetition_penalty": 1.3}},
    "seeded": {"sampling_options": {"temperature": 1.0, "seed": 11}},
    "seeded and penalized": {"sampling_options": {"temperature": 1.0, "seed": 12, "presence_penalty": 0.8}},
    "minimum": {
        "sampling_options": GREEDY | {"logit_bias": {1: 100.0}},
        "stop_conditions": {"ignore_eos": False, "min_tokens": 5},
    },
    "end": {"sampling_options": GREEDY | {"logit_bias": {1: 100.0}}, "stop_conditions": {"ignore_eos": False}},
    "stop": {
        "sampling_options": GREEDY | {"logit_bias": {99: 100.0}},
        "stop_conditions": {"stop_token_ids": [99], "min_tokens": 3},
    },
    "json": {"sampling_options": GREEDY | {"guided_decoding": {"json": SCHEMA}}, "stop_conditions": {"max_tokens": 60}},
    "choice": {"sampling_options": GREEDY | {"guided_decoding": {"choice": ["positive", "negative"]}}},
}


@pytest.mark.parametrize("case", CASES)
async def test_what_a_request_asks_for_is_as_if_one_worker_had_done_it(pair: Pair, case: str) -> None:
    sections = dict(CASES[case])
    if "guided_decoding" in sections.get("sampling_options", {}):
        sections["stop_conditions"] = {"ignore_eos": False} | sections.get("stop_conditions", {})
    wanted = asked(words(700, 75), **sections)
    whole = await ask(pair.plain, wanted)
    first = await prefill(pair.prefiller, wanted)
    items = [first["item"]]
    if first["disaggregated_params"] is not None:
        items += await ask(pair.plain, resumed(wanted, first))
    assert tokens(items) == tokens(whole)
    assert items[-1].get("finish_reason") == whole[-1].get("finish_reason")
    assert items[-1].get("stop_reason") == whole[-1].get("stop_reason")
    assert items[-1]["completion_usage"]["completion_tokens"] == whole[-1]["completion_usage"]["completion_tokens"]
    if case == "logprobs":
        ours, theirs = [[p for item in answer for p in item["log_probs"]] for answer in (items, whole)]
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert items[-1]["cum_log_probs"] == pytest.approx(whole[-1]["cum_log_probs"], abs=1e-2)


async def test_an_adapters_kv_is_fetched_for_that_adapter_alone(pair: Pair) -> None:
    adapted, base = [asked(words(701, 90), routing={"lora_name": name}) for name in ("adapter", None)]
    whole = [tokens(await ask(pair.cached, one)) for one in (adapted, base)]
    assert whole[0] != whole[1]
    assert [await split(pair.prefiller, pair.cached, one) for one in (adapted, base)] == whole
    first = await prefill(pair.prefiller, adapted)
    first["token_ids"] = whole[1][:1]
    assert tokens(await ask(pair.cached, resumed(base, first))) == whole[1][1:]
    assert await pair.cached.metric(RECOMPUTES, reason="digest") == 1


async def test_a_router_sees_the_blocks_that_came_over_and_they_need_not_come_again(pair: Pair) -> None:
    first_turn, moved = asked(words(715, 9 * BLOCK + 5), 3), "dynamo_component_kv_transfer_bytes"
    router = KvRouter(pair.runtime.endpoint("dynamo.cached.generate"), BLOCK)

    async def held() -> bool:
        return await router.best_worker(first_turn.token_ids) == (pair.cached.instance_id, 0, 9)

    async def transferred(count: float) -> bool:
        return await pair.cached.metric(f"{moved}_count") == count

    try:
        assert await router.best_worker(first_turn.token_ids) == (pair.cached.instance_id, 0, 0)
        before, size = [await pair.cached.metric(f"{moved}_{each}") for each in ("count", "sum")]
        await split(pair.prefiller, pair.cached, first_turn)
        await until(held, 20, pair.cached)
        await until(lambda: transferred(before + 1), 20, pair.cached)
        all_of_it = await pair.cached.metric(f"{moved}_sum") - size
        await split(pair.prefiller, pair.cached, asked([*first_turn.token_ids, *words(716, BLOCK)], 3))
        await until(lambda: transferred(before + 2), 20, pair.cached)
        assert await pair.cached.metric(f"{moved}_sum") - size - all_of_it < 0.3 * all_of_it
    finally:
        await router.close()


async def test_a_transfer_does_not_wait_for_the_prefill_workers_next_prompt(pair: Pair) -> None:
    short, long = asked(words(713, 200), 3), asked(words(714, 3900), 1)
    await split(pair.prefiller, pair.plain, short)  # they know each other
    first = await prefill(pair.prefiller, short)
    seconds = "dynamo_component_kv_transfer_latency_seconds_sum"
    before, began = await pair.plain.metric(seconds), time.monotonic()
    computing = asyncio.ensure_future(prefill(pair.prefiller, long))
    await asyncio.sleep(0.2)  # it is in the engine then, and keeps it busy for a second
    assert len(tokens(await ask(pair.plain, resumed(short, first)))) == 2
    handle = (await computing)["disaggregated_params"]
    assert await pair.plain.metric(seconds) - before < (time.monotonic() - began) / 4
    await pair.release(handle)


async def test_further_choices_follow_the_first(pair: Pair) -> None:
    wanted = asked(words(702, 130), sampling_options={"temperature": 1.0, "seed": 5, "n": 3})
    whole = await ask(pair.cached, wanted)
    first = await prefill(pair.prefiller, wanted)
    items = [first["item"], *await ask(pair.cached, resumed(wanted, first))]
    assert [tokens(items, i) for i in range(3)] == [tokens(whole, i) for i in range(3)]


async def test_the_clients_first_token_is_kept_whatever_the_engine_would_have_said(pair: Pair) -> None:
    wanted = asked(words(703, 60), 6)
    first = await prefill(pair.prefiller, wanted)
    other = 1234 if first["token_ids"] != [1234] else 1235
    answer = tokens(await ask(pair.plain, resumed(wanted, first | {"token_ids": [other]})))
    forced = asked([*wanted.token_ids, other], 5)
    assert answer == tokens(await ask(pair.plain, forced))


async def _overwrite(pair: Pair) -> None:
    """Have the prefill worker use every block it has for something else."""
    for seed in range(4):
        first = await prefill(pair.prefiller, asked(words(9000 + seed, 3000), 1))
        await pair.release(first["disaggregated_params"])


async def test_a_handle_used_again_after_its_blocks_were_overwritten_gives_the_right_text(pair: Pair) -> None:
    wanted = asked(words(704, 320))
    first = await prefill(pair.prefiller, wanted)
    right = tokens(await ask(pair.plain, resumed(wanted, first)))
    await _overwrite(pair)
    before = await pair.plain.metric(RECOMPUTES, reason="used")
    assert tokens(await ask(pair.plain, resumed(wanted, first))) == right
    assert await pair.plain.metric(RECOMPUTES, reason="used") == before + 1
    assert "the handle was used before" in pair.plain.log()


async def test_kv_that_was_released_is_recomputed(pair: Pair) -> None:
    wanted = asked(words(705, 320))
    first = await prefill(pair.prefiller, wanted)
    assert (await pair.release(first["disaggregated_params"]))["ok"]
    await _overwrite(pair)
    right = tokens(await ask(pair.plain, wanted))
    assert [*first["token_ids"], *tokens(await ask(pair.plain, resumed(wanted, first)))] == right
    await pair.nothing_held()


async def test_a_forged_handle_is_recomputed(pair: Pair) -> None:
    wanted, other = asked(words(706, 160)), asked(words(707, 160))
    right = tokens(await ask(pair.plain, wanted))
    handles = [await prefill(pair.prefiller, one) for one in (wanted, other)]
    forged = handles[1]["disaggregated_params"] | {"digest": handles[0]["disaggregated_params"]["digest"]}
    first = {"token_ids": right[:1], "disaggregated_params": forged}
    assert tokens(await ask(pair.plain, resumed(wanted, first))) == right[1:]
    assert await pair.plain.metric(RECOMPUTES, reason="digest") == 1
    for handle in handles:
        assert (await pair.release(handle["disaggregated_params"]))["ok"]


async def test_kv_that_is_read_after_its_lease_is_thrown_away(pair: Pair) -> None:
    wanted = asked(words(708, 320))
    right = tokens(await ask(pair.plain, wanted))
    first = await prefill(pair.prefiller, wanted)
    first["disaggregated_params"]["lease_s"] = 0.0  # as of a worker that cannot keep it longer
    before = await pair.plain.metric(RECOMPUTES, reason="transfer")
    ended = "dynamo_component_kv_handles_ended_total"
    expired = await pair.prefiller.metric(ended, end="expired")

    async def is_over() -> bool:
        return await pair.prefiller.metric(ended, end="expired") > expired

    core = pair.plain.core()
    os.kill(core, signal.SIGSTOP)  # an engine that hangs between the claim and the read
    try:
        answer = asyncio.ensure_future(ask(pair.plain, resumed(wanted, first)))
        await until(is_over, 4 * LEASE_S, pair.prefiller)
    finally:
        os.kill(core, signal.SIGCONT)
    assert [*first["token_ids"], *tokens(await answer)] == right
    assert await pair.plain.metric(RECOMPUTES, reason="transfer") == before + 1
    await pair.nothing_held()


async def test_kv_is_there_after_a_queue_of_three_leases(pair: Pair) -> None:
    wanted = asked(words(715, 320))
    right = tokens(await ask(pair.plain, wanted))
    lost = await pair.plain.metric(RECOMPUTES)

    async def keep_busy(seed: int) -> None:
        rnd = random.Random(seed)
        while True:
            await ask(pair.plain, asked(words(seed, 5), rnd.randrange(50, 390), routing={"priority": 5}))

    # All are let into the engine. The one that this is about waits behind many times as many as run at once.
    ahead = [asyncio.ensure_future(keep_busy(2000 + i)) for i in range(4 * SEQUENCES)]
    try:
        first = await prefill(pair.prefiller, wanted)
        answer = asyncio.ensure_future(ask(pair.plain, resumed(wanted, first)))
        await asyncio.sleep(3 * LEASE_S)  # the queue that this is about
        assert not answer.done()
        assert await pair.prefiller.held() == (0.0, 1.0)
        assert await pair.prefiller.metric("dynamo_component_kv_lease_renewals_total") >= 6
    finally:
        for each in ahead:
            each.cancel()
    assert [*first["token_ids"], *tokens(await answer)] == right
    assert await pair.plain.metric(RECOMPUTES) == lost
    await pair.nothing_held()


async def test_a_cancelled_request_leaves_nothing_behind(pair: Pair) -> None:
    assert pair.plain.client is not None
    for delay_s in (0.0, 0.002, 0.02, 0.1):
        wanted = asked(words(709, 700), 200)
        first = await prefill(pair.prefiller, wanted)
        body = msgspec.to_builtins(resumed(wanted, first))
        stream = await pair.plain.client.generate(body, annotated=False)
        await asyncio.sleep(delay_s)  # the stage that the cancel finds it in
        await stream.aclose()
    assert pair.prefiller.client is not None
    for delay_s in (0.0, 0.05, 0.3):
        body = msgspec.to_builtins(asked(words(710, 2000), 1))
        stream = await pair.prefiller.client.generate(body, annotated=False)
        await asyncio.sleep(delay_s)
        await stream.aclose()
    await pair.nothing_held()


async def test_workers_swap_their_roles_while_they_answer(pair: Pair) -> None:
    wanted = [asked(words(730 + i, 320), 20) for i in range(4)]
    right = [tokens(await ask(pair.plain, one)) for one in wanted]
    long = asked(words(740, 50), 600)
    answering = asyncio.ensure_future(split(pair.prefiller, pair.cached, long))
    seen = pair.cached.log().count("first token after")
    await until(lambda: pair.cached.log().count("first token after") > seen, 30, pair.cached)
    kept = await prefill(pair.prefiller, wanted[0])

    await pair.cached.become(pair.runtime, "prefill")
    assert await split(pair.cached, pair.plain, wanted[1]) == right[1]
    await pair.prefiller.become(pair.runtime, "decode")
    assert await split(pair.cached, pair.prefiller, wanted[2]) == right[2]
    # What the one kept while it was a prefill worker is there, and what the other answered as a decode worker goes on.
    assert [*kept["token_ids"], *tokens(await ask(pair.plain, resumed(wanted[0], kept)))] == right[0]
    assert not answering.done()

    await pair.prefiller.become(pair.runtime, "prefill")
    await pair.cached.become(pair.runtime, "decode")
    assert await split(pair.prefiller, pair.cached, wanted[3]) == right[3]
    assert await answering == tokens(await ask(pair.plain, long))
    assert await pair.prefiller.metric("dynamo_component_kv_transfer_success_total") == 1
    assert await pair.cached.metric("dynamo_component_kv_handles_ended_total", end="read") == 2
    assert await pair.cached.held() == (0.0, 0.0)
    await pair.nothing_held()


async def test_a_decode_worker_that_dies_while_it_fetches_leaves_nothing_behind(pair: Pair) -> None:
    wanted = asked(words(711, 320))
    answered = pair.plain.log().count("first token after")
    decoding = asyncio.ensure_future(split(pair.prefiller, pair.plain, asked(words(712, 100), 2000)))
    await until(lambda: pair.plain.log().count("first token after") > answered, 30, pair.plain)
    first = await prefill(pair.prefiller, wanted)
    os.kill(pair.plain.core(), signal.SIGSTOP)
    reading = asyncio.ensure_future(ask(pair.plain, resumed(wanted, first)))

    async def claimed() -> bool:
        return (await pair.prefiller.held())[1] >= 1

    await until(claimed, 30, pair.prefiller)
    await pair.plain.kill()
    for lost in (reading, decoding):
        with pytest.raises(DynamoException) as error:
            await lost
        assert error.value.migratable
    await pair.nothing_held()
    assert len(await split(pair.prefiller, pair.cached, wanted)) == 10


async def test_a_prefill_worker_that_dies_costs_time_and_nothing_else(pair: Pair) -> None:
    wanted = [asked(words(720 + i, 320), 40) for i in range(3)]
    right = [tokens(await ask(pair.cached, one)) for one in wanted]
    reset = pair.cached.log().count("first token after")
    firsts = [await prefill(pair.prefiller, one) for one in wanted]
    after = asyncio.ensure_future(ask(pair.cached, resumed(wanted[0], firsts[0])))
    await until(lambda: pair.cached.log().count("first token after") > reset, 30, pair.cached)
    core = pair.cached.core()
    os.kill(core, signal.SIGSTOP)
    during = asyncio.ensure_future(ask(pair.cached, resumed(wanted[1], firsts[1])))

    async def claimed() -> bool:
        return (await pair.prefiller.held())[1] >= 1

    with contextlib.ExitStack() as stack:
        stack.callback(os.kill, core, signal.SIGCONT)
        await until(claimed, 30, pair.prefiller)
        await pair.prefiller.kill()
    before = await ask(pair.cached, resumed(wanted[2], firsts[2]))
    for index, items in enumerate((await after, await during, before)):
        assert [*firsts[index]["token_ids"], *tokens(items)] == right[index], index
    assert await pair.cached.metric(RECOMPUTES, reason="unreachable") == 1
