"""Which lines of a batch are done, even after the process was killed?

`Journal` owns one append-only file beside the output: a header that says which work it belongs to, then one JSON line
a result, in the order in which they came. One `write()` a result, at once: what was written survives the death of the
process. `sync()` makes it survive the death of the machine; the batch calls it once a second, so that a power failure
costs at most about a second's results, which are then computed again. A line that was torn is dropped when the
journal is opened.
"""

import array
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

NOT_DONE = -1


class Work(msgspec.Struct, frozen=True):
    """What a journal belongs to. Another input or other settings would give other results."""

    input_sha256: str
    lines: int
    settings: dict[str, object]


class JournalError(Exception):
    """The journal cannot be used; the message says what to do."""


class _Entry(msgspec.Struct):
    line: int
    result: msgspec.Raw


_HEADER = msgspec.json.Decoder(Work)
_ENTRY = msgspec.json.Decoder(_Entry)


class Journal:
    """Opened for one run. `done` counts the results that are in it.

    Raises:
        JournalError: another process writes it, or it belongs to other work.
        OSError: it cannot be made or written.
    """

    def __init__(self, path: Path, work: Work) -> None:
        self.path = path
        self.done = 0
        self._offsets = array.array("q", [NOT_DONE]) * work.lines  # eight bytes a line of input
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = self._load(work)
        except BlockingIOError:
            os.close(self._fd)
            raise JournalError(f"{path} is in use: the same batch runs already") from None
        except BaseException:
            os.close(self._fd)
            raise

    def _load(self, work: Work) -> int:
        """Read what is there; returns the length of its whole lines."""
        end = 0
        with os.fdopen(os.dup(self._fd), "rb") as f:
            for raw in f:
                if not raw.endswith(b"\n"):
                    break  # torn by the end of the process
                try:
                    self._take(raw, end, work)
                except msgspec.DecodeError:
                    break  # torn by the end of the machine: nothing after it can be trusted
                end += len(raw)
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        if end == 0:
            head = msgspec.json.encode(work) + b"\n"
            _write_all(self._fd, head)
            end = len(head)
        return end

    def _take(self, raw: bytes, offset: int, work: Work) -> None:
        if offset == 0:
            if _HEADER.decode(raw) != work:
                raise JournalError(
                    f"{self.path} belongs to another input or other settings: "
                    "run it as before to finish that, or remove the file to begin anew"
                )
            return
        entry = _ENTRY.decode(raw)
        if not 0 <= entry.line < len(self._offsets):
            raise JournalError(f"{self.path} names line {entry.line + 1} of {len(self._offsets)}: remove the file")
        if self._offsets[entry.line] == NOT_DONE:
            self.done += 1
        self._offsets[entry.line] = offset

    def has(self, line: int) -> bool:
        """Whether the result of line `line` (from 0) is there."""
        return self._offsets[line] != NOT_DONE

    def append(self, line: int, result: object) -> None:
        """Record one result. It survives this process from here on.

        Raises:
            OSError: the disk is full; what was there before stays valid.
        """
        raw = msgspec.json.encode({"line": line, "result": result}) + b"\n"
        _write_all(self._fd, raw)
        self._offsets[line] = self._end
        self._end += len(raw)
        self.done += 1

    def sync(self) -> None:
        """Make everything that was appended survive the machine. May block for as long as the disk takes."""
        os.fdatasync(self._fd)

    def results(self) -> Iterator[bytes]:
        """All results, encoded, in the order of the input."""
        with os.fdopen(os.dup(self._fd), "rb") as f:
            for offset in self._offsets:
                if offset != NOT_DONE:
                    f.seek(offset)
                    yield bytes(_ENTRY.decode(f.readline()).result)

    def write_output(self, output: Path) -> None:
        """Write `output` whole, in the order of the input, and remove the journal."""
        part = output.with_name(output.name + ".part")
        with part.open("wb") as f:
            for result in self.results():
                f.write(result + b"\n")
            f.flush()
            os.fsync(f.fileno())
        part.replace(output)
        self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file; it stays for the next run unless `write_output` removed it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
