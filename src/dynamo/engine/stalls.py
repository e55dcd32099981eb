"""Has the engine stopped working without dying?

An engine that has requests inside makes steps: it puts out tokens, or reports its load or its cache. One that does
neither for long hangs (a collective that waits for a lost peer, a driver, a dead lock), and its process answers pings
all the same.
"""

DEFAULT_STALL_S = 120.0  # DYN_ENGINE_STALL_TIMEOUT: longer than any one step, and a step that compiles, may take


class StallWatch:
    """Counts how long an engine with work has shown no sign of any. `limit_s` 0: it is never called stalled."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._signs = 0
        self._seen = 0
        self._since: float | None = None

    def sign(self) -> None:
        """The engine did something."""
        self._signs += 1

    def is_stalled(self, now: float, has_work: bool) -> bool:
        """Whether it has had work for `limit_s`, and done nothing. To be asked several times in that span."""
        if not has_work or self._signs != self._seen or self._since is None:
            self._seen = self._signs
            self._since = now if has_work else None
            return False
        return 0 < self.limit_s <= now - self._since
