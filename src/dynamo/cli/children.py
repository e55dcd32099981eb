"""Which processes did this command start, what did they say last, and are they all alive?

`Children` owns them. Each is tied to this process's life (`die_with_parent`), leads a process group of its own, so
that Ctrl-C in a terminal reaches only us, and has one thread that reads what it prints.
"""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import msgspec

REMEMBERED_LINES = 200  # of output a child: enough for a traceback, and bounded
SHOWN_LINES = 20  # of them in an error
STOP_TIMEOUT_S = 20.0  # between SIGTERM and SIGKILL; vLLM gives its own processes 5 s, more on a busy machine
LAST_WORDS_S = 0.5  # to read what a dead child left in the pipe
KILL_TIMEOUT_S = 5.0  # a killed process is gone at once unless it hangs in the kernel
COLORS = ("36", "32", "33", "35", "34", "31")  # ANSI: cyan green yellow magenta blue red


class ChildSpec(msgspec.Struct, frozen=True):
    """One process to start. `argv` follows this Python; `env` is added to our own environment."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = {}


class ChildDied(Exception):  # noqa: N818 - what happened, not what is wrong
    """A child ended that should have gone on. The message has its last lines."""

    def __init__(self, name: str, status: int, lines: Sequence[str]) -> None:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        said = [f"  {name} │ {line}" for line in lines] or ["  (it printed nothing)"]
        super().__init__("\n".join([f"{name} {how}. It said last:", *said]))


class _Child:
    def __init__(self, spec: ChildSpec, process: "subprocess.Popen[str]", color: str) -> None:
        self.spec = spec
        self.process = process
        self.color = color
        self.lines: collections.deque[str] = collections.deque(maxlen=REMEMBERED_LINES)
        self.exited = threading.Event()


class Children:
    """Starts, watches and stops processes. `show` decides whether their lines go to `out` as they come."""

    def __init__(self, out: IO[str] | None = None, show: bool = False) -> None:
        self.show = show
        self._out = out or sys.stderr
        self._children: list[_Child] = []
        self._name_width = 0
        self._stopping = False
        self._died: ChildDied | None = None
        self._lock = threading.Lock()
        self._on_death: Callable[[], None] | None = None

    def start(self, spec: ChildSpec) -> None:
        """Start one process.

        Raises:
            OSError: no more processes may be made.
        """
        argv = [sys.executable, "-m", "dynamo.cli.die_with_parent", str(os.getpid()), sys.executable, *spec.argv]
        process = subprocess.Popen(  # noqa: S603 - our own interpreter, and the words of whoever typed the command
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **spec.env},
            start_new_session=True,
        )
        child = _Child(spec, process, COLORS[len(self._children) % len(COLORS)])
        self._children.append(child)
        self._name_width = max(self._name_width, len(spec.name))
        reader = threading.Thread(target=self._read, args=(child,), name=f"log-{spec.name}", daemon=True)
        reader.start()
        threading.Thread(target=self._watch, args=(child, reader), name=f"wait-{spec.name}", daemon=True).start()

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {child.spec.name: child.process.pid for child in self._children}

    def last_line(self) -> str:
        """What the child that was started last said last: workers come last and take longest to be ready."""
        for child in reversed(self._children):
            if child.lines:
                return f"{child.spec.name}: {child.lines[-1]}"
        return ""

    def check(self) -> None:
        """Raises ChildDied if one of them ended by itself."""
        if self._died is not None:
            raise self._died

    def on_death(self, call: Callable[[], None] | None) -> None:
        """Have `call` called, from another thread, when a child ends by itself; at once if one has."""
        with self._lock:
            self._on_death = call
            now = self._died is not None
        if now and call is not None:
            call()

    def stop(self) -> None:
        """End all of them: SIGTERM, then SIGKILL to what is left of their groups. Safe to call twice."""
        self._stopping = True
        children, self._children = self._children, []
        for child in children:
            if not child.exited.is_set():
                child.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        try:
            for child in children:
                child.exited.wait(max(0.0, deadline - time.monotonic()))
        finally:  # a second Ctrl-C comes here at once
            for child in children:
                # Nobody reaped the leader yet, so its number still names its group and nothing else.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.process.pid, signal.SIGKILL)
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(KILL_TIMEOUT_S)

    def _read(self, child: _Child) -> None:
        assert child.process.stdout is not None
        for raw in child.process.stdout:
            line = raw.rstrip()
            child.lines.append(line)
            if self.show:
                self._print(child, line)

    def _watch(self, child: _Child, reader: threading.Thread) -> None:
        # Not the end of its output: a grandchild may hold the pipe open. And without reaping: see `stop`.
        try:
            status = _exit_status(child.process.pid)
        except ChildProcessError:  # `stop` killed and reaped it meanwhile
            return
        finally:
            child.exited.set()
        reader.join(LAST_WORDS_S)
        with self._lock:
            if self._stopping or self._died is not None:
                return
            self._died = ChildDied(child.spec.name, status, list(child.lines)[-SHOWN_LINES:])
            call = self._on_death
        if call is not None:
            call()

    def _print(self, child: _Child, line: str) -> None:
        prefix = f"{child.spec.name:<{self._name_width}} │ "
        if self._out.isatty():
            prefix = f"\x1b[{child.color}m{prefix}\x1b[0m"
        with contextlib.suppress(OSError, ValueError):  # our own terminal is gone: nobody to tell
            self._out.write(prefix + line + "\n")
            self._out.flush()


def _exit_status(pid: int) -> int:
    """Wait for the end of a process, leaving it to be reaped. Negative for a signal, as in `subprocess`.

    Raises:
        ChildProcessError: somebody else reaped it.
    """
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert info is not None  # None only comes with WNOHANG
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
