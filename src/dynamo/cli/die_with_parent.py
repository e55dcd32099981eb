"""How does a child not outlive a parent that was killed?

usage: python -m dynamo.cli.die_with_parent PARENT_PID PROGRAM [ARGUMENT ...]

Asks the kernel for SIGTERM when the parent is gone (PR_SET_PDEATHSIG survives exec), then becomes PROGRAM. A
program of its own rather than `preexec_fn`, which may deadlock in a parent that has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str]) -> None:
    """Become `argv[1:]`, tied to the life of process `argv[0]`."""
    parent, program = int(argv[0]), argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(1)
    os.execv(program[0], program)  # noqa: S606 - replacing ourselves is the point


if __name__ == "__main__":
    main(sys.argv[1:])
