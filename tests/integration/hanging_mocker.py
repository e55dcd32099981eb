"""A mocker whose engine hangs from SIGUSR1 to SIGUSR2, while its process answers pings: it takes requests, and puts out
nothing."""

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

import dynamo.mocker.main as program
from dynamo.engine.contract import EngineCallbacks, EngineConfig
from dynamo.mocker.engine import MockerEngine


class Held:
    """Callbacks that wait while the engine hangs."""

    def __init__(self, inner: EngineCallbacks) -> None:
        self._inner = inner
        self._waiting: list[Callable[[], object]] | None = None

    def hang(self) -> None:
        self._waiting = []

    def go_on(self) -> None:
        waiting, self._waiting = self._waiting or [], None
        for call in waiting:
            call()

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._inner, name)

        def call(*args: Any, **kwargs: Any) -> None:
            if self._waiting is None:
                inner(*args, **kwargs)
            else:
                self._waiting.append(lambda: inner(*args, **kwargs))

        return call


class HangingEngine(MockerEngine):
    """The engine of this program."""

    async def start(self, callbacks: EngineCallbacks) -> EngineConfig:
        held = Held(callbacks)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, held.hang)
        loop.add_signal_handler(signal.SIGUSR2, held.go_on)
        return await super().start(held)  # type: ignore[arg-type]


if __name__ == "__main__":
    program.MockerEngine = HangingEngine  # type: ignore[misc]
    sys.exit(program.main())
