"""How late is the event loop?

A timer that is due every 10 ms notes by how much it fired late. A loop that is late is late for every stream.
"""

import asyncio
import time
from typing import Final

from dynamo import prometheus_names as names
from dynamo.runtime import buckets
from dynamo.runtime.metrics import Metrics

INTERVAL_S: Final = 0.010  # facts row O19; 100 timer calls a second cost about 0.1 % of a core
STALL_S: Final = 0.005  # as above: later than this is a stall


class LoopMonitor:
    """Counts `event_loop_delay_seconds` and `event_loop_stall_total` below `prefix`, from `start` to `close`."""

    def __init__(self, metrics: Metrics, prefix: str = names.name_prefix.FRONTEND) -> None:
        n = names.frontend_perf
        self._delay = metrics.histogram(
            n.EVENT_LOOP_DELAY_SECONDS,
            "Seconds by which a 10 ms timer fired late",
            bounds=buckets.LOOP_DELAY_SECONDS,
            prefix=prefix,
            base=(),
        ).labels()
        self._stalls = metrics.counter(
            n.EVENT_LOOP_STALL_TOTAL, "Timers that fired more than 5 ms late", prefix=prefix, base=()
        ).labels()
        self._loop: asyncio.AbstractEventLoop
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        """Begin to measure the running loop."""
        self._loop = asyncio.get_running_loop()
        self._arm()

    def close(self) -> None:
        """Stop measuring. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._due = time.monotonic() + INTERVAL_S  # not loop.time(): uvloop's stands still within a turn
        self._timer = self._loop.call_later(INTERVAL_S, self._fire)

    def _fire(self) -> None:
        late = max(0.0, time.monotonic() - self._due)
        self._delay.observe(late)
        if late > STALL_S:
            self._stalls.value += 1
        self._arm()
