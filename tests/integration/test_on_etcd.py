"""What do users see of a deployment on etcd, while etcd itself comes and goes?"""

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.integration.deployment import Deployment, chat_body
from tests.runtime.etcd_server import TTL_S, EtcdServer, running

pytestmark = pytest.mark.etcd


def answer(deployment: Deployment) -> str:
    """The text of one chat answer."""
    body = json.dumps(chat_body(stream=False, max_tokens=5)).encode()
    request = urllib.request.Request(
        f"{deployment.base}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            text: str = json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as e:
        raise AssertionError(f"{e}: {e.read()!r}\n{deployment.processes[-1].log()}") from e
    return text


def test_a_deployment_on_etcd_answers_before_during_and_after_an_outage(
    deployment: Deployment, model_dir: Path, tmp_path: Path
) -> None:
    with running(EtcdServer(tmp_path / "etcd")) as (server,):
        env = {"DYN_DISCOVERY_BACKEND": "auto", "ETCD_ENDPOINTS": server.url, "ETCD_LEASE_TTL": str(TTL_S)}
        leaver, stayer = (deployment.mocker(model_dir, "--speedup-ratio", "10", env=env) for _ in range(2))
        deployment.frontend(env=env)
        deployment.wait_for(workers=2)
        both = deployment.instances()
        assert answer(deployment)

        server.signal(signal.SIGSTOP)
        deployment.until(
            lambda: all("etcd does not answer" in p.log() for p in (leaver, stayer)), "the outage is noticed"
        )
        assert answer(deployment)
        assert deployment.instances() == both
        server.kill()
        leaver.signal(signal.SIGTERM)
        assert leaver.wait(15) == 0, leaver.log()
        assert answer(deployment)

        server.start()
        server.wait_ready()
        deployment.until(lambda: "etcd answers again" in stayer.log(), "the outage is over")
        deployment.until(lambda: len(deployment.instances()) == 1, "the one that left is gone")
        assert answer(deployment)
        joiner = deployment.mocker(model_dir, "--speedup-ratio", "10", env=env)
        deployment.wait_for(workers=2)
        for worker in (stayer, joiner):
            worker.signal(signal.SIGTERM)
            assert worker.wait(15) == 0, worker.log()
        assert server.keys() == {}
