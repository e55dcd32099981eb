"""Do simulated prefill and decode workers, as processes, share prompts as they are told to, while they come and go?"""

import json
import random
import signal
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.deployment import Deployment

MOCKER = ["--speedup-ratio", "0", "--block-size", "16"]
FRONTEND = ["--router-mode", "kv", "--router-conditional-disagg"]


class Answered(NamedTuple):
    """What came of one prompt."""

    text: str
    prefill: int
    decode: int
    split: dict[str, Any] | None


def post(deployment: Deployment, path: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(deployment.base + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def ask(deployment: Deployment, tokens: list[int]) -> Answered:
    nvext = {"extra_fields": ["worker_id", "routing"]}
    body = {"model": "m", "prompt": tokens, "max_tokens": 8, "temperature": 0, "nvext": nvext}
    answer = post(deployment, "/v1/completions", body)
    workers, routing = answer["nvext"]["worker_id"], answer["nvext"]["routing"]
    text = answer["choices"][0]["text"]
    return Answered(text, workers["prefill_worker_id"], workers["decode_worker_id"], routing.get("split"))


def where(deployment: Deployment, tokens: list[int]) -> int:
    """Who would compute a prompt, were it sent now."""
    nvext = {"annotations": ["query_instance_id"]}
    answer = post(deployment, "/v1/completions", {"model": "m", "prompt": tokens, "nvext": nvext})
    worker: int = answer["nvext"]["worker_id"]["prefill_worker_id"]
    return worker


def paired(deployment: Deployment) -> bool:
    """Whether prompts are split now."""
    models = (deployment.get("/status") or {"models": {}})["models"].get("m", [])
    return any(each["split"] is not None and each["split"]["in_effect"] for each in models)


@pytest.fixture
def pair(deployment: Deployment, model_dir: Path) -> Deployment:
    """A frontend, a prefill worker and two decode workers."""
    settings = json.dumps({"policy": "isl_bounding", "eff_isl_threshold": 256})
    deployment.frontend(*FRONTEND, "--router-conditional-disagg-config", settings)
    for role in ("decode", "decode", "prefill"):
        deployment.mocker(model_dir, *MOCKER, "--disaggregation-mode", role)
    deployment.wait_for("m", workers=3)
    deployment.until(lambda: paired(deployment), "prompts are split")
    return deployment


def prompt(seed: int, tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(50, 300) for _ in range(tokens)]


def test_a_conversation_goes_on_where_it_was_answered_whoever_computed_its_first_prompt(pair: Deployment) -> None:
    first = ask(pair, prompt(1, 1000))
    assert first.split is not None
    assert (first.split["remote"], first.split["cause"]) == (True, "long")
    assert first.prefill != first.decode
    turn = [*prompt(1, 1000), *prompt(2, 300)]

    def known() -> bool:  # once the decode worker's events have told what came over
        return where(pair, turn) == first.decode

    pair.until(known, "the next turn is to be computed by the decode worker that holds the conversation")
    second = ask(pair, turn)
    assert second.split is not None
    assert second.split["cause"] == "cached"
    assert second.prefill == second.decode == first.decode


def test_an_answer_is_the_same_wherever_its_prompt_is_computed(pair: Deployment) -> None:
    prompts = [prompt(seed, 300 + 16 * seed) for seed in range(10)]
    there = [ask(pair, each) for each in prompts]
    post(pair, "/conditional_disagg", {"model": "m", "eff_isl_threshold": 100_000})
    here = [ask(pair, each) for each in prompts]
    assert all(each.split is not None and each.split["remote"] for each in there)
    assert not any(each.split is None or each.split["remote"] for each in here)
    assert [each.text for each in here] == [each.text for each in there]


def test_prefill_workers_leave_and_join_while_prompts_come(pair: Deployment, model_dir: Path) -> None:
    leaving = pair.processes[-1]
    leaving.signal(signal.SIGTERM)
    pair.until(lambda: not paired(pair), "the prefill worker is gone")
    alone = ask(pair, prompt(3, 1000))
    assert alone.split is None
    assert alone.prefill == alone.decode
    assert leaving.wait() == 0
    pair.mocker(model_dir, *MOCKER, "--disaggregation-mode", "prefill")
    pair.until(lambda: paired(pair), "another prefill worker is there")
    again = ask(pair, prompt(4, 1000))
    assert again.split is not None
    assert again.split["remote"]
    assert again.prefill != again.decode
