"""What is the network of a run: which hosts, and what stands between them?"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from chaos.switch import Order, Shape, enter_namespace

CLIENTS = "clients"  # the host of this process itself
PREFIX = "dynchaos"  # of the namespaces, with the id of the process that made them
ROOT = Path(__file__).parents[1]

CUT = Shape(loss=1.0)


def why_not() -> str | None:
    """Why there can be no such network here, in a few words; None if there can be."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs the program ip (iproute2)"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    name = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make a network namespace: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Network:
    """Hosts by name. Everybody reaches everybody, until told otherwise."""

    def __init__(self, names: Iterable[str], seed: int) -> None:
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate((CLIENTS, *names), 1)}
        places = (f"{name}={address},{self.namespace(name)}" for name, address in self.addresses.items())
        argv = [sys.executable, "-m", "chaos.switch", str(seed), *places]
        for name in self.addresses:
            subprocess.run(["ip", "netns", "add", self.namespace(name)], check=True)
        self._switch = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        self._hear("ready")

    def namespace(self, host: str) -> str:
        """The network namespace of a host."""
        return f"{PREFIX}-{os.getpid()}-{host}"

    def on(self, host: str, argv: list[str]) -> list[str]:
        """The command that runs another on a host, as the same process."""
        return ["ip", "netns", "exec", self.namespace(host), *argv]

    def enter(self, host: str = CLIENTS) -> None:
        """Let this thread talk from a host."""
        enter_namespace(self.namespace(host))

    def shape(self, sources: Iterable[str], targets: Iterable[str], shape: Shape | None) -> None:
        """Let this befall all packets from these hosts to those from now on; None: nothing any more."""
        assert self._switch.stdin is not None
        self._switch.stdin.write(msgspec.json.encode(Order(list(sources), list(targets), shape)) + b"\n")
        self._switch.stdin.flush()
        self._hear("done")

    def others(self, host: str) -> list[str]:
        """All hosts but one."""
        return [name for name in self.addresses if name != host]

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        self.shape(self.addresses, self.addresses, None)

    def close(self) -> None:
        """Take it all down. What still runs there keeps the hosts alive, but reaches nobody."""
        assert self._switch.stdin is not None
        self._switch.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._switch.wait(5)
        self._switch.kill()
        for name in self.addresses:
            subprocess.run(["ip", "netns", "del", self.namespace(name)], check=False)

    def _hear(self, word: str) -> None:
        assert self._switch.stdout is not None
        heard = self._switch.stdout.readline().decode().strip()
        if heard != word:
            raise RuntimeError(f"the switch said {heard!r} instead of {word!r}")


def remove_leftovers() -> None:
    """End what still runs on the hosts of runs that were killed, and delete those."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name in _names(listed):
        found = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            there = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in there.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


def _names(listed: str) -> Iterator[str]:
    for line in listed.splitlines():
        if line.strip():
            yield line.split()[0]
