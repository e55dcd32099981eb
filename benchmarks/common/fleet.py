"""How do a frontend and vLLM workers of the demo model come up for a measurement, and how is one answer timed?"""

import asyncio
import contextlib
import json
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from common.servers import START_S, Server, Servers, free_port

MODEL = "m"


@dataclass
class Fleet:
    """A frontend and its workers, in the order in which they were asked for."""

    port: int
    servers: Servers
    frontend: Server
    workers: list[Server]


@contextlib.asynccontextmanager
async def fleet(
    model: Path,
    roles: list[str],
    flags: list[str],
    *,
    cores: list[int] | None = None,
    environ: dict[str, str] | None = None,
) -> AsyncIterator[Fleet]:
    """Workers of these roles (agg, prefill, decode) behind a frontend, ready for requests.

    Args:
        cores: one for each worker, which it then does not leave.
        flags: the engine's, for all.
    """
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "model").symlink_to(model)
        servers = Servers(directory, {"DYN_SYSTEM_PORT": "0", "DYN_LOG": "info"} | (environ or {}))
        port = free_port()
        try:
            frontend = servers.start("dynamo.frontend", "--http-port", str(port), "--router-mode", "round-robin")
            words = ["dynamo.vllm", "--model", str(model), "--served-model-name", MODEL, *flags]
            workers = [
                servers.start(*words, "--disaggregation-mode", role, core=cores[i] if cores else None)
                for i, role in enumerate(roles)
            ]
            await _serving(servers, port, workers)
            yield Fleet(port, servers, frontend, workers)
        finally:
            servers.stop()


async def _serving(servers: Servers, port: int, workers: list[Server]) -> None:
    deadline = time.monotonic() + START_S
    while not all("vllm is ready" in worker.text() for worker in workers) or _known(port) < len(workers):
        if not servers.alive() or time.monotonic() > deadline:
            raise RuntimeError(f"not serving:\n{servers.logs()}")
        await asyncio.sleep(0.2)


def _known(port: int) -> int:
    """Workers that the frontend has found."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models/{MODEL}/ready", timeout=10) as response:
            namespaces = json.load(response)["namespaces"].values()
    except OSError:
        return 0
    return sum(kind["workers"] for each in namespaces for kind in each["worker_types"].values())


# --- one answer


@dataclass
class Timed:
    """When the tokens of one answer came, on the client's clock, and what its events said."""

    sent: float = 0.0
    at: list[float] = field(default_factory=list)
    """One for each token."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.at[0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.at)]


class Connection(asyncio.Protocol):
    """One keep-alive connection: sends a completion request, notes when its tokens come."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._done: asyncio.Future[Timed] | None = None
        self.answer = Timed()
        """What has come so far."""

    def ask(self, body: dict[str, Any]) -> "asyncio.Future[Timed]":
        """Send; the future gives the answer's times."""
        text = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._done = asyncio.get_running_loop().create_future()
        self.answer, self._rest = Timed(), b""
        self.answer.sent = time.perf_counter()
        self.transport.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        return self._done

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._note(json.loads(line[6:]), now)
            elif line.startswith(b"data: [DONE]") and self._done is not None and not self._done.done():
                self._done.set_result(self.answer)
            elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                self._fail(RuntimeError(f"{line.decode()}: {data.decode(errors='replace')[-500:]}"))

    def _note(self, event: dict[str, Any], now: float) -> None:
        if "error" in event:
            self._fail(RuntimeError(str(event["error"])))
        extra = event.get("nvext") or {}
        self.answer.at.extend([now] * len(extra.pop("completion_token_ids", ())))
        self.answer.facts |= extra

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def leave(self) -> None:
        """Hang up, whatever is outstanding."""
        if self._done is not None:
            self._done.cancel()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection"))


async def connect(port: int) -> Connection:
    """To the frontend."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


def completion(tokens: list[int], made: int, *extra: str) -> dict[str, Any]:
    """The body of a request for `made` greedy tokens; `extra` are names of nvext's extra fields."""
    return {
        "model": MODEL, "prompt": tokens, "max_tokens": made, "ignore_eos": True, "temperature": 0, "stream": True,
        "nvext": {"extra_fields": ["completion_token_ids", *extra]},
    }  # fmt: skip
