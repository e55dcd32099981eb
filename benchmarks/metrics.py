"""What does counting cost?

Nanoseconds a call, the loop's own cost taken off: our instruments beside those of `prometheus_client`, what an
endpoint counts for a request, and one scrape.

    python benchmarks/metrics.py

Last result (2 shared cores, Python 3.11, prometheus_client 0.26): see docs/reference/metrics.md.
"""

import time
from collections.abc import Callable

import prometheus_client

from dynamo.runtime.buckets import WORK_SECONDS
from dynamo.runtime.instruments import Counter, Histogram
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.tracing import TraceContext, parse_traceparent, start_span

CALLS = 200_000


def cost_ns(call: Callable[[], object]) -> float:
    """Nanoseconds a call: the best of five runs."""

    def run(what: Callable[[], object]) -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            what()
        return time.perf_counter() - began

    empty = min(run(lambda: None) for _ in range(5))
    return (min(run(call) for _ in range(5)) - empty) / CALLS * 1e9


def main() -> None:
    """Print a table."""
    registry = prometheus_client.CollectorRegistry()
    their_counter = prometheus_client.Counter("c", "c", ["l"], registry=registry).labels("x")
    their_histogram = prometheus_client.Histogram("h", "h", ["l"], registry=registry, buckets=WORK_SECONDS).labels("x")
    counter, histogram = Counter(), Histogram(WORK_SECONDS)
    metrics = Metrics(1)
    endpoint = metrics.endpoint("ns", "backend", "generate", labels=[("model", "tiny")])
    place = parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01") or TraceContext("", "")

    def value() -> None:
        counter.value += 1

    for name, call in {
        "counter.value += 1": value,
        "counter.inc()": counter.inc,
        "histogram.observe(0.3)": lambda: histogram.observe(0.3),
        "prometheus_client: counter.inc()": their_counter.inc,
        "prometheus_client: histogram.observe(0.3)": lambda: their_histogram.observe(0.3),
        "endpoint.started(500)": lambda: endpoint.started(500),
        "endpoint.sent(500)": lambda: endpoint.sent(500),
        "endpoint.finished(0.3, None)": lambda: endpoint.finished(0.3, None),
        "parse_traceparent": lambda: parse_traceparent(place.traceparent),
        "start_span, not recorded": lambda: start_span("x", place).close(),
    }.items():
        print(f"{name:44}{cost_ns(call):8.0f} ns")
    metrics.render()
    began = time.perf_counter()
    text = metrics.render()
    print(f"{'scrape of ' + str(len(text)) + ' bytes':44}{(time.perf_counter() - began) * 1e3:8.2f} ms")


if __name__ == "__main__":
    main()
