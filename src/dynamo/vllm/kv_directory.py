"""Where in shared memory lie the files by which workers of one machine pass KV, and which are left behind?"""

import contextlib
import os
import re
import stat
import time
from pathlib import Path

LEFT_BEHIND_S = 900.0  # 30 leases; a file that old belongs to a worker that was killed
_NAME = re.compile(r"[0-9a-f]{32}")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps it


def default_directory() -> Path:
    """The directory that workers of this user share on this machine."""
    root = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108
    return root / f"dynamo-kv-{os.getuid()}"


def open_directory(path: Path) -> None:
    """Make the directory, for this user alone, and remove what killed workers left in it.

    Raises:
        ValueError: it is somebody else's, or open to others.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ValueError(f"--kv-transfer-dir: {path} must be a directory that belongs to this user alone (mode 700)")
    oldest = time.time() - LEFT_BEHIND_S
    for file in path.iterdir():
        with contextlib.suppress(OSError):
            if _NAME.fullmatch(file.name) and file.lstat().st_mtime < oldest:
                file.unlink()


def file_path(directory: Path, name: object) -> Path:
    """The path of a file named in another worker's answer. Raises ValueError for what is no name of ours."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a KV file")
    return directory / name
