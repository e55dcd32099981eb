"""What has this process counted, and how is it asked?

`Metrics` is one per runtime and owns its families (`dynamo.runtime.instruments`), a `CollectorRegistry` of
`prometheus_client` for what users bring along, and the texts of engines that already speak Prometheus. Names and
labels are those that dashboards for Dynamo query (`dynamo.prometheus_names`). `prometheus_client` is imported at
the first scrape, not with the runtime: it costs 100 ms.
"""

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dynamo import prometheus_names as names
from dynamo.runtime import buckets
from dynamo.runtime.errors import Cancelled
from dynamo.runtime.instruments import Counter, Family, Gauge, Histogram, Instrument, Kind, LabelPairs, label_pairs
from dynamo.runtime.logs import Rarely

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

logger = logging.getLogger(__name__)
rarely = Rarely(logger)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

TextSource = Callable[[], str | bytes]
"""Gives metrics that are already in the text format, such as an engine's own. Called at each scrape."""

T = TypeVar("T", Counter, Gauge, Histogram)


class Metrics:
    """All metrics of one runtime. `instance_id` is shown as the label `worker_id`, in hexadecimal.

    Each helper gives a `Family`; `.labels(...)` gives the series to count on. Asking again for a name gives the
    same family. Raises ValueError for a name that is taken by another kind of metric.
    """

    def __init__(self, instance_id: int) -> None:
        self.instance_id = instance_id
        self.worker_label: LabelPairs = ((names.labels.WORKER_ID, f"{instance_id:x}"),)
        self._families: dict[str, Family[Any]] = {}
        self._texts: list[tuple[TextSource, LabelPairs]] = []
        self._on_scrape: list[Callable[[], None]] = []
        started = time.monotonic()
        uptime = self.gauge(names.distributed_runtime.UPTIME_SECONDS, "Seconds since the runtime started")
        uptime.labels().set_function(lambda: time.monotonic() - started)

    def counter(
        self,
        name: str,
        help: str,  # noqa: A002 - Prometheus' word
        labels: Sequence[str] = (),
        *,
        prefix: str = names.name_prefix.COMPONENT,
        base: LabelPairs | None = None,
    ) -> Family[Counter]:
        """`{prefix}_{name}`, with the label `worker_id` unless `base` gives others. Names end in `_total`."""
        return self._family(prefix, name, help, "counter", Counter, labels, base)

    def gauge(
        self,
        name: str,
        help: str,  # noqa: A002 - Prometheus' word
        labels: Sequence[str] = (),
        *,
        prefix: str = names.name_prefix.COMPONENT,
        base: LabelPairs | None = None,
    ) -> Family[Gauge]:
        """As `counter`, for a value that goes up and down."""
        return self._family(prefix, name, help, "gauge", Gauge, labels, base)

    def histogram(
        self,
        name: str,
        help: str,  # noqa: A002 - Prometheus' word
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float] = buckets.WORK_SECONDS,
        prefix: str = names.name_prefix.COMPONENT,
        base: LabelPairs | None = None,
    ) -> Family[Histogram]:
        """As `counter`, for a distribution; `bounds` are the upper ends of its buckets, ascending."""
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"metric {name!r}: bucket bounds must ascend, got {list(bounds)}")
        fixed = tuple(float(b) for b in bounds)
        return self._family(prefix, name, help, "histogram", lambda: Histogram(fixed), labels, base)

    def _family(
        self,
        prefix: str,
        name: str,
        help: str,  # noqa: A002 - Prometheus' word
        kind: Kind,
        make: Callable[[], Instrument],
        labels: Sequence[str],
        base: LabelPairs | None,
    ) -> Family[Instrument]:
        full = f"{prefix}_{name}" if prefix else name
        family = Family(full, help, kind, make, labels, self.worker_label if base is None else base)
        known = self._families.get(full)
        if known is None:
            self._families[full] = family
        elif known.kind != kind:
            raise ValueError(f"metric {full!r} is already a {known.kind}; it cannot be a {kind} too")
        else:
            family.share(known)
        return family

    def endpoint(
        self,
        namespace: str,
        component: str,
        endpoint: str,
        *,
        instance_id: int | None = None,
        labels: Iterable[tuple[str, object]] | Mapping[str, object] | None = None,
    ) -> "EndpointMetrics":
        """The counters of one served endpoint. `labels` are the `metrics_labels` of `serve_endpoint`."""
        iid = self.instance_id if instance_id is None else instance_id
        return EndpointMetrics(self, endpoint_labels(namespace, component, endpoint, iid) + label_pairs(labels))

    def scope(
        self, namespace: str, component: str | None = None, endpoint: str | None = None, instance_id: int | None = None
    ) -> "ScopedMetrics":
        """Factories for a user's own metrics at a namespace, component or endpoint (`Endpoint.metrics`)."""
        iid = self.instance_id if instance_id is None else instance_id
        return ScopedMetrics(self, endpoint_labels(namespace, component, endpoint, iid))

    @cached_property
    def work_handler(self) -> "WorkHandlerMetrics":
        """What the listening side of the request plane counts."""
        return WorkHandlerMetrics(self)

    @cached_property
    def request_plane(self) -> "RequestPlaneMetrics":
        """What the calling side of the request plane counts."""
        return RequestPlaneMetrics(self)

    @cached_property
    def transport(self) -> "TransportMetrics":
        """What the sockets of the request plane count."""
        return TransportMetrics(self)

    @cached_property
    def nats(self) -> "NatsMetrics":
        """What the connection to NATS counts."""
        return NatsMetrics(self)

    @cached_property
    def admission(self) -> "AdmissionMetrics":
        """What a worker's admission limit counts."""
        return AdmissionMetrics(self)

    def add_text_source(
        self, source: TextSource, labels: Iterable[tuple[str, object]] | Mapping[str, object] | None = None
    ) -> None:
        """Append `source()` to every scrape, with `labels` added to the series that lack them."""
        self._texts.append((source, label_pairs(labels)))

    @cached_property
    def registry(self) -> "CollectorRegistry":
        """Where users register collectors of `prometheus_client`; ours are in it too."""
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry()
        registry.register(_Families(self))
        return registry

    def drop(self, name: str, pairs: LabelPairs, *, prefix: str = names.name_prefix.COMPONENT) -> None:
        """Forget one series: its subject is gone."""
        family = self._families.get(f"{prefix}_{name}" if prefix else name)
        if family is not None:
            family.drop(pairs)

    def on_scrape(self, callback: Callable[[], None]) -> None:
        """Call this before each scrape: what is cheap to keep as a plain number is brought into series only then."""
        self._on_scrape.append(callback)

    def off_scrape(self, callback: Callable[[], None]) -> None:
        """Call it no more."""
        if callback in self._on_scrape:
            self._on_scrape.remove(callback)

    def collect(self) -> Iterator["Metric"]:
        """Every family that has a series."""
        for callback in tuple(self._on_scrape):
            callback()
        for family in sorted(self._families.values(), key=lambda f: f.name):
            if family.has_series:
                yield family.collect()

    def render(self) -> bytes:
        """Everything in Prometheus' text format. A source that fails costs its own lines only."""
        from prometheus_client import generate_latest

        parts = [generate_latest(self.registry)]
        for source, labels in self._texts:
            try:
                text = source()
            except Exception as e:  # noqa: BLE001 - a foreign callback must not take /metrics down; it is counted
                self.counter("metrics_source_errors_total", "Text sources that failed during a scrape").labels().inc()
                rarely.warning("text-source", "a source of metrics failed: %s: %s", type(e).__name__, e)
                continue
            text = text.decode() if isinstance(text, bytes) else text
            parts.append(add_labels(text, labels).rstrip("\n").encode() + b"\n" if text.strip() else b"")
        return b"".join(parts)


