"""Two real processes, each with its own NIXL."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dynamo.nixl_connect", reason="needs NIXL: pip install 'ai-dynamo[nixl]'", exc_type=ImportError)

ANSWER_S = 60.0  # two agents start, on a machine that does other things
STOP_S = 10.0


class Process:
    """The other end, see peer.py."""

    def __init__(self, timeout_s: float, environment: dict[str, str]) -> None:
        quiet = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"}
        self._popen = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("peer.py")), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | quiet | environment,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one command, return its answer, which must be no error."""
        self.tell(do, **arguments)
        answer = self.answer()
        assert "error" not in answer, answer
        return answer

    def refused(self, do: str, **arguments: Any) -> tuple[str, str]:
        """Send one command that must fail; return the error's type and message."""
        self.tell(do, **arguments)
        answer = self.answer()
        assert "error" in answer, answer
        return answer["error"], answer["message"]

    def tell(self, do: str, **arguments: Any) -> None:
        """Send one command."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._popen.stdin.flush()

    def answer(self, seconds: float = ANSWER_S) -> dict[str, Any]:
        """The answer to the oldest command that has had none. Commands are answered in turn, so none is buffered."""
        assert self._popen.stdout is not None
        assert select.select([self._popen.stdout], [], [], seconds)[0], f"no answer in {seconds:g} s"
        line = self._popen.stdout.readline()
        assert line, "the process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End it at once, and wait until it has."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._popen.wait(STOP_S)
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


Start = Callable[..., Process]
Pair = tuple[Process, Process]


@contextlib.contextmanager
def starting() -> Iterator[Start]:
    processes: list[Process] = []

    def begin(timeout_s: float = 30, **environment: str) -> Process:
        processes.append(Process(timeout_s, environment))
        return processes[-1]

    try:
        yield begin
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process: `start(timeout_s=5, UCX_TLS="tcp")`."""
    with starting() as begin:
        yield begin


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes for all tests that leave them alive."""
    with starting() as begin:
        yield begin(), begin()


@pytest.fixture(scope="session")
def tcp_pair() -> Iterator[Pair]:
    """The same over TCP, where a transfer goes on after the call that began it."""
    with starting() as begin:
        yield begin(UCX_TLS="tcp"), begin(UCX_TLS="tcp")
