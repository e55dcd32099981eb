"""Who keeps a prefill worker's KV from expiring while the request that it was made for waits?

Whoever has the handle says again and again that it is wanted: the frontend while the request waits for a decode worker,
and then that worker until its engine has read. Whoever dies says nothing more, and a lease later the KV is free.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from dynamo.runtime.client import Client
from dynamo.runtime.errors import DynamoException

log = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3  # one may be late, or lost, and the KV is still there
MIN_PERIOD_S = 0.01  # for a lease that no worker gives

Find = Callable[[], Awaitable[Client]]


class _Reply(msgspec.Struct):
    """What of a prefill worker's answer matters here."""

    ok: bool = False
    reason: str = "it gave no answer"
    remaining_s: float = 0.0


class Keeping:
    """Renews one lease until it is stopped, or refused.

    Args:
        find: gives a client of the prefill workers' endpoint `handoff`.
        renewal: what that is asked, but for the verb.
        first_s: seconds until it is asked first; a third of the lease, unless less is left of it.
        renewed: told until when the KV stays now, on this machine's monotonic clock.
    """

    __slots__ = ("_find", "_instance_id", "_period_s", "_renewal", "_renewed", "_task", "_timer")

    def __init__(
        self,
        find: Find,
        instance_id: int,
        renewal: dict[str, Any],
        lease_s: float,
        first_s: float | None = None,
        renewed: Callable[[float], None] | None = None,
    ) -> None:
        self._find = find
        self._instance_id = instance_id
        self._renewal = {"verb": "renew"} | renewal
        self._period_s = max(MIN_PERIOD_S, lease_s / RENEWALS_PER_LEASE)
        self._renewed = renewed
        self._task: asyncio.Task[None] | None = None
        # A timer and not a task: most requests wait for less than it takes to make one.
        self._timer = asyncio.get_running_loop().call_later(self._period_s if first_s is None else first_s, self._begin)

    def stop(self) -> None:
        """It is not wanted any more, or it is somebody else's now. Safe to call again."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._renew_for_ever(), name="keep KV")

    async def _renew_for_ever(self) -> None:
        """Until `stop`, which comes with the end of the request at the latest."""
        while True:
            asked_at = time.monotonic()
            try:
                async with asyncio.timeout(self._period_s):
                    reply = await self._ask()
            except (DynamoException, TimeoutError, ValueError) as e:
                log.info("KV of prefill worker %x could not be asked for again: %r", self._instance_id, e)
            else:
                if not reply.ok:
                    log.info("prefill worker %x keeps KV no longer: %s", self._instance_id, reply.reason)
                    return
                if self._renewed is not None:
                    self._renewed(asked_at + reply.remaining_s)
            await asyncio.sleep(asked_at + self._period_s - time.monotonic())

    async def _ask(self) -> _Reply:
        client = await self._find()
        replies = await client.direct(self._renewal, self._instance_id, annotated=False)
        reply = _Reply()
        async for answer in replies:
            reply = msgspec.convert(answer, _Reply)
        return reply


class _Kept(msgspec.Struct):
    """What renewing needs to know of a prefill worker's handle, which names much more."""

    id: str
    incarnation: str
    endpoint: str
    instance_id: int
    lease_s: float = 0.0


def keep(handle: dict[str, Any], find: Callable[[str], Awaitable[Client]]) -> Keeping | None:
    """Keep what a handle names and nobody has claimed yet. None where its worker cannot keep it longer.

    Args:
        find: gives a client of an endpoint.
    """
    try:
        kept = msgspec.convert(handle, _Kept)
    except msgspec.ValidationError:
        return None  # whoever uses it will say what is wrong
    if kept.lease_s <= 0:
        return None
    renewal = {"id": kept.id, "incarnation": kept.incarnation}
    return Keeping(lambda: find(kept.endpoint), kept.instance_id, renewal, kept.lease_s)
