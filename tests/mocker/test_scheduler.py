"""The scheduler, step by step, without any clock."""

import pytest

from dynamo.llm.protocols.engine import OutputOptions, Routing
from dynamo.mocker.sampler import Reasoning
from dynamo.mocker.timing import StepTiming
from dynamo.runtime.errors import InvalidArgument
from tests.mocker.simulated import EOS, VOCABULARY, request, run, small_scheduler, tokens


def test_one_request_gets_its_tokens_and_its_usage():
    scheduler = small_scheduler()
    scheduler.add("a", request(range(10), max_tokens=5), now=0.0)
    outputs = run(scheduler)["a"]
    assert len(tokens(outputs)) == 5
    assert all(token in VOCABULARY for token in tokens(outputs))
    assert [o.finish_reason for o in outputs] == [None] * 4 + ["length"]
    usage = outputs[-1].completion_usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 5, 15)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert scheduler.pool.in_use == 0


def test_same_content_gives_same_output_and_another_seed_another():
    def output(seed):
        scheduler = small_scheduler()
        scheduler.add("x", request(range(10), seed=seed), now=0.0)
        return tokens(run(scheduler)["x"])

    assert output(1) == output(1) != output(2)


def test_a_long_prompt_is_computed_in_chunks_and_never_over_the_budget():
    scheduler = small_scheduler()
    scheduler.add("a", request(range(80)), now=0.0)
    sizes = []
    for _ in range(3):
        step = scheduler.schedule(0.0)
        sizes.append(sum(step.scheduled.values()))
        outputs = scheduler.complete(step, 0.0)
    assert sizes == [32, 32, 16]
    assert len(outputs) == 1


def test_without_chunks_a_prompt_waits_for_a_step_with_room():
    scheduler = small_scheduler(enable_chunked_prefill=False)
    scheduler.add("a", request(range(20)), now=0.0)
    scheduler.add("b", request(range(100, 120)), now=0.0)
    first = scheduler.schedule(0.0)
    assert list(first.scheduled.values()) == [20]
    scheduler.complete(first, 0.0)
    assert list(scheduler.schedule(0.0).scheduled.values()) == [1, 20]


def test_a_repeated_prompt_is_found_in_the_cache():
    scheduler = small_scheduler()
    for name in ("a", "b"):
        scheduler.add(name, request(range(21)), now=0.0)
        last = run(scheduler)[name][-1]
    assert last.completion_usage.prompt_tokens_details.cached_tokens == 20


def test_the_last_prompt_token_is_always_computed():
    scheduler = small_scheduler()
    for name in ("a", "b"):
        scheduler.add(name, request(range(20)), now=0.0)
        last = run(scheduler)[name][-1]
    assert last.completion_usage.prompt_tokens_details.cached_tokens == 16


def test_an_answer_sent_back_as_a_prompt_is_found_in_the_cache():
    scheduler = small_scheduler()
    scheduler.add("a", request(range(10), max_tokens=8), now=0.0)
    answer = tokens(run(scheduler)["a"])
    scheduler.add("b", request([*range(10), *answer, 7, 8, 9]), now=0.0)
    usage = run(scheduler)["b"][-1].completion_usage
    assert usage.prompt_tokens_details.cached_tokens == 16  # 17 of 18 tokens were computed: four blocks of 4


def test_equal_prompts_in_one_step_share_their_blocks():
    scheduler = small_scheduler(max_num_batched_tokens=64)
    scheduler.add("a", request(range(21)), now=0.0)
    scheduler.add("b", request(range(21)), now=0.0)
    step = scheduler.schedule(0.0)
    assert list(step.scheduled.values()) == [21, 1]
    assert scheduler.pool.in_use == 7


def test_adapters_and_salts_do_not_share_blocks():
    scheduler = small_scheduler()
    scheduler.add("a", request(range(21)), now=0.0)
    run(scheduler)
    salted = request(range(21))
    salted.routing = Routing(cache_salt="tenant-1")
    scheduler.add("b", salted, now=0.0)
    assert run(scheduler)["b"][-1].completion_usage.prompt_tokens_details.cached_tokens == 0


def test_without_prefix_caching_nothing_is_shared_and_no_event_leaves():
    scheduler = small_scheduler(enable_prefix_caching=False)
    for name in ("a", "b"):
        scheduler.add(name, request(range(21)), now=0.0)
        last = run(scheduler)[name][-1]
    assert last.completion_usage.prompt_tokens_details.cached_tokens == 0
    assert scheduler.take_kv_events() == []


