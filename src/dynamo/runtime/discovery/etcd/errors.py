"""What can go wrong with etcd, and what does its refusal mean?"""

from dynamo.runtime.discovery.etcd.messages import Failure, decode
from dynamo.runtime.errors import UNDECODABLE, DiscoveryError

# gRPC's codes that mean "not now, or not here": cancelled, unknown, deadline exceeded, aborted, internal, unavailable
_TRY_ELSEWHERE = {1, 2, 4, 10, 13, 14}
_NOT_FOUND, _FAILED_PRECONDITION, _UNAUTHENTICATED = 5, 9, 16


class EtcdUnavailable(DiscoveryError):  # noqa: N818 - named as the tree it belongs to
    """No endpoint answered. `hopeless`: each of them has a reason that waiting does not mend."""

    def __init__(self, message: str = "", hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


class EtcdRefused(DiscoveryError):  # noqa: N818 - named as the tree it belongs to
    """etcd understood, and said no: the user, the permission or the request is wrong."""


class KeyTaken(DiscoveryError):  # noqa: N818 - named as the tree it belongs to
    """Another process holds the key."""


class LeaseGone(Exception):  # noqa: N818 - a fact that is acted upon, not an error of the caller
    """The lease is not there any more, and so neither are its keys."""


class LeaseExists(Exception):  # noqa: N818
    """A lease of this number is there already: an answer was lost, and this was the second try."""


class NotHere(Exception):  # noqa: N818
    """One endpoint did not answer, or cannot at the moment; another one may. See `EtcdUnavailable.hopeless`."""

    def __init__(self, reason: str, hopeless: bool = False) -> None:
        super().__init__(reason)
        self.hopeless = hopeless


class TokenRejected(Exception):  # noqa: N818
    """The token is old, or the server has been restarted since: authenticate again."""


class AuthenticationOff(Exception):  # noqa: N818
    """The server knows no users."""


def explain(status: int, body: bytes) -> Exception:
    """The exception of an HTTP answer that is not 200."""
    try:
        failure = decode(body, Failure)
    except UNDECODABLE:
        if status == 404:
            return NotHere("it is no etcd with its JSON gateway on (etcd --enable-grpc-gateway)", hopeless=True)
        return NotHere(f"HTTP {status}: {body[:100].decode(errors='replace').strip()}", hopeless=status == 400)
    said = failure.message or failure.error or f"HTTP {status}"
    if failure.code == _NOT_FOUND and "lease not found" in said:
        return LeaseGone(said)
    if failure.code == _FAILED_PRECONDITION and "lease already exists" in said:
        return LeaseExists(said)
    if failure.code == _FAILED_PRECONDITION and "authentication is not enabled" in said:
        return AuthenticationOff(said)
    if "user name is empty" in said:
        return TokenRejected("it asks for a user: set ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD")
    if failure.code == _UNAUTHENTICATED or "invalid auth token" in said or "revision in header is old" in said:
        return TokenRejected(said)
    if failure.code in _TRY_ELSEWHERE or "too many requests" in said:
        return NotHere(said)
    if "invalid user ID or password" in said:
        said = f"{said} (ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD)"
    return EtcdRefused(f"etcd refused: {said}")
