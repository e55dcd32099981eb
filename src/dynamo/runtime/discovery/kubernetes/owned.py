"""What is ours in the API server? One object a process, that holds all its keys, and is collected with its pod.

Whoever lives in a container also removes what the dead of that container have left: a process that crashes in a pod
that goes on would be listed as long as the pod.
"""

import asyncio
import hashlib
import logging
import os
import secrets
from pathlib import Path

import msgspec

from dynamo.runtime.discovery.kubernetes.api import ApiServer
from dynamo.runtime.discovery.kubernetes.errors import KeyTaken, KubernetesUnavailable, NotThere
from dynamo.runtime.discovery.kubernetes.objects import (
    CLAIM,
    POD_UID,
    Process,
    Worker,
    newer,
    worker_object,
    workers_path,
)
from dynamo.runtime.discovery.kubernetes.reflector import Reflector, look
from dynamo.runtime.discovery.kubernetes.settings import POD_ENV, Pod
from dynamo.runtime.errors import DiscoveryError

log = logging.getLogger(__name__)

OPERATION_S = 10.0  # as of the other stores: one that is away for longer is an error of the operation
LEAVE_S = 5.0  # a process that ends waits no longer; its object then goes with its pod
MAX_OBJECT_BYTES = 1 << 20  # etcd behind the API server takes 1.5 MiB a request
MAX_NAME = 253  # of an object


