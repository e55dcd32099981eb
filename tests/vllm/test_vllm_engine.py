"""Does the real engine, on either driver, answer as vLLM itself does, and behave as the contract says?"""

import asyncio
import os
import re
import signal
import time
from typing import Any

import pytest

from dynamo.llm.block_hash import compute_block_hash_for_seq
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime.errors import EngineShutdown, InvalidArgument
from tests.vllm.conftest import ENGINE_TIMEOUT_S, Running
from tests.vllm.vllm_cases import BLOCK, CASES, LORA_PROMPT, LORA_TOKENS, SHARED, Case, words
from tests.vllm.vllm_helpers import alive, pid_named, request, shared_memory, still_there, tokens

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(ENGINE_TIMEOUT_S),
]

GREEDY = {"temperature": 0.0}
WORDS_OF_VLLM = {"length": "length", "stop": "stop", "eos": "stop"}


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], list[EngineOutput]]:
    """Our answers to the cases by (driver, name), filled by the first test that needs them."""
    return {}


async def ask_all(running: Running, answers: dict[tuple[str, str], list[EngineOutput]]) -> None:
    """Send all cases at once."""
    if (running.driver, CASES[0].name) in answers:
        return
    cases = served_cases(running)
    for case in cases:
        running.engine.submit(case.name, request(case.token_ids, **case.ours))
    for case in cases:
        answers[running.driver, case.name] = await running.seen.answer(case.name)


def served_cases(running: Running) -> list[Case]:
    return [case for case in CASES if "prompt_logprobs" not in case.vllm or not running.engine.lora_names]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_answers_equal_those_of_vllm_itself(
    running: Running, vllm_answers: dict[str, Any], answers: dict[tuple[str, str], list[EngineOutput]], case: Case
) -> None:
    await ask_all(running, answers)
    if case not in served_cases(running):
        with pytest.raises(InvalidArgument, match="LoRA") as refused:
            running.engine.submit(case.name, request(case.token_ids, **case.ours))
        assert refused.value.param == "prompt_logprobs"
        return
    ours, theirs = answers[running.driver, case.name], vllm_answers[case.name]
    assert tokens(ours) == theirs["token_ids"]
    last = ours[-1]
    assert last.finish_reason is not None
    assert WORDS_OF_VLLM[last.finish_reason] == theirs["finish_reason"]
    if last.finish_reason != "eos":
        assert last.stop_reason == theirs["stop_reason"]
    usage = last.completion_usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(case.token_ids), len(theirs["token_ids"]))


@pytest.mark.parametrize("name", ["logprobs", "seeded-sampling"])
async def test_logprobs_equal_those_of_vllm_itself(
    running: Running, vllm_answers: dict[str, Any], answers: dict[tuple[str, str], list[EngineOutput]], name: str
) -> None:
    await ask_all(running, answers)
    ours, theirs = answers[running.driver, name], vllm_answers[name]
    positions = [p for output in ours for p in zip(output.token_ids, output.log_probs or [], strict=True)]
    assert len(positions) == len(theirs["logprobs"])
    for (token_id, logprob), position in zip(positions, theirs["logprobs"], strict=True):
        assert logprob == pytest.approx(position[str(token_id)][0], abs=1e-4)
    alternatives = [top for output in ours for top in output.top_logprobs or []]
    for found, position in zip(alternatives, theirs["logprobs"], strict=bool(alternatives)):
        assert {str(t.token_id): pytest.approx([t.logprob, t.rank], abs=1e-4) for t in found} == position
    assert ours[-1].cum_log_probs == pytest.approx(sum(logprob for _, logprob in positions), abs=1e-6)


async def test_prompt_logprobs_equal_those_of_vllm_itself(
    running: Running, vllm_answers: dict[str, Any], answers: dict[tuple[str, str], list[EngineOutput]]
) -> None:
    if running.engine.lora_names:
        return  # refused: see above
    await ask_all(running, answers)
    ours = answers[running.driver, "prompt-logprobs"][0].prompt_logprobs
    theirs = vllm_answers["prompt-logprobs"]["prompt_logprobs"]
    assert ours is not None
    assert ours[0] is theirs[0] is None
    for found, position in zip(ours[1:], theirs[1:], strict=True):
        assert found is not None
        assert {str(t.token_id): pytest.approx([t.logprob, t.rank], abs=1e-4) for t in found} == position


async def test_an_adapter_answers_as_its_merged_weights(running: Running, vllm_answers: dict[str, Any]) -> None:
    wanted = request(
        LORA_PROMPT, "adapter", sampling_options=GREEDY, stop_conditions={"max_tokens": LORA_TOKENS, "ignore_eos": True}
    )
    found = tokens(await ask(running, "lora", wanted))
    assert (found == vllm_answers["lora"]) == bool(running.engine.lora_names)


