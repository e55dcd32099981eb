"""How do several frontend processes share one port?

Each is a whole frontend with its own socket on the port (SO_REUSEPORT): the kernel spreads connections over them. They
share nothing, so `/metrics` and `/health` answer for the one process that took the connection.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.main import run

log = logging.getLogger(__name__)

RESTART_PAUSE_S = 1.0  # a process that dies at once must not be restarted in a busy loop
LEAVE_S = 10.0  # beyond the graceful shutdown's own time, for what is left to close
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def supervise(config: FrontendConfig) -> int:
    """Run `config.http_workers` processes until a signal, replacing those that die. Gives back the exit status."""
    context = multiprocessing.get_context("spawn")
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _frame: signals.append(n))

    def start(index: int) -> SpawnProcess:
        process = context.Process(target=_child, args=(config, index, os.getpid()), name=f"http-worker-{index}")
        process.start()
        return process

    processes = [start(index) for index in range(config.http_workers)]
    started = time.monotonic()
    while not signals:
        wait([process.sentinel for process in processes], timeout=0.2)  # 0.2 s: how late a signal may be noticed
        for index, process in enumerate(processes):
            if process.is_alive() or signals:
                continue
            if time.monotonic() - started < RESTART_PAUSE_S * 5:
                log.error("%s ended with status %s at its start", process.name, process.exitcode)
                _stop(processes, signal.SIGTERM, 0)
                return process.exitcode or 1
            log.error("%s ended with status %s; starting another", process.name, process.exitcode)
            time.sleep(RESTART_PAUSE_S)
            processes[index] = start(index)
    _stop(processes, signals[0], Limits.from_env().graceful_shutdown_s + LEAVE_S)
    return 0


def _stop(processes: list[SpawnProcess], number: int, patience_s: float) -> None:
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
    deadline = time.monotonic() + patience_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _child(config: FrontendConfig, index: int, parent: int) -> None:
    from dynamo.runtime.logs import configure_logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the loop has its handlers; a terminal sends it to all of us
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        return
    if index:
        os.environ.pop("DYN_SYSTEM_PORT", None)  # one system server on that port is enough: the first process's
    configure_logging()
    raise SystemExit(run(config, reuse_port=True))
