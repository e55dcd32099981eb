"""Which trace does this work belong to, and who is told about it?

Reading and making W3C trace headers (https://www.w3.org/TR/trace-context/) needs no library and is always on.
Spans are recorded only with `OTEL_EXPORT_ENABLED=true`: then `start_span` gives a span of the OpenTelemetry SDK
that leaves over OTLP/HTTP. Else it gives a `SpanProxy` that does nothing, at the price of one call.
"""

import os
import random
import re
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from dynamo.runtime.options import env_bool

AttributeValue = str | bool | int | float | list[str] | list[bool] | list[int] | list[float]

_NO_TRACE = "0" * 32
_NO_SPAN = "0" * 16
_MAX_TRACESTATE = 512  # characters; the recommendation asks to propagate at least so many, longer is dropped whole

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)

_random = random.Random()  # seeded by the system; ids are no secrets, and a system call each would cost 1 µs
os.register_at_fork(after_in_child=_random.seed)


class TraceContext(NamedTuple):
    """A place in a trace: 32 and 16 hex digits, flags (bit 0: sampled), and what vendors pass along."""

    trace_id: str
    span_id: str
    flags: int = 1
    tracestate: str = ""

    @property
    def traceparent(self) -> str:
        """The header's value."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    def child(self) -> "TraceContext":
        """The same trace, with a span of its own."""
        return TraceContext(self.trace_id, new_span_id(), self.flags, self.tracestate)

    def headers(self) -> dict[str, str]:
        """What to send to the next hop."""
        if self.tracestate:
            return {"traceparent": self.traceparent, "tracestate": self.tracestate}
        return {"traceparent": self.traceparent}


def new_trace_id() -> str:
    """32 random hex digits, not all zero."""
    return (_random.getrandbits(128) or 1).to_bytes(16).hex()  # half the price of formatting the number


def new_span_id() -> str:
    """16 random hex digits, not all zero."""
    return (_random.getrandbits(64) or 1).to_bytes(8).hex()


def new_trace() -> TraceContext:
    """The root of a new trace, sampled."""
    return TraceContext(new_trace_id(), new_span_id())


def parse_traceparent(text: str | None, tracestate: str | None = None) -> TraceContext | None:
    """The place that the headers name, or None if they are absent or malformed: then a new trace begins.

    A version above 00 may carry more fields, which are ignored; version ff is invalid, as are zero ids.
    """
    if not text:
        return None
    found = _TRACEPARENT.fullmatch(text.strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == "ff" or (more and version == "00") or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    state = (tracestate or "").strip()
    return TraceContext(trace_id, span_id, int(flags, 16), state if len(state) <= _MAX_TRACESTATE else "")


def extract(headers: Mapping[str, str]) -> TraceContext | None:
    """The place named by `traceparent` and `tracestate` among `headers`, whose names are lower-case."""
    return parse_traceparent(headers.get("traceparent"), headers.get("tracestate"))


class SpanProxy:
    """A piece of work with a name. This base class only knows its place; nothing is recorded."""

    __slots__ = ("context",)

    def __init__(self, context: TraceContext) -> None:
        self.context = context

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return self.context.trace_id

    @property
    def span_id(self) -> str:
        """16 hex digits."""
        return self.context.span_id

    def is_recording(self) -> bool:
        """Whether anybody will see this span."""
        return False

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        """Set one attribute; a later value replaces an earlier one."""

    def add_event(self, name: str, attrs: Mapping[str, AttributeValue] | None = None) -> None:
        """Note that something happened now."""

    def set_status(self, status: str, description: str | None = None) -> None:
        """`ok`, `error` or `unset`. Raises ValueError for another word, whether spans are recorded or not."""
        check_status(status)

    def close(self) -> None:
        """The work is over. Later calls on this span do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.set_status("error", f"{type(error).__name__}: {error}")
        self.close()


def check_status(status: str) -> str:
    """The status word in lower case. Raises ValueError for one that OpenTelemetry does not know."""
    word = status.strip().lower()
    if word not in ("ok", "error", "unset"):
        raise ValueError(f"span status {status!r} is not one of ok, error, unset")
    return word


class Recorder(Protocol):
    """What makes real spans (`dynamo.runtime.otel`)."""

    def start_span(
        self,
        name: str,
        parent: TraceContext | None,
        attributes: Mapping[str, AttributeValue] | None,
        span_id: str | None,
    ) -> SpanProxy:
        """Begin a span below `parent`, or a trace."""

    def close(self, timeout_s: float) -> None:
        """Send what is left, within `timeout_s`."""


_recorder: Recorder | None = None
_configured = False


def configure_tracing(service_name: str = "dynamo") -> bool:
    """Read `OTEL_EXPORT_ENABLED` and, if it is true, start exporting. Gives whether it is. Later calls do nothing.

    `OTEL_SERVICE_NAME` wins over `service_name`. Raises ValueError for a wrong variable, and RuntimeError naming
    the extra to install when OpenTelemetry is missing: tracing that was asked for is never silently off.
    """
    global _recorder, _configured
    if not _configured:
        if env_bool("OTEL_EXPORT_ENABLED", False):
            _recorder = _load_recorder(service_name)
        _configured = True
    return _recorder is not None


def _load_recorder(service_name: str) -> Recorder:
    try:
        from dynamo.runtime import otel
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith("opentelemetry"):
            raise
        raise RuntimeError(
            "OTEL_EXPORT_ENABLED is true but OpenTelemetry is not installed: pip install 'ai-dynamo[otel]', "
            "or unset OTEL_EXPORT_ENABLED"
        ) from None
    return otel.OtelRecorder(os.environ, service_name)


def shutdown_tracing(timeout_s: float = 5.0) -> None:
    """Send what is left and stop exporting; blocks for at most `timeout_s`. `configure_tracing` starts anew."""
    global _recorder, _configured
    recorder, _recorder, _configured = _recorder, None, False
    if recorder is not None:
        recorder.close(timeout_s)


def start_span(
    name: str,
    parent: TraceContext | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    span_id: str | None = None,
) -> SpanProxy:
    """Begin a span below `parent`, or a new trace without one. Close it, or use it as a context manager.

    `span_id` is for a hop that had to tell others its span's id before the span began.
    """
    if _recorder is not None:
        return _recorder.start_span(name, parent, attributes, span_id)
    if parent is None:
        return SpanProxy(TraceContext(new_trace_id(), span_id or new_span_id()))
    return SpanProxy(TraceContext(parent.trace_id, span_id or new_span_id(), parent.flags, parent.tracestate))


def die_on_wrong_configuration(service_name: str) -> None:
    """For programs: `configure_tracing`, or one line on stderr and exit status 2."""
    try:
        configure_tracing(service_name)
    except (RuntimeError, ValueError) as e:
        sys.stderr.write(f"error: {e}\n")
        raise SystemExit(2) from None


__all__ = [
    "AttributeValue",
    "SpanProxy",
    "TraceContext",
    "check_status",
    "configure_tracing",
    "die_on_wrong_configuration",
    "extract",
    "new_span_id",
    "new_trace",
    "new_trace_id",
    "parse_traceparent",
    "shutdown_tracing",
    "start_span",
]
