"""What did this index miss because it was not there yet? Another one may know: ask it.

A rank that joins while there are peers is held back for a second, so that its engine's events surely come in; then a
peer is asked for everything it knows, what is the rank's is taken, and what came meanwhile follows. Doing again what
was done before changes nothing, so what both say may overlap.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping

import aiohttp
import msgspec

from dynamo.llm.kv_events import RouterEvent
from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import UNDECODABLE
from dynamo.services.cache_group import CacheGroup, GroupKey
from dynamo.services.engine_listener import EngineListener

log = logging.getLogger(__name__)

DELAY_S = 1.0  # until an engine's publisher has surely taken note of a subscriber
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 60.0  # two million blocks are told in some 5 s
MAX_ANSWER_BYTES = 512 << 20
ALONE = "no other index knows what it stored before, and it has no replay_endpoint: only what came since is known"


class _Dump(msgspec.Struct):
    block_size: int
    events: list[RouterEvent]


class PeerRecovery:
    """Owns the list of peers, and the ranks that wait for what they say."""

    def __init__(self, groups: Mapping[GroupKey, CacheGroup], peers: Iterable[str] = ()) -> None:
        self.peers = list(dict.fromkeys(peers))
        self._groups = groups
        self._waiting: dict[EngineListener, GroupKey] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="ask other indexers")

    @property
    def busy(self) -> bool:
        """Whether a rank waits for what peers say."""
        return not self._idle.is_set()

    async def settled(self) -> None:
        """Wait until no rank waits any more; bounded by the deadlines of asking."""
        await self._idle.wait()

    def joined(self, key: GroupKey, listener: EngineListener) -> None:
        """A rank is heard from now on."""
        if not self.peers:
            if listener.replay_endpoint is None:
                listener.note = ALONE
                log.info("%s: worker %d, rank %d: %s", key, *listener.worker, ALONE)  # no loss of a new engine
            return
        listener.hold()
        self._waiting[listener] = key
        self._idle.clear()
        self._wake.set()

    def left(self, listener: EngineListener) -> None:
        """A rank is heard no more."""
        self._waiting.pop(listener, None)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(DELAY_S)
            asked = dict(self._waiting)
            try:
                await self._ask_for(asked)
            except Exception:
                log.exception("asking other indexers failed")  # what comes from now on must be heard all the same
            finally:
                for listener in asked:
                    if self._waiting.pop(listener, None) is not None:
                        listener.release()
            if not self._waiting:
                self._idle.set()

    async def _ask_for(self, asked: dict[EngineListener, GroupKey]) -> None:
        """Ask one peer after the other, until all ranks are known."""
        unknown, answered = dict(asked), False
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            for peer in list(self.peers) if asked else ():
                try:
                    dumps = await _ask(session, peer)
                except (aiohttp.ClientError, TimeoutError, ValueError) as e:
                    log.warning("the indexer %s did not tell what it knows: %s", peer, str(e) or type(e).__name__)
                    continue
                answered = True
                for listener, key in list(unknown.items()):
                    if listener not in self._waiting or self._take(peer, dumps, key, listener):
                        del unknown[listener]
                    await asyncio.sleep(0)
                if not unknown:
                    return
        for listener in unknown:
            if not answered and listener.replay_endpoint is None:
                listener.note = ALONE

    def _take(self, peer: str, dumps: dict[str, _Dump], key: GroupKey, listener: EngineListener) -> bool:
        """Returns whether the peer knew anything of the rank."""
        dump, group = dumps.get(":".join(key)), self._groups.get(key)
        if dump is None or group is None:
            return False
        events = [event for event in dump.events if _of(event) == listener.worker]
        if events and dump.block_size != group.block_size:
            log.error(
                "%s: nothing of what %s knows is used, for its blocks have %d tokens, not %d",
                key,
                peer,
                dump.block_size,
                group.block_size,
            )
            return False
        group.restore(listener.worker, events)
        if events:
            log.info("%s: worker %d, rank %d: took over what %s knows", key, *listener.worker, peer)
        return bool(events)

    async def close(self) -> None:
        """Ask no more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _of(event: RouterEvent) -> WorkerKey:
    return WorkerKey(event.worker_id, event.event.dp_rank)


async def _ask(session: aiohttp.ClientSession, peer: str) -> dict[str, _Dump]:
    """Raises aiohttp's errors, TimeoutError, or ValueError for anything but a dump."""
    async with session.get(f"{peer}/dump") as response:
        if response.status != 200:
            raise ValueError(f"it answered with status {response.status}")
        body = bytearray()
        async for piece in response.content.iter_chunked(1 << 20):
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
    try:
        return msgspec.json.decode(body, type=dict[str, _Dump])
    except UNDECODABLE as e:
        raise ValueError(f"its answer is no dump: {e}") from None
