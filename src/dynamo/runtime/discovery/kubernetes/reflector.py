"""How is one kind of object followed? A list, then a watch from the list's version on, for ever.

A watch that ends is taken up where it ended. If the server has forgotten the changes since then (410), the objects are
listed again.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from dynamo.runtime.discovery.kubernetes.api import ApiServer, Pauses
from dynamo.runtime.discovery.kubernetes.errors import HistoryGone, KubernetesUnavailable, Status, of_status
from dynamo.runtime.discovery.kubernetes.objects import Listed, Slice, Versioned, WatchLine, Worker, newer
from dynamo.runtime.errors import DiscoveryError

log = logging.getLogger(__name__)

PAGE = 500  # objects in one answer: a page of 500 workers with their cards is a megabyte or two

T = TypeVar("T", bound=Worker | Slice)


async def look(api: ApiServer, path: str, selector: str, kind: type[T], within_s: float = 0.0) -> tuple[list[T], str]:
    """All objects of a collection that have a label, and the version of that. Raises DiscoveryError."""
    found: list[T] = []
    query = {"labelSelector": selector, "limit": str(PAGE)}
    while True:
        try:
            page: Listed[T] = await api.call("GET", path, Listed[kind], params=query, within_s=within_s)  # type: ignore[valid-type]
        except HistoryGone:  # the list's own version was forgotten between two pages
            query.pop("continue", None)
            found.clear()
            continue
        found += page.items or []
        if not page.metadata.continue_:
            return found, page.metadata.resource_version
        query["continue"] = page.metadata.continue_


class Reflector(Generic[T]):
    """One collection. `listed` gets all of it, with the list's version; `changed` a kind of change and the object."""

    def __init__(
        self,
        api: ApiServer,
        path: str,
        selector: str,
        kind: type[T],
        listed: Callable[[list[T], str], None],
        changed: Callable[[str, T], None],
    ) -> None:
        self._api = api
        self._path = path
        self._selector = selector
        self._kind = kind
        self._on_listed = listed
        self._on_changed = changed
        self._version = ""
        """What was told is the truth as of this version; empty: list first."""
        self.synced = asyncio.Event()
        """Whether all of it was ever told."""

    def is_behind(self, version: str) -> bool:
        """Whether what was told is older than a list of this version."""
        return newer(version, self._version)

    async def follow(self) -> None:
        """Follow for ever."""
        pauses = Pauses()
        while True:
            try:
                if not self._version:
                    found, version = await look(self._api, self._path, self._selector, self._kind)
                    self._on_listed(found, version)
                    self._version = version
                    self.synced.set()
                await self._watch(pauses)
            except HistoryGone as e:
                log.info("listing %s anew: %s", self._path, e)
                self._version = ""
            except KubernetesUnavailable as e:
                log.debug("not following %s: %s", self._path, e)
                await asyncio.sleep(pauses.next(e.retry_after_s))
            except DiscoveryError as e:
                log.warning("cannot follow %s: %s", self._path, e)
                await asyncio.sleep(self._api.settings.beat_s)

    async def _watch(self, pauses: Pauses) -> None:
        query = {"labelSelector": self._selector, "resourceVersion": self._version}
        async with self._api.watch(self._path, query) as lines:
            async for line in lines:
                if line.strip():
                    self._take(line)
                    pauses.reset()
        await asyncio.sleep(pauses.next())  # a server that ends watches at once is not to be hammered

    def _take(self, line: bytes) -> None:
        try:
            told = msgspec.json.decode(line, type=WatchLine)
            if told.type == "ERROR":
                status = msgspec.json.decode(told.object, type=Status)
                error = of_status(status, status.code)
                raise error if isinstance(error, HistoryGone) else KubernetesUnavailable(str(error))
            if told.type == "BOOKMARK":
                self._version = msgspec.json.decode(told.object, type=Versioned).metadata.resource_version
                return
            changed = msgspec.json.decode(told.object, type=self._kind)
        except msgspec.DecodeError as e:
            raise KubernetesUnavailable(f"a line of a watch is none: {e}") from e
        self._version = changed.metadata.resource_version
        self._on_changed(told.type, changed)
