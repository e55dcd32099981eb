"""An engine of one's own: it says the alphabet, backwards if the prompt is long. The frontend does all the rest."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import Context, DistributedRuntime, dynamo_worker

LONG = 100  # tokens


@dynamo_worker()
async def worker(runtime: DistributedRuntime, model: Path) -> None:
    tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode("a b c d e f g h i j k l m n o p").ids

    async def generate(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        letters = tokens[::-1] if len(request["token_ids"]) > LONG else tokens
        wanted = letters[: request["stop_conditions"].get("max_tokens")]
        for i, token in enumerate(wanted):
            if context.is_stopped():
                return
            last = "length" if len(wanted) < len(letters) else "stop"
            yield {"token_ids": [token], "finish_reason": last if i == len(wanted) - 1 else None}
            await asyncio.sleep(0.05)

    endpoint = runtime.endpoint("dynamo.backend.generate")
    chat = ModelType.Chat | ModelType.Completions
    await register_model(ModelInput.Tokens, chat, endpoint, str(model), "alphabet", worker_type=WorkerType.Aggregated)
    await endpoint.serve_endpoint(generate)


if __name__ == "__main__":
    asyncio.run(worker(Path(sys.argv[1])))
