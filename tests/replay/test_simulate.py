"""What the simulated fleet does with requests."""

import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dynamo.mocker.batching import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.replay.routing import BASELINES, make_routing, routing_details, routing_names
from dynamo.replay.simulate import Arrivals, Goal, Simulation
from dynamo.replay.traces import SyntheticWorkload, TraceError
from dynamo.router.config import DEFAULT_POLICY, KvRouterConfig
from dynamo.router.scheduler import KvScheduler
from tests.replay.workloads import asked, crowd, simulate

CAPACITY = 16384 * 64


def close(records):
    """What can be compared to the last digit, and what only nearly."""
    keys = [(r.request_id, r.worker, r.output_tokens, r.cached_tokens, r.overlap_tokens) for r in records]
    times = [(r.admitted_s, r.first_token_s, r.second_token_s or 0.0, r.last_token_s) for r in records]
    return keys, [pytest.approx(t, abs=1e-9) for t in times], times


def test_a_lone_request_takes_the_time_of_the_curves():
    _, (record,) = simulate([asked(0, 1000, 3, 1)])
    prefill, decode = StepTiming.prefill_ms(1000), [StepTiming.decode_ms(t / CAPACITY) for t in (1001, 1002)]
    assert record.ttft_s * 1000 == pytest.approx(prefill)
    assert (record.second_token_s - record.first_token_s) * 1000 == pytest.approx(decode[0])
    assert record.e2e_s * 1000 == pytest.approx(prefill + sum(decode))


def test_a_request_that_comes_in_a_long_decode_joins_at_the_next_step():
    step = StepTiming.decode_ms(1100 / CAPACITY) / 1000
    _, records = simulate([asked(0, 1000, 500, 1), asked(1000, 100, 2, 5000)])
    second = next(r for r in records if r.request_id == "1")
    assert 0 < second.admitted_s - 1.0 <= step * 1.01


def test_requests_of_one_moment_share_a_step():
    _, records = simulate([asked(0, 1000, 2, 1), asked(0, 1000, 2, 500)])
    assert [r.first_token_s * 1000 for r in records] == [pytest.approx(StepTiming.prefill_ms(2000))] * 2


def test_a_cached_prefix_is_not_computed_again():
    _, records = simulate([asked(0, 1024, 2, 1), asked(1000, 1024, 2, 1)])
    assert [r.cached_tokens for r in records] == [0, 960]
    assert records[1].ttft_s * 1000 == pytest.approx(StepTiming.prefill_ms(64))


def test_round_robin_takes_turns():
    _, records = simulate([asked(i * 1000, 100, 2, 100 * i) for i in range(6)], workers=3)
    assert [r.worker for r in records] == [0, 1, 2, 0, 1, 2]


def test_least_loaded_avoids_the_busy_worker():
    requests = [asked(0, 8000, 400, 1), asked(10, 100, 2, 500), asked(1000, 100, 2, 600), asked(1500, 100, 2, 700)]
    _, records = simulate(requests, workers=2, policy="least-loaded")
    assert {r.worker for r in records if r.input_tokens == 100} == {1 - records[-1].worker}


@pytest.mark.parametrize("policy", [name for name in routing_names() if name not in BASELINES])
def test_a_kv_policy_sends_a_prompt_where_its_prefix_is(policy):
    requests = [asked(i * 2000, 4000, 4, 1000 * (i % 3)) for i in range(9)]
    _, records = simulate(requests, workers=3, policy=policy)
    places = {}
    for record in records[3:]:
        assert record.cached_tokens > 3900
        assert record.overlap_tokens >= record.cached_tokens
    for record in records:
        places.setdefault(int(record.request_id) % 3, set()).add(record.worker)
    assert all(len(workers) == 1 for workers in places.values())


@pytest.mark.parametrize("policy", routing_names())
def test_nothing_is_left_when_all_is_done(policy):
    simulation, records = simulate(crowd(), workers=4, policy=policy)
    assert len(records) == simulation.totals.completed == 200
    assert all(worker.requests == worker.scheduler.pool.in_use == 0 for worker in simulation.workers)
    assert routing_details(simulation.routing).get("open_bookings", 0) == 0


