"""Who is there, in one namespace of a Kubernetes cluster?

What is ours is in `owned.py`, what is live in `members.py`, how it is followed in `reflector.py`, the way to the API
server in `api.py`; here is when each has its turn.
"""

import asyncio
from dataclasses import replace

from dynamo.runtime.discovery.chores import Chores
from dynamo.runtime.discovery.directory import split_key
from dynamo.runtime.discovery.kubernetes.api import ApiServer
from dynamo.runtime.discovery.kubernetes.errors import KubernetesUnavailable
from dynamo.runtime.discovery.kubernetes.members import Members
from dynamo.runtime.discovery.kubernetes.objects import ENABLED, POD_UID, Slice, Worker, slices_path, workers_path
from dynamo.runtime.discovery.kubernetes.owned import OPERATION_S, OwnedKeys
from dynamo.runtime.discovery.kubernetes.reflector import Reflector, look
from dynamo.runtime.discovery.kubernetes.settings import KubernetesSettings
from dynamo.runtime.discovery.protocol import Put
from dynamo.runtime.discovery.watching import Watch, WatchHub

_ENABLED = f"{ENABLED}=true"


class KubernetesDiscovery:
    """The `kubernetes` backend. `wait_s` replaces the settings' wait for the first answer.

    Raises ValueError if nothing tells where the API server is, or credentials cannot be used.
    """

    def __init__(self, settings: KubernetesSettings | None = None, wait_s: float | None = None) -> None:
        settings = settings or KubernetesSettings.from_environ()
        self.settings = settings if wait_s is None else replace(settings, startup_s=wait_s)
        self._api = ApiServer(self.settings)
        self._owned = OwnedKeys(self._api)
        self._hub = WatchHub()
        self._own_pod = settings.pod.uid if settings.pod is not None else ""
        self._members = Members(self._own_pod, settings.doubt_s, self._hub.tell)
        members = self._members
        self._workers_path = workers_path(settings.namespace)
        self._slices_path = slices_path(settings.namespace, settings.slices_version)
        self._workers = Reflector(
            self._api, self._workers_path, POD_UID, Worker, members.workers_listed, members.worker_changed
        )
        self._slices = Reflector(
            self._api, self._slices_path, _ENABLED, Slice, members.slices_listed, members.slice_changed
        )
        self._chores = Chores()

    async def put(self, key: str, value: bytes, *, create: bool = False) -> None:
        """See `Discovery.put`."""
        split_key(key)
        await self._owned.put(key, value, create)
        self._chores.begin("own", self._owned.follow)
        self._chores.begin("beat", self._owned.beat)

    async def delete(self, key: str) -> None:
        """See `Discovery.delete`."""
        await self._owned.delete(key)

    async def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """See `Discovery.get_prefix`. While the server is away, what is known if it is followed."""
        split_key(prefix + "_")
        synced = self._workers.synced.is_set() and self._slices.synced.is_set()
        within_s = 0.0 if synced else OPERATION_S
        try:
            if self._api.down and synced:
                raise KubernetesUnavailable("Kubernetes does not answer")
            (workers, workers_at), (slices, slices_at) = await asyncio.gather(
                look(self._api, self._workers_path, POD_UID, Worker, within_s),
                look(self._api, self._slices_path, _ENABLED, Slice, within_s),
            )
        except KubernetesUnavailable:
            if not synced:
                raise
            found = self._members.known
        else:
            if "workers" in self._chores:
                self._members.saw(
                    workers if self._workers.is_behind(workers_at) else None,
                    slices if self._slices.is_behind(slices_at) else None,
                )
            found = self._members.live_by(workers, slices)
        return {key: value for key, value in found.items() if key.startswith(prefix)}

    def watch(self, prefix: str) -> Watch:
        """See `Discovery.watch`."""
        split_key(prefix + "_")
        self._chores.begin("workers", self._workers.follow)
        self._chores.begin("slices", self._slices.follow)
        return self._hub.add(prefix, [Put(key, value) for key, value in self._members.known.items()])

    def hurry(self) -> None:
        """See `Discovery.hurry`."""
        self._api.hurry()

    async def close(self) -> None:
        """See `Discovery.close`."""
        if self._chores.stopped:
            return
        await self._chores.stop()
        await self._owned.close()
        await self._api.close()
        self._hub.close()
