"""How does one ask the served model, and read the answer as it comes?

A small synchronous client of `/v1/chat/completions` on the standard library alone: it loads in no time, and closing
the connection is all it takes to stop an answer.
"""

import contextlib
import http.client
import json
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import msgspec

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # between two pieces of one answer; a long prompt on a slow machine takes minutes


class ApiError(Exception):
    """The service refused or broke off. `status` is the HTTP status, 0 if the answer broke while streaming."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer, as the service counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatClient:
    """Asks one model at one address."""

    def __init__(self, host: str, port: int, model: str) -> None:
        self.model = model
        self._host = host
        self._port = port
        self.usage: Usage | None = None
        """Of the last answer that came to its end."""

    def models(self) -> list[str]:
        """Names of the models that are served now.

        Raises:
            OSError: nobody listens there (yet).
            ApiError: it does not answer as it should.
        """
        with self._connection(CONNECT_TIMEOUT_S) as connection:
            connection.request("GET", "/v1/models")
            body = _checked(connection.getresponse()).read()
        return [model["id"] for model in json.loads(body)["data"]]

    def instances(self, endpoint: str) -> int:
        """How many workers the service has found that serve an endpoint of this name.

        Raises:
            OSError, ApiError: as `models`.
        """
        with self._connection(CONNECT_TIMEOUT_S) as connection:
            connection.request("GET", "/health")
            body = _checked(connection.getresponse()).read()
        return sum(instance["endpoint"] == endpoint for instance in json.loads(body).get("instances", []))

    def stream(self, messages: Sequence[dict[str, Any]], **fields: Any) -> Generator[str, None, None]:
        """The answer to `messages`, in pieces of text. Leaving the iteration early stops the answer.

        Raises:
            ApiError: the service refused, or broke off in the middle.
            OSError: the connection broke.
        """
        self.usage = None
        body = {"model": self.model, "messages": list(messages), "stream": True} | fields
        body["stream_options"] = {"include_usage": True}
        with self._connection(READ_TIMEOUT_S) as connection:
            head = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), head)
            for chunk in _events(_checked(connection.getresponse())):
                if usage := chunk.get("usage"):
                    self.usage = msgspec.convert(usage, Usage)
                for choice in chunk.get("choices", []):
                    if text := choice.get("delta", {}).get("content"):
                        yield text

    @contextlib.contextmanager
    def _connection(self, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            yield connection
        except http.client.HTTPException as e:
            raise ApiError(0, f"the answer is not HTTP: {e!r}") from e
        finally:
            connection.close()


def _checked(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status == http.client.OK:
        return response
    raise ApiError(response.status, error_message(response.read()) or response.reason)


def error_message(body: bytes) -> str:
    """What an error body says: OpenAI's `{"error": {"message"}}`, a flat `{"message"}`, or the text as it is."""
    try:
        value = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")[:1000]
    if isinstance(value, dict):
        inner = value.get("error", value)
        message = inner.get("message") if isinstance(inner, dict) else inner
        if isinstance(message, str):
            return message
    return body.decode(errors="replace")[:1000]


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON values of a server-sent event stream, up to `[DONE]`."""
    event = comment = ""
    for raw in response:
        line = raw.decode(errors="replace").rstrip("\r\n")
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            event = value
        elif field == "" and line:  # a comment: keep-alive, or what an error event says
            comment = value
        elif field == "data":
            if value == "[DONE]":
                return
            if event == "error" or '"error"' in value[:20]:
                raise ApiError(0, error_message(value.encode()))
            yield json.loads(value)
        elif not line:
            if event == "error":
                raise ApiError(0, comment.strip('"') or "the answer broke off")
            event = comment = ""
    raise ApiError(0, "the answer broke off before its end")
