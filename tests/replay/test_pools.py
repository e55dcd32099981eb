"""Prefill and decode workers in the simulator: how long everything takes, and that nothing is left behind."""

import pytest

from dynamo.mocker.batching import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.replay import TelemetryOptions, run_trace_replay
from dynamo.replay.args import parse_options
from dynamo.replay.disagg import PooledSimulation
from dynamo.replay.pools import Pools
from dynamo.replay.routing import KvRouting, make_routing, routing_details
from dynamo.replay.simulate import Arrivals, Record, Recorder
from dynamo.router.config import KvRouterConfig
from dynamo.router.policies.line import Line
from dynamo.router.policies.predicted import FIRST_TOKEN_PRIOR, MAX_TOKEN_S
from dynamo.router.split import POLICIES
from tests.replay.workloads import asked, crowd, write_jsonl

BYTES = 131072  # a token's KV
CAPACITY = 16384 * 64  # tokens
PROMPT_S = StepTiming.prefill_ms(4096) / 1000
TRAVEL_S = 4096 * BYTES / 64e9


def decode_s(*contexts: int) -> float:
    return sum(StepTiming.decode_ms(context / CAPACITY) for context in contexts) / 1000


def simulate_pools(
    requests,
    prefill: int = 1,
    decode: int = 1,
    policy: str = "round-robin",
    *,
    split: str = "always",
    config: KvRouterConfig | None = None,
    stepping: bool = False,
    prefill_blocks: int = 16384,
    decode_blocks: int = 16384,
    **way: object,
) -> tuple[PooledSimulation, list[Record]]:
    """Run requests to their end, with KV that takes 2 ms for 1,000 tokens."""
    limits, prefill_limits = (
        SchedulerConfig(num_blocks=blocks, max_model_len=1 << 20) for blocks in (decode_blocks, prefill_blocks)
    )
    records: list[Record] = []
    pools = Pools(prefill_workers=prefill, decode_workers=decode, **({"kv_bytes_per_token": BYTES} | way))  # type: ignore[arg-type]
    config = config or KvRouterConfig()
    simulation = PooledSimulation(
        Arrivals(requests),
        pools,
        limits,
        make_routing(policy, decode, limits, config=config),
        make_routing(policy, prefill, prefill_limits, config=config),
        prefill_limits=prefill_limits,
        split=POLICIES[split](config),
        recorder=Recorder(on_record=records.append),
    )
    if stepping:
        for worker in simulation.workers:
            worker.scheduler.steady_steps = lambda: 0  # type: ignore[method-assign]
    simulation.run()
    return simulation, sorted(records, key=lambda record: int(record.request_id))


def assert_nothing_is_left(simulation: PooledSimulation) -> None:
    for worker in simulation.workers:
        scheduler = worker.scheduler
        assert len(scheduler) == 0
        assert scheduler.pool.in_use == 0
        assert scheduler.held_blocks == 0
    for routing in (simulation.routing, simulation.prefill_routing):
        details = routing_details(routing)
        assert details.get("open_bookings", 0) == details.get("queued", 0) == 0
    assert not simulation._wholes


# --- time


def test_the_first_token_is_the_prefill_workers_and_the_second_follows_the_transfer_and_two_steps():
    _, [record] = simulate_pools([asked(0, 4096, 10, 0)])
    assert record.first_token_s == pytest.approx(PROMPT_S)
    assert record.transfer_s == pytest.approx(TRAVEL_S)
    assert record.resumed_s == pytest.approx(PROMPT_S + TRAVEL_S + decode_s(4096))  # repeats what is known
    assert record.second_token_s == pytest.approx(PROMPT_S + TRAVEL_S + decode_s(4096, 4097))
    assert record.last_token_s == pytest.approx(PROMPT_S + TRAVEL_S + decode_s(*range(4096, 4106)))
    assert (record.prefill_worker, record.worker, record.output_tokens) == (0, 0, 10)


@pytest.mark.parametrize(
    ("bandwidth", "ttft_ms", "last_ms"), [(64.0, 100.095172, 153.652735), (1.0, 628.577476, 682.135039)]
)
def test_counted_from_the_decode_worker_the_times_are_those_that_the_peer_prints(
    bandwidth: float, ttft_ms: float, last_ms: float
):
    _, [record] = simulate_pools([asked(0, 4096, 10, 0)], kv_transfer_bandwidth=bandwidth, first_from_decode=True)
    assert record.ttft_s * 1000 == pytest.approx(ttft_ms, abs=1e-5)
    assert record.last_token_s * 1000 == pytest.approx(last_ms, abs=1e-5)


def test_two_pairs_of_workers_take_turns_as_the_peers_do():
    requests = [asked(0, 4096, 10, 0), asked(1, 1000, 10, 1000), asked(2, 700, 10, 2000), asked(3, 700, 10, 3000)]
    _, records = simulate_pools(requests, 2, 2, first_from_decode=True)
    assert [(record.prefill_worker, record.worker) for record in records] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    firsts = [record.first_token_s * 1000 for record in records]
    assert firsts == pytest.approx([101.6183, 40.9453, 125.4144, 67.6516], abs=1e-4)


