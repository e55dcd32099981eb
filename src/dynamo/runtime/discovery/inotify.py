"""Did something change in these directories?

The kernel's answer, for an event loop, without a thread: a file descriptor that becomes readable. Only the
arrival and departure of files count; heartbeats, which touch files, do not wake anybody.
"""

import ctypes
import os
from pathlib import Path

_IN_CLOSE_WRITE, _IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x8, 0x40, 0x80, 0x100, 0x200
_MASK = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_CLOSE_WRITE
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


class Inotify:
    """One inotify descriptor. Raises OSError if the kernel gives none (fs.inotify.max_user_instances)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._libc.inotify_init1(_FLAGS)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def add(self, directory: Path) -> None:
        """Watch a directory too. Adding it again does nothing, unless it is a new directory of that name."""
        if self._libc.inotify_add_watch(self.fd, os.fsencode(directory), _MASK) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))

    def drain(self) -> None:
        """Forget what has been reported so far."""
        try:
            while os.read(self.fd, 65536):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Give the descriptor back. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
