"""Do the make targets run what they promise? Looked at without running them, which CI does on a clean checkout."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def planned(*words: str) -> str:
    # Under `make test` a make of ours would be a sub-make, which takes the flags of the outer one and says where it is.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.replace("\\\n", " ").split())


def test_run_serves_the_demo_with_two_vllm_workers() -> None:
    text = planned("run")
    assert "dynamo run in=http out=vllm --num-workers 2 --http-port 8000" in text
    assert "--no-engine" not in text


def test_run_can_split_prompts_from_decoding() -> None:
    assert "--num-workers 2 --http-port 8000 --prefill-workers 1 --say" in " ".join(
        planned("run", "MODE=disagg").split()
    )


def test_run_takes_its_variables() -> None:
    text = planned("run", "MODEL=/m", "WORKERS=3", "PORT=9000", "OUT=echo", "FLAGS=--delay-ms 1")
    assert "dynamo run /m in=http out=echo --num-workers 3 --http-port 9000" in text
    assert text.endswith("-- --delay-ms 1")
    assert "--no-engine" in text  # echo needs no vLLM


@pytest.mark.parametrize("check", ["ruff format --check", "ruff check", "mypy", "lint-imports", "pytest"])
def test_test_runs_every_check(check: str) -> None:
    assert f".venv/bin/{check}" in planned("test")


def test_ci_runs_make_test_and_prints_the_time() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script
    assert "SECONDS" in script
