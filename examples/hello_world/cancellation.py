"""A client that changes its mind: after two answers it stops the stream, and the worker stops working."""

import asyncio

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def ask(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("hello_world.backend.generate").client()
    await client.wait_for_instances(timeout_s=10)
    context = Context()
    answers = await client.generate([f"number {i}" for i in range(100)], context=context)
    received = 0
    async for answer in answers:
        print(answer.data())
        received += 1
        if received == 2:
            context.stop_generating()
    print(f"stopped after {received} of 100 answers")


if __name__ == "__main__":
    asyncio.run(ask())