async def test_outputs_of_one_step_come_in_one_batch(
    running: Running, answers: dict[tuple[str, str], list[EngineOutput]]
) -> None:
    await ask_all(running, answers)
    assert max(running.seen.batches) >= 16


async def test_a_repeated_prompt_is_found_in_the_cache_and_said_so(running: Running) -> None:
    prompt = words(31, 3 * BLOCK + 5)
    wanted = request(prompt, sampling_options=GREEDY, stop_conditions={"max_tokens": 4})
    first = await ask(running, "first", wanted)
    second = await ask(running, "second", wanted)
    assert tokens(first) == tokens(second)
    assert [cached(first), cached(second)] == [0, 3 * BLOCK]


async def test_a_cache_salt_keeps_prompts_apart(running: Running) -> None:
    prompt = words(32, 2 * BLOCK + 5)
    salted = request(prompt, sampling_options=GREEDY, stop_conditions={"max_tokens": 2}, routing={"cache_salt": "a"})
    other = request(prompt, sampling_options=GREEDY, stop_conditions={"max_tokens": 2}, routing={"cache_salt": "b"})
    assert [cached(await ask(running, name, r)) for name, r in (("s1", salted), ("s2", other), ("s3", salted))] == [
        0,
        0,
        2 * BLOCK,
    ]


async def test_kv_events_name_blocks_by_their_content(running: Running) -> None:
    await running.seen.until(lambda: local_hashes(running) >= set(compute_block_hash_for_seq(SHARED, BLOCK)))
    prompt = words(33, 2 * BLOCK + 5)
    salted = {"routing": {"cache_salt": "tenant"}}
    await ask(running, "kv-salted", request(prompt, stop_conditions={"max_tokens": 1}, **salted))
    await ask(running, "kv-lora", request(prompt, "adapter", stop_conditions={"max_tokens": 1}))
    adapter = {"lora_name": "adapter"} if running.engine.lora_names else {}
    for more in ({"cache_namespace": "tenant"}, adapter):
        expected = set(compute_block_hash_for_seq(prompt, BLOCK, **more))
        await running.seen.until(lambda expected=expected: local_hashes(running) >= expected)


async def test_blocks_chain_to_their_parent(running: Running) -> None:
    prompt = words(34, BLOCK - 10)
    await ask(running, "grow", request(prompt, stop_conditions={"max_tokens": BLOCK + 20, "ignore_eos": True}))
    whole = [*prompt, *tokens(running.seen.outputs["grow"])]
    first, second = compute_block_hash_for_seq(whole[: 2 * BLOCK], BLOCK)
    await running.seen.until(lambda: second in local_hashes(running))
    stored = {b.tokens_hash: (b.block_hash, s.parent_hash) for s in all_stored(running) for b in s.blocks}
    assert stored[second][1] == stored[first][0]
    assert stored[first][1] is None


async def test_abort_stops_within_a_step_and_leaves_the_others(running: Running) -> None:
    endless = {"max_tokens": 1500, "ignore_eos": True}
    for name in ("stays", "goes"):
        running.engine.submit(name, request(words(40, 10), sampling_options=GREEDY, stop_conditions=endless))
    await running.seen.until(lambda: len(running.seen.outputs.get("goes", [])) > 3)
    await running.seen.until(lambda: running.seen.loads[-1].running_requests == 2)
    running.engine.abort("goes")
    said = len(running.seen.outputs["goes"])
    loads = len(running.seen.loads)
    await running.seen.until(lambda: any(load.running_requests == 1 for load in running.seen.loads[loads:]))
    fallen = next(i for i, load in enumerate(running.seen.loads[loads:]) if load.running_requests == 1)
    assert fallen <= 2  # the step under way, and at most one that was made before the core read the message
    assert len(running.seen.outputs["goes"]) == said
    running.engine.abort("stays")
    assert running.seen.loads[-1].running_requests == 0
    assert running.seen.loads[-1].kv_used_blocks == 0


async def test_an_id_can_be_used_again_after_an_abort(running: Running) -> None:
    first = request(words(41, 10), sampling_options=GREEDY, stop_conditions={"max_tokens": 1500, "ignore_eos": True})
    running.engine.submit("again", first)
    await running.seen.until(lambda: "again" in running.seen.outputs)
    running.engine.abort("again")
    del running.seen.outputs["again"]
    second = request(words(42, 10), sampling_options=GREEDY, stop_conditions={"max_tokens": 6})
    alone = await ask(running, "alone", second)
    assert tokens(await ask(running, "again", second)) == tokens(alone)


