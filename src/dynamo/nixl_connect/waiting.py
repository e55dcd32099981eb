"""How does an event loop wait for a thread's answer?"""

import asyncio
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def outcome(promise: "Future[T]") -> T:
    """The promise's result, which the thread that made it bounds in time. Cancelling the wait leaves it alone."""
    if promise.done():
        return promise.result()
    return await asyncio.wrap_future(promise)
