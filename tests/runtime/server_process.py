"""How do tests run a server that is not ours, and hurt it?"""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class ServerProcess:
    """One process, with its log in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, argv: Sequence[str]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def until(self, ready: Callable[[], bool], within_s: float) -> None:
        """Wait for it. Fails with the end of the log."""
        deadline = time.monotonic() + within_s
        while not ready():
            if time.monotonic() > deadline:
                log = (self.directory / "log").read_text()[-4000:]
                raise AssertionError(f"{type(self).__name__} did not start:\n{log}")
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, as power fails."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
