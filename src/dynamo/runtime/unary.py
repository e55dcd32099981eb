"""How does one ask for exactly one answer?"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from dynamo.runtime.client import Client
from dynamo.runtime.component import Endpoint, MetricsLabels
from dynamo.runtime.context import Context
from dynamo.runtime.errors import StreamIncomplete, Unknown

UnaryHandler = Callable[..., Awaitable[Any]]


async def serve_unary_endpoint(
    endpoint: Endpoint,
    handler: UnaryHandler,
    graceful_shutdown: bool = True,
    metrics_labels: MetricsLabels | None = None,
    health_check_payload: dict[str, Any] | None = None,
) -> None:
    """Serve `async handler(request, *, context)`, which returns one answer, until the runtime shuts down."""

    async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
        yield await handler(request, context=context)

    await endpoint.serve_endpoint(answer, graceful_shutdown, metrics_labels, health_check_payload)


class UnaryClient:
    """Asks an endpoint that gives one answer."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def complete(self, request: object, *, context: Context | None = None) -> Any:
        """The one answer.

        Raises:
            StreamIncomplete: there was none.
            Unknown: there were several.
        """
        answers = await self._client.generate(request, annotated=False, context=context)
        try:
            first = await anext(answers)
        except StopAsyncIteration:
            raise StreamIncomplete("the endpoint gave no answer") from None
        async for _ in answers:
            await answers.aclose()
            raise Unknown("the endpoint gave more than one answer to a unary request")
        return first
