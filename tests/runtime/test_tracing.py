"""Trace headers without a library, and spans that arrive at a real OTLP receiver."""

import asyncio
import gzip
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from dynamo.runtime import Context, DistributedRuntime
from dynamo.runtime.logs import bind
from dynamo.runtime.tracing import (
    SpanProxy,
    TraceContext,
    configure_tracing,
    extract,
    new_trace,
    parse_traceparent,
    shutdown_tracing,
    start_span,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{SPAN}-01"

# --- headers


def test_a_traceparent_is_read() -> None:
    assert parse_traceparent(HEADER, "vendor=1") == TraceContext(TRACE, SPAN, 1, "vendor=1")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "00",
        HEADER[:-1],
        HEADER + "-extra",
        HEADER.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}x{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
    ],
)
def test_a_malformed_traceparent_is_none(text: str | None) -> None:
    assert parse_traceparent(text) is None


def test_a_later_version_may_say_more() -> None:
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01-more") == TraceContext(TRACE, SPAN)
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01more") is None


def test_a_tracestate_that_is_too_long_is_dropped() -> None:
    found = parse_traceparent(HEADER, "a=" + "x" * 600)
    assert found is not None
    assert found.tracestate == ""


hexes = st.integers(1, 2**128 - 1).map(lambda n: f"{n:032x}")


@given(hexes, st.integers(1, 2**64 - 1), st.integers(0, 255), st.sampled_from(["", "a=b", "a=b,c=d"]))
def test_headers_survive_the_round_trip(trace_id: str, span: int, flags: int, state: str) -> None:
    place = TraceContext(trace_id, f"{span:016x}", flags, state)
    assert extract(place.headers()) == place


@given(st.text(max_size=70))
def test_any_text_is_a_place_or_none(text: str) -> None:
    found = parse_traceparent(text)
    assert found is None or parse_traceparent(found.traceparent) == found


def test_a_child_keeps_the_trace() -> None:
    parent = new_trace()
    child = parent.child()
    assert child.trace_id == parent.trace_id
    assert child.span_id != parent.span_id


# --- spans, not recorded


def test_without_export_a_span_is_a_place_and_nothing_else() -> None:
    with start_span("work", TraceContext(TRACE, SPAN), {"a": 1}) as span:
        span.set_attribute("k", "v")
        span.add_event("happened", {"n": 1})
        span.set_status("ok")
    assert type(span) is SpanProxy
    assert span.trace_id == TRACE
    assert not span.is_recording()
    span.close()


def test_a_span_can_be_given_its_id() -> None:
    assert start_span("work", TraceContext(TRACE, SPAN), span_id="1" * 16).span_id == "1" * 16
    assert start_span("work", span_id="2" * 16).span_id == "2" * 16


def test_a_wrong_status_is_an_error_even_if_nobody_records() -> None:
    with pytest.raises(ValueError, match="'fine' is not one of ok, error, unset"):
        start_span("work").set_status("fine")


# --- spans, exported


