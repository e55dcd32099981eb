"""How do spans and log lines reach an OpenTelemetry collector?

Imported only with `OTEL_EXPORT_ENABLED=true` (the extra `otel`). OTLP over HTTP with protobuf, from background
threads of the SDK: a collector that is slow or gone costs dropped spans (queue of 2,048), never a waiting request.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator

from dynamo.runtime.logs import current_request, extra_of, level_name
from dynamo.runtime.tracing import AttributeValue, SpanProxy, TraceContext, check_status

logger = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "http://localhost:4318"  # where a collector listens for OTLP over HTTP
GRPC_PORT = 4317  # where collectors take gRPC, which is not spoken here
EXPORT_TIMEOUT_S = 5  # for all attempts to send a batch: how long a dead collector can hold up the end of a process

_PLAIN = (str, bool, int, float)
_formatter = logging.Formatter()
_STATUS = {"ok": trace.StatusCode.OK, "error": trace.StatusCode.ERROR, "unset": trace.StatusCode.UNSET}


class OtelRecorder:
    """Owns the SDK's providers. Spans go to the traces endpoint, log lines to the logs endpoint if one is set.

    `environ`: `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, `OTEL_EXPORTER_OTLP_LOGS_ENDPOINT` (full URLs),
    `OTEL_EXPORTER_OTLP_ENDPOINT` (base of both), `OTEL_SERVICE_NAME`, `OTEL_EXPORTER_OTLP_PROTOCOL`. The SDK reads
    the rest of its own variables, such as `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_TRACES_SAMPLER`.
    """

    def __init__(self, environ: Mapping[str, str], service_name: str) -> None:
        _check_protocol(environ)
        name = environ.get("OTEL_SERVICE_NAME") or service_name
        resource = Resource.create({"service.name": name})
        exporter = OTLPSpanExporter(endpoint=_endpoint(environ, "TRACES"), timeout=EXPORT_TIMEOUT_S)
        self._ids = _Ids()
        self._spans = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=True)
        self._spans.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._spans.get_tracer("dynamo")
        self._logs: LoggerProvider | None = None
        if environ.get("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"):
            self._logs = LoggerProvider(resource=resource)
            log_exporter = OTLPLogExporter(endpoint=_endpoint(environ, "LOGS"), timeout=EXPORT_TIMEOUT_S)
            self._logs.add_log_record_processor(BatchLogRecordProcessor(log_exporter))
            self._handler = _LogHandler(self._logs)
            logging.getLogger().addHandler(self._handler)

    def start_span(
        self,
        name: str,
        parent: TraceContext | None,
        attributes: Mapping[str, AttributeValue] | None,
        span_id: str | None,
    ) -> SpanProxy:
        """Begin a span of the SDK below `parent`."""
        self._ids.next_span_id = int(span_id, 16) if span_id else None
        span = self._tracer.start_span(name, context=_context(parent) if parent else None, attributes=attributes)
        own = span.get_span_context()
        state = parent.tracestate if parent else ""
        place = TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", int(own.trace_flags), state)
        return _OtelSpan(place, span)

    def close(self, timeout_s: float) -> None:
        """Send what is left, within about `timeout_s`."""
        self._spans.force_flush(int(timeout_s * 1000))
        self._spans.shutdown()
        if self._logs is not None:
            logging.getLogger().removeHandler(self._handler)
            self._logs.force_flush(int(timeout_s * 1000))
            self._logs.shutdown()


class _OtelSpan(SpanProxy):
    """A span of the SDK behind the calls users know."""

    __slots__ = ("_span",)

    def __init__(self, context: TraceContext, span: trace.Span) -> None:
        super().__init__(context)
        self._span = span

    def is_recording(self) -> bool:
        return self._span.is_recording()

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        self._span.set_attribute(key, value)

    def add_event(self, name: str, attrs: Mapping[str, AttributeValue] | None = None) -> None:
        self._span.add_event(name, attrs)

    def set_status(self, status: str, description: str | None = None) -> None:
        code = _STATUS[check_status(status)]
        self._span.set_status(code, description if code is trace.StatusCode.ERROR else None)

    def close(self) -> None:
        if self._span.is_recording():
            self._span.end()


class _Ids(IdGenerator):
    """Random ids, but for a span whose id was given out before it began."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()
        self.next_span_id: int | None = None

    def generate_span_id(self) -> int:
        given, self.next_span_id = self.next_span_id, None
        return given or self._random.getrandbits(64) or 1

    def generate_trace_id(self) -> int:
        return self._random.getrandbits(128) or 1


_SEVERITIES = (
    (logging.ERROR, SeverityNumber.ERROR),
    (logging.WARNING, SeverityNumber.WARN),
    (logging.INFO, SeverityNumber.INFO),
    (logging.DEBUG, SeverityNumber.DEBUG),
    (0, SeverityNumber.TRACE),
)


class _LogHandler(logging.Handler):
    """Sends log lines in the trace of the request they are about."""

    def __init__(self, provider: LoggerProvider) -> None:
        super().__init__()
        self._provider = provider

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("opentelemetry"):
            return  # what the exporter says about not reaching the collector must not be sent there
        ids = current_request.get()
        attributes = {
            key: value if isinstance(value, _PLAIN) else str(value) for key, value in extra_of(record).items()
        }
        if ids.x_request_id:
            attributes.setdefault("x_request_id", ids.x_request_id)
        if record.exc_info:
            attributes["exception.stacktrace"] = _formatter.formatException(record.exc_info)
        self._provider.get_logger(record.name).emit(
            LogRecord(
                timestamp=int(record.created * 1e9),
                context=_context(TraceContext(ids.trace_id, ids.span_id)) if ids.trace_id and ids.span_id else None,
                severity_text=level_name(record.levelno),
                severity_number=next(number for level, number in _SEVERITIES if record.levelno >= level),
                body=record.getMessage(),
                attributes=attributes,
            )
        )


def _context(place: TraceContext) -> otel_context.Context:
    span = trace.SpanContext(
        int(place.trace_id, 16),
        int(place.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(place.flags),
        trace_state=trace.TraceState.from_header([place.tracestate]) if place.tracestate else None,
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(span), otel_context.Context())


def _endpoint(environ: Mapping[str, str], signal: str) -> str:
    """The full URL for TRACES or LOGS. Raises ValueError that names the variable."""
    own = f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"
    names: Sequence[str] = (own, "OTEL_EXPORTER_OTLP_ENDPOINT")
    name = next((n for n in names if environ.get(n)), own)
    url = (environ.get(name) or DEFAULT_ENDPOINT).strip()
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"{name}: {url!r} is not an http or https URL")
    if parts.port == GRPC_PORT:
        logger.warning("%s: %s is the port of OTLP over gRPC; spans and logs are sent over HTTP (port 4318)", name, url)
    if name != own or not parts.path.strip("/"):
        return f"{url.rstrip('/')}/v1/{signal.lower()}"
    return url


def _check_protocol(environ: Mapping[str, str]) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        word = environ.get(name, "").strip()
        if word and word != "http/protobuf":
            raise ValueError(f"{name}: {word!r} is not supported; use http/protobuf (collectors take it on port 4318)")
