"""Which shared memory do vLLM's processes hold, and how is it freed when they were killed?

A process that is killed frees none of its segments and semaphores. Python's resource tracker does, but only once
the process that started all others has ended too; an engine that is stopped must not wait for that.
"""

import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

_DIRECTORY = "/dev/shm/"  # noqa: S108 - where Linux keeps it


def held_by_children() -> set[str]:
    """Paths of the segments and semaphores that the processes below this one have mapped; empty without /proc."""
    found = set()
    for child in multiprocessing.active_children():
        if child.pid is not None:
            for pid in (child.pid, *_below(child.pid)):
                with contextlib.suppress(OSError):
                    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
                    found |= {line.split(None, 5)[5] for line in lines if _DIRECTORY in line}
    return {path for path in found if not path.endswith("(deleted)")}


def free(paths: Iterable[str]) -> None:
    """Free what is left of `paths`, and tell the resource tracker, which would complain about it at the end."""
    for path in paths:
        name = path.removeprefix(_DIRECTORY)
        if name.startswith("psm_"):
            with contextlib.suppress(FileNotFoundError):
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()
        elif name.startswith("sem.mp-") and Path(path).exists():
            Path(path).unlink(missing_ok=True)
            resource_tracker.unregister("/" + name.removeprefix("sem."), "semaphore")


def _below(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from _below(int(child))
