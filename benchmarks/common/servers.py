"""How are the programs that a benchmark measures started, found out about and ended?"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dynamo.vllm import cpu

START_S = 300.0  # two cores, a cold disk
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """One program, its log in a file of its own."""

    def __init__(self, words: list[str], log: Path, environ: dict[str, str], cores: set[int]) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words], stdout=out, stderr=out, env=environ, start_new_session=True,
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
            )  # fmt: skip

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")

    def series(self, name: str, label: str = "") -> float:
        """The sum of a worker's series of this name, with this text in their labels. Needs DYN_SYSTEM_PORT."""
        found = re.search(r"listens on (http://\S+)", self.text())
        assert found
        with urllib.request.urlopen(found.group(1) + "/metrics", timeout=20) as response:
            lines = response.read().decode().splitlines()
        return sum(float(x.rpartition(" ")[2]) for x in lines if x.split("{")[0] == name and label in x)


class Servers:
    """The processes of one side, their logs in files.

    Args:
        directory: for logs and discovery; the model is in `model` there.
        environ: variables beside those that all get.
        cores: those that may be used; all if not given.
    """

    def __init__(self, directory: Path, environ: dict[str, str] | None = None, cores: set[int] | None = None) -> None:
        self.directory = directory
        self.cores = cores or os.sched_getaffinity(0)
        self.servers: list[Server] = []
        weights = cpu.weights_bytes(directory / "model")
        settings = cpu.environment(weights, len(self.cores), 1, os.environ)
        self.environ = os.environ | {s.name: s.value for s in settings}
        self.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        self.environ |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(directory / "discovery")}
        self.environ |= environ or {}

    def start(self, *words: str, core: int | None = None) -> Server:
        """Run `python -m WORDS`, on one core alone if it is named."""
        log = self.directory / f"{len(self.servers)}.log"
        server = Server(list(words), log, self.environ, self.cores if core is None else {core})
        self.servers.append(server)
        return server

    def alive(self) -> bool:
        """Whether none has ended."""
        return all(server.process.poll() is None for server in self.servers)

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{server.log.name}:\n{server.text()[-4000:]}" for server in self.servers)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by process name."""
        found: dict[str, float] = {}
        for server in self.servers:
            pid = server.process.pid
            for each in [pid, *descendants(pid)]:
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
                    found[title(each)] = found.get(title(each), 0.0) + (int(fields[11]) + int(fields[12])) / TICKS
        return found

    def stop(self) -> None:
        """End them politely, then not."""
        processes = [server.process for server in self.servers]
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def descendants(pid: int) -> Iterator[int]:
    """Its children, theirs, and so on."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def title(pid: int) -> str:
    """`VLLM::EngineCore`, or the module of a Python process."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    if words[0].startswith("VLLM::"):
        return words[0]
    return words[words.index("-m") + 1] if "-m" in words else "other"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