async def test_a_seeded_prompt_computed_in_chunks_is_answered_as_alone(running: Running) -> None:
    """On a CPU the unrepaired worker of vLLM 0.32 dies of this."""

    def seeded(salt: str, seed: int) -> Any:
        sampling = {"temperature": 0.9, "seed": seed}
        stop = {"max_tokens": 12, "ignore_eos": True}
        return request(words(seed, 1400), sampling_options=sampling, stop_conditions=stop, routing={"cache_salt": salt})

    alone = [tokens(await ask(running, f"unhurried-{seed}", seeded("one", seed))) for seed in (80, 81, 82)]
    for seed in (80, 81, 82):  # 4200 tokens of prompt, 2048 a step
        running.engine.submit(f"chunked-{seed}", seeded("two", seed))
    assert [tokens(await running.seen.answer(f"chunked-{seed}")) for seed in (80, 81, 82)] == alone


async def test_an_unknown_id_is_not_aborted_loudly(running: Running) -> None:
    running.engine.abort("never-was")


REFUSED = [
    ("temperature", {"sampling_options": {"temperature": 9.0}}),
    ("top_p", {"sampling_options": {"top_p": 1.5}}),
    ("min_p", {"sampling_options": {"min_p": -1.0}}),
    ("presence_penalty", {"sampling_options": {"presence_penalty": 7.0}}),
    ("repetition_penalty", {"sampling_options": {"repetition_penalty": 0.0}}),
    ("max_tokens", {"stop_conditions": {"max_tokens": 0}}),
    ("min_tokens", {"stop_conditions": {"min_tokens": 9, "max_tokens": 3}}),
    ("stop_token_ids", {"stop_conditions": {"stop_token_ids": [10**6]}}),
    ("logit_bias", {"sampling_options": {"logit_bias": {10**6: 1.0}}}),
    ("logprobs", {"output_options": {"logprobs": 1000}}),
    ("prompt_logprobs", {"output_options": {"prompt_logprobs": 1000}}),
    ("seed", {"sampling_options": {"seed": 2**64}}),
    ("use_beam_search", {"sampling_options": {"use_beam_search": True}}),
    ("guided_decoding", {"sampling_options": {"guided_decoding": {"regex": "(", "backend": None}}}),
    ("guided_decoding", {"sampling_options": {"guided_decoding": {"json": {"type": "no such type"}}}}),
    ("guided_decoding", {"sampling_options": {"guided_decoding": {"choice": []}}}),
    ("guided_decoding.backend", {"sampling_options": {"guided_decoding": {"regex": "a", "backend": "outlines"}}}),
    ("lora_name", {"routing": {"lora_name": "nobody"}}),
    ("multi_modal_data", {"multi_modal_data": {"image_url": []}}),
    ("prefill_result", {"prefill_result": {"disaggregated_params": {}}}),
    ("max_thinking_tokens", {"stop_conditions": {"max_thinking_tokens": 3}}),
]


