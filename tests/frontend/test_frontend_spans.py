"""A request is one trace from the client through the frontend to the worker."""

import asyncio
import gzip
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from dynamo.runtime.tracing import shutdown_tracing
from tests.frontend.front_door import CHAT, StartFrontend, StartWorker, ask, chat, model_ready

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
async def spans(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, Span]]:
    """What is exported, by name, once `shutdown_tracing` has run."""
    found: dict[str, Span] = {}

    async def take(request: web.Request) -> web.Response:
        body = await request.read()
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            found.update({span.name: span for scope in resource.scope_spans for span in scope.spans})
        return web.Response()

    shutdown_tracing()
    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://{host}:{port}/v1/traces")
    yield found
    await asyncio.to_thread(shutdown_tracing)
    await runner.cleanup()


async def test_a_request_is_one_trace(
    spans: dict[str, Span], start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend()
    (await start_worker()).auto = "x"
    await model_ready(service, "tiny")
    await ask(service.port, CHAT, chat(), f"traceparent: 00-{TRACE}-{CALLER}-01\r\n")
    await asyncio.to_thread(shutdown_tracing)
    request, preprocess = spans["http-request"], spans["preprocess"]
    assert request.trace_id.hex() == preprocess.trace_id.hex() == TRACE
    assert request.parent_span_id.hex() == CALLER
    assert preprocess.parent_span_id == request.span_id
    assert request.status.code == Status.STATUS_CODE_OK
    worker = next(span for name, span in spans.items() if name.startswith("handle "))
    assert worker.parent_span_id == request.span_id


async def test_a_failed_request_says_how(
    spans: dict[str, Span], start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(router_mode="direct")
    await start_worker()
    await model_ready(service, "tiny")
    await ask(service.port, CHAT, chat())
    await asyncio.to_thread(shutdown_tracing)
    assert spans["http-request"].status.code == Status.STATUS_CODE_ERROR
    assert spans["http-request"].status.message == "validation"
