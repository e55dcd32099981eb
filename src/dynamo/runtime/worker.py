"""How does a script become a worker process?

@dynamo_worker()
async def worker(runtime):
    await runtime.endpoint("ns.comp.ep").serve_endpoint(handler)

asyncio.run(worker())
"""

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec

from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import EngineShutdown
from dynamo.runtime.stop_signals import on_stop_signals

log = logging.getLogger(__name__)

RETURN_S = 5.0  # once everything is drained, the worker function gets this long to return before it is cancelled

P = ParamSpec("P")
T = TypeVar("T")
WorkerFunction = Callable[Concatenate[DistributedRuntime, P], Coroutine[Any, Any, T]]


def dynamo_worker(
    enable_nats: bool | None = None,
) -> Callable[[WorkerFunction[P, T]], Callable[P, Coroutine[Any, Any, T]]]:
    """Make a function that gets a runtime as its first argument; `asyncio.run(worker())` then runs it on uvloop.

    SIGTERM and SIGINT shut the runtime down in order; a second one ends the process at once. `enable_nats` is
    ignored, kept for scripts that pass it.
    """

    def decorate(function: WorkerFunction[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        def start(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
            _prefer_uvloop()
            return _run(function, args, kwargs)

        return start

    return decorate


def _prefer_uvloop() -> None:
    """Called before the caller's `asyncio.run` makes its loop: the argument is evaluated first."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


async def _run(function: Callable[..., Coroutine[Any, Any, T]], args: Any, kwargs: Any) -> T:
    runtime = DistributedRuntime(asyncio.get_running_loop())
    handle_signals(runtime)
    work = asyncio.ensure_future(function(runtime, *args, **kwargs))
    leaving = asyncio.ensure_future(_after_shutdown(runtime))
    try:
        await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            log.warning("the worker function did not return %g s after the shutdown; cancelling it", RETURN_S)
            work.cancel()
            await asyncio.wait([work], timeout=RETURN_S)
            raise SystemExit(1)
        return work.result()
    except EngineShutdown:
        if not runtime.is_shutting_down():
            raise
        log.info("the shutdown came before the worker served")
        raise SystemExit(0) from None
    finally:
        work.cancel()
        leaving.cancel()
        await runtime.close()


async def _after_shutdown(runtime: DistributedRuntime) -> None:
    """Returns when the worker function should have returned."""
    await runtime.wait_drained()
    await asyncio.sleep(RETURN_S)


def handle_signals(runtime: DistributedRuntime) -> None:
    """SIGTERM, SIGINT: shut down in order; the second time end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread gets signals; whoever runs us in another one calls runtime.shutdown()
    on_stop_signals(runtime.shutdown, runtime.is_shutting_down, log, "shutting down; a second one ends at once")


Handler = Callable[..., AsyncIterator[Any]]


def dynamo_endpoint(request_model: type[Any], response_model: type[Any] | None = None) -> Callable[[Handler], Handler]:
    """Parse the request of an async generator as `request_model`: a pydantic model, or any type msgspec knows.

    A string is parsed as JSON, unless strings are asked for. What does not fit raises ValueError at the first
    item. `response_model` documents what is yielded; pydantic models are sent as their fields.
    """
    parse = _parser(request_model)

    def decorate(function: Handler) -> Handler:
        position = 1 if next(iter(inspect.signature(function).parameters), None) == "self" else 0

        @functools.wraps(function)
        async def handle(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            if len(args) <= position:
                raise ValueError("the handler was called without a request")
            request = parse(args[position])
            async for item in function(*args[:position], request, *args[position + 1 :], **kwargs):
                yield item

        return handle

    return decorate


def _parser(model: type[Any]) -> Callable[[Any], Any]:
    is_pydantic = hasattr(model, "model_validate") and hasattr(model, "model_validate_json")

    def parse(request: Any) -> Any:
        if isinstance(model, type) and isinstance(request, model):
            return request
        if not isinstance(request, str | dict | list | int | float | bool | None):
            raise ValueError(f"invalid request: {type(request).__name__} is not JSON-like")  # noqa: TRY004 - promised
        try:
            if is_pydantic:
                validate = model.model_validate_json if isinstance(request, str) else model.model_validate
                return validate(request)
            return (
                msgspec.json.decode(request, type=model)
                if isinstance(request, str)
                else msgspec.convert(request, model)
            )
        except ValueError as e:  # pydantic's and msgspec's validation errors are ValueErrors
            raise ValueError(f"invalid request: {e}") from e

    return parse
