"""How do tests start a service, ask it over HTTP, and see it end?"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

READY_S = 30.0
DEADLINE_S = 15.0


class Reply(NamedTuple):
    """What came back."""

    status: int
    body: Any
    headers: dict[str, str]


class Service:
    """One service process that is ready."""

    def __init__(self, popen: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.popen = popen
        self.url = url
        self.log_path = log

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """One request. A body that is bytes goes as it is."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                return _reply(response.status, response)
        except urllib.error.HTTPError as e:
            return _reply(e.code, e)

    def get(self, path: str) -> Any:
        return self.ask("GET", path).body

    def post(self, path: str, body: Any = None) -> Reply:
        return self.ask("POST", path, {} if body is None else body)

    def end(self) -> int:
        """SIGTERM; the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(DEADLINE_S)


def _reply(status: int, response: Any) -> Reply:
    raw = response.read()
    headers = {name.lower(): value for name, value in response.headers.items()}
    is_json = headers.get("content-type", "").startswith("application/json")
    return Reply(status, json.loads(raw) if is_json else raw.decode(), headers)


@contextlib.contextmanager
def running(directory: Path, module: str, *flags: str, env: dict[str, str] | None = None) -> Iterator[Service]:
    """`python -m module --port 0 flags`, from its ready line on; killed at the end if it still runs."""
    log = directory / f"{module}-{time.monotonic_ns()}.log"
    with log.open("wb") as errors:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | (env or {}),
        )
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline().decode()
        assert " is ready: " in line, log.read_text()
        yield Service(popen, line.split(" is ready: ")[1].strip(), log)
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait(DEADLINE_S)


def refused(module: str, *flags: str) -> tuple[int, str]:
    """A program that should not start: its exit status and what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", module, *flags], capture_output=True, text=True, timeout=READY_S, check=False
    )
    return done.returncode, done.stderr


def eventually(true: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
    """Wait until it is true; what it gave."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = true()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
