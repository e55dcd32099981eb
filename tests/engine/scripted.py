"""An engine that does what the test says, and a worker that serves it."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from dynamo.engine.contract import EngineCallbacks, EngineConfig
from dynamo.engine.serving import EngineWorker, ServeOptions
from dynamo.engine.worker_args import WorkerOptions
from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PreprocessedRequest, PromptTokensDetails
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.client import Client
from dynamo.runtime.errors import EngineShutdown

DEADLINE_S = 10.0  # for anything that should happen at once


class ScriptedEngine:
    """Remembers what it is told; the test makes its outputs. `events` wakes whoever waits for a change."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig(
            model="m", served_model_name="m", context_length=100, kv_cache_block_size=4, total_kv_blocks=50
        )
        self.submitted: dict[str, PreprocessedRequest] = {}
        self.aborted: list[str] = []
        self.refuse: Exception | None = None
        self.dead: str | None = None
        self.stopped = False
        self.callbacks: EngineCallbacks
        self._changed = asyncio.Event()

    async def start(self, callbacks: EngineCallbacks) -> EngineConfig:
        self.callbacks = callbacks
        return self.config

    def submit(self, request_id: str, request: PreprocessedRequest) -> None:
        if self.refuse:
            raise self.refuse
        self.submitted[request_id] = request
        self._changed.set()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._changed.set()

    async def check_health(self) -> None:
        if self.dead:
            raise EngineShutdown(self.dead)

    async def stop(self) -> None:
        self.stopped = True

    async def until(self, condition) -> None:
        """Wait until `condition()`; it is asked after every submit and abort."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def submissions(self, count: int) -> list[str]:
        """The ids submitted so far, once there are `count`."""
        await self.until(lambda: len(self.submitted) >= count)
        return list(self.submitted)

    def step(self, *tokens: tuple[str, int], finish: bool = False) -> None:
        """One engine step: a token for each of these requests."""
        outputs = []
        for request_id, token in tokens:
            output = EngineOutput([token])
            if finish:
                output.finish_reason = "length"
                output.completion_usage = CompletionUsage(10, 2, 12, PromptTokensDetails(4))
            outputs.append((request_id, output))
        self.callbacks.on_outputs(outputs)


def request(prompt: list[int] | None = None, **sampling: object) -> dict:
    """A request as a frontend sends it."""
    return {"model": "m", "token_ids": prompt or [1, 2, 3], "sampling_options": sampling}


@asynccontextmanager
async def serving(
    runtime: DistributedRuntime, engine: ScriptedEngine, model_dir: Path, **options: object
) -> AsyncIterator[tuple[EngineWorker, Client]]:
    """A worker that has started, and a client that has found it."""
    worker = EngineWorker(runtime, engine, ServeOptions(model_dir, WorkerOptions(**options)))
    assert await worker.start()
    client = await runtime.endpoint(worker.options.worker.endpoint).client()
    await client.wait_for_instances(DEADLINE_S)
    running = asyncio.ensure_future(worker.run())
    try:
        yield worker, client
    finally:
        runtime.shutdown()
        async with asyncio.timeout(DEADLINE_S):
            await running


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Return once `condition()` holds, for what tells nobody that it changed."""
    async with asyncio.timeout(DEADLINE_S):
        while not (await holds if inspect.isawaitable(holds := condition()) else holds):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def collect(stream: AsyncIterator) -> list[dict]:
    """All items of a stream."""
    async with asyncio.timeout(DEADLINE_S):
        return [item async for item in stream]