@pytest.mark.parametrize(("field", "sections"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
async def test_a_refused_request_names_the_field_and_hurts_nobody(
    running: Running, field: str, sections: dict[str, Any]
) -> None:
    if field == "multi_modal_data":
        sections = {"multi_modal_data": {"image_url": [{"Url": "x"}]}}
    with pytest.raises(InvalidArgument) as refused:
        await ask(running, f"refused-{field}-{time.monotonic_ns()}", request(words(50, 4), **sections))
    assert refused.value.param == field


@pytest.mark.parametrize("constraint", [{"grammar": "root ::= root"}, {"json": {"$ref": "#"}}], ids=["grammar", "json"])
async def test_a_constraint_that_cannot_be_kept_fails_its_request_alone(
    running: Running, constraint: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await ask(
            running,
            f"loop-{time.monotonic_ns()}",
            request(words(52, 4), sampling_options={"guided_decoding": constraint}),
        )
    assert refused.value.param == "guided_decoding"


@pytest.mark.parametrize("token_ids", [[], [10**6], words(51, 4000)], ids=["empty", "out-of-vocabulary", "too-long"])
async def test_a_refused_prompt_names_the_prompt(running: Running, token_ids: list[int]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await ask(running, f"prompt-{len(token_ids)}", request(token_ids))
    assert refused.value.param == "token_ids"


async def test_load_counts_waiting_requests_and_pending_prompts(running: Running) -> None:
    limit = running.config.max_num_seqs or 0
    names = [f"crowd-{i}" for i in range(limit + 4)]
    for name in names:
        running.engine.submit(name, request(words(60, 8), stop_conditions={"max_tokens": 8, "ignore_eos": True}))
    seen = len(running.seen.loads)
    for name in names:
        await running.seen.answer(name)
    loads = running.seen.loads[seen:]
    assert max(load.running_requests for load in loads) == limit
    assert max(load.waiting_requests for load in loads) >= 4
    assert max(load.active_prefill_tokens for load in loads) >= 4 * 8
    assert max(load.kv_used_blocks for load in loads) >= limit
    await running.seen.until(lambda: running.seen.loads[-1].running_requests == 0)
    assert running.seen.loads[-1].active_prefill_tokens == 0


async def test_vllms_own_metrics_count_every_token_once(running: Running) -> None:
    wanted = request(words(62, 3), stop_conditions={"max_tokens": 50, "ignore_eos": True})
    before = vllm_counts(running)
    for i in range(3):
        running.engine.submit(f"counted-{i}", wanted)
    for i in range(3):
        await running.seen.answer(f"counted-{i}")
    await running.seen.until(lambda: running.seen.loads[-1].running_requests == 0)
    grown = {name: value - before.get(name, 0.0) for name, value in vllm_counts(running).items()}
    assert grown["vllm:generation_tokens_total"] == 150
    assert grown["vllm:prompt_tokens_total"] == 9
    assert grown["vllm:time_to_first_token_seconds_count"] == 3
    assert grown["vllm:inter_token_latency_seconds_count"] == 147
    assert grown["vllm:iteration_tokens_total_sum"] == 159
    assert grown["vllm:e2e_request_latency_seconds_count"] == 3


async def test_the_config_tells_what_the_router_needs(running: Running) -> None:
    config = running.config
    assert (config.context_length, config.kv_cache_block_size, config.max_num_seqs) == (2048, BLOCK, 32)
    assert config.total_kv_blocks is not None
    assert config.total_kv_blocks > 32
    assert config.runtime_data["driver"] == running.driver


async def test_resetting_the_cache_is_told_to_routers(running: Running) -> None:
    reset = running.engine.controls()["control/reset_prefix_cache"]
    assert await reset({}) == {"status": "ok", "reset": True}
    await ask(
        running, "after-reset", request(words(61, 4), stop_conditions={"max_tokens": 1})
    )  # events leave with a step
    await running.seen.until(lambda: any(event.cleared for _, event in running.seen.kv))


async def test_routes_that_cannot_work_are_absent(running: Running) -> None:
    assert set(running.engine.controls()) == {"control/reset_prefix_cache"}


async def test_a_killed_process_is_noticed_and_nothing_is_left(running: Running) -> None:
    """Last, for it ends the engine: the worker of one driver's, the core of the other's."""
    segments = shared_memory(running.processes)
    assert segments
    victim = pid_named(running.processes, "VLLM::Worker" if running.driver == "core" else "VLLM::EngineCore")
    engine_processes = {pid: name for pid, name in running.processes.items() if "VLLM::" in name}
    running.engine.submit("doomed", request(words(70, 8), stop_conditions={"max_tokens": 1500, "ignore_eos": True}))
    await running.seen.until(lambda: "doomed" in running.seen.outputs)
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    await running.seen.until(lambda: bool(running.seen.deaths), timeout_s=2.0)
    assert time.monotonic() - killed < 2.0
    with pytest.raises(EngineShutdown):
        await running.engine.check_health()
    with pytest.raises(EngineShutdown):
        running.engine.submit("late", request(words(71, 8)))
    await running.engine.stop()
    assert still_there(segments) == []
    async with asyncio.timeout(20):
        while alive(engine_processes):  # noqa: ASYNC110 - processes tell no event
            await asyncio.sleep(0.1)
    assert len(running.seen.deaths) == 1


async def ask(running: Running, name: str, wanted: Any) -> list[EngineOutput]:
    running.engine.submit(name, wanted)
    return await running.seen.answer(name)


def cached(outputs: list[EngineOutput]) -> int | None:
    usage = outputs[-1].completion_usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return usage.prompt_tokens_details.cached_tokens


def vllm_counts(running: Running) -> dict[str, float]:
    """vLLM's metrics by name, those with labels of their own added up."""
    found: dict[str, float] = {}
    for line in running.engine.prometheus_text().decode().splitlines():
        if line.startswith("vllm:"):
            name, value = re.split(r"\{.*\} | ", line)
            found[name] = found.get(name, 0.0) + float(value)
    return found


def all_stored(running: Running) -> list[Any]:
    return [event.stored for _, event in running.seen.kv if event.stored is not None]


def local_hashes(running: Running) -> set[int]:
    return {block.tokens_hash for stored in all_stored(running) for block in stored.blocks}