class OwnedKeys:
    """The keys of this process."""

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        pod = api.settings.pod
        self._pod = pod
        self._process = this_process(pod.container if pod is not None else "")
        suffix = f"-{secrets.token_hex(4)}"
        self.name = f"{pod.name[: MAX_NAME - len(suffix)]}{suffix}" if pod is not None else ""
        self._values: dict[str, str] = {}
        self._claims: set[str] = set()
        self._version = ""
        """Of our object as we last wrote it; empty: it is not there."""
        self._unwritten = False
        """Whether the last write failed: the server may have it or not."""
        self._wake = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()
        self._siblings: dict[str, Worker] = {}
        self._closed = False

    async def put(self, key: str, value: bytes, create: bool) -> None:
        """See `Discovery.put`."""
        pod = self._must_have_pod()
        text = _text(key, value)
        async with self._one_at_a_time:
            claim = create and key not in self._values
            if claim and (holder := await self._holder(key)) is not None:
                raise _taken(key, holder)
            before = self._values.get(key)
            self._values[key] = text
            if claim:
                self._claims.add(key)
            try:
                await self._apply(pod, OPERATION_S)
                if claim and (holder := await self._holder(key, before_us=True)) is not None:
                    raise _taken(key, holder)
            except BaseException:
                self._restore(key, before, claim)
                raise

    async def delete(self, key: str) -> None:
        """See `Discovery.delete`. If the server is away it fails at once, and is made good when it is back."""
        async with self._one_at_a_time:
            if self._values.pop(key, None) is None:
                return
            self._claims.discard(key)
            await self._apply(self._must_have_pod(), 0.0)

    async def follow(self) -> None:
        """Follow the objects of this pod for ever: ours, that nobody else may change, and those of the dead."""
        pod = self._must_have_pod()
        path = workers_path(self._api.settings.namespace)
        watching = Reflector(self._api, path, f"{POD_UID}={pod.uid}", Worker, self._listed, self._changed)
        await watching.follow()

    async def beat(self) -> None:
        """Make good, for ever, what an outage or a stranger spoilt; remove what the dead left."""
        pod = self._must_have_pod()
        while True:
            try:
                async with asyncio.timeout(self._api.settings.beat_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                async with self._one_at_a_time:
                    if self._unwritten:
                        await self._apply(pod, 0.0)
                await self._bury_dead(pod)
            except KubernetesUnavailable as e:
                log.debug("not now: %s", e)
            except DiscoveryError as e:
                log.warning("cannot look after our entries: %s", e)

    async def close(self) -> None:
        """Remove our object. Never raises: what cannot be removed goes with the pod."""
        self._closed = True
        self._values.clear()
        self._claims.clear()
        if self._pod is None or not (self._version or self._unwritten):
            return
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._remove(self._pod, self.name, self._process)
        except (DiscoveryError, TimeoutError) as e:
            log.warning("leaving Kubernetes: %s; our entries go with our pod", e or "no answer in time")

    # --- our object

    def _must_have_pod(self) -> Pod:
        if self._pod is None:
            raise DiscoveryError(
                "discovery on Kubernetes: this process does not know its pod, and so cannot be seen by others; give "
                f"the container\n{POD_ENV}"
            )
        return self._pod

    async def _apply(self, pod: Pod, within_s: float) -> None:
        """Let the server hold what we hold: one request, that creates or replaces, and may be sent twice."""
        claims = sorted(claim_label(key) for key in self._claims)
        wanted = worker_object(self.name, (pod.name, pod.uid), dict(self._values), self._process, claims)
        size = len(msgspec.json.encode(wanted))
        if size > MAX_OBJECT_BYTES:
            raise DiscoveryError(
                f"our entries are {size} bytes, more than {MAX_OBJECT_BYTES}: serve fewer in a process"
            )
        self._unwritten = True
        applied = await self._send(wanted, within_s)
        self._version = applied.metadata.resource_version
        self._unwritten = False

    async def _send(self, wanted: dict[str, object], within_s: float) -> Worker:
        path = workers_path(self._api.settings.namespace, str(wanted["metadata"]["name"]))  # type: ignore[index]
        params = {"fieldManager": "dynamo", "force": "true"}
        return await self._api.call("PATCH", path, Worker, params=params, body=wanted, within_s=within_s)

    async def _remove(self, pod: Pod, name: str, process: Process) -> None:
        """Say that it leaves, so that nobody takes it for a mistake, and then delete it."""
        with _nothing_there():
            await self._send(worker_object(name, (pod.name, pod.uid), {}, process, []), 0.0)
            path = workers_path(self._api.settings.namespace, name)
            await self._api.call("DELETE", path, msgspec.Raw)

    def _restore(self, key: str, before: str | None, claim: bool) -> None:
        if claim:
            self._claims.discard(key)
        if before is None:
            self._values.pop(key, None)
        else:
            self._values[key] = before
        self._unwritten = True  # the server may hold what we do not
        self._wake.set()

    # --- whether a key is free

    async def _holder(self, key: str, before_us: bool = False) -> Worker | None:
        """Another process that holds the key; with `before_us` only one that wrote before our last write.

        The server orders all writes, so of two that claim a key at once one sees the other before it, and gives way.
        """
        path = workers_path(self._api.settings.namespace)
        workers, _ = await look(self._api, path, claim_label(key, CLAIM), Worker, OPERATION_S)
        for worker in workers:
            held = worker.metadata.name != self.name and key in worker.spec.data.entries
            first = not before_us or newer(self._version, worker.metadata.resource_version)
            if held and first and not self._is_dead(worker):
                return worker
        return None

    # --- the others of this pod

    def _listed(self, workers: list[Worker], _: str) -> None:
        self._siblings = {worker.metadata.name: worker for worker in workers}
        ours = self._siblings.pop(self.name, None)
        if ours is None and self._version:
            self._lost("was deleted")
        elif ours is not None:
            self._changed("MODIFIED", ours)

    def _changed(self, how: str, worker: Worker) -> None:
        name = worker.metadata.name
        if name != self.name:
            if how == "DELETED":
                self._siblings.pop(name, None)
            else:
                self._siblings[name] = worker
        elif how == "DELETED":
            self._lost("was deleted")
        elif newer(worker.metadata.resource_version, self._version) and worker.spec.data.entries != self._values:
            self._lost("was changed")

    def _lost(self, what: str) -> None:
        if self._closed or self._one_at_a_time.locked():
            return  # our own doing
        log.warning(
            "our object %s %s, and is put again; where several containers of a pod are ours, each needs CONTAINER_NAME",
            self.name, what,
        )  # fmt: skip
        self._unwritten = True
        self._wake.set()

    async def _bury_dead(self, pod: Pod) -> None:
        for name, worker in tuple(self._siblings.items()):
            if self._is_dead(worker):
                log.info("removing %s: its process is gone", name)
                await self._remove(pod, name, worker.spec.data.process)
                self._siblings.pop(name, None)

    def _is_dead(self, worker: Worker) -> bool:
        """Whether it is of a process of this very container that is no more."""
        assert self._pod is not None
        process = worker.spec.data.process
        ours = worker.pod_uid == self._pod.uid and process.container == self._pod.container
        return ours and _started(process.pid) != process.started


class _nothing_there:  # noqa: N801 - reads as the statement it is
    """What is to be removed may have been removed by another."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, NotThere)


def claim_label(key: str, prefix: str = "") -> str:
    """The label of a key that only one may hold: labels are short, and know no slashes."""
    return prefix + hashlib.sha256(key.encode()).hexdigest()[:32]


def this_process(container: str) -> Process:
    """Who we are, to the others of our container."""
    return Process(container, os.getpid(), _started(os.getpid()))


def _started(pid: int) -> int:
    """When a process started, in the kernel's ticks; 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # Its name, in brackets, may hold anything; the 22nd field is the 20th behind it.
    state, *rest = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(rest[18])


def _text(key: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise DiscoveryError(f"the value of {key} is no text: this store holds JSON") from None


def _taken(key: str, holder: Worker) -> KeyTaken:
    return KeyTaken(f"{key} is already taken: another live process holds it ({holder.metadata.name})")
