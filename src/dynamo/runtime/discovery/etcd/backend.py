"""Who is there, on machines that share an etcd?

What is ours is in `owned.py`, what is others' in `followed.py`, the way to etcd in `gateway.py`; here is when each
has its turn.
"""

import asyncio
import logging
from dataclasses import replace

from dynamo.runtime.discovery.chores import Chores
from dynamo.runtime.discovery.directory import split_key
from dynamo.runtime.discovery.etcd.errors import EtcdUnavailable
from dynamo.runtime.discovery.etcd.followed import Bucket, entries
from dynamo.runtime.discovery.etcd.gateway import EtcdGateway
from dynamo.runtime.discovery.etcd.messages import LEFT, RANGE, Ranged, prefix_range
from dynamo.runtime.discovery.etcd.owned import OPERATION_S, OwnedKeys
from dynamo.runtime.discovery.etcd.settings import EtcdSettings
from dynamo.runtime.discovery.protocol import Put
from dynamo.runtime.discovery.watching import Watch, WatchHub
from dynamo.runtime.errors import DiscoveryError

log = logging.getLogger(__name__)

RETRY_S = 0.1  # after a beat that failed, once etcd answers again


class EtcdDiscovery:
    """The `etcd` backend. `wait_s` replaces the settings' wait for the first answer.

    Raises ValueError if the environment's settings are wrong, or certificates cannot be used.
    """

    def __init__(self, settings: EtcdSettings | None = None, wait_s: float | None = None) -> None:
        settings = settings or EtcdSettings.from_environ()
        self.settings = settings if wait_s is None else replace(settings, startup_s=wait_s)
        self.gateway = EtcdGateway(self.settings)
        self._owned = OwnedKeys(self.gateway)
        self._buckets: dict[str, Bucket] = {}
        self._hub = WatchHub()
        self._chores = Chores()

    async def put(self, key: str, value: bytes, *, create: bool = False) -> None:
        """See `Discovery.put`."""
        split_key(key)
        await self._owned.put(key, value, create)
        self._chores.begin("beat", self._beat)

    async def delete(self, key: str) -> None:
        """See `Discovery.delete`."""
        await self._owned.delete(key)

    async def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """See `Discovery.get_prefix`. While etcd is away, what is known of a bucket that is watched."""
        bucket = self._buckets.get(split_key(prefix + "_")[0])
        try:
            if self.gateway.down and bucket is not None:
                raise EtcdUnavailable("etcd does not answer")
            answer = await self.gateway.call(RANGE, prefix_range(prefix), Ranged, OPERATION_S)
        except EtcdUnavailable:
            if bucket is None or not bucket.listed:
                raise
            return {key: entry.value for key, entry in bucket.known.items() if key.startswith(prefix)}
        found = entries(answer.kvs)
        kept = bucket.merge(found, answer.header) if bucket is not None else {}
        kept = {key: value for key, value in kept.items() if key.startswith(prefix)}
        return kept | {key: entry.value for key, entry in found.items() if entry.value != LEFT}

    def watch(self, prefix: str) -> Watch:
        """See `Discovery.watch`."""
        name = split_key(prefix + "_")[0]
        if name not in self._buckets:
            self._buckets[name] = Bucket(name, self.gateway, self._hub.tell)
            self._chores.begin(name, self._buckets[name].follow)
            self._chores.begin("beat", self._beat)
        known = self._buckets[name].known
        return self._hub.add(prefix, [Put(key, entry.value) for key, entry in known.items()])

    def hurry(self) -> None:
        """See `Discovery.hurry`."""
        self.gateway.hurry()

    async def close(self) -> None:
        """See `Discovery.close`."""
        if self._chores.stopped:
            return
        await self._chores.stop()
        await self._owned.close()
        await self.gateway.close()
        self._hub.close()

    async def _beat(self) -> None:
        """Renew our lease; and whether we have one or not, know within one beat when etcd is away."""
        while True:
            try:
                await self._owned.beat()
                pause_s = self.settings.beat_s
            except EtcdUnavailable:
                await self.gateway.answering(self.settings.beat_s)
                pause_s = RETRY_S
            except DiscoveryError as e:
                log.warning("cannot renew our lease: %s", e)
                pause_s = self.settings.beat_s
            for bucket in self._buckets.values():
                bucket.settle()
            await asyncio.sleep(pause_s)
