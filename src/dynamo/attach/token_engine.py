"""How does a server that takes tokens fulfil the engine contract?

One HTTP request a choice. Aborting it closes the connection, on which the server ends the request within a step.
"""

from collections.abc import AsyncIterator, Callable

import msgspec

from dynamo.attach.dialects import Dialect
from dynamo.attach.server import OpenAIServer, read_all, refusal
from dynamo.attach.sse import events
from dynamo.engine.contract import EngineConfig
from dynamo.engine.generator import GeneratorEngine
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest
from dynamo.runtime.context import Context
from dynamo.runtime.errors import CannotConnect, ConnectionTimeout, Disconnected, StreamIncomplete


class TokenEngine(GeneratorEngine):
    """An `LLMEngine` over one of the server's token endpoints. `suspect` hears why a request could not be served."""

    def __init__(
        self, server: OpenAIServer, dialect: Dialect, config: EngineConfig, suspect: Callable[[str], None]
    ) -> None:
        super().__init__(self._answer, config)
        self._server = server
        self._dialect = dialect
        self._suspect = suspect
        self._prefilling: dict[str, int] = {}

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of requests that have no first token yet."""
        return sum(self._prefilling.values())

    async def _answer(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        request_id = context.id()
        body = msgspec.json.encode(self._dialect.body(request, request_id))
        headers = {
            "Content-Type": "application/json",
            "X-Request-Id": request_id,
            **self._dialect.headers(request),
        }
        reader = self._dialect.reader(request)
        last: EngineOutput | None = None
        self._prefilling[request_id] = len(request.token_ids)
        try:
            async with self._server.stream(self._dialect.path, body, headers) as response:
                if response.status != 200:
                    raise refusal(response.status, await read_all(response.content.iter_any(), self._server.url))
                async for event in events(response.content.iter_any()):
                    if event == b"[DONE]":
                        continue  # the end of the body follows; then the connection can be used again
                    output = reader.read(event)
                    if output is None:
                        continue
                    self._prefilling.pop(request_id, None)
                    if output.finish_reason is None:
                        yield output
                    else:
                        last = output  # what the server counted comes after it
        except (CannotConnect, Disconnected, ConnectionTimeout) as e:
            self._suspect(e.message)
            raise
        finally:
            self._prefilling.pop(request_id, None)
        if last is None:
            raise StreamIncomplete("the server ended its stream before the answer ended")
        last.completion_usage = reader.usage()
        yield last
