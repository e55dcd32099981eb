"""Why is a request to a service refused, and what does its caller read?

Every refusal is one exception with a status and one JSON body, `{"error": ..., "kind": ...}`, with the `field` that
is wrong where there is one. `error_answer` is the one place where the one becomes the other.
"""

import logging
from typing import Any, NamedTuple

from dynamo.runtime.errors import (
    DynamoException,
    InvalidArgument,
    RouterQueueLimitExceeded,
    SelectionServiceError,
    WorkerOverloaded,
    WorkerUnavailable,
)

log = logging.getLogger(__name__)

BAD_BODY = "bad_body"  # the `code` of an InvalidArgument about a body that has not the shape it should have
OVERLOADED = 529  # as the frontend says that all workers are busy
RETRY_AFTER_S = 1  # a worker's queue moves with each step of its engine


class Answer(NamedTuple):
    """A status, what the JSON body holds, and further headers."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def not_found(message: str) -> SelectionServiceError:
    """What was named does not exist."""
    return SelectionServiceError(message, "not_found", 404)


def conflict(message: str) -> SelectionServiceError:
    """It does not fit what there is."""
    return SelectionServiceError(message, "conflict", 409)


def not_ready(message: str) -> SelectionServiceError:
    """There is nobody who could."""
    return SelectionServiceError(message, "not_ready", 503)


def full(message: str) -> SelectionServiceError:
    """There is no room for one more."""
    return SelectionServiceError(message, "full", 507)


def error_answer(error: Exception) -> Answer:
    """What a caller reads of an error."""
    if isinstance(error, InvalidArgument):
        body = {"error": error.message, "kind": "invalid"}
        if error.param:
            body["field"] = error.param
        return Answer(422 if error.code == BAD_BODY else 400, body, {})
    if isinstance(error, SelectionServiceError):
        return Answer(error.status_code, {"error": error.message, "kind": error.kind}, {})
    if isinstance(error, WorkerUnavailable):
        return Answer(503, {"error": error.message, "kind": "not_ready"}, {})
    if isinstance(error, WorkerOverloaded | RouterQueueLimitExceeded):
        body = {"error": error.message, "kind": "overloaded", **error.details()}
        return Answer(OVERLOADED, body, {"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, TimeoutError):
        return Answer(504, {"error": str(error) or "it took too long", "kind": "timeout"}, {})
    message = error.message if isinstance(error, DynamoException) else f"{type(error).__name__}: {error}"
    log.exception("a request failed", exc_info=error)
    return Answer(500, {"error": message, "kind": "internal"}, {})


def as_selection_error(error: DynamoException) -> DynamoException:
    """The same for a caller in this process: what is not about its arguments is a SelectionServiceError."""
    if isinstance(error, InvalidArgument | SelectionServiceError):
        return error
    answer = error_answer(error)
    return SelectionServiceError(error.message, answer.body["kind"], answer.status)
