"""What an operator gets over HTTP, and how it says no."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import CannotConnect, HttpError
from dynamo.runtime.system_server import SystemRequest, SystemServer


class Operator:
    """A client of one runtime's system server."""

    def __init__(self, runtime: DistributedRuntime, session: aiohttp.ClientSession) -> None:
        assert runtime.system_server is not None
        self.runtime = runtime
        self.server: SystemServer = runtime.system_server
        self._session = session

    async def get(self, path: str) -> tuple[int, Any]:
        return await self.ask("GET", path)

    async def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        async with self._session.request(method, self.server.url + path, data=body) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.read()


@pytest.fixture
async def operator(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Operator]:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    runtime = DistributedRuntime(discovery_backend="mem")
    await runtime.started()
    async with aiohttp.ClientSession() as session:
        yield Operator(runtime, session)
    await runtime.close()


async def handler(request: Any) -> AsyncIterator[Any]:
    yield request


# --- health


async def test_health_is_503_until_something_is_served(operator: Operator) -> None:
    status, body = await operator.get("/health")
    assert (status, body["status"], body["endpoints"]) == (503, "notready", {})
    await operator.runtime.endpoint("ns.worker.generate").start_endpoint(handler)
    status, body = await operator.get("/health")
    assert (status, body["status"], body["endpoints"]) == (200, "ready", {"generate": "ready"})
    assert set(body["uptime"]) == {"secs", "nanos"}


async def test_live_is_200_however_ill_the_engine_is(operator: Operator) -> None:
    operator.runtime.set_health_status(False)
    assert (await operator.get("/health"))[0] == 503
    status, body = await operator.get("/live")
    assert (status, body["status"]) == (200, "notready")


async def test_a_process_that_leaves_is_notready(operator: Operator) -> None:
    await operator.runtime.endpoint("ns.worker.generate").start_endpoint(handler)
    operator.runtime.shutdown()
    status, body = await operator.get("/health")
    assert (status, body["status"]) == (503, "notready")


async def test_paths_of_health_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    monkeypatch.setenv("DYN_SYSTEM_HEALTH_PATH", "/healthz/detail")
    monkeypatch.setenv("DYN_SYSTEM_LIVE_PATH", "/livez")
    runtime = DistributedRuntime(discovery_backend="mem")
    await runtime.started()
    async with aiohttp.ClientSession() as session:
        operator = Operator(runtime, session)
        assert (await operator.get("/healthz/detail"))[0] == 503
        assert (await operator.get("/livez"))[0] == 200
        assert (await operator.get("/health"))[0] == 404
    await runtime.close()


# --- metrics and identity


async def test_metrics_are_prometheus_text_with_what_engines_add(operator: Operator) -> None:
    endpoint = operator.runtime.endpoint("ns.worker.generate")
    await endpoint.start_endpoint(handler, metrics_labels=[("model", "tiny")])
    operator.runtime.metrics.add_text_source(lambda: "vllm:num_requests_running 2\n")
    async for _ in await (await endpoint.client()).round_robin({"x": 1}):
        pass
    status, body = await operator.get("/metrics")
    assert status == 200
    samples = {s.name: s for f in text_string_to_metric_families(body.decode()) for s in f.samples}
    assert samples["dynamo_component_requests_total"].value == 1
    assert samples["dynamo_component_requests_total"].labels["model"] == "tiny"
    assert samples["vllm:num_requests_running"].value == 2


async def test_metadata_says_who_this_is(operator: Operator) -> None:
    await operator.runtime.endpoint("ns.worker.generate").start_endpoint(handler)
    _, body = await operator.get("/metadata")
    assert body["instance_id"] == operator.runtime.instance_id
    assert [e["endpoint"] for e in body["endpoints"]] == ["generate"]


# --- engine routes


async def test_an_engine_route_takes_and_gives_json(operator: Operator) -> None:
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return {"got": body}

    operator.runtime.register_engine_route("control/echo", echo)
    assert await operator.ask("POST", "/engine/control/echo", b'{"a": 1}') == (200, {"got": {"a": 1}})
    assert await operator.ask("POST", "/engine/control/echo") == (200, {"got": {}})
    assert await operator.get("/engine/control/echo?level=2") == (200, {"got": {"level": "2"}})


