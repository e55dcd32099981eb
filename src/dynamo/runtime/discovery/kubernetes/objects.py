"""What do the API server's objects look like? As far as discovery needs them.

One `DynamoWorkerMetadata` a process (facts row Z8) holds the keys it has put. The pods' readiness is in the
`EndpointSlice`s of the services that carry `ENABLED`.
"""

from typing import Any, Generic, TypeVar

import msgspec

GROUP, VERSION, KIND, PLURAL = "nvidia.com", "v1alpha1", "DynamoWorkerMetadata", "dynamoworkermetadatas"

ENABLED = "nvidia.com/dynamo-discovery-enabled"
"""A label of services whose pods take part, and so of their slices; its value is `true`."""
POD_UID = "nvidia.com/dynamo-pod-uid"
"""A label of our objects, by which a process finds those of its own pod; it also tells ours from those of others."""
CLAIM = "nvidia.com/dynamo-key-"
"""Begins a label for each key that only one may hold: who wants it looks for that label."""

T = TypeVar("T")


class Metadata(msgspec.Struct, rename="camel"):
    """Of every object. `resource_version` orders all changes of one kind of object."""

    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] = {}


class ListMetadata(msgspec.Struct, rename="camel"):
    """Of every list. `continue_` is set where the list goes on."""

    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class Process(msgspec.Struct, rename="camel"):
    """Who put it: enough for the others of its container to know when it has died."""

    container: str = ""
    pid: int = 0
    started: int = 0
    """In the kernel's ticks since the machine started: a number is used again, at another time."""


class Data(msgspec.Struct):
    """What a process has put."""

    entries: dict[str, str] = {}
    process: Process = msgspec.field(default_factory=Process)


class WorkerSpec(msgspec.Struct):
    """As Dynamo's: everything is in `data`."""

    data: Data = msgspec.field(default_factory=Data)


class Worker(msgspec.Struct):
    """A `DynamoWorkerMetadata` of ours."""

    metadata: Metadata
    spec: WorkerSpec = msgspec.field(default_factory=WorkerSpec)

    @property
    def pod_uid(self) -> str:
        return self.metadata.labels.get(POD_UID, "")


class Conditions(msgspec.Struct):
    """`ready` is to be taken for true where it is not known."""

    ready: bool | None = None


class TargetRef(msgspec.Struct):
    """What is behind an address."""

    kind: str = ""
    name: str = ""
    uid: str = ""


class SliceEndpoint(msgspec.Struct, rename="camel"):
    """One pod of a service."""

    conditions: Conditions = msgspec.field(default_factory=Conditions)
    target_ref: TargetRef | None = None


class Slice(msgspec.Struct):
    """An `EndpointSlice`."""

    metadata: Metadata
    endpoints: list[SliceEndpoint] | None = None


class Listed(msgspec.Struct, Generic[T]):
    """The answer to a list."""

    metadata: ListMetadata
    items: list[T] | None = None


class WatchLine(msgspec.Struct):
    """A line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR, and the object it is about."""

    type: str
    object: msgspec.Raw


class Versioned(msgspec.Struct):
    """Of an object, only its metadata."""

    metadata: Metadata


def workers_path(namespace: str, name: str = "") -> str:
    """Of all our objects, or of one."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}" + (f"/{name}" if name else "")


def slices_path(namespace: str, version: str) -> str:
    """Of all slices."""
    return f"/apis/discovery.k8s.io/{version}/namespaces/{namespace}/endpointslices"


def worker_object(
    name: str, pod: tuple[str, str], entries: dict[str, str], process: Process, claims: list[str]
) -> dict[str, Any]:
    """The object to apply. It belongs to its pod (name, uid), and is collected with it."""
    pod_name, uid = pod
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod_name, "uid": uid}
    labels = {POD_UID: uid} | {CLAIM + claim: "" for claim in claims}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
        "spec": {"data": {"entries": entries, "process": msgspec.to_builtins(process)}},
    }


def newer(version: str, than: str) -> bool:
    """Whether a resource version is later than another; they are decimal numbers."""
    return int(version or 0) > int(than or 0)
