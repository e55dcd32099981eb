"""Do the examples do what their READMEs say?"""

import subprocess
from pathlib import Path

import pytest

from tests.integration.deployment import Deployment

EXAMPLES = Path(__file__).parents[2] / "examples"
HELLO = str(EXAMPLES / "hello_world")


def run(deployment: Deployment, *words: str) -> "subprocess.CompletedProcess[str]":
    process = deployment.start(*words)
    process.wait(30)
    return subprocess.CompletedProcess(words, process.popen.returncode, process.log())


def test_hello_world_greets(deployment: Deployment) -> None:
    deployment.start(f"{HELLO}/server.py")
    done = run(deployment, f"{HELLO}/client.py")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == ["1 worker(s) found", "Hello world!", "Hello sun!", "Hello moon!", "Hello star!"]


def test_hello_world_stops_the_worker_when_the_client_changes_its_mind(deployment: Deployment) -> None:
    server = deployment.start(f"{HELLO}/server.py")
    done = run(deployment, f"{HELLO}/cancellation.py")
    assert done.stdout.splitlines()[-1] == "stopped after 2 of 100 answers"
    deployment.until(lambda: "the caller wants no more" in server.log(), "the server was told")


@pytest.mark.parametrize(
    ("fields", "content", "reason"),
    [
        ({}, "a b c d e f g h i j k l m n o p", "stop"),
        ({"max_tokens": 3}, "a b c", "length"),
        ({"stop": ["f"]}, "a b c d e ", "stop"),
    ],
)
def test_the_custom_engine_is_served(
    deployment: Deployment, model_dir: Path, fields: dict[str, object], content: str, reason: str
) -> None:
    import openai

    deployment.start(str(EXAMPLES / "custom_engine" / "worker.py"), str(model_dir))
    deployment.frontend()
    deployment.wait_for("alphabet")
    client = openai.OpenAI(base_url=f"{deployment.base}/v1", api_key="x", max_retries=0)
    answer = client.chat.completions.create(
        model="alphabet",
        messages=[{"role": "user", "content": "Go on."}],
        **fields,  # type: ignore[call-overload]
    )
    assert answer.choices[0].message.content == content
    assert answer.choices[0].finish_reason == reason


def test_the_custom_engine_is_about_thirty_lines() -> None:
    code = (EXAMPLES / "custom_engine" / "worker.py").read_text().split("LONG = ")[1].split("if __name__")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
