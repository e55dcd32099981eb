"""A caller that does not read must not fill this process's memory, however fast the simulated engine is."""

import asyncio

import msgspec

from dynamo.engine.serving import EngineWorker, ServeOptions
from dynamo.mocker.engine import MockerConfig, MockerEngine
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.scheduler import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from tests.mocker.simulated import VOCABULARY, eventually, request

DEADLINE_S = 20.0
STREAMS, TOKENS = 32, 60_000  # 40 MB of frames in all, far more than two sockets hold


async def test_an_instant_engine_waits_for_a_caller_that_does_not_read(runtime, model_dir, monkeypatch):
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")
    limits = SchedulerConfig(num_blocks=100_000, max_model_len=2 * TOKENS)
    engine = MockerEngine(MockerConfig("m", "m", limits, StepTiming(0)), Sampler(VOCABULARY))
    worker = EngineWorker(runtime, engine, ServeOptions(model_dir))
    engine.held = worker.callers_are_behind
    assert await worker.start()
    running = asyncio.ensure_future(worker.run())
    client = await runtime.endpoint("dynamo.backend.generate").client()
    await client.wait_for_instances(DEADLINE_S)

    asked = msgspec.to_builtins(request(range(20), TOKENS, ignore_eos=True))
    streams = [await client.generate(asked, annotated=False) for _ in range(STREAMS)]
    await anext(streams[0])
    (connection,) = runtime.server.connections
    (caller,) = runtime.pool._connections.values()
    caller._transport.pause_reading()
    made = engine.schedulers[0].stats.generation_tokens
    async with asyncio.timeout(DEADLINE_S):
        before = -1.0
        while before != made.value:
            before = made.value
            await asyncio.sleep(0.1)
    assert made.value < STREAMS * TOKENS / 2
    assert connection._transport.get_write_buffer_size() < 2 << 20

    caller._transport.resume_reading()
    await eventually(lambda: made.value > before)
    for stream in streams:
        await stream.aclose()
    runtime.shutdown()
    async with asyncio.timeout(DEADLINE_S):
        assert await running == 0
