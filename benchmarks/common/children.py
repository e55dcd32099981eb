"""How does one process of a benchmark tell others what to do? Lines of JSON to their standard input, and back."""

import asyncio
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
ANSWER_S = 180.0

Command = Callable[..., Awaitable[Any]]


class Child:
    """A process that carries out commands, one after the other."""

    def __init__(self, script: str, role: str, environ: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, "--role", role], env=os.environ | environ, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.pid = self._process.pid

    async def ask(self, command: str, **words: Any) -> Any:
        """Its answer. Raises RuntimeError if it has ended, TimeoutError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, words]) + "\n")
        async with asyncio.timeout(ANSWER_S):
            line = await asyncio.to_thread(self._process.stdout.readline)
        if not line:
            raise RuntimeError(f"{command}: the process has ended")
        return json.loads(line)

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


async def obey(commands: dict[str, Command]) -> None:
    """Be a child: carry out what comes, until nothing comes any more."""
    raise_file_limit()
    logging.getLogger("dynamo").setLevel(logging.CRITICAL)  # on few cores it has much to say of servers that are slow
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, words = json.loads(line)
        print(json.dumps(await commands[command](**words)), flush=True)


def raise_file_limit() -> None:
    """As many sockets as the machine allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid: int) -> float:
    """What it holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
