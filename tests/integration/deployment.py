"""How do tests start real processes that find each other, and that they may hurt?"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

READY_S = 30.0
LOG_SHOWN = 4000  # characters of each process's log, when something does not come up


class Process:
    """One program, its log in a file."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        self.log_path = log
        with log.open("ab") as f:
            self.popen = subprocess.Popen(argv, stdout=f, stderr=f, env=env, start_new_session=True)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the whole group, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(10)

    def wait(self, timeout_s: float = READY_S) -> int:
        return self.popen.wait(timeout_s)


class Deployment:
    """Processes that find each other in a discovery directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.discovery = directory / "discovery"
        self.processes: list[Process] = []
        self.base = ""

    def start(self, *words: str, env: dict[str, str] | None = None) -> Process:
        """Run `python *words`."""
        environ = os.environ | {"DYN_FILE_KV": str(self.discovery), "DYN_DISCOVERY_BACKEND": "file"}
        log = self.directory / f"{len(self.processes)}.log"
        process = Process([sys.executable, *words], environ | (env or {}), log)
        self.processes.append(process)
        return process

    def frontend(self, *words: str, port: int | None = None, env: dict[str, str] | None = None) -> Process:
        """A frontend, listening."""
        port = port or free_port()
        self.base = f"http://127.0.0.1:{port}"
        process = self.start("-m", "dynamo.frontend", "--http-port", str(port), *words, env=env)
        self.until(lambda: self.get("/live") is not None, "the frontend listens")
        return process

    def mocker(self, model: Path, *words: str, name: str = "m", env: dict[str, str] | None = None) -> Process:
        """A mocker; `wait_for` tells when it serves."""
        return self.start("-m", "dynamo.mocker", "--model-path", str(model), "--model-name", name, *words, env=env)

    def get(self, path: str) -> Any:
        """The JSON of a GET, or None if it fails."""
        try:
            with urllib.request.urlopen(self.base + path, timeout=5) as response:
                return json.load(response)
        except (OSError, ValueError):
            return None

    def text(self, path: str) -> str:
        """The text of a GET."""
        with urllib.request.urlopen(self.base + path, timeout=5) as response:
            text: str = response.read().decode()
            return text

    def models(self) -> set[str]:
        return {m["id"] for m in (self.get("/v1/models") or {"data": []})["data"]}

    def instances(self) -> set[int]:
        """Ids of the workers that the frontend knows."""
        found = (self.get("/health") or {}).get("instances", [])
        return {i["instance_id"] for i in found if i["endpoint"] == "generate"}

    def wait_for(self, name: str = "m", workers: int = 1) -> None:
        """Until the frontend serves a model, and has the cards of so many workers of all models."""
        self.until(
            lambda: name in self.models() and self.admitted() >= workers,
            f"{name} by {workers} workers",
        )

    def admitted(self) -> int:
        """Workers that requests go to; /health tells of those, too, whose cards have not come."""
        models = (self.get("/status") or {}).get("models", {})
        return sum(each["workers"] for sets in models.values() for each in sets)

    def until(self, true: Callable[[], bool], what: str, timeout_s: float = READY_S) -> float:
        """Wait; returns the seconds it took. Fails with the logs."""
        started = time.monotonic()
        while not true():
            if time.monotonic() - started > timeout_s:
                logs = "\n".join(f"--- {p.popen.args}\n{p.log()[-LOG_SHOWN:]}" for p in self.processes)
                raise AssertionError(f"not within {timeout_s} s: {what}\n{logs}")
            time.sleep(0.02)
        return time.monotonic() - started

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def chat_body(model: str = "m", **fields: Any) -> dict[str, Any]:
    """A streaming chat request."""
    return {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "stream": True, **fields}
