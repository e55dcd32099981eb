"""What the two ends of a response stream look like to the code above the request plane.

Both ends are plain calls. A worker pushes into a `ResponseStream`; the caller's `StreamSink` is called
straight from the socket's callback, with no task, queue or future in between. The async iterator that user
code sees is a thin face on a sink (`dynamo.runtime.client`).
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from dynamo.runtime.context import Context
from dynamo.runtime.errors import DynamoException


class StreamSink(Protocol):
    """The caller's end. Exactly one of `on_end` and `on_error` is called, last, unless the caller left first."""

    def on_item(self, item: msgspec.Raw) -> None:
        """One item of the stream, still encoded as msgpack: only the caller knows its type."""

    def on_end(self) -> None:
        """The worker finished the stream."""

    def on_error(self, error: DynamoException) -> None:
        """The stream failed; nothing follows."""

    def flush(self) -> None:
        """Called once after each run of the calls above that came with one read of the socket.

        A sink that writes onward collects in the calls above and writes here: one system call, however many
        steps of the engine arrived together.
        """


class ResponseStream(Protocol):
    """The worker's end. All that is sent in one turn of the event loop leaves in one frame."""

    context: Context

    def send(self, item: object) -> None:
        """Queue one item: anything msgspec can encode. Does nothing once the stream is closed."""

    def end(self) -> None:
        """Finish the stream. Later calls do nothing."""

    def fail(self, error: BaseException) -> None:
        """End the stream with an error; see `dynamo.runtime.errors.to_wire`. Later calls do nothing."""

    @property
    def closed(self) -> bool:
        """Whether the stream ended, failed, or lost its caller."""


PushHandler = Callable[[msgspec.Raw, ResponseStream], None]
"""A handler that answers by pushing: called once a request, returns at once, pushes whenever it has something."""
