"""Which workers are heard, for which model and group? Owns the groups; they come with their first worker and go with
their last."""

import logging
from collections import Counter
from collections.abc import Iterable

from zmq.asyncio import Context

from dynamo.router.types import WorkerKey
from dynamo.runtime.metrics import Metrics
from dynamo.services.cache_group import CacheGroup, EventCounts, GroupKey
from dynamo.services.engine_listener import ListenerState
from dynamo.services.peer_recovery import PeerRecovery
from dynamo.services.refusals import conflict, full, not_found

log = logging.getLogger(__name__)

MAX_LISTENERS = 4096  # a socket each


class IndexRegistry:
    """All groups of an indexer. Needs a running event loop."""

    def __init__(self, metrics: Metrics, peers: Iterable[str] = ()) -> None:
        self.groups: dict[GroupKey, CacheGroup] = {}
        self.recovery = PeerRecovery(self.groups, peers)
        self._counts = EventCounts(metrics)
        self._context = Context()
        self._seen: set[tuple[GroupKey, int]] = set()

    @property
    def joined(self) -> int:
        """How many different workers have registered since the start."""
        return len(self._seen)

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return sum(len({w.worker_id for w in group.listeners}) for group in self.groups.values())

    def states(self) -> Counter[ListenerState]:
        """How many listeners are how far."""
        return Counter(listener.state for group in self.groups.values() for listener in group.listeners.values())

    def group(self, key: GroupKey) -> CacheGroup:
        """Raises SelectionServiceError (404)."""
        found = self.groups.get(key)
        if found is None:
            raise not_found(f"no worker is registered for {key}")
        return found

    def register(
        self, key: GroupKey, worker: WorkerKey, endpoint: str, replay_endpoint: str | None, block_size: int
    ) -> None:
        """Hear a rank from now on.

        Raises:
            InvalidArgument: a name, size or address that cannot be meant.
            SelectionServiceError: it is heard already, its blocks have another size than others of the group (409), or
                there are too many (507).
        """
        group = self.groups.get(key.check())
        if group is None:
            group = CacheGroup(key, block_size, self._counts, self._context)
        group.check_block_size(block_size)
        if worker in group.listeners:
            raise conflict(f"instance {worker.worker_id}, dp_rank {worker.dp_rank} is registered already for {key}")
        if sum(len(each.listeners) for each in self.groups.values()) >= MAX_LISTENERS:
            raise full(f"{MAX_LISTENERS} ranks are heard already, which is the most one indexer hears")
        listener = group.listen(worker, endpoint, replay_endpoint)
        self.groups[key] = group
        self._seen.add((key, worker.worker_id))
        self.recovery.joined(key, listener)
        log.info("%s: hearing worker %d, rank %d at %s", key, *worker, endpoint)

    async def unregister(self, key: GroupKey, worker_id: int, dp_rank: int | None) -> None:
        """Hear a worker, or one of its ranks, no more, and forget what it held. Raises SelectionServiceError (404)."""
        group = self.groups.get(key)
        workers = [
            worker
            for worker in (group.listeners if group is not None else ())
            if worker.worker_id == worker_id and dp_rank in (None, worker.dp_rank)
        ]
        if group is None or not workers:
            rank = "" if dp_rank is None else f", dp_rank {dp_rank}"
            raise not_found(f"instance {worker_id}{rank} is not registered for {key}")
        for worker in workers:
            self.recovery.left(group.listeners[worker])
        await group.leave(workers)
        if not group.listeners and self.groups.get(key) is group:
            del self.groups[key]
        log.info("%s: worker %d is heard no more", key, worker_id)

    async def close(self) -> None:
        """Hear nobody any more."""
        await self.recovery.close()
        for group in list(self.groups.values()):
            await group.close()
        self._context.term()
