"""A client: it finds the workers, asks one after the other, and prints what comes as it comes."""

import asyncio

from dynamo.runtime import DistributedRuntime, dynamo_worker


@dynamo_worker()
async def ask(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("hello_world.backend.generate").client()
    workers = await client.wait_for_instances(timeout_s=10)
    print(f"{len(workers)} worker(s) found")
    answers = await client.round_robin(["world", "sun", "moon", "star"])
    async for answer in answers:
        print(answer.data())


if __name__ == "__main__":
    asyncio.run(ask())