def test_a_transfer_takes_its_latency_and_no_time_for_nothing():
    _, [slow] = simulate_pools([asked(0, 4096, 10, 0)], kv_transfer_latency_ms=5)
    assert slow.transfer_s == pytest.approx(TRAVEL_S + 0.005)
    _, [free] = simulate_pools([asked(0, 4096, 10, 0)], kv_bytes_per_token=None)
    assert free.transfer_s == 0
    assert free.second_token_s == pytest.approx(PROMPT_S + decode_s(4096, 4097))


def test_only_what_the_decode_worker_lacks_travels_if_asked_for():
    requests = [asked(0, 4096, 5, 0), asked(1000, 8192, 5, 0)]
    _, [_, whole] = simulate_pools(requests)
    assert whole.transfer_s == pytest.approx(2 * TRAVEL_S)
    simulation, [_, rest] = simulate_pools(requests, kv_transfer_timing_mode="destination_missing")
    assert rest.transfer_s == pytest.approx(TRAVEL_S)
    assert simulation.moved_tokens == 8192
    assert rest.cached_tokens == 4096  # at the prefill worker, which had computed the first half


def test_an_answer_of_one_token_needs_no_decode_worker():
    simulation, [record] = simulate_pools([asked(0, 4096, 1, 0)])
    assert record.last_token_s == record.first_token_s == pytest.approx(PROMPT_S)
    assert record.transfer_s is None
    assert simulation.decode_workers[0].steps == 0
    assert_nothing_is_left(simulation)


# --- room


def test_blocks_stay_with_the_prefill_worker_until_they_have_been_read():
    requests = [asked(0, 4096, 5, 0), asked(0, 4096, 5, 1000)]
    simulation, [first, second] = simulate_pools(requests, prefill_blocks=100, kv_transfer_bandwidth=1.0)
    read = first.first_token_s + first.transfer_s
    assert second.admitted_s == pytest.approx(0) or second.admitted_s == pytest.approx(read)
    assert second.first_token_s >= read + PROMPT_S - 1e-9  # no room for both
    assert simulation.hold_s.minimum >= first.transfer_s - 1e-9
    assert_nothing_is_left(simulation)


def test_a_transfer_begins_when_the_decode_worker_has_room():
    requests = [asked(0, 4096, 200, 0), asked(0, 4096, 200, 1000)]
    simulation, [first, second] = simulate_pools(requests, decode_blocks=100)
    assert second.resumed_s > first.last_token_s + second.transfer_s
    assert simulation.hold_s.maximum == pytest.approx(first.last_token_s + second.transfer_s - second.first_token_s)
    assert_nothing_is_left(simulation)


@pytest.mark.parametrize("split", POLICIES)
def test_every_request_is_answered_once_and_nothing_stays_behind(split: str):
    requests = crowd(150, seed=3)
    simulation, records = simulate_pools(
        requests, 2, 2, "marginal", split=split, prefill_blocks=300, decode_blocks=300,
        config=KvRouterConfig(conditional_disagg_prefill_busy_threshold=0.1),
    )  # fmt: skip
    assert [record.output_tokens for record in records] == [request.output_tokens for request in requests]
    assert simulation.totals.itl_s.count == sum(request.output_tokens - 1 for request in requests)
    remote = [record for record in records if record.prefill_worker is not None]
    assert len(remote) == len(records) - simulation.kept
    assert simulation.hold_s.count == len(remote)
    assert simulation.moved_tokens == sum(record.input_tokens for record in remote if record.output_tokens > 1)
    assert_nothing_is_left(simulation)


def test_a_prompt_that_waits_at_the_router_is_answered_too():
    config = KvRouterConfig(router_queue_threshold=0.05, router_queue_policy="wspt")
    simulation, records = simulate_pools(crowd(100), 1, 1, "marginal", split="predicted", config=config)
    assert len(records) == 100
    assert_nothing_is_left(simulation)


# --- sameness


def test_equal_inputs_give_equal_results():
    runs = [simulate_pools(crowd(100), 2, 2, "marginal", split="predicted")[1] for _ in range(2)]
    assert runs[0] == runs[1]


def test_leaps_come_to_what_single_steps_come_to():
    leaps, steps = (
        simulate_pools(crowd(80, seed=5), 2, 2, "least-loaded", decode_blocks=120, stepping=stepping)[1]
        for stepping in (False, True)
    )
    assert [record.worker for record in leaps] == [record.worker for record in steps]
    for name in ("first_token_s", "resumed_s", "second_token_s", "last_token_s"):
        assert [getattr(record, name) for record in leaps] == pytest.approx([getattr(record, name) for record in steps])


