"""How does an event loop wait for a thread's answer?"""

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from dynamo.nixl_connect.agent import DRAIN_S
from dynamo.nixl_connect.errors import TransferTimeout

T = TypeVar("T")

GRACE_S = DRAIN_S + 10.0  # the thread keeps the deadlines; this is for a thread that hangs in a call of NIXL's


async def outcome(promise: "Future[T]", patience_s: float) -> T:
    """The promise's result. Cancelling the wait leaves it alone. Raises TransferTimeout if the thread hangs."""
    if promise.done():
        return promise.result()
    waiting = asyncio.wrap_future(promise)
    try:
        done, _ = await asyncio.wait([waiting], timeout=patience_s + GRACE_S)
        if not done:
            raise TransferTimeout(f"NIXL has not answered for {patience_s + GRACE_S:g} s; it hangs in a call")
        return waiting.result()
    finally:
        waiting.cancel()  # or an error that nobody waits for any more would be logged as forgotten
