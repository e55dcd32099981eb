"""How do several frontend processes share one port?

The process that was started listens and answers nothing itself. Each of the others, a whole frontend, takes connections
from the same socket: whoever has time takes the next. So a process that dies, hangs or leaves takes no waiting client
along, as it would if each had a queue of its own (SO_REUSEPORT). One that died is replaced; on SIGUSR2 all are, each
once its successor serves.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.http_worker import READY, Post
from dynamo.frontend.main import BIND_FAILED, HAND_OVER

log = logging.getLogger(__name__)

RESTART_PAUSE_S = 1.0  # a process that never served must not be restarted in a busy loop
LEAVE_S = 10.0  # beyond the graceful shutdown's own time, for what is left to close
INNER_BACKLOG = 64  # questions of siblings; more than there are processes


def supervise(config: FrontendConfig, argv: Sequence[str]) -> int:
    """Keep `config.http_workers` processes with these flags until a signal. Gives back the exit status."""
    try:
        listening = listen(config.http_host, config.http_port, Limits.from_env().listen_backlog)
    except OSError as e:
        where = f"{config.http_host}:{config.http_port}"
        sys.stderr.write(f"dynamo.frontend: error: cannot serve on {where}: {e.strerror or e}\n")
        return BIND_FAILED
    if os.environ.get("DYN_SYSTEM_PORT", "-1") != "-1":
        log.warning("DYN_SYSTEM_PORT has no effect with --http-workers: /metrics of the HTTP port speaks for all")
    return asyncio.run(_Supervisor(config.http_workers, argv, listening).run())


def listen(host: str, port: int, backlog: int) -> list[socket.socket]:
    """A socket for each address of the host, all of one port. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    made: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            sock = socket.socket(family, socket.SOCK_STREAM)
            made.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound = made[0].getsockname()[1] if len(made) > 1 else port  # port 0: the first one's for all
            sock.bind((address[0], bound, *address[2:]))
            sock.listen(backlog)
    except OSError:
        for sock in made:
            sock.close()
        raise
    return made


@dataclass
class _Slot:
    """The place of one process. Its inner socket outlives processes, so that others always know its address."""

    number: int
    inner: socket.socket
    renew: asyncio.Event = field(default_factory=asyncio.Event)
    renewed: asyncio.Event = field(default_factory=asyncio.Event)
    has_served: bool = False


class _Process:
    """A process of a slot. `ready` ends with whether it serves; False once it has ended before."""

    def __init__(self, process: asyncio.subprocess.Process, ready: "asyncio.Task[bool]") -> None:
        self.process = process
        self.ready = ready
        self.ended = asyncio.ensure_future(process.wait())

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class _Supervisor:
    def __init__(self, count: int, argv: Sequence[str], listening: list[socket.socket]) -> None:
        self._argv = argv
        self._listening = listening
        self._slots = [_Slot(number, _inner_socket()) for number in range(count)]
        self._processes: set[_Process] = set()
        self._failed: asyncio.Future[int]
        self._rolling: asyncio.Task[None] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._failed = loop.create_future()
        stop: asyncio.Future[int] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, stop, number)
        loop.add_signal_handler(HAND_OVER, self._roll)
        keepers = [loop.create_task(self._keep(slot)) for slot in self._slots]
        until: list[asyncio.Future[Any]] = [stop, self._failed, *keepers]
        await asyncio.wait(until, return_when=asyncio.FIRST_COMPLETED)
        for task in (*keepers, *([self._rolling] if self._rolling is not None else [])):
            task.cancel()
        said = await asyncio.gather(*keepers, return_exceptions=True)
        await self._end_all()
        for error in said:
            if isinstance(error, Exception):
                raise error
        return self._failed.result() if self._failed.done() else 0

    def _on_stop(self, stop: "asyncio.Future[int]", number: signal.Signals) -> None:
        if not stop.done():
            stop.set_result(number)
            return
        log.warning("second %s: ending at once", number.name)
        for each in self._processes:
            each.signal(signal.SIGKILL)
        os._exit(128 + number)

    # --- one process after the other

    async def _keep(self, slot: _Slot) -> None:
        """Let there be a process in this place."""
        now = await self._start(slot)
        while True:
            if await now.ready:
                slot.has_served = True
                renew = asyncio.ensure_future(slot.renew.wait())
                await asyncio.wait((now.ended, renew), return_when=asyncio.FIRST_COMPLETED)
                renew.cancel()
                if not now.ended.done():
                    now = await self._renew(slot, now)
                    continue
            status = await now.ended
            if not slot.has_served:
                log.error("http worker %d ended with status %s at its start", slot.number, status)
                if not self._failed.done():
                    self._failed.set_result(status if status > 0 else 1)
                return
            log.error("http worker %d ended with status %s; starting another", slot.number, status)
            if not now.ready.result():
                await asyncio.sleep(RESTART_PAUSE_S)
            now = await self._start(slot)

    async def _renew(self, slot: _Slot, old: _Process) -> _Process:
        """Another process in place of one that serves; the one that serves if the other does not come to."""
        slot.renew.clear()
        new = await self._start(slot)
        if await new.ready:
            old.signal(HAND_OVER)
            log.info("http worker %d: process %d serves, %d leaves", slot.number, new.process.pid, old.process.pid)
        else:
            log.error("http worker %d: no successor came to serve, the old process stays", slot.number)
            new = old
        slot.renewed.set()
        return new

    def _roll(self) -> None:
        if self._rolling is None or self._rolling.done():
            self._rolling = asyncio.get_running_loop().create_task(self._renew_all())

    async def _renew_all(self) -> None:
        log.info("%s: replacing all http workers, one after the other", HAND_OVER.name)
        for slot in self._slots:
            slot.renewed.clear()
            slot.renew.set()
            await slot.renewed.wait()
        log.info("all http workers are replaced; the old ones finish what they have")

    async def _start(self, slot: _Slot) -> _Process:
        reading, writing = os.pipe()
        listening = [sock.fileno() for sock in self._listening]
        siblings = [str(each.inner.getsockname(), "latin-1") for each in self._slots]
        post = Post(slot.number, listening, slot.inner.fileno(), writing, siblings, os.getpid())
        words = ["-m", "dynamo.frontend.http_worker", msgspec.json.encode(post).decode(), *self._argv]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words,
            env={**os.environ, "DYN_SYSTEM_PORT": "-1"},
            pass_fds=(*listening, slot.inner.fileno(), writing),
        )
        os.close(writing)
        started = _Process(process, asyncio.ensure_future(_is_ready(reading)))
        self._processes.add(started)
        started.ended.add_done_callback(lambda _: self._processes.discard(started))
        return started

    async def _end_all(self) -> None:
        """SIGTERM to all, those that hand over too; SIGKILL to who takes longer than it may."""
        ending = {each.ended for each in self._processes}
        for each in self._processes:
            each.signal(signal.SIGTERM)
        if not ending:
            return
        _, late = await asyncio.wait(ending, timeout=Limits.from_env().graceful_shutdown_s + LEAVE_S)
        for each in tuple(self._processes):
            log.error("process %d does not end; killing it", each.process.pid)
            each.signal(signal.SIGKILL)
        if late:
            await asyncio.wait(late)


def _inner_socket() -> socket.socket:
    """A listening socket with an abstract Unix address that the kernel chooses."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("")
    sock.listen(INNER_BACKLOG)
    return sock


async def _is_ready(reading: int) -> bool:
    """Whether a process says that it serves, or ends without."""
    reader = asyncio.StreamReader()
    pipe = os.fdopen(reading, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        return await reader.read(1) == READY
    finally:
        transport.close()
