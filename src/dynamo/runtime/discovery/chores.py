"""What does a backend of discovery do in the background, and how does that end?"""

import asyncio
from collections.abc import Callable, Coroutine


class Chores:
    """The tasks of one backend: each is begun once, by name, and none after `stop`."""

    def __init__(self) -> None:
        self.stopped = False
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def begin(self, name: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Begin a task, unless it has begun already or all have been stopped."""
        if name not in self._tasks and not self.stopped:
            self._tasks[name] = asyncio.get_running_loop().create_task(work(), name=f"discovery {name}")

    async def stop(self) -> None:
        """End all tasks; returns once they have ended."""
        self.stopped = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