def test_the_index_knows_exactly_what_the_engines_hold():
    simulation, _ = simulate(crowd(), workers=4, policy="linear", num_blocks=128)
    simulation.routing._deliver(float("inf"))
    index = simulation.routing.index
    for worker in simulation.workers:
        key = simulation.routing._keys[worker.index]
        assert index.blocks(key) == {"device": len(worker.scheduler.pool.named())}


def test_late_events_make_the_router_miss_what_it_could_have_known():
    requests = [asked(i * 100, 4000, 2, 1) for i in range(40)]
    _, prompt = simulate(requests, workers=4, policy="linear")
    _, late = simulate(requests, workers=4, policy="linear", event_lag_s=2.0)
    assert sum(r.overlap_tokens for r in late) < sum(r.overlap_tokens for r in prompt)
    assert all(r.overlap_tokens == 0 for r in late if r.arrived_s < 2.0)


@pytest.mark.parametrize("policy", ["round-robin", "linear", "lmetric"])
def test_equal_seeds_give_equal_runs_and_other_workloads_others(policy):
    def run(seed, workload):
        return close(simulate(crowd(seed=workload), workers=4, policy=policy, seed=seed)[1])[2]

    assert run(3, 1) == run(3, 1) != run(3, 2)


loads = st.fixed_dictionaries(
    {
        "count": st.just(60),
        "seed": st.integers(1, 10_000),
        "request_rate": st.sampled_from([2.0, 20.0, 200.0]),
        "output_tokens": st.sampled_from([1, 5, 100]),
        "num_prefix_groups": st.sampled_from([1, 8]),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    loads,
    st.sampled_from(["round-robin", "linear"]),
    st.sampled_from([64, 200, 16384]),
    st.sampled_from([4, 256]),
    st.sampled_from([0.0, 0.3]),
)
def test_leaping_gives_what_stepping_gives(load, policy, num_blocks, max_num_seqs, lag):
    def run(stepping):
        simulation, records = simulate(
            crowd(**load),
            workers=3,
            policy=policy,
            event_lag_s=lag,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            stepping=stepping,
        )
        records.sort(key=lambda record: int(record.request_id))
        steps = sum(worker.steps for worker in simulation.workers)
        return close(records), steps, simulation.totals.itl_s

    (keys, times, _), steps, itl = run(False)
    (other_keys, _, other_times), other_steps, other_itl = run(True)
    assert other_keys == keys
    assert other_times == times
    assert other_steps == steps
    assert other_itl.count == itl.count
    assert other_itl.mean == pytest.approx(itl.mean)


def test_a_closed_loop_keeps_so_many_under_way():
    workload = SyntheticWorkload(input_tokens=500, output_tokens=20, request_count=30)
    _, records = simulate(workload.requests(), concurrency=3)
    moments = sorted([(r.arrived_s, 1) for r in records] + [(r.last_token_s, -1) for r in records])
    under_way, most = 0, 0
    for _, change in moments:
        under_way += change
        most = max(most, under_way)
    assert most == 3
    assert sum(r.arrived_s == 0 for r in records) == 3


def test_a_turn_waits_for_the_one_before_and_its_delay():
    workload = SyntheticWorkload(
        input_tokens=640,
        output_tokens=70,
        request_count=5,
        arrival_interval_ms=100,
        turns_per_session=3,
        inter_turn_delay_ms=500,
        history=True,
    )
    _, records = simulate(workload.requests(), policy="linear", speedup=2.0)
    by_turn = {(r.session_id, r.turn): r for r in records}
    assert len(by_turn) == 15
    for (session, turn), record in by_turn.items():
        if turn:
            before = by_turn[session, turn - 1]
            assert record.arrived_s == pytest.approx(before.last_token_s + 0.25)
            # The answer before is in the cache too, but for its last token and what fills no block.
            assert record.cached_tokens >= before.input_tokens + before.output_tokens - 1 - 64


def test_a_closed_loop_counts_sessions_with_their_pauses():
    workload = SyntheticWorkload(
        input_tokens=64, output_tokens=4, request_count=6, turns_per_session=3, inter_turn_delay_ms=50
    )
    _, records = simulate(workload.requests(), concurrency=2)
    assert len(records) == 18
    sessions = {}
    for r in records:
        first, last = sessions.get(r.session_id, (r.arrived_s, 0.0))
        sessions[r.session_id] = (min(first, r.arrived_s), max(last, r.last_token_s))
    for at, _ in sessions.values():
        assert sum(first <= at < last for first, last in sessions.values()) <= 2


def test_a_request_too_long_for_any_worker_is_named():
    with pytest.raises(TraceError, match=r"request 1 of the trace: .*context length is 128"):
        simulate([asked(0, 64, 2, 1), asked(5, 500, 2, 1)], num_blocks=2)


def test_an_answer_is_cut_at_the_context_length():
    _, (record,) = simulate([asked(0, 100, 500, 1)], num_blocks=2)
    assert (record.output_tokens, record.requested_tokens) == (28, 500)


def test_block_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="block_size 48 and the trace's block size 64"):
        simulate([asked(0, 100, 5, 1)], block_size=48)


