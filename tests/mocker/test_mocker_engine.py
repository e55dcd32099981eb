"""The simulated engine on the event loop's own clock."""

import asyncio

import pytest

from dynamo.llm.protocols.engine import EngineOutput, Routing
from dynamo.mocker import stats
from dynamo.mocker.engine import MockerConfig, MockerEngine
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.runtime.errors import EngineShutdown, InvalidArgument
from dynamo.runtime.metrics import Metrics
from tests.mocker.simulated import VOCABULARY, request

DEADLINE_S = 10.0


class Recorder:
    """Callbacks that remember. `done` is set when `expected` requests have ended."""

    def __init__(self, expected: int = 1) -> None:
        self.outputs: dict[str, list[EngineOutput]] = {}
        self.events, self.loads = [], []
        self.expected = expected
        self.done = asyncio.Event()
        self.first = asyncio.Event()

    def on_outputs(self, outputs):
        self.first.set()
        for request_id, output in outputs:
            self.outputs.setdefault(request_id, []).append(output)
            if output.finish_reason:
                self.expected -= 1
        if self.expected <= 0:
            self.done.set()

    def on_kv_events(self, events, dp_rank=0, tier="device"):
        self.events += [(dp_rank, event) for event in events]

    def on_load(self, load):
        self.loads.append(load)


async def started(recorder, speedup=0.0, ranks=1, **limits):
    config = MockerConfig(
        model="m",
        served_model_name="m",
        scheduler=SchedulerConfig(**({"num_blocks": 64, "block_size": 4} | limits)),
        timing=StepTiming(speedup),
        data_parallel_size=ranks,
    )
    engine = MockerEngine(config, Sampler(VOCABULARY))
    await engine.start(recorder)
    return engine


async def test_steps_take_their_time_on_the_clock():
    recorder = Recorder()
    engine = await started(recorder, speedup=10.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    engine.submit("a", request(range(20), max_tokens=6))
    async with asyncio.timeout(DEADLINE_S):
        await recorder.done.wait()
    # prefill (16.5 + 0.3) ms and five decodes of at least 5.74 ms, ten times as fast
    assert 0.0045 <= loop.time() - began < 1.0
    await engine.stop()


async def test_an_instant_engine_lets_the_loop_turn_between_steps():
    recorder = Recorder()
    engine = await started(recorder)
    engine.submit("a", request(range(20), max_tokens=100))
    turns = 0
    while not recorder.done.is_set():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 100
    await engine.stop()


async def test_an_instant_engine_waits_for_callers_that_are_behind():
    recorder = Recorder()
    engine = await started(recorder)
    behind = True
    engine.held = lambda: behind
    engine.submit("a", request(range(20), max_tokens=5))
    await asyncio.sleep(0.02)
    assert recorder.outputs == {}
    behind = False
    async with asyncio.timeout(DEADLINE_S):
        await recorder.done.wait()
    await engine.stop()


async def test_an_abort_takes_effect_within_the_step():
    recorder = Recorder(expected=2)
    engine = await started(recorder, speedup=10.0)
    engine.submit("a", request(range(20), max_tokens=1000))
    engine.submit("b", request(range(20), max_tokens=3))
    await recorder.first.wait()
    seen = len(recorder.outputs["a"])
    engine.abort("a")
    recorder.expected = 1
    async with asyncio.timeout(DEADLINE_S):
        await recorder.done.wait()
    assert len(recorder.outputs["a"]) == seen
    assert engine.schedulers[0].pool.in_use == 0
    await engine.stop()


async def test_ranks_are_chosen_by_the_router_or_by_load():
    recorder = Recorder(expected=3)
    engine = await started(recorder, ranks=2)
    routed = request(range(20))
    routed.routing = Routing(dp_rank=1)
    engine.submit("routed", routed)
    engine.submit("free", request(range(50, 70)))
    assert [len(s) for s in engine.schedulers] == [1, 1]
    routed.routing.dp_rank = 2
    with pytest.raises(InvalidArgument, match="2 is not one of this worker's 2 ranks"):
        engine.submit("nowhere", routed)
    recorder.expected = 2
    async with asyncio.timeout(DEADLINE_S):
        await recorder.done.wait()
    assert {rank for rank, _ in recorder.events} == {0, 1}
    await engine.stop()


async def test_an_idle_engine_has_said_that_it_is_idle():
    recorder = Recorder()
    engine = await started(recorder)
    engine.submit("a", request(range(20), max_tokens=5))
    async with asyncio.timeout(DEADLINE_S):
        await recorder.done.wait()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    last = recorder.loads[-1]
    assert (last.active_decode_blocks, last.running_requests, last.active_prefill_tokens) == (0, 0, 0)
    await engine.stop()


async def test_a_stopped_engine_takes_nothing():
    recorder = Recorder()
    engine = await started(recorder)
    await engine.check_health()
    await engine.stop()
    with pytest.raises(EngineShutdown):
        engine.submit("a", request(range(20)))
    with pytest.raises(EngineShutdown):
        await engine.check_health()


async def test_numbers_are_shown_under_the_real_engines_names():
    metrics = Metrics(1)
    recorder = Recorder()
    engine = await started(recorder)
    stats.publish(engine.schedulers[0], metrics, "m", 0, worker_id=10)
    engine.submit("a", request(range(20), max_tokens=5))
    async with asyncio.timeout(DEADLINE_S):
        await recorder.done.wait()
    shown = metrics.render().decode().splitlines()
    labels = '{engine="0",model_name="m",worker_id="a"}'
    for line in (
        f"vllm:generation_tokens_total{labels} 5.0",
        f"vllm:prompt_tokens_total{labels} 20.0",
        f"vllm:num_preemptions_total{labels} 0.0",
        f"vllm:num_requests_running{labels} 0.0",
        f"vllm:num_requests_waiting{labels} 0.0",
        f"vllm:kv_cache_usage_perc{labels} 0.0",
        f"vllm:time_to_first_token_seconds_count{labels} 1.0",
        f"vllm:inter_token_latency_seconds_count{labels} 4.0",
        f"vllm:e2e_request_latency_seconds_count{labels} 1.0",
    ):
        assert line in shown
    await engine.stop()
