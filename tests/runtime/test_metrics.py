"""What is counted, under which names and labels, and at what cost."""

import asyncio
import math
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Counter as ForeignCounter
from prometheus_client.parser import text_string_to_metric_families

from dynamo.runtime.buckets import DEFAULT_RANGES, buckets_from_env, log_buckets
from dynamo.runtime.instruments import Counter, Gauge, Histogram
from dynamo.runtime.loop_monitor import LoopMonitor
from dynamo.runtime.metrics import Metrics, add_labels

WORKER = "2a"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(0x2A)


def scrape(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample by name and labels, as a Prometheus server would read it."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return scrape(metrics).get((name, frozenset(labels.items())))


def test_endpoint_metrics_have_dynamos_names_and_labels(metrics: Metrics) -> None:
    endpoint = metrics.endpoint("ns", "backend", "generate", labels=[("model", "tiny")])
    endpoint.started(100)
    endpoint.started(50)
    endpoint.sent(7)
    endpoint.finished(0.3, None)
    base = {
        "dynamo_namespace": "ns",
        "dynamo_component": "backend",
        "dynamo_endpoint": "generate",
        "worker_id": WORKER,
        "model": "tiny",
    }
    assert value(metrics, "dynamo_component_requests_total", **base) == 2
    assert value(metrics, "dynamo_component_request_bytes_total", **base) == 150
    assert value(metrics, "dynamo_component_response_bytes_total", **base) == 7
    assert value(metrics, "dynamo_component_inflight_requests", **base) == 1
    assert value(metrics, "dynamo_component_cancellation_total", **base) == 0
    assert value(metrics, "dynamo_component_request_duration_seconds_count", **base) == 1
    assert value(metrics, "dynamo_component_request_duration_seconds_sum", **base) == pytest.approx(0.3)
    assert value(metrics, "dynamo_component_request_duration_seconds_bucket", **base, le="0.25") == 0
    assert value(metrics, "dynamo_component_request_duration_seconds_bucket", **base, le="0.5") == 1
    assert value(metrics, "dynamo_component_request_duration_seconds_bucket", **base, le="+Inf") == 1


def test_a_failed_request_is_counted_by_the_errors_type(metrics: Metrics) -> None:
    endpoint = metrics.endpoint("ns", "c", "e")
    endpoint.started(1)
    endpoint.finished(0.1, "InvalidArgument")
    base = {"dynamo_namespace": "ns", "dynamo_component": "c", "dynamo_endpoint": "e", "worker_id": WORKER}
    assert value(metrics, "dynamo_component_errors_total", **base, error_type="InvalidArgument") == 1


def test_a_cancelled_request_is_no_error(metrics: Metrics) -> None:
    endpoint = metrics.endpoint("ns", "c", "e")
    endpoint.started(1)
    endpoint.cancelled()
    endpoint.finished(0.1, "Cancelled")
    text = metrics.render().decode()
    assert "dynamo_component_cancellation_total" in text
    assert "dynamo_component_errors_total" not in text


def test_two_instances_of_one_endpoint_are_two_series(metrics: Metrics) -> None:
    metrics.endpoint("ns", "c", "e", instance_id=1).started(1)
    metrics.endpoint("ns", "c", "e", instance_id=2).started(1)
    names = [dict(labels)["worker_id"] for name, labels in scrape(metrics) if name == "dynamo_component_requests_total"]
    assert sorted(names) == ["1", "2"]


def test_uptime_grows(metrics: Metrics) -> None:
    first = value(metrics, "dynamo_component_uptime_seconds", worker_id=WORKER)
    second = value(metrics, "dynamo_component_uptime_seconds", worker_id=WORKER)
    assert first is not None
    assert second is not None
    assert 0 <= first < second


def test_users_metrics_carry_the_endpoints_labels(metrics: Metrics) -> None:
    scope = metrics.scope("ns", "c", "e")
    scope.counter("things_total", "Things", ["kind"]).labels(kind="big").inc(3)
    scope.gauge("level", "Level").labels().set(1.5)
    scope.histogram("sizes", "Sizes", bounds=[1, 10]).labels().observe(5)
    base = {"dynamo_namespace": "ns", "dynamo_component": "c", "dynamo_endpoint": "e", "worker_id": WORKER}
    assert value(metrics, "dynamo_component_things_total", **base, kind="big") == 3
    assert value(metrics, "dynamo_component_level", **base) == 1.5
    assert value(metrics, "dynamo_component_sizes_bucket", **base, le="10") == 1


def test_collectors_of_prometheus_client_can_be_registered_beside_ours(metrics: Metrics) -> None:
    ForeignCounter("foreign", "From elsewhere", registry=metrics.registry).inc(4)
    assert value(metrics, "foreign_total") == 4


def test_metrics_of_two_runtimes_do_not_mix() -> None:
    one, other = Metrics(1), Metrics(2)
    one.counter("things_total", "Things").labels().inc()
    assert b"things_total" not in other.render()


def test_groups_appear_once_they_are_used(metrics: Metrics) -> None:
    assert b"dynamo_work_handler" not in metrics.render()
    metrics.work_handler.network_transit.observe(0.002)
    metrics.request_plane.inflight.inc()
    metrics.transport.bytes_sent.inc(10)
    metrics.admission.rejected.inc()
    assert value(metrics, "dynamo_work_handler_network_transit_seconds_count") == 1
    assert value(metrics, "dynamo_request_plane_inflight_requests") == 1
    assert value(metrics, "dynamo_transport_tcp_bytes_sent_total") == 10
    assert value(metrics, "dynamo_rejection_request_total") == 1


def test_a_name_cannot_be_two_kinds(metrics: Metrics) -> None:
    metrics.counter("x_total", "x")
    with pytest.raises(ValueError, match=r"dynamo_component_x_total.*already a counter"):
        metrics.gauge("x_total", "x")


@pytest.mark.parametrize(
    ("name", "labels", "complaint"),
    [("1x", [], "metric name"), ("x", ["a-b"], "label name"), ("x", ["__x"], "label name")],
)
def test_bad_names_are_refused(metrics: Metrics, name: str, labels: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        metrics.counter(name, "x", labels, prefix="")


def test_wrong_labels_name_the_metric_and_its_labels(metrics: Metrics) -> None:
    family = metrics.counter("x_total", "x", ["a", "b"])
    with pytest.raises(ValueError, match=r"dynamo_component_x_total.*\['a', 'b'\]"):
        family.labels(a="1")
    assert family.labels("1", "2") is family.labels(b="2", a="1")


def test_a_wrong_metrics_label_of_a_user_is_refused(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="metrics_labels"):
        metrics.endpoint("ns", "c", "e", labels=[("bad-name", "x")])


def test_an_engines_own_text_is_passed_through_with_labels_added(metrics: Metrics) -> None:
    text = '# TYPE vllm:running gauge\nvllm:running{model_name="own"} 3\nvllm:waiting 1\n'
    metrics.add_text_source(lambda: text, {"model_name": "ours", "dynamo_namespace": "ns"})
    assert value(metrics, "vllm:running", model_name="own", dynamo_namespace="ns") == 3
    assert value(metrics, "vllm:waiting", model_name="ours", dynamo_namespace="ns") == 1


def test_the_callback_users_of_dynamo_know_is_taken(metrics: Metrics) -> None:
    metrics.scope("ns", "c", "e").register_prometheus_expfmt_callback(lambda: b"mine 7\n")
    labels = {"dynamo_namespace": "ns", "dynamo_component": "c", "dynamo_endpoint": "e", "worker_id": WORKER}
    assert value(metrics, "mine", **labels) == 7


def test_a_failing_text_source_costs_only_its_own_lines(metrics: Metrics) -> None:
    def broken() -> str:
        raise RuntimeError("engine is gone")

    metrics.add_text_source(broken)
    metrics.add_text_source(lambda: "good 1\n")
    assert value(metrics, "good") == 1
    assert value(metrics, "dynamo_component_metrics_source_errors_total", worker_id=WORKER) == 1


label_values = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)


@given(old=label_values, new=label_values)
def test_added_labels_survive_the_round_trip(old: str, new: str) -> None:
    metrics = Metrics(1)
    metrics.counter("x_total", "x", ["old"], base=()).labels(old).inc()
    labelled = add_labels(metrics.render().decode(), (("new", new),))
    samples = [s for f in text_string_to_metric_families(labelled) for s in f.samples if s.name.endswith("x_total")]
    assert [s.labels for s in samples] == [{"old": old, "new": new}]


# --- buckets


def test_default_buckets_are_those_that_dashboards_for_dynamo_know() -> None:
    assert log_buckets(*DEFAULT_RANGES["REQUEST_DURATION"]) == (0, 2, 4, 8, 16, 32, 64, 130, 260, 510)
    assert log_buckets(*DEFAULT_RANGES["OUTPUT_SEQUENCE"])[:5] == (0, 100, 210, 430, 880)
    assert log_buckets(*DEFAULT_RANGES["TTFT"])[:5] == (0, 0.0022, 0.0047, 0.01, 0.022)
    assert log_buckets(*DEFAULT_RANGES["ITL"])[-3:] == (24, 44, 80)


@given(st.floats(1e-6, 1e3), st.floats(1.1, 1e6), st.integers(2, 512))
def test_buckets_ascend_from_zero_to_the_greatest(least: float, factor: float, count: int) -> None:
    bounds = log_buckets(least, least * factor, count)
    assert bounds[0] == 0
    assert list(bounds) == sorted(set(bounds))
    assert len(bounds) <= count
    assert math.isclose(bounds[-1], least * factor, rel_tol=0.06)  # two significant digits


def test_buckets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_METRICS_TTFT_MIN", "0.01")
    monkeypatch.setenv("DYN_METRICS_TTFT_MAX", "10")
    monkeypatch.setenv("DYN_METRICS_TTFT_COUNT", "4")
    assert buckets_from_env("TTFT") == (0, 0.1, 1, 10)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MIN", "fast"),
        ("MIN", "-1"),
        ("MAX", "0.0001"),
        ("COUNT", "1"),
        ("COUNT", "2.5"),
        ("COUNT", "9999"),
        ("MAX", "inf"),
    ],
)
def test_a_wrong_bucket_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setenv(f"DYN_METRICS_TTFT_{variable}", text)
    with pytest.raises(ValueError, match="DYN_METRICS_TTFT"):
        buckets_from_env("TTFT")


