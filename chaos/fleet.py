"""Which processes are there, on which hosts, and how do they end and begin again?"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp

from chaos import clock
from chaos.network import ROOT, Network

MODEL = "m"
HTTP_PORT = 8000
READY_S = 60.0  # for processes to be there; a loaded machine starts one in ten seconds
LEAVE_S = 45.0  # longer than any drain that is asked of a process
LOG_SHOWN = 3000  # characters of each log, where something did not come up

Kind = Literal["frontend", "worker", "etcd", "nats"]


@dataclass
class Member:
    """One process of the deployment, and how to start it."""

    name: str
    kind: Kind
    argv: list[str]
    env: dict[str, str]
    log: Path
    popen: subprocess.Popen[bytes] | None = None
    exits: list[int] = field(default_factory=list)
    """The status of each end that was asked for in order."""

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    @property
    def runs(self) -> bool:
        """Whether it is there, stopped or not."""
        return self.popen is not None and self.popen.poll() is None

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.popen = subprocess.Popen(
                self.argv, stdout=file, stderr=file, env=self.env, cwd=ROOT, start_new_session=True
            )

    def signal(self, number: signal.Signals) -> None:
        if self.runs:
            os.kill(self.pid, number)

    def parts(self) -> list[int]:
        """The processes that it has started."""
        return [int(each) for each in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    async def ended(self, timeout_s: float = LEAVE_S) -> int:
        """Its exit status. Raises TimeoutError."""
        assert self.popen is not None
        async with asyncio.timeout(timeout_s):
            while (status := self.popen.poll()) is None:
                await asyncio.sleep(0.02)
        return status

    async def leave(self) -> None:
        """End in order, as an operator ends it."""
        self.signal(signal.SIGTERM)
        try:
            self.exits.append(await self.ended())
        except TimeoutError:
            self.kill()
            self.exits.append(-signal.SIGKILL)

    def kill(self) -> None:
        """End at once, with all it has started."""
        if self.popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait(10)


@dataclass(frozen=True)
class Settings:
    """What a fleet is made of."""

    model: Path
    directory: Path
    """For logs, clocks and what is shared."""
    shared: Path
    """What stands for a disk that all hosts share."""
    frontends: int
    workers: int
    router_mode: str
    environ: dict[str, str]
    """By which all find each other."""
    speedup: float = 5.0
    http_workers: int = 1
    """Processes of each frontend."""


class Fleet:
    """Frontends and workers on hosts of their own, named as they are."""

    def __init__(self, network: Network, settings: Settings, backends: list[Member]) -> None:
        self.network = network
        self.settings = settings
        self.backends = backends
        self.frontends = [self._frontend(f"f{i}") for i in range(settings.frontends)]
        self.workers = [self._worker(f"w{i}") for i in range(settings.workers)]

    @property
    def members(self) -> list[Member]:
        return [*self.backends, *self.workers, *self.frontends]

    def clock(self, name: str) -> Path:
        """The file by which a process's clock is set."""
        return self.settings.directory / f"{name}.clock"

    def url(self, frontend: Member) -> str:
        return f"http://{self.network.addresses[frontend.name]}:{HTTP_PORT}"

    def _member(self, name: str, kind: Kind, module: str, words: list[str], env: dict[str, str]) -> Member:
        settings = self.settings
        clock.make_file(self.clock(name))
        address = self.network.addresses[name]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("DYN_")}
        environ |= {
            "DYN_FILE_KV": str(settings.shared / "discovery"),
            "DYN_TCP_RPC_HOST": address,
            "DYN_EVENT_PLANE_HOST": address,
            **settings.environ,
            **env,
        }
        argv = [sys.executable, "-m", "chaos.clock", str(self.clock(name)), module, *words]
        return Member(name, kind, self.network.on(name, argv), environ, settings.directory / f"{name}.log")

    def _frontend(self, name: str) -> Member:
        words = ["--http-host", "0.0.0.0", "--http-port", str(HTTP_PORT), "--migration-limit", "10"]
        words += ["--router-mode", self.settings.router_mode]
        if self.settings.http_workers > 1:
            words += ["--http-workers", str(self.settings.http_workers)]
        if self.settings.router_mode == "kv":
            words += ["--router-replica-sync"]
        env = {"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "20"}  # longer than any answer of ours
        return self._member(name, "frontend", "dynamo.frontend", words, env)

    def _worker(self, name: str) -> Member:
        settings = self.settings
        words = ["--model-path", str(settings.model), "--model-name", MODEL, "--speedup-ratio", str(settings.speedup)]
        # Shorter than most answers: what does not finish in this time has to move.
        env = {"DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "0.5"}
        return self._member(name, "worker", "dynamo.mocker", words, env)

    async def start(self) -> None:
        """Start all but the backends, and wait until each frontend has all workers."""
        for member in [*self.workers, *self.frontends]:
            member.start()
        await self.until_whole()

    async def until_whole(self, timeout_s: float = READY_S) -> None:
        """Wait until each frontend can send to all workers, none left out. Raises RuntimeError with the logs."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            try:
                async with asyncio.timeout(timeout_s):
                    for frontend in self.frontends:
                        while not await self._knows_all(session, frontend):
                            await asyncio.sleep(0.1)
            except TimeoutError:
                raise RuntimeError(f"not whole within {timeout_s:g} s\n{self.logs()}") from None

    async def _knows_all(self, session: aiohttp.ClientSession, frontend: Member) -> bool:
        """Whether a frontend serves the model by as many workers as run."""
        try:
            async with session.get(f"{self.url(frontend)}/v1/models") as response:
                models = {model["id"] for model in (await response.json())["data"]}
            async with session.get(f"{self.url(frontend)}/health") as response:
                instances = (await response.json()).get("instances", [])
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
            return False
        known = {each["instance_id"] for each in instances if each["endpoint"] == "generate"}
        return MODEL in models and len(known) == len(self.workers)

    def logs(self) -> str:
        """The end of each log."""
        return "\n".join(f"--- {m.name}\n{m.log.read_text(errors='replace')[-LOG_SHOWN:]}" for m in self.members)

    async def leave(self) -> None:
        """End everything in order: those who ask before those who are asked."""
        for group in (self.frontends, self.workers):  # the backends stay: what is left in them is looked at
            await asyncio.gather(*(member.leave() for member in group if member.runs))

    def kill(self) -> None:
        """End everything now."""
        for member in self.members:
            member.kill()