@pytest.mark.parametrize("block_size", [16, 32, 128, 256])
def test_any_block_size_that_fits_finds_what_is_shared(block_size):
    _, records = simulate([asked(0, 1024, 2, 1), asked(1000, 1024, 2, 1)], block_size=block_size)
    assert records[1].cached_tokens == 1024 - block_size


def test_past_the_knee_requests_wait_and_all_end():
    simulation, records = simulate(crowd(count=300, request_rate=2000.0, output_tokens=200), max_num_seqs=8)
    assert len(records) == 300
    assert max(r.admitted_s - r.arrived_s for r in records) > 10
    assert simulation.workers[0].scheduler.stats.preemptions.value == 0


def test_a_crowded_cache_preempts_and_all_end():
    simulation, records = simulate(
        crowd(count=60, request_rate=2000.0, output_tokens=400, num_prefix_groups=0), num_blocks=64
    )
    assert len(records) == 60
    assert simulation.workers[0].scheduler.stats.preemptions.value > 0


def test_a_run_can_be_ended_early():
    limits = SchedulerConfig()
    simulation = Simulation(Arrivals(crowd()), 1, limits, make_routing("round-robin", 1, limits))
    totals = simulation.run(until_s=2.0)
    assert simulation.now <= 2.0
    assert 0 < totals.completed < 200


weathers = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(routing_names()),
        "concurrency": st.sampled_from([None, 1, 7]),
        "event_lag_s": st.sampled_from([0.0, 0.5]),
        "num_blocks": st.sampled_from([64, 16384]),
        "max_num_seqs": st.sampled_from([2, 256]),
        "config": st.sampled_from(
            [
                KvRouterConfig(),
                KvRouterConfig(router_queue_threshold=0.5),
                KvRouterConfig(router_queue_threshold=0.5, router_queue_policy="lcfs"),
                KvRouterConfig(router_temperature=1.0, router_track_output_blocks=True),
            ]
        ),
    }
)


@settings(max_examples=40, deadline=None)
@given(weathers, loads, st.sampled_from([1, 3]))
def test_every_request_ends_once_whatever_the_weather(weather, load, turns):
    simulation, records = simulate(crowd(**load, turns_per_session=turns), workers=3, **weather)
    totals = simulation.totals
    assert totals.requests == load["count"] * turns
    assert sorted(int(record.request_id) for record in records) == list(range(totals.requests))
    assert totals.refused == 0
    assert sum(totals.per_worker) == totals.completed == totals.requests
    assert totals.output_tokens == sum(record.output_tokens for record in records)
    for r in records:
        assert r.arrived_s <= r.routed_s <= r.admitted_s < r.first_token_s <= r.last_token_s
        assert 0 <= r.cached_tokens < r.input_tokens
    left = routing_details(simulation.routing)
    assert (left.get("open_bookings", 0), left.get("queued", 0)) == (0, 0)