@given(st.lists(st.floats(-10, 1000), max_size=50))
def test_a_histogram_counts_as_prometheus_does(values: list[float]) -> None:
    bounds = (0.0, 1.0, 10.0, 100.0)
    histogram = Histogram(bounds)
    for v in values:
        histogram.observe(v)
    for i, bound in enumerate(bounds):
        assert sum(histogram.counts[: i + 1]) == sum(v <= bound for v in values)
    assert histogram.count == len(values)


# --- cost


def test_counting_costs_well_under_a_microsecond() -> None:
    counter, gauge, histogram = Counter(), Gauge(), Histogram((0.1, 1.0, 10.0, 100.0))

    def count() -> None:
        counter.value += 1
        gauge.value -= 1
        histogram.observe(0.5)

    def best_of_five(calls: int = 20_000) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(calls):
                count()
            times.append((time.perf_counter() - began) / calls)
        return min(times)

    assert best_of_five() < 3e-6  # three operations; about 0.35 µs on an idle machine


def test_counting_does_not_import_prometheus_client() -> None:
    code = (
        "import sys; from dynamo.runtime.metrics import Metrics; m = Metrics(1); m.endpoint('a', 'b', 'c').started(1);"
        "assert 'prometheus_client' not in sys.modules; m.render(); assert 'prometheus_client' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


# --- the event loop's delay


async def test_a_blocked_loop_is_a_stall(metrics: Metrics) -> None:
    monitor = LoopMonitor(metrics)
    monitor.start()
    time.sleep(0.03)  # noqa: ASYNC251 - blocking the loop is what is tested
    await asyncio.sleep(0.02)  # due after the monitor's own timer, so that has fired
    monitor.close()
    monitor.close()
    assert (value(metrics, "dynamo_frontend_event_loop_stall_total") or 0) >= 1
    assert (value(metrics, "dynamo_frontend_event_loop_delay_seconds_sum") or 0) > 0.015
