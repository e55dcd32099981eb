"""What do SIGTERM and SIGINT do? The first begins an orderly end, the second ends the process at once."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable


def on_stop_signals(stop: Callable[[], None], is_stopping: Callable[[], bool], log: logging.Logger, said: str) -> None:
    """Call `stop` at the first signal, and say what happens then. Needs a running event loop in the main thread."""

    def on_signal(number: signal.Signals) -> None:
        if is_stopping():
            log.warning("second %s: ending at once", number.name)
            os._exit(128 + number)
        log.info("%s: %s", number.name, said)
        stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
