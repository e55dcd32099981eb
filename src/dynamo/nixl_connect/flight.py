"""How far is one transfer, and is its memory the caller's again?"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from dynamo.nixl_connect.kinds import OperationKind, OperationStatus
from dynamo.nixl_connect.region import Region


class Flight:
    """One operation, as the thread of an `Agent` sees it. It keeps the memory alive, whoever drops the operation.

    `status` is what users see: the first final one stays. `over` resolves when NIXL has let go of the memory, or fails
    with what went wrong. They differ after a cancel: bytes may arrive until the transfer has really ended.
    """

    __slots__ = (
        "_lock",
        "begun",
        "deadline",
        "error",
        "handle",
        "holding",
        "is_known",
        "key",
        "kind",
        "over",
        "regions",
        "remote",
        "status",
    )

    def __init__(self, kind: OperationKind, key: str, regions: Sequence[Region], patience_s: float) -> None:
        self.kind = kind
        self.key = key
        self.regions = regions
        self.deadline = time.monotonic() + patience_s
        self.status = OperationStatus.UNINITIALIZED
        self.error: BaseException | None = None
        self.handle: int | None = None  # NIXL's, while a transfer that this side began is not released
        self.remote: Any = None  # the peer that it is with, while it counts as its user
        self.holding: list[Region] = []
        self.is_known = False  # whether a peer may have been told of the memory
        self.begun: Future[Any] = _promise()  # resolves when memory is registered and, if active, NIXL has the transfer
        self.over: Future[None] = _promise()
        self._lock = threading.Lock()

    def advance(self, status: OperationStatus, error: BaseException | None = None) -> bool:
        """Take a status, unless there is a final one already. Says whether it was taken."""
        with self._lock:
            if self.status.is_final:
                return False
            self.status, self.error = status, error
            return True

    def conclude(self) -> None:
        """NIXL has let go: wake who waits."""
        for promise in (self.begun, self.over):
            if not promise.done():
                if self.error is None:
                    promise.set_result(None)
                else:
                    promise.set_exception(self.error)


def _promise() -> "Future[Any]":
    """A future that waiting for cannot cancel."""
    promise: Future[Any] = Future()
    promise.set_running_or_notify_cancel()
    return promise
