"""The description of the service, and the service held to it."""

import asyncio
import contextlib

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.frontend.front_door import Served, fetch


async def test_every_route_is_described(served: Served) -> None:
    service, _ = served
    document = (await fetch(service.port, "/openapi.json")).json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/models/{model}/ready",
        "/health",
        "/live",
        "/metrics",
        "/status",
        "/busy_threshold",
        "/conditional_disagg",
    }
    chat = document["components"]["schemas"]["ChatCompletionRequest"]
    assert chat["required"] == ["model", "messages"]
    assert {"temperature", "stream", "nvext", "top_k"} <= set(chat["properties"])


@pytest.mark.slow
async def test_generated_requests_find_no_server_error(served: Served) -> None:
    service, worker = served
    worker.auto = "x"
    await asyncio.to_thread(probe, service.url)
    assert worker.answered > 0  # the service was not only refusing


def probe(url: str) -> None:
    """Many requests by the schema, and many that break it."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            try:
                strategy = operation.as_strategy(generation_mode=mode)
            except schemathesis.errors.SchemathesisError:
                continue

            @hypothesis.settings(
                max_examples=60,
                deadline=None,
                derandomize=True,  # a failure in CI is then one at the desk
                suppress_health_check=list(hypothesis.HealthCheck),
                database=None,
            )
            @hypothesis.given(case=strategy)
            def hold(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"  # or nearly all would end at a model that is not there
                case.call_and_validate(base_url=url, checks=checks)

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing about a page can be wrong
                hold()