async def test_an_unknown_engine_route_is_404_and_lists_those_there_are(operator: Operator) -> None:
    async def sleep(_: dict[str, Any]) -> dict[str, Any]:
        return {}

    operator.runtime.register_engine_route("control/sleep", sleep)
    status, body = await operator.get("/engine/control/slep")
    assert status == 404
    assert body == {
        "error": "Route not found",
        "message": "Route /engine/control/slep not found",
        "routes": ["control/sleep"],
    }


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"x"', b"\xff"])
async def test_a_body_that_is_no_json_object_is_400(operator: Operator, body: bytes) -> None:
    async def never(_: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("called")

    operator.runtime.register_engine_route("x", never)
    status, answer = await operator.ask("POST", "/engine/x", body)
    assert status == 400
    assert "JSON" in answer["message"]


async def test_a_failing_engine_route_is_500_with_the_errors_type(operator: Operator) -> None:
    async def fail(_: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("engine is gone")

    operator.runtime.register_engine_route("x", fail)
    expected = {"error": "RuntimeError", "message": "engine is gone"}
    assert await operator.ask("POST", "/engine/x") == (500, expected)


async def test_an_engine_route_chooses_its_own_status(operator: Operator) -> None:
    async def busy(_: dict[str, Any]) -> dict[str, Any]:
        raise HttpError(409, "already asleep")

    operator.runtime.register_engine_route("x", busy)
    assert (await operator.ask("POST", "/engine/x"))[0] == 409


async def test_a_body_that_is_too_large_is_413(operator: Operator) -> None:
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    operator.runtime.register_engine_route("x", echo)
    status, body = await operator.ask("POST", "/engine/x", b'{"a": "' + b"x" * (2 << 20) + b'"}')
    assert status == 413
    assert "error" in body


# --- what others add


async def test_a_registered_route_gets_parameters_query_and_body(operator: Operator) -> None:
    calls: list[SystemRequest] = []

    async def remember(request: SystemRequest) -> dict[str, Any]:
        calls.append(request)
        return {"status": "ok"}

    operator.server.add_route("POST", "/v1/loras", remember)
    operator.server.add_route("DELETE", "/v1/loras/{name}", remember)
    assert await operator.ask("POST", "/v1/loras?x=1", b'{"lora_name": "a"}') == (200, {"status": "ok"})
    assert (await operator.ask("DELETE", "/v1/loras/my-adapter"))[0] == 200
    assert (calls[0].body, calls[0].query) == ({"lora_name": "a"}, {"x": "1"})
    assert calls[1].params == {"name": "my-adapter"}
    assert (await operator.ask("PUT", "/v1/loras/a"))[0] == 405
    with pytest.raises(ValueError, match="already there"):
        operator.server.add_route("POST", "/v1/loras", remember)


async def test_an_unknown_path_is_404_and_lists_the_routes(operator: Operator) -> None:
    status, body = await operator.get("/v1/loras")
    assert status == 404
    assert "/metrics" in body["routes"]


async def test_files_are_given_by_name_and_never_by_path(operator: Operator) -> None:
    asked: list[str] = []

    async def source(name: str) -> bytes | None:
        asked.append(name)
        return {"ns/worker/generate/tiny/_base/config.json": b"{}"}.get(name)

    assert (await operator.get("/v1/metadata/config.json"))[0] == 404
    operator.server.serve_files(source)
    assert await operator.get("/v1/metadata/ns/worker/generate/tiny/_base/config.json") == (200, b"{}")
    assert (await operator.get("/v1/metadata/missing"))[0] == 404
    for name in ("%2e%2e/%2e%2e/etc/passwd", "a/%2e%2e/b", "%2fetc/passwd", "a//b", "a%5cb", "a%00b"):
        assert (await operator.get(f"/v1/metadata/{name}"))[0] in (400, 404)
    assert all(".." not in name and not name.startswith("/") for name in asked)


# --- where it listens


async def test_it_is_off_by_default() -> None:
    runtime = DistributedRuntime(discovery_backend="mem")
    await runtime.started()
    assert runtime.system_server is None
    await runtime.close()


async def test_it_binds_loopback_unless_told_otherwise(operator: Operator) -> None:
    assert operator.server.host == "127.0.0.1"


async def test_it_binds_the_host_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    monkeypatch.setenv("DYN_SYSTEM_HOST", "0.0.0.0")
    runtime = DistributedRuntime(discovery_backend="mem")
    await runtime.started()
    assert runtime.system_server is not None
    assert runtime.system_server.host == "0.0.0.0"
    await runtime.close()


async def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("DYN_SYSTEM_PORT", str(taken.getsockname()[1]))
        runtime = DistributedRuntime(discovery_backend="mem")
        with pytest.raises(CannotConnect, match="DYN_SYSTEM_PORT"):
            await runtime.started()
        await runtime.close()


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DYN_SYSTEM_PORT", "70000"),
        ("DYN_SYSTEM_PORT", "8.5"),
        ("DYN_SYSTEM_HEALTH_PATH", "health"),
        ("DYN_SYSTEM_HEALTH_PATH", "/metrics"),
        ("DYN_SYSTEM_LIVE_PATH", "/health"),
        ("DYN_SYSTEM_LIVE_PATH", "/a{b}"),
    ],
)
async def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    monkeypatch.setenv(variable, text)
    runtime = DistributedRuntime(discovery_backend="mem")
    with pytest.raises(ValueError, match=variable):
        await runtime.started()
    await runtime.close()


def test_a_runtime_without_a_system_port_does_not_import_aiohttp() -> None:
    code = (
        "import asyncio, sys\n"
        "from dynamo.runtime import DistributedRuntime\n"
        "async def main():\n"
        "    await DistributedRuntime(discovery_backend='mem').close()\n"
        "asyncio.run(main())\n"
        "assert 'aiohttp' not in sys.modules and 'zmq' not in sys.modules\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "DYN_SYSTEM_PORT"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


async def test_many_at_once(operator: Operator) -> None:
    answers = await asyncio.gather(*(operator.get("/live") for _ in range(50)))
    assert {status for status, _ in answers} == {200}
