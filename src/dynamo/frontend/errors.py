"""Which HTTP answer does an error get?

The one place that turns an exception into a status and a body. The body is OpenAI's error object with the flat
fields of ai-dynamo beside it, so clients of either kind find what they look for:

    {"error": {"message", "type", "param", "code"}, "message", "type", "code"}
"""

import http
from collections.abc import Mapping

import msgspec

from dynamo.frontend.bodies import ErrorBody, ErrorObject
from dynamo.runtime.errors import (
    Cancelled,
    CannotConnect,
    ConnectionTimeout,
    DeadlineExceeded,
    Disconnected,
    DynamoException,
    EngineShutdown,
    HttpError,
    InvalidArgument,
    RouterQueueLimitExceeded,
    SelectionServiceError,
    StreamIncomplete,
    WorkerOverloaded,
    WorkerUnavailable,
)

CLIENT_CLOSED_REQUEST = 499  # nginx's word for a client that left; nobody reads this answer, the metrics do
OVERLOADED = 529  # not in http.HTTPStatus; the interface users know answers it when workers are full


class RequestRefused(DynamoException):
    """The frontend refuses by itself. `code` is OpenAI's error code word, `allow` the methods of a 405."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.allow = allow


def model_not_found(model: str) -> RequestRefused:
    """404 for a model that no worker serves."""
    return RequestRefused(404, f"Model not found: {model!r}", param="model", code="model_not_found")


class ErrorAnswer(msgspec.Struct, frozen=True):
    """An error as it is answered. `error_type`, `failure_class` and `reason` are label values of metrics."""

    status: int
    body: bytes
    error_type: str
    failure_class: str
    reason: str
    headers: tuple[tuple[str, str], ...] = ()


class _Kind(msgspec.Struct, frozen=True):
    """What all errors of one status have in common: OpenAI's type word and three label values."""

    openai_type: str
    error_type: str
    failure_class: str
    reason: str


_INVALID = _Kind("invalid_request_error", "validation", "InvalidRequest", "request.invalid")
_NOT_FOUND = _Kind("invalid_request_error", "not_found", "NotFound", "request.not_found")
_OVERLOAD = _Kind("overloaded_error", "overload", "Overload", "worker.overload")
_INTERNAL = _Kind("server_error", "internal", "Internal", "internal.error")

_KINDS: Mapping[int, _Kind] = {
    404: _NOT_FOUND,
    408: _Kind("invalid_request_error", "validation", "InvalidRequest", "request.timeout"),
    413: _Kind("invalid_request_error", "validation", "InvalidRequest", "request.too_large"),
    415: _Kind("invalid_request_error", "validation", "UnsupportedMedia", "request.unsupported_media"),
    429: _OVERLOAD,
    CLIENT_CLOSED_REQUEST: _Kind("cancelled", "cancelled", "Cancelled", "client.cancelled"),
    501: _Kind("server_error", "not_implemented", "NotImplemented", "request.not_implemented"),
    503: _Kind("server_error", "unavailable", "Unavailable", "worker.unavailable"),
    504: _Kind("server_error", "response_timeout", "ResponseTimeout", "worker.response_timeout"),
    OVERLOADED: _OVERLOAD,
}

# The order matters only where one class is another's parent; none is.
_STATUS_BY_TYPE: Mapping[type[DynamoException], int] = {
    InvalidArgument: 400,
    WorkerUnavailable: 503,
    CannotConnect: 503,
    Disconnected: 503,
    EngineShutdown: 503,
    StreamIncomplete: 503,
    ConnectionTimeout: 504,
    DeadlineExceeded: 504,
    Cancelled: CLIENT_CLOSED_REQUEST,
}

_REASONS = {CLIENT_CLOSED_REQUEST: "Client Closed Request", OVERLOADED: "Site Overloaded"}


def reason_phrase(status: int) -> str:
    """The words after the number in the status line, and the flat `type` field."""
    try:
        return _REASONS.get(status) or http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def error_status(error: BaseException, overload_status: int = OVERLOADED) -> int:
    """The HTTP status of any exception."""
    if isinstance(error, RequestRefused):
        return error.status
    if isinstance(error, WorkerOverloaded | RouterQueueLimitExceeded):
        return overload_status
    if isinstance(error, HttpError):
        return error.code if 400 <= error.code <= 599 else 500
    if isinstance(error, SelectionServiceError):
        return error.status_code if 400 <= error.status_code <= 599 else 500
    return _STATUS_BY_TYPE.get(type(error), 500) if isinstance(error, DynamoException) else 500


def error_answer(error: BaseException, overload_status: int = OVERLOADED) -> ErrorAnswer:
    """Describe any exception to the client. What is not a `DynamoException` keeps its details to the log."""
    status = error_status(error, overload_status)
    overloaded = isinstance(error, WorkerOverloaded | RouterQueueLimitExceeded)
    kind = _OVERLOAD if overloaded else _KINDS.get(status) or (_INVALID if status < 500 else _INTERNAL)
    if isinstance(error, DynamoException):
        message = error.message or type(error).__name__
    else:
        message = "internal error; the server's log has the details"
    code = getattr(error, "code", None)  # OpenAI's word, except that HttpError's is its status
    phrase = reason_phrase(status)
    told = ErrorObject(
        message, kind.openai_type, getattr(error, "param", None), code if isinstance(code, str) else kind.error_type
    )
    body = msgspec.json.encode(ErrorBody(told, message, phrase, status))
    headers: list[tuple[str, str]] = []
    if isinstance(error, RequestRefused) and error.allow:
        headers.append(("Allow", error.allow))
    if overloaded or status in (429, 503):
        headers.append(("Retry-After", "1"))  # seconds; a worker frees a slot about once a second under load
    return ErrorAnswer(status, body, kind.error_type, kind.failure_class, kind.reason, tuple(headers))
