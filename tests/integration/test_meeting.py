"""Do simulated workers, as processes, meet at a bootstrap port, and is nothing lost if one dies?"""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.integration.deployment import Deployment

SLOW = ["--speedup-ratio", "0.1", "--block-size", "16"]  # a prompt of 4,000 tokens takes most of a second


def ask(deployment: Deployment, first: int) -> Any:
    body = {
        "model": "m",
        "prompt": [first, *range(50, 4050)],
        "max_tokens": 4,
        "temperature": 0,
        "nvext": {"extra_fields": ["worker_id", "routing", "engine_data"]},
    }
    request = urllib.request.Request(
        deployment.base + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_two_processes_meet_and_if_one_is_killed_the_other_does_it_all(deployment: Deployment, model_dir: Path) -> None:
    deployment.frontend()
    deployment.mocker(model_dir, *SLOW, "--disaggregation-mode", "decode")
    prefill = deployment.mocker(model_dir, *SLOW, "--disaggregation-mode", "prefill", "--bootstrap-ports", "0")
    deployment.wait_for("m", workers=2)
    deployment.until(lambda: "meeting" in ask(deployment, 1)["nvext"]["routing"], "prompts are split")
    met = ask(deployment, 2)
    assert met["nvext"]["engine_data"]["kv_transfer"]["transport"] == "bootstrap"
    assert met["nvext"]["worker_id"]["prefill_worker_id"] != met["nvext"]["worker_id"]["decode_worker_id"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, deployment, 3)
        deployment.until(lambda: count(deployment, "dynamo_frontend_inflight_requests") > 0, "it is on its way")
        prefill.kill()
        alone = asked.result()
    assert alone["choices"] == ask(deployment, 3)["choices"]
    assert "kv_transfer" not in (alone["nvext"].get("engine_data") or {})
    assert count(deployment, "dynamo_frontend_remote_prefills_total", 'outcome="lost"') == 1


def count(deployment: Deployment, name: str, label: str = "") -> float:
    """The sum of a metric's series."""
    lines = deployment.text("/metrics").splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0] == name and label in line)
