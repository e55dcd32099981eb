"""A worker process for tests: counts up for as long as it is asked to, and says what happens to it."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

from dynamo.runtime import Client, Context, DistributedRuntime, dynamo_worker

ENDPOINT = "test.worker.generate"


async def count(request: dict[str, Any], context: Context) -> AsyncIterator[int]:
    """Yield 0, 1, … `n - 1`, one every `every_s`."""
    try:
        for i in range(request["n"]):
            if context.is_stopped():
                print(f"stopped {context.id()}", flush=True)
                return
            yield i
            await asyncio.sleep(request.get("every_s", 0.01))
    except asyncio.CancelledError:
        print(f"killed {context.id()}", flush=True)
        raise


@dynamo_worker()
async def serve(runtime: DistributedRuntime) -> None:
    """Serve until told to leave."""
    served = await runtime.endpoint(ENDPOINT).start_endpoint(count)
    print(f"ready {served.instance_id} {type(asyncio.get_running_loop()).__module__}", flush=True)
    await served.finished()
    print("left", flush=True)


@dynamo_worker()
async def call(runtime: DistributedRuntime) -> None:
    """Be a caller that never finishes."""
    client: Client = await runtime.endpoint(ENDPOINT).client()
    await client.wait_for_instances()
    context = Context("of-the-caller")
    async for item in await client.round_robin({"n": 10**9}, annotated=False, context=context):
        if item == 0:
            print("streaming", flush=True)


@dynamo_worker()
async def never_return(runtime: DistributedRuntime) -> None:
    """A worker function that ignores the shutdown."""
    print("ready", flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run({"serve": serve, "call": call, "never-return": never_return}[sys.argv[1]]())
