"""How does the wall clock of one process jump, and nobody else's?

usage: python -m chaos.clock FILE MODULE ARGS...
Runs a module as `python -m MODULE ARGS` does, with `time.time` and `time.time_ns` off by the seconds that stand in
FILE (a float of 8 bytes, at any time). That is the wall clock as our own code reads it; the kernel's file times, and
`datetime.now`, stay right. A system's clock belongs to all that runs on it, and Linux has no namespace for it.
"""

import mmap
import os
import runpy
import struct
import sys
import time

_OFFSET = struct.Struct("<d")


def set_offset(path: str | os.PathLike[str], seconds: float) -> None:
    """Let the clocks of all processes that run with this file be off by so much."""
    with open(path, "r+b") as file:
        file.write(_OFFSET.pack(seconds))


def make_file(path: str | os.PathLike[str]) -> None:
    """A file whose clock is right."""
    with open(path, "wb") as file:
        file.write(_OFFSET.pack(0.0))


def follow(path: str) -> None:
    """From now on this process's wall clock is off by what stands in the file."""
    with open(path, "rb") as file:
        shared = mmap.mmap(file.fileno(), _OFFSET.size, access=mmap.ACCESS_READ)
    true_time, true_time_ns, unpack = time.time, time.time_ns, _OFFSET.unpack_from

    def shifted() -> float:
        return true_time() + float(unpack(shared)[0])

    def shifted_ns() -> int:
        return true_time_ns() + int(unpack(shared)[0] * 1e9)

    time.time, time.time_ns = shifted, shifted_ns


def main() -> None:
    """Become the module."""
    follow(sys.argv[1])
    module = sys.argv[2]
    sys.argv[1:3] = []
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
