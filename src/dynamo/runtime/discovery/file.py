"""Who is there, on machines that share a directory?

The default on one machine. Root: DYN_FILE_KV, else `$TMPDIR/dynamo_store_kv`. Changes are noticed by inotify
and, whatever inotify missed, by a look every second. All file operations run on one thread, so that a hung
disk never stops the event loop.
"""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from dynamo.runtime.discovery.chores import Chores
from dynamo.runtime.discovery.directory import Entry, KeyDirectory, split_key
from dynamo.runtime.discovery.inotify import Inotify
from dynamo.runtime.discovery.protocol import LEASE_TTL_S, Delete, Put
from dynamo.runtime.discovery.watching import Watch, WatchHub
from dynamo.runtime.errors import DiscoveryError

log = logging.getLogger(__name__)

POLL_S = 1.0  # notices expiry, dead processes, and whatever inotify does not see (network file systems)
OPERATION_TIMEOUT_S = 10.0  # one lease: a directory slower than this is no use as a discovery store
WARN_EVERY_S = 30.0

P = ParamSpec("P")
T = TypeVar("T")


def default_root() -> Path:
    """The directory that all processes of one deployment must share."""
    return Path(os.environ.get("DYN_FILE_KV") or Path(tempfile.gettempdir()) / "dynamo_store_kv").absolute()


class FileDiscovery:
    """The `file` backend."""

    def __init__(self, root: Path | None = None, ttl_s: float = LEASE_TTL_S) -> None:
        self.root = root or default_root()
        chosen = root is not None or bool(os.environ.get("DYN_FILE_KV"))
        self._directory = KeyDirectory(self.root, ttl_s, must_be_ours=not chosen)
        self._ttl_s = ttl_s
        self._thread = ThreadPoolExecutor(1, "discovery")
        self._hub = WatchHub()
        self._known: dict[str, dict[str, Entry]] = {}
        self._buckets: set[str] = set()
        self._inotify: Inotify | None = None
        self._changed = asyncio.Event()
        self._chores = Chores()
        self._trouble_since: float | None = None
        self._warned_at = 0.0
        self._keep_absent_until = 0.0

    # --- the protocol

    async def put(self, key: str, value: bytes, *, create: bool = False) -> None:
        """See `Discovery.put`."""
        await self._run(self._directory.put, key, value, create)
        self._chores.begin("heartbeat", self._beat)
        self._changed.set()

    async def delete(self, key: str) -> None:
        """See `Discovery.delete`."""
        await self._run(self._directory.delete, key)
        self._changed.set()

    async def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """See `Discovery.get_prefix`."""
        bucket = split_key(prefix + "_")[0]
        try:
            found = await self._run(self._look, bucket)
        except OSError as e:
            raise DiscoveryError(
                f"cannot read {bucket} in the discovery directory {self.root} (DYN_FILE_KV): {e}"
            ) from e
        if bucket in self._buckets:
            self._publish(bucket, found)
        return {key: entry.value for key, entry in found.items() if key.startswith(prefix)}

    def watch(self, prefix: str) -> Watch:
        """See `Discovery.watch`."""
        bucket = split_key(prefix + "_")[0]
        known = self._known.setdefault(bucket, {})
        self._buckets.add(bucket)
        self._chores.begin("watch", self._follow)
        self._changed.set()
        return self._hub.add(prefix, [Put(key, entry.value) for key, entry in known.items()])

    def hurry(self) -> None:
        """See `Discovery.hurry`. Nothing here waits for long."""

    async def close(self) -> None:
        """See `Discovery.close`."""
        if self._chores.stopped:
            return
        await self._chores.stop()
        try:
            await self._run(self._directory.close)
        except DiscoveryError as e:
            log.warning("%s", e)
        if self._inotify is not None and self._inotify.fd >= 0:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
        self._hub.close()
        self._thread.shutdown(wait=False)

    # --- keeping what is ours

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 3)  # two beats may fail before the lease ends
            try:
                await self._run(self._directory.heartbeat)
            except (OSError, DiscoveryError) as e:
                self._warn("cannot renew our discovery entries", e)

    # --- following what is others'

    async def _follow(self) -> None:
        self._open_inotify()
        while True:
            self._changed.clear()
            await self._reconcile()
            try:
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _reconcile(self) -> None:
        try:
            found = {bucket: await self._run(self._look, bucket) for bucket in tuple(self._buckets)}
        except (OSError, DiscoveryError) as e:
            if self._trouble_since is None:
                self._trouble_since = time.monotonic()
            self._warn("cannot read the discovery directory; going on with the last known set", e)
            return
        if self._trouble_since is not None:
            log.warning(
                "the discovery directory %s is back after %.1f s", self.root, time.monotonic() - self._trouble_since
            )
            self._trouble_since = None
            # Owners put their keys back at their next heartbeat: until then absence means nothing.
            self._keep_absent_until = time.monotonic() + self._ttl_s
        for bucket, entries in found.items():
            self._publish(bucket, entries)

    def _publish(self, bucket: str, found: dict[str, Entry]) -> None:
        known = self._known[bucket]
        for key, entry in found.items():
            if known.get(key) != entry:
                known[key] = entry
                self._hub.tell(Put(key, entry.value))
        if time.monotonic() < self._keep_absent_until:
            return
        for key in [key for key in known if key not in found]:
            del known[key]
            self._hub.tell(Delete(key))

    def _look(self, bucket: str) -> dict[str, Entry]:
        """On the thread: what is live in a bucket."""
        if self._directory.open_bucket(bucket) and self._known.get(bucket):
            self._keep_absent_until = time.monotonic() + self._ttl_s  # somebody removed the directory under us
        self._directory.reap()
        if self._inotify is not None:
            self._inotify.add(self.root / bucket)
        return self._directory.scan(bucket)

    def _open_inotify(self) -> None:
        try:
            self._inotify = Inotify()
        except OSError as e:
            log.warning("no inotify (%s): discovery looks every %.0f s instead", e, POLL_S)
            return
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._on_inotify, self._inotify)

    def _on_inotify(self, inotify: Inotify) -> None:
        inotify.drain()
        self._changed.set()

    # --- the thread, and trouble

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT_S):
                return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))
        except TimeoutError:
            raise DiscoveryError(
                f"the discovery directory {self.root} (DYN_FILE_KV) did not answer within {OPERATION_TIMEOUT_S:.0f} s"
            ) from None

    def _warn(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._warned_at >= WARN_EVERY_S or self._warned_at == 0.0:
            self._warned_at = now
            log.warning("%s: %s (%s, DYN_FILE_KV); trying again", what, error, self.root)
