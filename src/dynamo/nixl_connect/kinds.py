"""What may an operation do, and how far is it?"""

import enum


class OperationKind(enum.IntEnum):
    """Which way the bytes go, seen from the side that begins. The values are on the wire."""

    UNSPECIFIED = 0
    READ = 1
    WRITE = 2

    def __str__(self) -> str:
        return "<invalid>" if self is OperationKind.UNSPECIFIED else self.name


_SHORT = {0: "<invalid>", 1: "INIT", 2: "PROC", 3: "DONE", 4: "STOP", 5: "ERR"}  # words that users of the peer print


class OperationStatus(enum.IntEnum):
    """How far an operation is. The last three are final."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    IN_PROGRESS = 2
    COMPLETE = 3
    CANCELLED = 4
    ERRORED = 5

    def __str__(self) -> str:
        return _SHORT[self.value]

    @property
    def is_final(self) -> bool:
        """Whether nothing can change it any more."""
        return self >= OperationStatus.COMPLETE
