"""Which watcher hears of which change?

Shared by the backends: a `Watch` holds at most one pending change a key, so a slow reader costs no memory.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

from dynamo.runtime.discovery.protocol import Change


class Watch(AsyncIterator[Change]):
    """One subscription to a prefix: an async iterator that ends when it is closed."""

    def __init__(self, hub: "WatchHub", prefix: str) -> None:
        self._hub = hub
        self.prefix = prefix
        self._pending: dict[str, Change] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def offer(self, change: Change) -> None:
        """Queue a change; it replaces an unread one of the same key, and goes to the end of the line."""
        if change.key.startswith(self.prefix):
            self._pending.pop(change.key, None)
            self._pending[change.key] = change
            self._wake.set()

    @property
    def waiting(self) -> int:
        """Changes that were told and not read yet."""
        return len(self._pending)

    def close(self) -> None:
        """End the iteration, after what is already queued."""
        self._closed = True
        self._wake.set()

    async def aclose(self) -> None:
        """End the subscription at once."""
        self._pending.clear()
        self.close()
        self._hub.forget(self)

    async def __anext__(self) -> Change:
        while not self._pending:
            if self._closed:
                self._hub.forget(self)
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()  # no deadline: it lasts as long as its owner wants to know
        return self._pending.pop(next(iter(self._pending)))


class WatchHub:
    """All watches of one backend object. Owned by it; call only on its loop."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []

    def add(self, prefix: str, snapshot: Iterable[Change] = ()) -> Watch:
        """A new watch that begins with `snapshot`."""
        watch = Watch(self, prefix)
        for change in snapshot:
            watch.offer(change)
        self._watches.append(watch)
        return watch

    def tell(self, change: Change) -> None:
        """Tell everybody who asked."""
        for watch in self._watches:
            watch.offer(change)

    def forget(self, watch: Watch) -> None:
        """Drop a watch that nobody reads."""
        if watch in self._watches:
            self._watches.remove(watch)

    def close(self) -> None:
        """End all watches."""
        for watch in tuple(self._watches):
            watch.close()
