"""What does an engine say that only repeats the prompt?"""

import asyncio
from collections.abc import AsyncIterator

from dynamo.engine.contract import EngineConfig
from dynamo.engine.generator import GeneratorEngine
from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PreprocessedRequest
from dynamo.runtime.context import Context
from dynamo.runtime.errors import InvalidArgument


def echo_engine(config: EngineConfig, delay_s: float) -> GeneratorEngine:
    """An engine that puts out the prompt's tokens, template and all, one every `delay_s` seconds.

    It ends with `stop` after the last one, or with `length` at `max_tokens` if that is earlier.
    """

    async def generate(request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        prompt, longest = request.token_ids, config.context_length
        if not prompt:
            raise InvalidArgument("token_ids: the prompt is empty", "token_ids")
        if longest is not None and len(prompt) >= longest:
            raise InvalidArgument(
                f"token_ids: the prompt has {len(prompt)} tokens, but the context length is {longest}", "token_ids"
            )
        room = len(prompt) if longest is None else longest - len(prompt)
        wanted = min(len(prompt), request.stop_conditions.max_tokens or len(prompt), room)
        for count, token in enumerate(prompt[:wanted], 1):
            await asyncio.sleep(delay_s)
            output = EngineOutput([token])
            if count == wanted:
                output.finish_reason = "stop" if wanted == len(prompt) else "length"
                output.completion_usage = CompletionUsage(len(prompt), count, len(prompt) + count)
            yield output

    return GeneratorEngine(generate, config)