class Collector:
    """A tiny OTLP/HTTP receiver."""

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}
        self.services: set[str] = set()
        self.bodies: list[str] = []
        self.log_traces: list[str] = []
        self._runner: web.AppRunner

    async def start(self) -> str:
        app = web.Application()
        app.router.add_post("/v1/traces", self._traces)
        app.router.add_post("/v1/logs", self._logs)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _body(self, request: web.Request) -> bytes:
        assert request.content_type == "application/x-protobuf"
        body = await request.read()
        return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body

    async def _traces(self, request: web.Request) -> web.Response:
        for resource in ExportTraceServiceRequest.FromString(await self._body(request)).resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self.spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
        return web.Response()

    async def _logs(self, request: web.Request) -> web.Response:
        for resource in ExportLogsServiceRequest.FromString(await self._body(request)).resource_logs:
            for record in (record for scope in resource.scope_logs for record in scope.log_records):
                self.bodies.append(record.body.string_value)
                self.log_traces.append(record.trace_id.hex())
        return web.Response()


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A receiver that this process exports to from now on."""
    shutdown_tracing()
    receiver = Collector()
    base = await receiver.start()
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{base}/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", f"{base}/v1/logs")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "test-service")
    yield receiver
    await asyncio.to_thread(shutdown_tracing)
    await receiver.stop()


async def flush() -> None:
    """Send everything; in a thread, for the receiver runs on this loop."""
    await asyncio.to_thread(shutdown_tracing)


async def test_spans_arrive_over_otlp(collector: Collector) -> None:
    assert configure_tracing()
    parent = TraceContext(TRACE, SPAN, 1, "vendor=1")
    with start_span("outer", parent, {"model": "tiny"}) as outer:
        outer.add_event("first token", {"ms": 12})
        with pytest.raises(RuntimeError), start_span("inner", outer.context):
            raise RuntimeError("broke")
    await flush()
    sent, inner = collector.spans["outer"], collector.spans["inner"]
    assert collector.services == {"test-service"}
    assert sent.trace_id.hex() == TRACE
    assert sent.parent_span_id.hex() == SPAN
    assert sent.trace_state == "vendor=1"
    assert {a.key: a.value.string_value for a in sent.attributes} == {"model": "tiny"}
    assert [e.name for e in sent.events] == ["first token"]
    assert sent.status.code == Status.STATUS_CODE_UNSET
    assert inner.parent_span_id.hex() == outer.span_id == sent.span_id.hex()
    assert inner.status.code == Status.STATUS_CODE_ERROR
    assert inner.status.message == "RuntimeError: broke"


async def test_a_span_is_exported_with_the_id_it_was_given(collector: Collector) -> None:
    configure_tracing()
    start_span("hop", TraceContext(TRACE, SPAN), span_id="12" * 8).close()
    await flush()
    assert collector.spans["hop"].span_id.hex() == "12" * 8


async def test_a_closed_span_takes_nothing_more(collector: Collector) -> None:
    configure_tracing()
    span = start_span("once")
    span.close()
    span.set_attribute("late", 1)
    span.close()
    await flush()
    assert list(collector.spans["once"].attributes) == []


async def test_an_unsampled_trace_is_not_recorded(collector: Collector) -> None:
    configure_tracing()
    with start_span("unsampled", TraceContext(TRACE, SPAN, flags=0)) as span:
        assert not span.is_recording()
    await flush()
    assert collector.spans == {}


async def test_log_lines_are_exported_in_their_requests_trace(collector: Collector) -> None:
    configure_tracing()
    with bind(trace_id=TRACE, span_id=SPAN):
        logging.getLogger("dynamo.test").error("look here")
    await flush()
    assert (collector.bodies, collector.log_traces) == (["look here"], [TRACE])


async def test_a_request_is_one_trace_from_caller_to_worker(collector: Collector) -> None:
    runtime = DistributedRuntime(discovery_backend="mem")
    seen: dict[str, str] = {}

    async def handler(request: object, context: Context) -> AsyncIterator[dict[str, object]]:
        with context.start_span("engine", {"tokens": 3}):
            seen.update(context.trace_headers())
            yield {"done": True}

    endpoint = runtime.endpoint("ns.worker.generate")
    await endpoint.start_endpoint(handler)
    caller = Context()
    caller.set_trace({"traceparent": HEADER})
    async for _ in await (await endpoint.client()).round_robin({}, context=caller):
        pass
    await runtime.close()
    await flush()
    assert {span.trace_id.hex() for span in collector.spans.values()} == {TRACE}
    assert "engine" in collector.spans
    assert seen["traceparent"].split("-")[1] == TRACE


# --- asked for and not there


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "localhost:4318"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({"OTEL_EXPORT_ENABLED": "perhaps"}, "OTEL_EXPORT_ENABLED"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], complaint: str) -> None:
    shutdown_tracing()
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "true")
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=complaint):
        configure_tracing()
    shutdown_tracing()


def test_a_missing_extra_is_an_error_that_names_it() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from dynamo.runtime.tracing import die_on_wrong_configuration; die_on_wrong_configuration('x')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OTEL_EXPORT_ENABLED": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 2
    assert "pip install 'ai-dynamo[otel]'" in run.stderr
    assert run.stderr.count("\n") == 1


def test_without_export_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys; from dynamo.runtime.tracing import configure_tracing, start_span; configure_tracing();"
        "start_span('x').close(); assert not any(m.startswith('opentelemetry') for m in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=30)
