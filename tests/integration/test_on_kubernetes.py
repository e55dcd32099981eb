"""A frontend and workers that find each other by the API server of Kubernetes (a scripted one, no cluster)."""

import contextlib
import signal
import urllib.error
import urllib.request
from asyncio import to_thread
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from dynamo.runtime.discovery.kubernetes.settings import Pod
from tests.integration.deployment import Deployment, free_port
from tests.integration.test_bad_weather import ask, until
from tests.runtime.kubernetes_server import NAMESPACE, TOKEN, WORKERS, ScriptedApiServer, scripted


@pytest.fixture
async def server() -> AsyncIterator[ScriptedApiServer]:
    async with scripted() as running:
        yield running


def kubeconfig(directory: Path, server: ScriptedApiServer) -> Path:
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
        "clusters": [{"name": "c", "cluster": {"server": server.url}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
    }
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def healthy(port: int) -> bool:
    """What the kubelet asks a worker."""
    with contextlib.suppress(urllib.error.HTTPError):
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    return False


async def test_a_request_is_answered_and_a_pod_that_is_not_ready_gets_none(
    server: ScriptedApiServer, tmp_path: Path, model_dir: Path
) -> None:
    deployment = Deployment(tmp_path)
    outside = {"DYN_DISCOVERY_BACKEND": "kubernetes", "KUBECONFIG": str(kubeconfig(tmp_path, server))}

    def within(pod: Pod) -> dict[str, str]:
        return outside | {"POD_NAME": pod.name, "POD_UID": pod.uid, "POD_NAMESPACE": NAMESPACE}

    pod = await server.add_pod("worker-0", ready=False)
    try:
        port = free_port()
        system = {"DYN_SYSTEM_PORT": str(port)}
        worker = deployment.mocker(model_dir, "--speedup-ratio", "100", env=within(pod) | system)
        frontend = within(await server.add_pod("frontend-0"))
        await to_thread(deployment.frontend, env=frontend)
        await until(lambda: server.kinds[WORKERS].objects, "the worker has registered", timeout_s=60)
        assert deployment.models() == set()
        await until(lambda: healthy(port), "it says that it is ready before others can see it")
        await server.set_ready(pod, True)
        await until(lambda: deployment.models() == {"m"}, "the frontend serves it", timeout_s=60)
        async with aiohttp.ClientSession() as session:
            assert (await ask(session, deployment.base, max_tokens=3)).ended_well
            await server.stop()
            assert (await ask(session, deployment.base, max_tokens=3)).ended_well
            assert healthy(port)
            assert deployment.get("/health")["status"] == "healthy"
            await server.start()
        worker.signal(signal.SIGTERM)
        assert await to_thread(worker.wait) == 0
        await until(lambda: deployment.models() == set(), "the frontend knows that it left")
    finally:
        deployment.stop()
    assert [one for one in server.kinds[WORKERS].objects if one.startswith("worker-0")] == []