@pytest.mark.parametrize("mode", ["lifo", "fifo"])
def test_preempted_sequences_give_the_same_output_as_alone(mode):
    alone = {}
    for i in range(6):
        scheduler = small_scheduler()
        scheduler.add("x", request(range(i * 50, i * 50 + 20), max_tokens=40), now=0.0)
        alone[str(i)] = tokens(run(scheduler)["x"])
    crowded = small_scheduler(preemption_mode=mode)
    for i in range(6):
        crowded.add(str(i), request(range(i * 50, i * 50 + 20), max_tokens=40), now=0.0)
    together = {name: tokens(outputs) for name, outputs in run(crowded).items()}
    assert crowded.stats.preemptions.value > 0
    assert together == alone


def test_lifo_pushes_out_the_newest_and_fifo_the_oldest():
    for mode, victim in (("lifo", "new"), ("fifo", "old")):
        scheduler = small_scheduler(preemption_mode=mode, num_blocks=9)
        scheduler.add("old", request(range(14), max_tokens=20), now=0.0)
        scheduler.add("new", request(range(50, 65), max_tokens=20), now=0.0)
        while not scheduler.stats.preemptions.value:
            scheduler.complete(scheduler.schedule(0.0), 0.0)
        assert [seq.id for seq in scheduler.waiting] == [victim]


def test_guaranteed_no_evict_never_preempts():
    scheduler = small_scheduler(reserve=lambda seq: seq.num_prompt + seq.script.max_tokens)
    for i in range(6):
        scheduler.add(str(i), request(range(i * 50, i * 50 + 20), max_tokens=40), now=0.0)
    assert len(run(scheduler)) == 6
    assert scheduler.stats.preemptions.value == 0


def test_longest_prefix_first_starts_the_request_with_cached_blocks():
    scheduler = small_scheduler(schedule_policy="lpm", max_num_seqs=1)
    scheduler.add("warm", request(range(21)), now=0.0)
    run(scheduler)
    scheduler.add("cold", request(range(50, 71)), now=0.0)
    scheduler.add("again", request(range(21)), now=0.0)
    assert [seq.id for seq in scheduler.schedule(0.0).scheduled] == ["again"]


def test_prefill_first_engines_do_not_mix_prefill_and_decode():
    scheduler = small_scheduler(mix_prefill_and_decode=False)
    scheduler.add("a", request(range(10)), now=0.0)
    scheduler.complete(scheduler.schedule(0.0), 0.0)
    scheduler.add("b", request(range(50, 90)), now=0.0)
    sizes = []
    for _ in range(3):
        step = scheduler.schedule(0.0)
        sizes.append({seq.id: count for seq, count in step.scheduled.items()})
        scheduler.complete(step, 0.0)
    assert sizes == [{"b": 32}, {"b": 8}, {"a": 1, "b": 1}]


def test_an_abort_in_the_middle_of_a_step_frees_everything_and_says_nothing():
    scheduler = small_scheduler()
    scheduler.add("a", request(range(10)), now=0.0)
    scheduler.add("b", request(range(50, 60)), now=0.0)
    step = scheduler.schedule(0.0)
    assert scheduler.abort("a")
    assert [name for name, _ in scheduler.complete(step, 0.0)] == ["b"]
    assert not scheduler.abort("a")
    run(scheduler)
    assert scheduler.pool.in_use == 0


def test_a_stop_token_ends_with_its_id_and_min_tokens_puts_it_off():
    scheduler = small_scheduler()
    scheduler.add("a", request(range(10), max_tokens=8), now=0.0)
    answer = tokens(run(scheduler)["a"])
    scheduler.add("b", request(range(10), max_tokens=8, stop_token_ids=[answer[3]]), now=0.0)
    stopped = run(scheduler)["b"]
    assert tokens(stopped) == answer[:4]
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", answer[3])
    scheduler.add("c", request(range(10), max_tokens=8, stop_token_ids=[answer[3]], min_tokens=6), now=0.0)
    put_off = run(scheduler)["c"]
    assert len(tokens(put_off)) == 8
    assert answer[3] not in tokens(put_off)[:6]


def test_an_unbounded_request_ends_by_itself_unless_eos_is_ignored():
    scheduler = small_scheduler(num_blocks=100)
    scheduler.add("a", request(range(10), max_tokens=None), now=0.0)
    last = run(scheduler)["a"][-1]
    assert (last.finish_reason, last.token_ids) == ("eos", [EOS])
    scheduler.add("b", request(range(10), max_tokens=None, ignore_eos=True), now=0.0)
    outputs = run(scheduler)["b"]
    assert (outputs[-1].finish_reason, len(tokens(outputs))) == ("length", 390)


