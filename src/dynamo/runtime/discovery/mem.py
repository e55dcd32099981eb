"""Who is there, within this process?

One store a process, shared by all runtimes in it: what tests and single-process set-ups need.
"""

import asyncio
import threading

from dynamo.runtime.discovery.protocol import Change, Delete, Put
from dynamo.runtime.discovery.watching import Watch, WatchHub
from dynamo.runtime.errors import DiscoveryError


class _Store:
    """The process's keys, each with the backend object that put it. Guarded by `lock`: loops may differ."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.entries: dict[str, tuple[bytes, MemDiscovery]] = {}
        self.members: list[MemDiscovery] = []

    def tell(self, change: Change) -> None:
        for member in tuple(self.members):
            member.hear(change)


_store = _Store()


class MemDiscovery:
    """The `mem` backend."""

    def __init__(self) -> None:
        self._hub = WatchHub()
        self._loop: asyncio.AbstractEventLoop | None = None

    def hear(self, change: Change) -> None:
        """Pass a change on to this object's watches, on their own loop."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is loop:
            self._hub.tell(change)
        else:
            loop.call_soon_threadsafe(self._hub.tell, change)

    async def put(self, key: str, value: bytes, *, create: bool = False) -> None:
        """See `Discovery.put`."""
        with _store.lock:
            held = _store.entries.get(key)
            if create and held is not None and held[1] is not self:
                raise DiscoveryError(f"{key} is already taken by another runtime of this process")
            _store.entries[key] = (value, self)
            _store.tell(Put(key, value))

    async def delete(self, key: str) -> None:
        """See `Discovery.delete`."""
        with _store.lock:
            held = _store.entries.get(key)
            if held is not None and held[1] is self:
                del _store.entries[key]
                _store.tell(Delete(key))

    async def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """See `Discovery.get_prefix`."""
        with _store.lock:
            return {key: value for key, (value, _) in _store.entries.items() if key.startswith(prefix)}

    def watch(self, prefix: str) -> Watch:
        """See `Discovery.watch`."""
        self._loop = asyncio.get_running_loop()
        with _store.lock:
            if self not in _store.members:
                _store.members.append(self)
            return self._hub.add(prefix, [Put(key, value) for key, (value, _) in _store.entries.items()])

    def hurry(self) -> None:
        """See `Discovery.hurry`. Nothing here waits for long."""

    async def close(self) -> None:
        """See `Discovery.close`."""
        with _store.lock:
            if self in _store.members:
                _store.members.remove(self)
            for key in [key for key, (_, owner) in _store.entries.items() if owner is self]:
                await self.delete(key)
        self._hub.close()
