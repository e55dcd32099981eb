"""What can go wrong with the API server, and what does its refusal mean?"""

import msgspec

from dynamo.runtime.errors import DiscoveryError

MANIFESTS = "python -m dynamo.runtime.discovery.kubernetes | kubectl apply -n NAMESPACE -f -"
"""Prints what a cluster needs: the resource's definition, the role, the service."""

_TOO_LARGE_VERSION = "ResourceVersionTooLarge"  # our version is of a server that knew more: list again


class KubernetesUnavailable(DiscoveryError):  # noqa: N818 - named as the tree it belongs to
    """The API server does not answer, or not now. `retry_after_s` is what it asks for, 0 if nothing."""

    def __init__(self, message: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KubernetesRefused(DiscoveryError):  # noqa: N818 - named as the tree it belongs to
    """It answered, and said no; waiting does not mend that."""


class NotThere(KubernetesRefused):
    """No such object."""


class NotDefined(KubernetesRefused):
    """No such kind of object: its definition is not in the cluster."""


class KeyTaken(DiscoveryError):  # noqa: N818 - named as the tree it belongs to
    """Another process holds the key."""


class HistoryGone(Exception):  # noqa: N818 - a fact that is acted upon, not an error of the caller
    """The changes since our version cannot be had any more: list again."""


class TokenRejected(Exception):  # noqa: N818
    """The token is old or wrong."""


class Cause(msgspec.Struct):
    """One reason among several."""

    reason: str = ""


class Details(msgspec.Struct):
    """Which object, and why."""

    name: str = ""
    kind: str = ""
    causes: list[Cause] = []


class Status(msgspec.Struct):
    """The body of an answer that is an error; also the object of an `ERROR` line of a watch."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: Details | None = None


def explain(path: str, code: int, body: bytes, retry_after_s: float = 0.0) -> Exception:
    """The exception of an answer that is not 2xx."""
    try:
        status = msgspec.json.decode(body, type=Status)
    except msgspec.DecodeError:
        status = Status(body[:200].decode(errors="replace").strip())
    return of_status(status, status.code or code, retry_after_s, path)


def of_status(status: Status, code: int, retry_after_s: float = 0.0, path: str = "") -> Exception:
    """What a `Status` means."""
    said = status.message or status.reason or f"HTTP {code}"
    if code == 410 or _version_too_large(status):
        return HistoryGone(said)
    if code == 401:
        return TokenRejected(said)
    if code == 403:
        return KubernetesRefused(f"Kubernetes refused: {said}. Give the service account the role: {MANIFESTS}")
    if code == 404 and (status.details is None or not status.details.name):
        if "endpointslices" in path:
            return NotDefined(f"Kubernetes has no {path}: discovery needs Kubernetes 1.21 or later")
        return NotDefined(f"Kubernetes does not know DynamoWorkerMetadata ({said}). Define it: {MANIFESTS}")
    if code == 404:
        return NotThere(f"Kubernetes: {said}")
    if code in (408, 429) or code >= 500:
        return KubernetesUnavailable(f"HTTP {code}: {said}", retry_after_s)
    return KubernetesRefused(f"Kubernetes refused: {said}")


def _version_too_large(status: Status) -> bool:
    causes = status.details.causes if status.details is not None else []
    return any(cause.reason == _TOO_LARGE_VERSION for cause in causes)
