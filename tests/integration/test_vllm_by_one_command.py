"""Does `dynamo run` serve the real engine, and is everything gone afterwards?"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

READY_S = 240.0  # two engines import torch and load side by side on two cores


@pytest.fixture
def run(weights_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    words = [str(weights_dir), "in=http", "out=vllm", "--http-port", "0", "--num-workers", "2", "--model-name", "tiny"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo.cli.main", "run", *words, "--", "--enforce-eager", "--max-model-len", "2048"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"DYN_TEST_MARK": str(os.getpid())},
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


def marked() -> set[int]:
    """All processes that were started, however distantly, by this test."""
    mark = f"DYN_TEST_MARK={os.getpid()}".encode()
    found = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                found.add(int(environ.parent.name))
    return found


def ask(base: str, **fields: object) -> dict[str, object]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Once upon a time"}], "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, object] = json.load(response)
    return answer


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(READY_S + 120)
def test_two_vllm_workers_answer_alike_and_leave_nothing_behind(run: "subprocess.Popen[str]") -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    assert run.stdout is not None
    base = next(m.group() for line in run.stdout if (m := re.search(r"http://[\d.]+:\d+", line)))
    with urllib.request.urlopen(f"{base}/health", timeout=10) as response:
        instances = [i for i in json.load(response)["instances"] if i["endpoint"] == "generate"]
    assert len(instances) == 2
    answers = [ask(base, max_tokens=16)["choices"][0]["message"]["content"] for _ in range(4)]  # type: ignore[index]
    assert len(set(answers)) == 1  # two workers in turn, the same greedy answer
    assert len(marked()) >= 4
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 0
    deadline = time.monotonic() + 5
    while marked() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked() == set()
    assert set(os.listdir("/dev/shm")) - shared_memory == set()
