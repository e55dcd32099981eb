"""Which discovery backend does this process use?

`auto`: etcd if ETCD_ENDPOINTS is set, kubernetes inside a pod, else file.
"""

import os

from dynamo.runtime.discovery.protocol import LEASE_TTL_S, Change, Delete, Discovery, Put

__all__ = ["BACKENDS", "LEASE_TTL_S", "Change", "Delete", "Discovery", "Put", "choose_backend", "open_discovery"]

BACKENDS = ("auto", "file", "mem", "etcd", "kubernetes")


def choose_backend(name: str | None = None) -> str:
    """The backend's name: the argument, else DYN_DISCOVERY_BACKEND, else auto. Raises ValueError."""
    name = name or os.environ.get("DYN_DISCOVERY_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"discovery backend {name!r} is not one of {', '.join(BACKENDS)} (DYN_DISCOVERY_BACKEND)")
    if name != "auto":
        return name
    if os.environ.get("ETCD_ENDPOINTS"):
        return "etcd"
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    return "file"


def open_discovery(name: str | None = None, wait_s: float | None = None) -> Discovery:
    """A new backend object. `wait_s` bounds the wait for a store that does not answer yet, where there is such a wait.

    Raises ValueError for an unknown name, or settings of it that are wrong.
    """
    backend = choose_backend(name)
    if backend == "mem":
        from dynamo.runtime.discovery.mem import MemDiscovery

        return MemDiscovery()
    if backend == "file":
        from dynamo.runtime.discovery.file import FileDiscovery

        return FileDiscovery()
    if backend == "etcd":
        from dynamo.runtime.discovery.etcd.backend import EtcdDiscovery

        return EtcdDiscovery(wait_s=wait_s)
    from dynamo.runtime.discovery.kubernetes.backend import KubernetesDiscovery

    return KubernetesDiscovery(wait_s=wait_s)
