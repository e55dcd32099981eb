"""What can go wrong between a caller and a worker, as one tree.

DynamoException
├── Unknown                     the worker raised something that has no type of its own
├── InvalidArgument             the request itself is wrong; sending it elsewhere gives the same answer
├── CannotConnect               no connection to the worker could be made; nothing was sent
├── Disconnected                the connection broke while the request was in flight
├── ConnectionTimeout           connecting, or an answer, took longer than its deadline
├── DeadlineExceeded            the time that the caller gave the whole request is over
├── Cancelled                   the caller gave up
├── EngineShutdown              the worker is leaving or its engine died
├── StreamIncomplete            the stream ended without its end mark
├── WorkerUnavailable           there is no worker to send to
├── WorkerOverloaded            the worker has as many requests as it admits
├── DiscoveryError              the discovery store cannot be used, or a key in it is taken
├── RouterQueueLimitExceeded    the router's queue is full for this class of request
└── SelectionServiceError       the stand-alone selection service refused

Names are those that users of `dynamo.llm.exceptions` know. A type crosses the wire by its name.
"""

from typing import Any, ClassVar, Final

import msgspec

UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not what they should be: malformed, no UTF-8, or nested without end."""


class DynamoException(Exception):  # noqa: N818 - the name users know
    """Root of all errors that cross a process boundary.

    `migratable` says whether the same request may succeed on another worker, and so whether sending it
    there is right.
    """

    migratable: ClassVar[bool] = False

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    def details(self) -> dict[str, Any]:
        """Fields beside the message that must survive the wire."""
        return {}


class Unknown(DynamoException):
    """The worker raised something that has no type of its own."""


class InvalidArgument(DynamoException):
    """The request is wrong. `param` names the field and `code` is OpenAI's word for the case, where there is one."""

    def __init__(self, message: str = "", param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def details(self) -> dict[str, Any]:
        return {name: value for name, value in (("param", self.param), ("code", self.code)) if value}


class CannotConnect(DynamoException):
    """No connection to the worker could be made; nothing was sent."""

    migratable = True


class Disconnected(DynamoException):
    """The connection broke while the request was in flight."""

    migratable = True


class ConnectionTimeout(DynamoException):
    """Connecting, or waiting for an answer, took longer than its deadline."""

    migratable = True


class DeadlineExceeded(DynamoException):
    """The time that the caller gave the whole request is over. Elsewhere it would be, too."""


class Cancelled(DynamoException):
    """The caller gave up."""


class EngineShutdown(DynamoException):
    """The worker is leaving, or its engine died."""

    migratable = True


class StreamIncomplete(DynamoException):
    """The stream ended without its end mark."""

    migratable = True


class WorkerUnavailable(DynamoException):
    """There is no worker to send to."""


class WorkerOverloaded(DynamoException):
    """The worker already has as many requests as it admits."""

    migratable = True


class DiscoveryError(DynamoException):
    """The discovery store cannot be read or written, or another process holds the key."""


class RouterQueueLimitExceeded(DynamoException):
    """The router's queue is full for this class of request."""

    def __init__(
        self,
        message: str = "",
        policy_class: str = "default",
        limit_kind: str = "requests",
        current: int = 0,
        limit: int = 0,
    ) -> None:
        super().__init__(
            message or f"router queue of class {policy_class!r} is full: {current} of {limit} {limit_kind}"
        )
        self.policy_class = policy_class
        self.limit_kind = limit_kind
        self.current = current
        self.limit = limit

    def details(self) -> dict[str, Any]:
        return {
            "policy_class": self.policy_class,
            "limit_kind": self.limit_kind,
            "current": self.current,
            "limit": self.limit,
        }


class SelectionServiceError(DynamoException):
    """The stand-alone selection service refused. `kind` is its error word, `status_code` its HTTP status."""

    def __init__(self, message: str = "", kind: str = "internal", status_code: int = 500) -> None:
        super().__init__(message)
        self.kind = kind
        self.status_code = status_code

    def details(self) -> dict[str, Any]:
        return {"kind": self.kind, "status_code": self.status_code}


MAX_HTTP_ERROR_MESSAGE = 8192  # characters; longer messages are cut, as in the interface users know


class HttpError(DynamoException):
    """A handler's own choice of HTTP status. `message` is cut to 8192 characters."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message[:MAX_HTTP_ERROR_MESSAGE])
        self.code = code

    def details(self) -> dict[str, Any]:
        return {"code": self.code}


class WireError(msgspec.Struct, omit_defaults=True):
    """An error as it travels: the type's name, the message, and the type's own fields."""

    kind: str
    message: str
    details: dict[str, Any] = {}


_BY_NAME: dict[str, type[DynamoException]] = {
    cls.__name__: cls
    for cls in (
        Unknown,
        InvalidArgument,
        CannotConnect,
        Disconnected,
        ConnectionTimeout,
        DeadlineExceeded,
        Cancelled,
        EngineShutdown,
        StreamIncomplete,
        WorkerUnavailable,
        WorkerOverloaded,
        DiscoveryError,
        RouterQueueLimitExceeded,
        SelectionServiceError,
        HttpError,
    )
}


def to_wire(error: BaseException) -> WireError:
    """Describe any exception for the other side: a room's own type as the nearest that all rooms know, a foreign type
    as `Unknown` with its name in the message."""
    if isinstance(error, DynamoException):
        known = next((cls for cls in type(error).__mro__ if _BY_NAME.get(cls.__name__) is cls), type(error))
        return WireError(known.__name__, error.message, error.details())
    return WireError(Unknown.__name__, f"{type(error).__name__}: {error}")


def from_wire(wire: WireError) -> DynamoException:
    """The exception that `to_wire` described. A name or fields that this version does not know give `Unknown`."""
    cls = _BY_NAME.get(wire.kind, Unknown)
    try:
        return cls(message=wire.message, **wire.details)
    except TypeError:
        return Unknown(f"{wire.kind}: {wire.message}")