# --- which prompts travel


def test_the_next_turn_of_a_conversation_is_computed_where_its_answers_were():
    first = [asked(10 * i, 6000, 400, 1000 * i) for i in range(8)]
    following = [asked(1500 + 10 * i, 6400, 50, 1000 * i) for i in range(8)]
    _, records = simulate_pools(first + following, 1, 2, "marginal", split="isl_bounding")
    turns = {record.request_id: record for record in records}
    assert all(turns[str(i)].prefill_worker == 0 for i in range(8))
    assert all(turns[str(8 + i)].prefill_worker is None for i in range(8))
    assert all(turns[str(8 + i)].worker == turns[str(i)].worker for i in range(8))
    assert all(turns[str(8 + i)].cached_tokens >= 5952 for i in range(8))


def test_transfers_teach_the_decode_router_nothing_of_how_long_prompts_take():
    simulation, _ = simulate_pools(crowd(60), 1, 2, "predicted")
    assert isinstance(simulation.routing, KvRouting)
    assert isinstance(simulation.prefill_routing, KvRouting)
    untaught = Line(FIRST_TOKEN_PRIOR, MAX_TOKEN_S).slope
    assert simulation.routing.scheduler.policy.first_token.slope == untaught
    assert simulation.prefill_routing.scheduler.policy.first_token.slope != untaught


def test_a_blind_router_cannot_split():
    with pytest.raises(ValueError, match="round-robin knows nothing"):
        simulate_pools([asked(0, 100, 5, 0)], split="predicted")


# --- asking for it


def test_the_command_line_takes_both_pools_and_the_peers_words_for_the_split(tmp_path):
    trace = str(
        write_jsonl(tmp_path / "t.jsonl", {"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [1]})
    )
    pools = [trace, "--prefill-workers", "3", "--decode-workers", "5", "--kv-bytes-per-token", "1000"]
    [plain] = parse_options(pools).experiments
    assert plain.pools == Pools(prefill_workers=3, decode_workers=5, kv_bytes_per_token=1000)
    assert plain.split is None
    words = '{"policy":"isl_or_load","eff_isl_threshold":512}'
    [asked_for] = parse_options(
        [*pools, "--router-conditional-disagg", "--router-conditional-disagg-config", words]
    ).experiments
    assert asked_for.split == "isl_or_load"
    assert asked_for.router.conditional_disagg_eff_isl_threshold == 512
    [ours] = parse_options([*pools, "--split-policy", "predicted"]).experiments
    assert ours.split == "predicted"
    outcome = ours.run()
    assert outcome.summary["remote_requests"] + outcome.summary["local_requests"] == 1
    assert outcome.summary["split"] == "predicted"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prefill-workers", "3"], "give both"),
        (["--split-policy", "predicted"], "needs prefill and decode workers"),
        (["--prefill-workers", "0", "--decode-workers", "1"], "prefill_workers must be at least 1"),
        (
            ["--prefill-workers", "1", "--decode-workers", "1", "--router-conditional-disagg-config", '{"best":1}'],
            "--router-conditional-disagg-config: Object contains unknown field `best`",
        ),
    ],
)
def test_what_cannot_be_meant_is_named(more, said, capsys):
    with pytest.raises(SystemExit):
        parse_options(["trace.jsonl", *more])
    assert said in capsys.readouterr().err


def test_programs_ask_with_the_engines_of_both_kinds(tmp_path):
    trace = write_jsonl(
        tmp_path / "t.jsonl", {"timestamp": 0, "input_length": 4096, "output_length": 10, "hash_ids": list(range(8))}
    )
    way = {"kv_transfer_bandwidth": 64.0, "kv_transfer_bytes_per_token": BYTES}
    engines = {
        "prefill_engine_args": {"engine": {"worker_type": "prefill", **way}},
        "decode_engine_args": {"engine": {"worker_type": "decode", **way}},
    }
    report = run_trace_replay(
        trace, **engines, capture_per_request=True, first_from_decode=True, telemetry_options=TelemetryOptions()
    )
    assert report.telemetry is not None
    sample = report.telemetry.samples[0]
    assert len(sample["decode_scheduler_metrics"]) == len(sample["prefill_scheduler_metrics"]) == 1
    assert report.summary["mean_ttft_ms"] == pytest.approx(100.095172)
    assert report.per_request[0]["prefill_worker_idx"] == 0
    with pytest.raises(ValueError, match="give both"):
        run_trace_replay(trace, prefill_engine_args={})
    with pytest.raises(ValueError, match=r"decode_engine_args.worker_type: must be 'decode'"):
        run_trace_replay(trace, prefill_engine_args={}, decode_engine_args={"worker_type": "prefill"})
    with pytest.raises(ValueError, match=r"decode_engine_args.num_gpu_block: is not simulated; did you mean"):
        run_trace_replay(trace, prefill_engine_args={}, decode_engine_args={"num_gpu_block": 1})
