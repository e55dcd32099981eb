"""Which worker has this session been with? [K46]

A session is bound to the worker of its first request, and stays bound as long as it is used within its time to live
and the worker is there. `hard` means that its requests go nowhere else; `soft` that they go elsewhere while the
worker is busy, and come back.
"""

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from dynamo.router.types import WorkerKey

MAX_SESSIONS = 100_000  # about 30 MB; the one that was idle longest is forgotten first


class Binding(msgspec.Struct):
    """One session's worker."""

    worker: WorkerKey
    bound_at: float
    used_at: float


class SessionAffinity:
    """The sessions of one model. `on_bind` hears of every new binding, so that other routers can be told."""

    def __init__(
        self,
        ttl_s: float,
        mode: str = "hard",
        *,
        max_sessions: int = MAX_SESSIONS,
        on_bind: Callable[[str, WorkerKey], None] | None = None,
    ) -> None:
        if not ttl_s > 0:
            raise ValueError(f"session_affinity_ttl_secs must be above 0, got {ttl_s!r}")
        if mode not in ("hard", "soft"):
            raise ValueError(f"session_affinity_mode must be hard or soft, got {mode!r}")
        self.ttl_s = ttl_s
        self.mode = mode
        self.on_bind = on_bind
        self.moved = 0
        """Sessions that lost their worker."""
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, Binding] = OrderedDict()  # the one used longest ago first
        self._at: dict[WorkerKey, set[str]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def worker(self, session_id: str, now: float) -> WorkerKey | None:
        """Where the session's requests go. Being asked for is use."""
        self.expire(now)
        binding = self._sessions.get(session_id)
        if binding is None:
            return None
        binding.used_at = now
        self._sessions.move_to_end(session_id)
        return binding.worker

    def bind(self, session_id: str, worker: WorkerKey, now: float) -> None:
        """A request of the session was sent to a worker. A session that is bound stays where it is."""
        binding = self._sessions.get(session_id)
        if binding is not None:
            binding.used_at = now
            self._sessions.move_to_end(session_id)
            return
        self._put(session_id, Binding(worker, now, now))
        if self.on_bind is not None:
            self.on_bind(session_id, worker)

    def adopt(self, session_id: str, worker: WorkerKey, now: float) -> None:
        """Another router bound a session. If both of us did at the same time, the lower worker wins at both."""
        binding = self._sessions.get(session_id)
        if binding is not None:
            if worker >= binding.worker:
                return
            self._drop(session_id)
        self._put(session_id, Binding(worker, now, now))

    def _put(self, session_id: str, binding: Binding) -> None:
        while len(self._sessions) >= self._max_sessions:
            self._drop(next(iter(self._sessions)))
        self._sessions[session_id] = binding
        self._at.setdefault(binding.worker, set()).add(session_id)

    def _drop(self, session_id: str) -> None:
        worker = self._sessions.pop(session_id).worker
        at = self._at[worker]
        at.discard(session_id)
        if not at:
            del self._at[worker]

    def end(self, session_id: str) -> None:
        """The client said that this was the session's last request."""
        if session_id in self._sessions:
            self._drop(session_id)

    def expire(self, now: float) -> None:
        """Forget sessions that nobody used for their time to live."""
        while self._sessions:
            session_id, binding = next(iter(self._sessions.items()))
            if now - binding.used_at <= self.ttl_s:
                return
            self._drop(session_id)

    def forget(self, worker: WorkerKey) -> int:
        """A worker is gone: its sessions are bound anew with their next requests. Returns how many."""
        sessions = list(self._at.get(worker, ()))
        for session_id in sessions:
            self._drop(session_id)
        self.moved += len(sessions)
        return len(sessions)
