"""What do others hold in etcd? One bucket, followed: a list, then a watch from its revision on.

A watch that ends is taken up where it ended. If etcd no longer has the changes since then (compaction), or is not the
store it was (restored, or begun anew), the bucket is listed again and the difference told.

A key that goes without its owner saying so (`LEFT`) is kept for a moment: leases also end by mistake, for all owners at
once (an old leader that was stopped: etcd-io/etcd#15247), and an owner that lives puts its keys again.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping

import msgspec

from dynamo.runtime.discovery.etcd.errors import EtcdRefused, EtcdUnavailable, NotHere
from dynamo.runtime.discovery.etcd.gateway import EtcdGateway
from dynamo.runtime.discovery.etcd.messages import (
    LEFT,
    RANGE,
    Event,
    Header,
    KeyValue,
    Ranged,
    WatchAnswer,
    WatchLine,
    decode,
    prefix_range,
)
from dynamo.runtime.discovery.protocol import Change, Delete, Put
from dynamo.runtime.errors import UNDECODABLE, DiscoveryError

log = logging.getLogger(__name__)

LIST_S = 10.0  # one lease


class HistoryGone(Exception):  # noqa: N818
    """The changes since our revision cannot be had: list again."""


class Entry(msgspec.Struct, frozen=True):
    """A key's value, and the revision that put it."""

    value: bytes
    revision: int


class Bucket:
    """All keys of a bucket as they are known here, told to `tell` as they change."""

    def __init__(self, name: str, gateway: EtcdGateway, tell: Callable[[Change], None]) -> None:
        self.known: dict[str, Entry] = {}
        self.listed = False
        """Whether `known` was ever all of it."""
        self._range = prefix_range(f"{name}/")
        self._name = name
        self._gateway = gateway
        self._tell = tell
        self._revision = 0
        """What is known is the truth as of this revision of the store; 0: list first."""
        self._term = 0
        self._absent: dict[str, float] = {}
        """Keys that are gone from etcd, and kept until this time because their owners may be there all the same."""

    async def follow(self) -> None:
        """Follow for ever."""
        while True:
            try:
                header = await self._gateway.ping()
                self._check_history(header)
                if self._revision == 0:
                    await self._list()
                await self._watch()
            except HistoryGone as e:
                log.info("listing %s anew: %s", self._name, e)
                self._revision = 0
            except EtcdUnavailable as e:
                log.debug("not following %s: %s", self._name, e)
                await asyncio.sleep(random.uniform(0.1, 0.3))  # not the whole fleet at one moment
                await self._gateway.answering(self._gateway.settings.beat_s)
            except DiscoveryError as e:
                log.warning("cannot follow %s: %s", self._name, e)
                await asyncio.sleep(self._gateway.settings.beat_s)

    def merge(self, found: Mapping[str, Entry], header: Header) -> dict[str, bytes]:
        """What a look at some keys shows that the watch has not told yet; and the kept keys that it does not show."""
        if header.revision > self._revision:
            for key, entry in found.items():
                self._put(key, entry)
        return {key: self.known[key].value for key in self._absent}

    def settle(self) -> None:
        """Let go of keys that are gone, once that means something."""
        if not self._gateway.absence_counts():
            return
        now = time.monotonic()
        for key in [key for key, until in self._absent.items() if until <= now]:
            self._let_go(key)

    # --- the list, and the watch

    def _check_history(self, header: Header) -> None:
        """Revisions and terms only rise. If they have not, this is another store: its owners must come back first."""
        if header.revision < self._revision or header.raft_term < self._term:
            was, self._revision = self._revision, 0
            self.known = {key: Entry(entry.value, 0) for key, entry in self.known.items()}
            self._term = header.raft_term
            self._gateway.distrust_absence()
            raise HistoryGone(f"etcd was at revision {was} and is at {header.revision}: it has begun anew")
        self._term = header.raft_term

    async def _list(self) -> None:
        answer = await self._gateway.call(RANGE, self._range, Ranged, LIST_S)
        found = entries(answer.kvs)
        for key, entry in found.items():
            self._put(key, entry)
        for key, entry in tuple(self.known.items()):
            if key not in found and entry.revision <= answer.header.revision:  # else a look was ahead of this list
                if self.listed:
                    self._doubt(key)
                else:
                    self._let_go(key)  # shown by a look a moment ago, and gone before the first list
        self._revision = answer.header.revision
        self.listed = True

    async def _watch(self) -> None:
        wanted = {**self._range, "start_revision": str(self._revision + 1), "progress_notify": True}
        async with self._gateway.watch(wanted) as lines:
            async with asyncio.timeout(self._gateway.settings.attempt_s):
                self._take(_answer(await anext(lines, b"")))
            async for line in lines:
                self._take(_answer(line))

    def _take(self, answer: WatchAnswer) -> None:
        if answer.compact_revision:
            raise HistoryGone(f"revision {self._revision} has been compacted")
        if answer.canceled:
            if "permission denied" in answer.cancel_reason:
                raise EtcdRefused(f"etcd refused: {answer.cancel_reason}")
            raise NotHere(f"the watch was ended: {answer.cancel_reason}")
        for event in answer.events:
            self._apply(event)
        if answer.events:
            self._revision = answer.events[-1].kv.mod_revision
        elif not answer.created:
            self._revision = max(self._revision, answer.header.revision)  # a sign of life: nothing up to there

    def _apply(self, event: Event) -> None:
        key = _text(event.kv.key)
        known = self.known.get(key)
        if known is not None and event.kv.mod_revision < known.revision:
            return  # a look was ahead of the watch
        if event.type == "DELETE":
            if known is not None:
                self._doubt(key)
        elif key:
            self._put(key, Entry(event.kv.value, event.kv.mod_revision))

    # --- one key

    def _put(self, key: str, entry: Entry) -> None:
        if entry.value == LEFT:
            self._let_go(key)
            return
        self._absent.pop(key, None)
        if self.known.get(key) != entry:
            self.known[key] = entry
            self._tell(Put(key, entry.value))

    def _doubt(self, key: str) -> None:
        if key not in self._absent:
            doubt_s = self._gateway.settings.doubt_s
            self._absent[key] = time.monotonic() + doubt_s
            asyncio.get_running_loop().call_later(doubt_s + 0.02, self.settle)  # timers may be a little early

    def _let_go(self, key: str) -> None:
        self._absent.pop(key, None)
        if self.known.pop(key, None) is not None:
            self._tell(Delete(key))


def entries(kvs: list[KeyValue]) -> dict[str, Entry]:
    """Keys that are text; discovery writes no others."""
    return {key: Entry(kv.value, kv.mod_revision) for kv in kvs if (key := _text(kv.key))}


def _text(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        return ""


def _answer(line: bytes) -> WatchAnswer:
    try:
        message = decode(line, WatchLine)
    except UNDECODABLE as e:
        raise NotHere(f"a line of a watch is no answer of etcd: {e}") from e
    if message.result is None:
        raise NotHere(f"the watch was ended: {(message.error or {}).get('message', 'no reason given')}")
    return message.result
