"""How is an engine served that was written as an async generator?

`GeneratorEngine` runs one task a request and gathers what all of them yield in one turn of the event loop into one
batch, as an engine of steps would.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

from dynamo.engine.contract import EngineCallbacks, EngineConfig
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest
from dynamo.runtime.context import Context
from dynamo.runtime.errors import DynamoException, EngineShutdown, Unknown

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # for generators to clean up after themselves once they are cancelled

Generate = Callable[[PreprocessedRequest, Context], AsyncIterator[EngineOutput | Mapping[str, Any]]]
"""An async generator of outputs, as structs or as dicts with the same keys. It should end with a finish reason;
without one it ended with `stop`. `context` tells it when nobody wants the answer any more."""


class GeneratorEngine:
    """An `LLMEngine` made of an async generator function and what there is to say of it."""

    def __init__(self, generate: Generate, config: EngineConfig) -> None:
        self._generate = generate
        self._config = config
        self._callbacks: EngineCallbacks | None = None
        self._running: dict[str, tuple[asyncio.Task[None], Context]] = {}
        self._outputs: list[tuple[str, EngineOutput]] = []

    async def start(self, callbacks: EngineCallbacks) -> EngineConfig:
        """See `LLMEngine.start`."""
        self._callbacks = callbacks
        return self._config

    def submit(self, request_id: str, request: PreprocessedRequest) -> None:
        """See `LLMEngine.submit`."""
        if self._callbacks is None:
            raise EngineShutdown("the engine is not started")
        context = Context(request_id)
        task = asyncio.get_running_loop().create_task(self._run(request_id, request, context))
        self._running[request_id] = (task, context)

    def abort(self, request_id: str) -> None:
        """See `LLMEngine.abort`. The generator sees its context killed and is cancelled where it waits."""
        running = self._running.pop(request_id, None)
        if running is not None:
            task, context = running
            context.kill()
            task.cancel()

    async def check_health(self) -> None:
        """A generator function cannot die by itself."""

    async def stop(self) -> None:
        """See `LLMEngine.stop`."""
        tasks = [task for task, _ in self._running.values()]
        for request_id in tuple(self._running):
            self.abort(request_id)
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)

    async def _run(self, request_id: str, request: PreprocessedRequest, context: Context) -> None:
        finished = False
        try:
            async for item in self._generate(request, context):
                if request_id not in self._running:
                    return
                output = item if isinstance(item, EngineOutput) else msgspec.convert(item, EngineOutput)
                finished = output.finish_reason is not None
                self._put(request_id, output)
                if finished:
                    return
            if request_id in self._running:
                self._put(request_id, EngineOutput(finish_reason="stop"))
        except msgspec.ValidationError as e:
            self._fail(request_id, Unknown(f"the engine yielded what is no output: {e}"))
        except DynamoException as e:
            self._fail(request_id, e)
        except Exception as e:
            log.exception("the engine failed on request %s", request_id)
            self._fail(request_id, e)
        finally:
            self._running.pop(request_id, None)

    def _put(self, request_id: str, output: EngineOutput) -> None:
        if not self._outputs:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outputs.append((request_id, output))

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        assert self._callbacks is not None
        self._callbacks.on_outputs(outputs)

    def _fail(self, request_id: str, error: Exception) -> None:
        if self._outputs:
            self._flush()  # what was yielded before comes before the error
        if request_id in self._running:
            assert self._callbacks is not None
            self._callbacks.on_error(request_id, error)
