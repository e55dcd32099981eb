"""Who asked what, and how long did it take? One JSON line a request, in a file that may be rotated."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import msgspec

log = logging.getLogger(__name__)


class Access(msgspec.Struct, frozen=True):
    """One line. `-` stands for what the request did not say."""

    ts: str
    trace_id: str
    method: str
    path: str
    model: str
    status: int
    duration_ms: float


class AccessLog:
    """Appends to a file. Raises OSError where it cannot be opened; later failures are told in the log, once."""

    def __init__(self, path: Path, *, local_time: bool = False) -> None:
        self._path = path
        self._zone = None if local_time else UTC
        self._file: TextIO | None = path.open("a", encoding="utf-8", buffering=1)

    def write(self, trace_id: str, method: str, path: str, model: str, status: int, duration_s: float) -> None:
        """Append a line."""
        if self._file is None:
            return
        when = datetime.now(UTC).astimezone(self._zone).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = Access(when, trace_id, method, path, model, status, round(duration_s * 1000, 3))
        try:
            self._file.write(msgspec.json.encode(line).decode() + "\n")
        except OSError as e:
            log.error("the access log %s cannot be written, and is off until it is reopened: %s", self._path, e)  # noqa: TRY400
            self._file = None

    def reopen(self) -> None:
        """Go on in a new file, after the old one was moved away. Raises OSError; then the old one stays open."""
        new = self._path.open("a", encoding="utf-8", buffering=1)
        self.close()
        self._file = new

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            self._file.close()
            self._file = None