def test_an_ordinary_token_can_be_eos():
    scheduler = small_scheduler()
    scheduler.add("a", request(range(10), max_tokens=8), now=0.0)
    answer = tokens(run(scheduler)["a"])
    for ignore, length in ((False, 3), (True, 8)):
        asked = request(range(10), max_tokens=8, ignore_eos=ignore)
        asked.eos_token_ids = [answer[2]]
        scheduler.add("b", asked, now=0.0)
        assert len(tokens(run(scheduler)["b"])) == length


def test_logprobs_are_well_formed():
    scheduler = small_scheduler()
    asked = request(range(10), max_tokens=3)
    asked.output_options = OutputOptions(logprobs=3, prompt_logprobs=1)
    scheduler.add("a", asked, now=0.0)
    outputs = run(scheduler)["a"]
    for output in outputs:
        (alternatives,) = output.top_logprobs
        assert alternatives[0].token_id == output.token_ids[0]
        assert output.log_probs == [alternatives[0].logprob]
        assert [a.rank for a in alternatives] == [1, 2, 3]
        assert len({a.token_id for a in alternatives}) == 3
        assert all(a.logprob < 0 for a in alternatives)
    assert outputs[0].prompt_logprobs[0] is None
    assert [p[0].token_id for p in outputs[0].prompt_logprobs[1:]] == list(range(1, 10))


def test_reasoning_is_wrapped_in_its_marks():
    scheduler = small_scheduler(reasoning=Reasoning(5, 6, 0.5))
    scheduler.add("a", request(range(10), max_tokens=10), now=0.0)
    answer = tokens(run(scheduler)["a"])
    assert (answer[0], answer[5], len(answer)) == (5, 6, 10)
    scheduler.add("b", request(range(10), max_tokens=10, max_thinking_tokens=1), now=0.0)
    assert tokens(run(scheduler)["b"])[:3:2] == [5, 6]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request([]), "empty"),
        (request(range(200)), "context length is 128"),
        (request(range(10), max_tokens=0), "max_tokens"),
    ],
)
def test_what_can_never_be_served_is_refused(asked, words):
    scheduler = small_scheduler()
    with pytest.raises(InvalidArgument, match=words):
        scheduler.add("a", asked, now=0.0)
    assert len(scheduler) == 0


def test_output_stops_at_the_context_length():
    scheduler = small_scheduler(max_model_len=16)
    scheduler.add("a", request(range(10), max_tokens=100), now=0.0)
    outputs = run(scheduler)["a"]
    assert (len(tokens(outputs)), outputs[-1].finish_reason) == (6, "length")


def test_a_step_takes_the_time_of_the_curves():
    scheduler = small_scheduler(StepTiming(speedup_ratio=2.0, decode_speedup_ratio=4.0))
    scheduler.add("a", request(range(20)), now=0.0)
    prefill = scheduler.schedule(0.0)
    assert prefill.duration_s == pytest.approx((4.209989e-7 * 400 + 1.518344e-2 * 20 + 16.50142) / 2000)
    scheduler.complete(prefill, prefill.duration_s)
    decode = scheduler.schedule(0.0)
    share = 21 / 128  # of the tokens that fit the cache
    assert decode.duration_s == pytest.approx((-25.74 * share**2 + 54.01 * share + 5.74) / 8000)


def test_latencies_are_counted():
    scheduler = small_scheduler(StepTiming(speedup_ratio=1.0))
    scheduler.add("a", request(range(10), max_tokens=5), now=0.0)
    run(scheduler)
    stats = scheduler.stats
    assert (sum(stats.ttft_s.counts), sum(stats.itl_s.counts), sum(stats.e2e_s.counts)) == (1, 4, 1)
    assert stats.generation_tokens.value == 5
    assert stats.e2e_s.sum == pytest.approx(stats.ttft_s.sum + stats.itl_s.sum)


def test_the_load_tells_what_is_used_and_what_waits():
    scheduler = small_scheduler(max_num_seqs=1)
    scheduler.add("a", request(range(10)), now=0.0)
    scheduler.add("b", request(range(50, 60)), now=0.0)
    scheduler.complete(scheduler.schedule(0.0), 0.0)
    load = scheduler.load(dp_rank=3)
    assert (load.dp_rank, load.running_requests, load.waiting_requests) == (3, 1, 1)
    assert (load.active_decode_blocks, load.kv_used_blocks, load.active_prefill_tokens) == (3, 3, 10)
