"""How far is it?"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def every(seconds: float, report: Callable[[int, float], None]) -> Callable[[int, float], None]:
    """`report`, but at most once in so many seconds."""
    due = 0.0

    def maybe(done: int, clock_s: float) -> None:
        nonlocal due
        now = time.perf_counter()
        if now >= due:
            due = now + seconds
            report(done, clock_s)

    return maybe


class Bars:
    """A bar a run on the terminal; nothing at all where stderr is not one, or is not wanted."""

    def __init__(self, names: Sequence[str], total: int, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._total = total
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[clock]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._tasks = [self._progress.add_task(name, total=total, clock="") for name in names]

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            for task in self._tasks:
                self._progress.update(task, completed=self._total)
        self._progress.stop()

    def at(self, position: int, done: int, clock_s: float) -> None:
        """A run has finished `done` requests."""
        self._progress.update(self._tasks[position], completed=min(done, self._total), clock=f"{clock_s:.0f} s")
