"""Who ends vLLM's processes when ours is killed, and who shields them from a terminal's Ctrl-C?

vLLM's workers watch its engine core, but nothing watches for the core: if the process that started it is killed,
the core stays. The executors here do, from inside the core, where vLLM builds its executor first of all:

- They make the core the leader of a process group of its own. Ctrl-C in a terminal then reaches our process alone,
  which drains; without this the core would drop everything in flight at once.
- They watch the process that started the core through a pidfd, and end the core when it is gone.
"""

import asyncio
import multiprocessing
import os
import select
import shutil
import signal
import threading
import time
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from dynamo.vllm.driver import PARENT_ENV, SCRATCH_ENV, SPIN_LESS_ENV

_ABANDON_S = 25.0  # the client may be importing for ten seconds before it has anything to kill
_SOFT_S = 5.0  # as long as vLLM itself gives its processes to end before it kills them


def guarded(executor: type[Any]) -> type[Any]:
    """The guarded form of vLLM's executor class; one that is neither of the local ones (Ray) stays as it is."""
    return {MultiprocExecutor: GuardedMultiprocExecutor, UniProcExecutor: GuardedUniProcExecutor}.get(
        executor, executor
    )


async def abandon(starting: "asyncio.Future[Any]") -> None:
    """End a start that is under way: kill what it has begun until it comes back with an error.

    vLLM's core puts a polite signal aside until its model is loaded, which nobody wants to wait for.
    """
    deadline = time.monotonic() + _ABANDON_S
    while not starting.done() and time.monotonic() < deadline:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                _kill_with_group(child.pid)
        await asyncio.wait([starting], timeout=0.2)


def _kill_with_group(pid: int) -> None:
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)  # it stands guard already: its workers go too
        else:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def stand_guard() -> None:
    """Run in the engine core's process: leave the terminal's group, and die with the process that started us."""
    parent = int(os.environ.get(PARENT_ENV, "0"))
    if not parent:
        return
    if os.getpid() != os.getpgrp():
        os.setpgid(0, 0)
    threading.Thread(target=_outlive_not, args=(parent,), name="dynamo-parent-guard", daemon=True).start()


def _outlive_not(parent: int) -> None:
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        pass  # it went before we looked
    except OSError:  # a kernel or sandbox without pidfd
        while os.getppid() == parent:
            time.sleep(0.5)
    else:
        select.select([pidfd], [], [])
    if scratch := os.environ.get(SCRATCH_ENV):
        shutil.rmtree(scratch, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)  # vLLM's own clean end: workers, shared memory, sockets
    time.sleep(_SOFT_S)
    os.killpg(0, signal.SIGKILL)  # our group is the core and its workers


class GuardedMultiprocExecutor(MultiprocExecutor):  # type: ignore[misc]
    """One worker process a device, ended with the process that started the engine."""

    def _init_executor(self) -> None:
        stand_guard()
        if os.environ.get(SPIN_LESS_ENV) == "1":
            from vllm.v1.engine.core import EngineCoreProc

            from dynamo.vllm.spinning import spin_less, wait_for_requests

            spin_less()
            wait_for_requests(EngineCoreProc)
        super()._init_executor()


class GuardedUniProcExecutor(UniProcExecutor):  # type: ignore[misc]
    """The worker inside the engine core's process, ended with the process that started the engine."""

    def _init_executor(self) -> None:
        stand_guard()
        super()._init_executor()
