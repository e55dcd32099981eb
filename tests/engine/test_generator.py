"""Engines written as async generators."""

import asyncio

import pytest

from dynamo.engine.contract import EngineConfig
from dynamo.engine.generator import GeneratorEngine
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime.context import Context
from dynamo.runtime.errors import InvalidArgument, Unknown
from tests.engine.scripted import DEADLINE_S, collect, request, serving

CONFIG = EngineConfig(model="m", served_model_name="m")


async def test_what_is_yielded_is_streamed_and_dicts_will_do(runtime, model_dir):
    async def generate(request, context):
        yield EngineOutput([request.token_ids[0]])
        yield {"token_ids": [2], "finish_reason": "length"}

    async with serving(runtime, GeneratorEngine(generate, CONFIG), model_dir) as (_, client):
        items = await collect(await client.generate(request([9]), annotated=False))
        assert items == [{"token_ids": [9]}, {"token_ids": [2], "finish_reason": "length"}]


async def test_a_generator_that_just_ends_has_stopped(runtime, model_dir):
    async def generate(request, context):
        yield {"token_ids": [1]}

    async with serving(runtime, GeneratorEngine(generate, CONFIG), model_dir) as (_, client):
        items = await collect(await client.generate(request(), annotated=False))
        assert items[-1] == {"finish_reason": "stop"}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [(InvalidArgument("too long", "token_ids"), InvalidArgument, "too long"), (KeyError("x"), Unknown, "KeyError")],
)
async def test_an_exception_ends_the_stream_after_what_was_yielded(runtime, model_dir, error, kind, words):
    async def generate(request, context):
        yield {"token_ids": [1]}
        raise error

    async with serving(runtime, GeneratorEngine(generate, CONFIG), model_dir) as (_, client):
        stream = await client.generate(request(), annotated=False)
        assert (await anext(stream))["token_ids"] == [1]
        with pytest.raises(kind, match=words):
            await anext(stream)


async def test_what_is_no_output_is_an_error(runtime, model_dir):
    async def generate(request, context):
        yield {"token_ids": "text"}

    async with serving(runtime, GeneratorEngine(generate, CONFIG), model_dir) as (_, client):
        with pytest.raises(Unknown, match="what is no output"):
            await collect(await client.generate(request()))


async def test_a_stop_closes_the_generator(runtime, model_dir):
    closed = asyncio.Event()

    async def generate(request, context):
        try:
            while True:
                yield {"token_ids": [1]}
                await asyncio.sleep(0)
        finally:
            assert context.is_killed()
            closed.set()

    async with serving(runtime, GeneratorEngine(generate, CONFIG), model_dir) as (_, client):
        context = Context()
        stream = await client.generate(request(), annotated=False, context=context)
        await anext(stream)
        context.stop_generating()
        items = await collect(stream)
        assert items[-1]["finish_reason"] == "cancelled"
        async with asyncio.timeout(DEADLINE_S):
            await closed.wait()
