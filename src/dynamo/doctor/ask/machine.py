"""What is this machine: processor, memory, system, Python, limits, clock? The kernel is asked, and nobody else."""

import ctypes
import os
import platform
import resource
import time
from pathlib import Path

from dynamo.doctor.facts import Clock, Memory, OpenFiles, Processor, Python, SharedMemory, System

GROUP = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")  # noqa: S108 - the place itself is what is looked at
ADJTIMEX_BYTES = 256  # of struct timex, 208 on 64-bit Linux
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def processor(group: Path = GROUP) -> Processor:
    """The architecture, and the cores that affinity and control group leave."""
    cores = float(len(os.sched_getaffinity(0)))
    quota, _, period = _line(group / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) / int(period))
    return Processor(platform.machine(), cores)


def memory(group: Path = GROUP) -> Memory:
    """The machine's memory, or the control group's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _line(group / "memory.max")
    return Memory(min(total, int(limit)) if limit.isdigit() else total)


def system() -> System:
    """Kernel, distribution and C library."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    name = " ".join(filter(None, (release.get("ID", ""), release.get("VERSION_ID", ""))))
    libc, version = _libc()
    return System(platform.system(), name, release.get("PRETTY_NAME", name), libc, version)


def _libc() -> tuple[str, str]:
    try:
        word, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):  # a C library that does not know the name
        return ("musl" if any(Path("/lib").glob("ld-musl-*")) else ""), ""
    return word, version


def python() -> Python:
    """The interpreter that runs this."""
    return Python(platform.python_implementation(), platform.python_version())


def shared_memory(directory: Path = SHM) -> SharedMemory:
    """Raises OSError if there is no such directory."""
    stat = os.statvfs(directory)
    return SharedMemory(
        free_bytes=stat.f_bavail * stat.f_frsize,
        size_bytes=stat.f_blocks * stat.f_frsize,
        writable=os.access(directory, os.W_OK),
    )


def open_files() -> OpenFiles:
    """The limits of this process, which its children inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = 2**31 - 1
    return OpenFiles(*(unlimited if n == resource.RLIM_INFINITY else n for n in (soft, hard)))


def clock() -> Clock:
    """The date, and what the kernel knows of the clock's error. Raises OSError where it may not be asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    timex = ctypes.create_string_buffer(ADJTIMEX_BYTES)  # modes = 0: nothing is set
    state = libc.adjtimex(timex)
    if state < 0:
        raise OSError(ctypes.get_errno(), "adjtimex: " + os.strerror(ctypes.get_errno()))
    max_error_us = ctypes.c_long.from_buffer(timex, 3 * ctypes.sizeof(ctypes.c_long)).value
    return Clock(time.strftime("%Y%m%d", time.gmtime()), state != TIME_ERROR, max_error_us / 1e6)


def _line(file: Path) -> str:
    """The first line of a small file; empty where there is none, as without control groups."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