class _Families:
    """The collector that `prometheus_client` asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator["Metric"]:
        return self._metrics.collect()


class EndpointMetrics:
    """The counters of one endpoint, bound once: what `dynamo.runtime.routes.RouteStats` asks for.

    Each call costs well under 1 µs (`benchmarks/metrics.py`).
    """

    __slots__ = (
        "_errors",
        "_pairs",
        "cancellations",
        "duration",
        "inflight",
        "request_bytes",
        "requests",
        "response_bytes",
    )

    def __init__(self, metrics: Metrics, pairs: LabelPairs) -> None:
        n = names.work_handler
        self._pairs = pairs
        counter, gauge = metrics.counter, metrics.gauge
        self.requests = counter(n.REQUESTS_TOTAL, "Requests that were received").series(pairs)
        self.duration = metrics.histogram(
            n.REQUEST_DURATION_SECONDS, "Seconds from a request's arrival to the end of its stream"
        ).series(pairs)
        self.inflight = gauge(n.INFLIGHT_REQUESTS, "Requests being worked on").series(pairs)
        self.request_bytes = counter(n.REQUEST_BYTES_TOTAL, "Bytes of requests").series(pairs)
        self.response_bytes = counter(n.RESPONSE_BYTES_TOTAL, "Bytes of responses").series(pairs)
        self.cancellations = counter(n.CANCELLATION_TOTAL, "Requests that their caller gave up").series(pairs)
        self._errors = counter(n.ERRORS_TOTAL, "Requests that failed, by the type of the error")

    def started(self, request_bytes: int) -> None:
        """A request of so many bytes arrived."""
        self.requests.value += 1
        self.inflight.value += 1
        self.request_bytes.value += request_bytes

    def sent(self, response_bytes: int) -> None:
        """A frame of so many bytes left."""
        self.response_bytes.value += response_bytes

    def finished(self, seconds: float, error: str | None) -> None:
        """A stream ended after so many seconds; `error` is the type's name of what ended it, if anything did."""
        self.inflight.value -= 1
        self.duration.observe(seconds)
        if error is not None and error != Cancelled.__name__:  # a cancel is counted by `cancelled`
            self._errors.series((*self._pairs, (names.work_handler.ERROR_TYPE_LABEL, error))).value += 1

    def cancelled(self) -> None:
        """The caller stopped or killed a request."""
        self.cancellations.value += 1


