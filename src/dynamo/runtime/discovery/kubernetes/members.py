"""Which keys are live? What processes have put, as far as their pods are ready.

A pod is ready as long as a slice says so (facts row Z8). Those of this process's own pod are live in any case: whoever
asks itself whether it is well must find itself, and a pod of a frontend and its workers must not wait for itself.

What vanishes without a word is kept for `doubt_s`: a pod that no slice names any more (slices are rewritten, services
replaced), an object that was deleted while it held keys (its owner puts it again, if it lives).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from dynamo.runtime.discovery.kubernetes.errors import MANIFESTS
from dynamo.runtime.discovery.kubernetes.objects import ENABLED, Slice, Worker, newer
from dynamo.runtime.discovery.protocol import Change, Delete, Put

log = logging.getLogger(__name__)

UNLISTED_S = 30.0  # a pod takes some seconds to be in a slice; after this its service is missing


class Members:
    """All keys as they are known here, told to `tell` as they change. Call only on one event loop."""

    def __init__(self, own_pod: str, doubt_s: float, tell: Callable[[Change], None]) -> None:
        self.known: dict[str, bytes] = {}
        """What was told."""
        self._own_pod = own_pod
        self._doubt_s = doubt_s
        self._tell = tell
        self._workers: dict[str, Worker] = {}
        self._slices: dict[str, Slice] = {}
        self._ready: dict[str, bool] = {}
        """Of every pod in a slice."""
        self._vanished: dict[str, float] = {}
        """Pods and objects that vanished without a word, and until when they are kept."""
        self._unlisted: dict[str, float] = {}
        """Pods that put keys and were in no slice, since when."""
        self._settling: asyncio.Handle | None = None

    # --- what is heard

    def workers_listed(self, workers: list[Worker], version: str) -> None:
        """All objects as of a version."""
        found = {worker.metadata.name for worker in workers}
        for worker in workers:
            self._put_worker(worker)
        for worker in tuple(self._workers.values()):
            if worker.metadata.name not in found and not newer(worker.metadata.resource_version, version):
                self._drop_worker(worker)
        self.settle()

    def worker_changed(self, how: str, worker: Worker) -> None:
        """One object was added, modified or deleted."""
        if how == "DELETED":
            self._drop_worker(worker)
        else:
            self._put_worker(worker)
        self._settle_soon()

    def slices_listed(self, slices: list[Slice], _: str) -> None:
        """All slices."""
        self._slices = {one.metadata.name: one for one in slices}
        self._judge_pods()
        self.settle()

    def slice_changed(self, how: str, one: Slice) -> None:
        """One slice was added, modified or deleted."""
        if how == "DELETED":
            self._slices.pop(one.metadata.name, None)
        else:
            self._slices[one.metadata.name] = one
        self._judge_pods()
        self._settle_soon()

    def saw(self, workers: list[Worker] | None, slices: list[Slice] | None) -> None:
        """A look that is ahead of what the watches have told; None for what is not."""
        for worker in workers or ():
            self._put_worker(worker)
        for one in slices or ():
            known = self._slices.get(one.metadata.name)
            if known is None or newer(one.metadata.resource_version, known.metadata.resource_version):
                self._slices[one.metadata.name] = one
        self._judge_pods()
        self.settle()

    def live_by(self, workers: list[Worker], slices: list[Slice]) -> dict[str, bytes]:
        """The keys that are live by a look, and those that are kept although it does not show them."""
        kept = [self._workers[name] for name in self._vanished if name in self._workers]
        return live_keys([*kept, *workers], dict.fromkeys(self._vanished, True) | readiness(slices), self._own_pod)

    # --- what follows

    def settle(self) -> None:
        """Tell what has changed."""
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        now = time.monotonic()
        for name in [name for name, until in self._vanished.items() if until <= now]:
            del self._vanished[name]
            self._workers.pop(name, None)
        kept = dict.fromkeys(self._vanished, True)
        live = live_keys(self._workers.values(), kept | self._ready, self._own_pod)
        for key in self.known.keys() - live.keys():
            del self.known[key]
            self._tell(Delete(key))
        for key, value in live.items():
            if self.known.get(key) != value:
                self.known[key] = value
                self._tell(Put(key, value))
        self._note_unlisted(now)

    def _settle_soon(self) -> None:
        """Once for all changes of one turn of the loop: a fleet that starts makes thousands."""
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_soon(self.settle)

    def _put_worker(self, worker: Worker) -> None:
        known = self._workers.get(worker.metadata.name)
        if known is None or newer(worker.metadata.resource_version, known.metadata.resource_version):
            self._workers[worker.metadata.name] = worker
            self._vanished.pop(worker.metadata.name, None)

    def _drop_worker(self, worker: Worker) -> None:
        name = worker.metadata.name
        known = self._workers.get(name)
        if known is None:
            return
        if known.spec.data.entries and worker.spec.data.entries:
            self._doubt(name)
        else:
            del self._workers[name]  # it said that it leaves

    def _judge_pods(self) -> None:
        ready = readiness(self._slices.values())
        for uid, was_ready in self._ready.items():
            if uid not in ready and was_ready:
                self._doubt(uid)
        for uid in ready:
            self._vanished.pop(uid, None)
        self._ready = ready

    def _doubt(self, name: str) -> None:
        if name not in self._vanished:
            self._vanished[name] = time.monotonic() + self._doubt_s
            asyncio.get_running_loop().call_later(self._doubt_s + 0.02, self.settle)  # timers may be a little early

    def _note_unlisted(self, now: float) -> None:
        """Say once of a pod that nobody will ever see it."""
        here = {worker.pod_uid: worker.metadata.name for worker in self._workers.values() if worker.spec.data.entries}
        unlisted = here.keys() - self._ready.keys() - {self._own_pod}
        self._unlisted = {uid: self._unlisted.get(uid, now) for uid in unlisted}
        for uid, since in self._unlisted.items():
            if since == now:
                asyncio.get_running_loop().call_later(UNLISTED_S, self._warn_unlisted, uid, here[uid])

    def _warn_unlisted(self, uid: str, name: str) -> None:
        if uid in self._unlisted and time.monotonic() - self._unlisted[uid] >= UNLISTED_S - 1:
            log.warning(
                "%s has registered, but no EndpointSlice labelled %s=true names its pod, so no request goes there: "
                "label the pod %s=true and apply the service: %s",
                name, ENABLED, ENABLED, MANIFESTS,
            )  # fmt: skip


def readiness(slices: Iterable[Slice]) -> dict[str, bool]:
    """Of every pod in the slices, by its uid. A pod may be in several; one that says ready is enough."""
    found: dict[str, bool] = {}
    for one in slices:
        for endpoint in one.endpoints or ():
            target = endpoint.target_ref
            if target is not None and target.kind == "Pod":
                ready = endpoint.conditions.ready is not False
                found[target.uid] = found.get(target.uid, False) or ready
    return found


def live_keys(workers: Iterable[Worker], ready: dict[str, bool], own_pod: str) -> dict[str, bytes]:
    """The keys of all whose pods are ready."""
    return {
        key: value
        for worker in workers
        if worker.pod_uid == own_pod or ready.get(worker.pod_uid, False)
        for key, value in _keys(worker)
    }


def _keys(worker: Worker) -> list[tuple[str, bytes]]:
    return [(key, text.encode()) for key, text in worker.spec.data.entries.items()]
