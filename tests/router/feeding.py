"""Publishers and feeds over real sockets, with ways to lose what passes between them."""

import asyncio
from contextlib import asynccontextmanager

from dynamo.llm.block_hash import sequence_hashes
from dynamo.llm.kv_events import KvEventData, Removed, Stored, StoredBlock
from dynamo.router.event_feed import KvEventFeed
from dynamo.router.publisher import KvEventPublisher
from dynamo.router.tier_index import TierIndex
from dynamo.router.types import Overlap, WorkerKey

ENDPOINT = "dynamo.backend.generate"
BLOCK_SIZE = 4
DEADLINE_S = 15.0


def stored(path, start=0) -> KvEventData:
    """The blocks of a prompt from `start` on, named as the mocker names them."""
    seqs = sequence_hashes(path)
    pairs = zip(seqs[start:], path[start:], strict=True)
    return KvEventData(stored=Stored([StoredBlock(*pair) for pair in pairs], seqs[start - 1] if start else None))


def removed(path, start) -> KvEventData:
    """The end of a prompt, from `start` on, is gone."""
    return KvEventData(removed=Removed(sequence_hashes(path)[start:][::-1]))


class LossyFeed(KvEventFeed):
    """Loses the messages for which `lose` says so."""

    lose = staticmethod(lambda message: False)

    def _on_event(self, message) -> None:
        if not self.lose(message):
            super()._on_event(message)


async def eventually(condition, deadline_s: float = DEADLINE_S) -> None:
    """Return once `condition()` holds, for what tells nobody that it changed."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def feeding(runtime, where=ENDPOINT, kv_block_size=BLOCK_SIZE):
    """A feed that has begun."""
    feed = LossyFeed(runtime, where, TierIndex(), kv_block_size)
    await feed.start()
    try:
        yield feed
    finally:
        await feed.close()


@asynccontextmanager
async def publishing(runtime, worker_id=1, dp_rank=0, local_indexer=True, block_size=BLOCK_SIZE):
    """A publisher that can be found."""
    publisher = KvEventPublisher(
        runtime.endpoint(ENDPOINT), worker_id, block_size, dp_rank, enable_local_indexer=local_indexer
    )
    await publisher.ready()
    try:
        yield publisher
    finally:
        await publisher.close()


def holds(feed, path, **blocks) -> bool:
    """Whether exactly these workers (`w1=3`: worker 1, rank 0, three blocks) match a prompt on their device."""
    expected = {WorkerKey(int(name[1:])): Overlap(count) for name, count in blocks.items() if count}
    return feed.index.find(sequence_hashes(path)) == expected


def line(feed, worker_id=1, dp_rank=0) -> dict:
    """What the feed says of a rank."""
    (found,) = [x for x in feed.status() if (x["worker_id"], x["dp_rank"]) == (worker_id, dp_rank)]
    return found