class ScopedMetrics:
    """Factories for metrics of the user's own, labelled with the place they are for (`Endpoint.metrics`)."""

    def __init__(self, metrics: Metrics, base: LabelPairs) -> None:
        self._metrics = metrics
        self._base = base

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Family[Counter]:  # noqa: A002
        """`dynamo_component_{name}`. Count with `.labels(...).inc()`."""
        return self._metrics.counter(name, help, labels, base=self._base)

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Family[Gauge]:  # noqa: A002
        """`dynamo_component_{name}`. Set with `.labels(...).set(value)`."""
        return self._metrics.gauge(name, help, labels, base=self._base)

    def histogram(
        self,
        name: str,
        help: str,  # noqa: A002 - Prometheus' word
        labels: Sequence[str] = (),
        bounds: Sequence[float] = buckets.WORK_SECONDS,
    ) -> Family[Histogram]:
        """`dynamo_component_{name}`. Count with `.labels(...).observe(value)`."""
        return self._metrics.histogram(name, help, labels, bounds=bounds, base=self._base)

    def register_prometheus_expfmt_callback(self, callback: TextSource) -> None:
        """Append what `callback` gives (text format) to `/metrics`, labelled with this place."""
        self._metrics.add_text_source(callback, self._base)

    def register_prometheus_typed_callback(self, callback: Callable[[], object]) -> None:
        """Accepted, with a warning: typed families are for metrics over OTLP, which this version does not send."""
        logger.warning("metrics are not exported over OTLP in this version; use register_prometheus_expfmt_callback")


class _Group:
    """Metrics of a process without labels. One appears in a scrape once it was used."""

    prefix: str

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def _counter(self, name: str, help: str) -> Counter:  # noqa: A002 - Prometheus' word
        return self._metrics.counter(name, help, prefix=self.prefix, base=()).labels()

    def _gauge(self, name: str, help: str) -> Gauge:  # noqa: A002 - Prometheus' word
        return self._metrics.gauge(name, help, prefix=self.prefix, base=()).labels()

    def _histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:  # noqa: A002
        return self._metrics.histogram(name, help, bounds=bounds, prefix=self.prefix, base=()).labels()


