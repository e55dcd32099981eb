"""A worker: it greets, one word at a time."""

import asyncio
from collections.abc import AsyncIterator

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


async def greet(names: list[str], context: Context) -> AsyncIterator[str]:
    """Yield one greeting a name, one every fifth of a second, until the caller wants no more."""
    for name in names:
        if context.is_stopped():
            print(f"{context.id()}: the caller wants no more", flush=True)
            return
        yield f"Hello {name}!"
        await asyncio.sleep(0.2)


@dynamo_worker()
async def worker(runtime: DistributedRuntime) -> None:
    print("serving hello_world.backend.generate; Ctrl-C ends", flush=True)
    await runtime.endpoint("hello_world.backend.generate").serve_endpoint(greet)


if __name__ == "__main__":
    asyncio.run(worker())