def test_one_prefix_of_all_prompts_does_not_draw_them_all_to_one_worker():
    load = crowd(count=600, request_rate=10.0, input_tokens=6000, num_prefix_groups=1, shared_prefix_ratio=0.9)
    blind, _ = simulate(load, workers=8, policy="least-loaded")
    ours, _ = simulate(load, workers=8, policy=DEFAULT_POLICY)
    assert max(ours.totals.per_worker) < 300
    assert ours.totals.tpot_s.mean < 1.1 * blind.totals.tpot_s.mean
    assert ours.totals.ttft_s.mean < 1.2 * blind.totals.ttft_s.mean


def test_the_code_that_serves_makes_the_choices(monkeypatch):
    asked_for = []
    select = KvScheduler.select

    def spied(scheduler, request, *args, **more):
        asked_for.append(request.request_id)
        return select(scheduler, request, *args, **more)

    monkeypatch.setattr(KvScheduler, "select", spied)
    _, records = simulate(crowd(), workers=4, policy=DEFAULT_POLICY)
    assert asked_for == sorted((r.request_id for r in records), key=int)


def test_goals_count_requests_that_meet_all_of_them():
    goal = Goal(ttft_ms=100, e2e_ms=500)
    assert goal.met(0.1, None, 0.4)
    assert not goal.met(0.11, None, 0.4)
    assert not goal.met(0.05, 0.01, 0.6)
    assert Goal(itl_ms=10).met(9, 0.009, 9)
    assert not Goal(itl_ms=10).met(9, 0.011, 9)
    assert not Goal().set


@pytest.mark.parametrize("wrong", [{"speedup": 0}, {"concurrency": 0}])
def test_impossible_arrivals_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Arrivals([], **wrong)


def peak_bytes(requests: int) -> int:
    """What a run of so many requests takes at most, of which a few are live at a time."""
    limits = SchedulerConfig(num_blocks=64)
    workload = SyntheticWorkload(
        input_tokens=300, output_tokens=20, request_count=requests, request_rate=20.0, num_prefix_groups=4
    )
    tracemalloc.start()
    routing = make_routing(DEFAULT_POLICY, 2, limits)
    Simulation(Arrivals(workload.requests()), 2, limits, routing).run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_finished_request_leaves_only_a_count():
    peak_bytes(100)  # what is imported or cached once
    # What is left grows to a bound: samples of the fleet, and buckets of latencies. A kept record takes 400 bytes.
    assert peak_bytes(2500) - peak_bytes(500) < 150 * 2000


def test_the_index_and_the_clock_hold_what_is_cached_and_live():
    simulation, _ = simulate(crowd(count=600, num_prefix_groups=0), workers=2, policy="linear", num_blocks=256)
    routing = simulation.routing
    assert len(routing.index) <= 2 * 256
    assert len(simulation._wakes) <= 8


def test_requests_wait_at_the_router_while_all_workers_are_busy():
    load = crowd(request_rate=500.0, input_tokens=4000)
    config = KvRouterConfig(router_queue_threshold=1.0, router_queue_policy="wspt")
    simulation, records = simulate(load, workers=2, policy="linear", config=config)
    assert len(records) == 200
    waited = [record for record in records if record.routed_s > record.arrived_s]
    assert len(waited) > 50
    assert all(record.admitted_s >= record.routed_s for record in records)
    assert routing_details(simulation.routing)["queued"] == 0
    _, direct = simulate(load, workers=2, policy="linear")
    assert sum(r.ttft_s for r in records) < sum(r.ttft_s for r in direct)  # short ones do not wait for long ones


def test_who_waits_too_long_is_refused_and_counted():
    config = KvRouterConfig(router_queue_threshold=0.0)
    load = [asked(i, 200_000, 5, 5000 * i) for i in range(40)]
    simulation, records = simulate(load, policy="linear", config=config)
    assert simulation.totals.refused > 0
    assert len(records) + simulation.totals.refused == 40
    assert max(record.routed_s - record.arrived_s for record in records) <= 60


def test_output_blocks_count_where_they_are_tracked():
    config = KvRouterConfig(router_track_output_blocks=True)
    simulation, records = simulate(crowd(), workers=2, policy="linear", config=config)
    assert len(records) == 200
    assert routing_details(simulation.routing)["open_bookings"] == 0