class WorkHandlerMetrics(_Group):
    """The listening side of the request plane: `dynamo_work_handler_*`."""

    prefix = names.name_prefix.WORK_HANDLER

    @cached_property
    def network_transit(self) -> Histogram:
        return self._histogram(
            names.work_handler.NETWORK_TRANSIT_SECONDS,
            "Seconds from the caller's send to the arrival here, by the clocks of both machines",
            buckets.TRANSIT_SECONDS,
        )

    @cached_property
    def time_to_first_response(self) -> Histogram:
        return self._histogram(
            names.work_handler.TIME_TO_FIRST_RESPONSE_SECONDS,
            "Seconds from a request's arrival to its first response item",
            buckets.FIRST_RESPONSE_SECONDS,
        )

    @cached_property
    def enqueue_rejected(self) -> Counter:
        return self._counter(
            names.work_handler.ENQUEUE_REJECTED_TOTAL, "Requests refused because the endpoint was closing"
        )


class RequestPlaneMetrics(_Group):
    """The calling side of the request plane: `dynamo_request_plane_*`."""

    prefix = names.name_prefix.REQUEST_PLANE

    @cached_property
    def roundtrip_ttft(self) -> Histogram:
        return self._histogram(
            names.request_plane.ROUNDTRIP_TTFT_SECONDS,
            "Seconds from the send to the first response item",
            buckets.ROUNDTRIP_SECONDS,
        )

    @cached_property
    def inflight(self) -> Gauge:
        return self._gauge(names.request_plane.INFLIGHT_REQUESTS, "Requests sent whose stream has not ended")


class TransportMetrics(_Group):
    """The sockets of the request plane: `dynamo_transport_tcp_*`."""

    prefix = names.name_prefix.TRANSPORT

    @cached_property
    def bytes_sent(self) -> Counter:
        return self._counter(names.transport.tcp.BYTES_SENT_TOTAL, "Bytes written to sockets")

    @cached_property
    def bytes_received(self) -> Counter:
        return self._counter(names.transport.tcp.BYTES_RECEIVED_TOTAL, "Bytes read from sockets")

    @cached_property
    def errors(self) -> Counter:
        return self._counter(names.transport.tcp.ERRORS_TOTAL, "Connections that failed or broke")

    @cached_property
    def connections(self) -> Gauge:
        return self._gauge(names.transport.tcp.POOL_ACTIVE, "Open connections to workers")


class NatsMetrics(_Group):
    """The connection to NATS, if there is one: `dynamo_transport_nats_*`."""

    prefix = names.name_prefix.TRANSPORT

    @cached_property
    def errors(self) -> Counter:
        return self._counter(
            names.transport.nats.ERRORS_TOTAL, "Connections that failed or broke, and messages refused or dropped"
        )

    @cached_property
    def connected(self) -> Gauge:
        return self._gauge(names.transport.nats.CONNECTED, "Whether there is a connection (1 or 0)")


class AdmissionMetrics(_Group):
    """A worker's admission limit: `dynamo_engine_request` and its two companions."""

    prefix = "dynamo"

    @cached_property
    def engine_requests(self) -> Gauge:
        return self._gauge("engine_request", "Requests in the engine (--engine-request-limit)")

    @cached_property
    def queued_requests(self) -> Gauge:
        return self._gauge("request_queue", "Requests waiting for the engine (--dynamo-request-queue-limit)")

    @cached_property
    def rejected(self) -> Counter:
        return self._counter("rejection_request_total", "Requests refused: engine and queue were full")


def endpoint_labels(namespace: str, component: str | None, endpoint: str | None, instance_id: int) -> LabelPairs:
    """The base labels of a place, in the order in which they are shown."""
    pairs = []
    if component is not None:
        pairs.append((names.labels.COMPONENT, component))
    if endpoint is not None:
        pairs.append((names.labels.ENDPOINT, endpoint))
    return (*pairs, (names.labels.NAMESPACE, namespace), (names.labels.WORKER_ID, f"{instance_id:x}"))


_SAMPLE: Final = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?( .*)")
_LABEL: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="(?:[^"\\]|\\.)*"')


def add_labels(text: str, labels: LabelPairs) -> str:
    """Prometheus text with `labels` on every series that does not have a label of that name."""
    if not labels:
        return text
    added = [(name, f'{name}="{_escape(value)}"') for name, value in labels]
    lines = []
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.fullmatch(line)
        if match is None:
            lines.append(line)
            continue
        name, inside, value = match.groups()
        inside = (inside or "").rstrip(",")
        present = set(_LABEL.findall(inside))
        pairs = [inside] if inside else []
        pairs += [pair for key, pair in added if key not in present]
        lines.append(f"{name}{{{','.join(pairs)}}}{value}")
    return "\n".join(lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
