"""What does one rank of an engine say of its cache? Heard from the engine itself, without a runtime between."""

import logging
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from zmq.asyncio import Context

from dynamo.engine.zmq_kv_events import KvEventRelay, TieredEvents, local_endpoint
from dynamo.llm.kv_events import KvEventData, StorageTier
from dynamo.router.types import WorkerKey

log = logging.getLogger(__name__)

HELD_BATCHES = 65_536  # while another index is asked for what was before, which takes seconds

OnChange = Callable[[WorkerKey, StorageTier, KvEventData], None]


class ListenerState(StrEnum):
    """The words that `/workers` and `/metrics` say."""

    PENDING = "pending"
    """What was before is being asked for; what comes meanwhile is held."""
    ACTIVE = "active"
    PAUSED = "paused"
    """Not used here; shown because dashboards sum over it."""
    FAILED = "failed"
    """What the engine says is of no use: its blocks have another size."""


class EngineListener:
    """Hears one rank and hands on every change of its cache, in order."""

    def __init__(
        self,
        worker: WorkerKey,
        endpoint: str,
        replay_endpoint: str | None,
        block_size: int,
        on_change: OnChange,
        context: Context,
    ) -> None:
        self.worker = worker
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self.batches = 0
        self.lost = 0
        """Batches that came while there was no room to hold them."""
        self.note = ""
        """What keeps the index from knowing all of this rank, if anything does."""
        self._on_change = on_change
        self._held: deque[TieredEvents] | None = None
        self._relay = KvEventRelay(
            local_endpoint(endpoint, 0),
            local_endpoint(replay_endpoint, 0) if replay_endpoint is not None else None,
            "",
            self._hear,
            block_size=block_size,
            catch_up=True,
            context=context,
        )

    @property
    def state(self) -> ListenerState:
        """How far it is."""
        if self._relay.problem:
            return ListenerState.FAILED
        return ListenerState.ACTIVE if self._held is None else ListenerState.PENDING

    @property
    def reason(self) -> str:
        """Why less is known than could be; empty if not."""
        return self._relay.problem or (self.note if self._relay.first_heard != 0 else "")

    def hold(self) -> None:
        """Hand nothing on until `release`."""
        if self._held is None:
            self._held = deque(maxlen=HELD_BATCHES)

    def release(self) -> None:
        """Hand on what was held, and what comes."""
        held, self._held = self._held, None
        for events in held or ():
            self._apply(events)

    def _hear(self, events: TieredEvents) -> None:
        self.batches += 1
        if self._held is None:
            self._apply(events)
            return
        self.lost += len(self._held) == HELD_BATCHES
        self._held.append(events)

    def _apply(self, events: TieredEvents) -> None:
        for tier, change in events:
            self._on_change(self.worker, tier, change)

    async def close(self) -> None:
        """Hear no more."""
        await self._relay.close()
