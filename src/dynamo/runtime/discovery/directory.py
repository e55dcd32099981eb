"""How does a directory hold keys that die with their process?

Plain blocking file operations; `file.py` calls them from one thread. The layout, below the root:

    v1/instances/dynamo%2Fbackend%2Fgenerate%2F1a2b   a key: the bucket is a directory, the rest is percent-encoded
    leases/7f3c…                                      which keys a process holds; it keeps this file locked

A key is live while its file's mtime moves: its owner touches it every third of the TTL. A process that dies
on this machine loses its lock at once, and whoever looks next removes its keys.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import msgspec

from dynamo.runtime.errors import UNDECODABLE, DiscoveryError

log = logging.getLogger(__name__)

MAX_VALUE_BYTES = 16 << 20  # a model card is some kilobytes; anything larger was not written by us
MAX_FILE_NAME = 255  # bytes, of ext4, xfs, tmpfs
LITTER_AGE_S = 60.0  # temporary files and entries this much older than the TTL are swept away
_LOCK_WAIT_S = 2.0  # a claim takes milliseconds; whoever holds the lock longer is stopped, and we go on

_SEGMENT = re.compile(r"[a-z0-9_]+")


_Line = tuple[str, int]
"""A line of a lease file: a key, and the inode of its file, so that a key somebody else took over is left alone. 0: no
longer held. The last line of a key counts."""


@dataclass(slots=True)
class _Seen:
    """A key's file as it was last read. `alive_at` is when, on our monotonic clock, its owner last moved it."""

    value: bytes
    inode: int
    mtime_ns: int
    alive_at: float


@dataclass(slots=True)
class Entry:
    """A live key. `version` changes whenever its owner puts it again."""

    value: bytes
    version: int


def encode_name(name: str) -> str:
    """Everything but ASCII letters and digits becomes `%XX`, so no name is a path, hidden, or `..`."""
    return "".join(chr(b) if chr(b).isalnum() and b < 128 else f"%{b:02X}" for b in name.encode())


def split_key(key: str) -> tuple[str, str]:
    """(bucket, rest). Raises DiscoveryError if the key has no bucket of two plain segments and a rest."""
    segments = key.split("/", 2)
    if len(segments) != 3 or not segments[2] or not all(_SEGMENT.fullmatch(s) for s in segments[:2]):
        raise DiscoveryError(f"{key!r} is not a discovery key: write bucket/bucket/name")
    return f"{segments[0]}/{segments[1]}", segments[2]


def explain(root: Path, doing: str, error: OSError) -> DiscoveryError:
    """An OSError as the user can mend it."""
    return DiscoveryError(
        f"cannot {doing} in the discovery directory {root}: {error.strerror or error}. "
        "Make it writable and give it space, or point DYN_FILE_KV at another directory"
    )


class KeyDirectory:
    """The directory as one process sees it. Owns this process's entries. Use from one thread at a time."""

    def __init__(self, root: Path, ttl_s: float, must_be_ours: bool = False) -> None:
        self.root = root
        self.ttl_s = ttl_s
        self._must_be_ours = must_be_ours
        self._mine: dict[str, tuple[bytes, int]] = {}
        self._seen: dict[str, dict[str, _Seen]] = {}
        self._warned_names: set[str] = set()
        self._lease_name = secrets.token_hex(8)
        self._lease_fd: int | None = None
        self._count = 0

    # --- writing

    def put(self, key: str, value: bytes, create: bool) -> None:
        """See `Discovery.put`."""
        path = self._path(key)
        try:
            self._make(path.parent)
            temporary = self._write_temporary(path.parent, value)
            try:
                inode = temporary.stat().st_ino
                self._note(key, inode)
                if create and key not in self._mine:
                    self._claim(key, path, temporary)
                else:
                    os.replace(temporary, path)
            except (OSError, DiscoveryError):
                self._note(key, self._mine[key][1] if key in self._mine else 0)
                raise
            finally:
                temporary.unlink(missing_ok=True)
            self._mine[key] = (value, inode)
        except OSError as e:
            raise explain(self.root, f"put {key}", e) from e

    def delete(self, key: str) -> None:
        """See `Discovery.delete`."""
        held = self._mine.pop(key, None)
        if held is None:
            return
        try:
            self._remove(self._path(key), held[1])
            self._note(key, 0)
        except OSError as e:
            raise explain(self.root, f"delete {key}", e) from e

    def heartbeat(self) -> None:
        """Touch what is ours; put back what was swept away. Raises OSError if the directory cannot be used."""
        self._renew_lease()
        for key, (value, inode) in tuple(self._mine.items()):
            path = self._path(key)
            try:
                if path.stat().st_ino == inode:
                    os.utime(path)
                    continue
            except FileNotFoundError:
                log.info("discovery key %s had vanished; putting it back", key)
                del self._mine[key]
                try:
                    self.put(key, value, create=True)
                except DiscoveryError:
                    self._mine[key] = (value, inode)
                    raise
                continue
            del self._mine[key]
            log.error("discovery key %s now belongs to another process; this one no longer claims it", key)

    def close(self) -> None:
        """Remove all that is ours, as far as the directory lets us."""
        for key, (_, inode) in self._mine.items():
            with contextlib.suppress(OSError):
                self._remove(self._path(key), inode)
        self._mine.clear()
        if self._lease_fd is not None:
            with contextlib.suppress(OSError):
                (self.root / "leases" / self._lease_name).unlink(missing_ok=True)
            os.close(self._lease_fd)
            self._lease_fd = None

    def _make(self, directory: Path) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_owner()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _check_owner(self) -> None:
        """The default root has a name that anybody can guess: another user could have made it, to be our workers."""
        if self._must_be_ours and self.root.stat().st_uid not in (os.geteuid(), 0):
            raise DiscoveryError(
                f"the discovery directory {self.root} belongs to another user: name one by DYN_FILE_KV that you trust"
            )

    def _path(self, key: str) -> Path:
        bucket, rest = split_key(key)
        name = encode_name(rest)
        if len(name) > MAX_FILE_NAME:
            raise DiscoveryError(
                f"{key!r} needs a file name of {len(name)} bytes, more than {MAX_FILE_NAME}: use shorter names"
            )
        return self.root / bucket / name

    def _write_temporary(self, directory: Path, content: bytes) -> Path:
        self._count += 1
        path = directory / f".{self._lease_name}-{self._count}"
        try:
            path.write_bytes(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def _claim(self, key: str, path: Path, temporary: Path) -> None:
        self.reap()
        with self._directory_lock():
            try:
                os.link(temporary, path)
            except FileExistsError:
                age_s = time.time() - path.stat().st_mtime
                if age_s <= self.ttl_s:
                    raise DiscoveryError(
                        f"{key} is held by another live process (seen {age_s:.1f} s ago in {self.root}): "
                        "give each worker its own instance id, or stop the other one"
                    ) from None
                os.replace(temporary, path)

    def _remove(self, path: Path, inode: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == inode:
                path.unlink()
                return True
        return False

    @contextlib.contextmanager
    def _directory_lock(self) -> Iterator[None]:
        """Keeps two processes from taking over one dead key. Goes on without after 2 s."""
        with open(self.root / ".lock", "ab") as file:
            give_up = time.monotonic() + _LOCK_WAIT_S
            while not _try_lock(file.fileno(), fcntl.LOCK_EX) and time.monotonic() < give_up:
                time.sleep(0.01)
            yield

    def _note(self, key: str, inode: int) -> None:
        """Append to the lease file, which is ours from before it has its name, and locked for as long as we live."""
        if self._lease_fd is None:
            directory = self.root / "leases"
            directory.mkdir(mode=0o700, exist_ok=True)
            temporary = directory / f".{self._lease_name}"
            self._lease_fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            _try_lock(self._lease_fd, fcntl.LOCK_EX)
            os.rename(temporary, directory / self._lease_name)
        os.write(self._lease_fd, msgspec.json.encode((key, inode)) + b"\n")

    def _renew_lease(self) -> None:
        """Somebody may have removed our lease file, with or without the whole directory: then begin a new one."""
        if self._lease_fd is not None and not (self.root / "leases" / self._lease_name).exists():
            os.close(self._lease_fd)
            self._lease_fd = None
            self._make(self.root / "leases")
            for key, (_, inode) in self._mine.items():
                self._note(key, inode)

    # --- reading

    def open_bucket(self, bucket: str) -> bool:
        """Make the bucket's directory if it is not there; whether it was not. Raises DiscoveryError."""
        directory = self.root / bucket
        try:
            if directory.is_dir():
                self._check_owner()
                return False
            self._make(directory)
        except OSError as e:
            raise explain(self.root, f"read {bucket}", e) from e
        return True

    def scan(self, bucket: str) -> dict[str, Entry]:
        """The live keys of a bucket. Raises OSError if it cannot be read."""
        before = self._seen.get(bucket, {})
        seen: dict[str, _Seen] = {}
        live: dict[str, Entry] = {}
        now, wall = time.monotonic(), time.time()
        with os.scandir(self.root / bucket) as files:
            for file in files:
                key = self._key_of(bucket, file)
                if key is None:
                    continue
                found = self._look(file, before.get(key), now, wall)
                if found is None:
                    continue
                seen[key] = found
                if now - found.alive_at <= self.ttl_s:
                    live[key] = Entry(found.value, found.inode)
                elif now - found.alive_at > self.ttl_s + LITTER_AGE_S:
                    self._sweep(Path(file.path), found.mtime_ns)
        self._seen[bucket] = seen
        return live

    def reap(self) -> None:
        """Remove the keys of processes of this machine that have died. Raises OSError."""
        try:
            leases = os.listdir(self.root / "leases")
        except FileNotFoundError:
            return
        for name in leases:
            if name == self._lease_name:
                continue
            path = self.root / "leases" / name
            try:
                with open(path, "rb") as file:
                    if not _try_lock(file.fileno(), fcntl.LOCK_SH):
                        continue
                    if name.startswith("."):
                        if time.time() - os.fstat(file.fileno()).st_mtime > LITTER_AGE_S:
                            path.unlink(missing_ok=True)
                        continue
                    self._bury(file.read(MAX_VALUE_BYTES))
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue

    def _bury(self, content: bytes) -> None:
        held: dict[str, int] = {}
        for line in content.splitlines():
            with contextlib.suppress(*UNDECODABLE):  # a line cut short; its key ends with its TTL
                key, inode = msgspec.json.decode(line, type=_Line)
                held[key] = inode
        for key, inode in held.items():
            with contextlib.suppress(DiscoveryError):
                if inode and self._remove(self._path(key), inode):
                    log.info("removing %s: its process is gone", key)

    def _key_of(self, bucket: str, file: "os.DirEntry[str]") -> str | None:
        name = file.name
        if name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > LITTER_AGE_S:
                    os.unlink(file.path)
            return None
        try:
            key = f"{bucket}/{unquote(name, errors='strict')}"
        except UnicodeDecodeError:
            key = ""
        if not key or encode_name(key[len(bucket) + 1 :]) != name:
            self._warn_once(file.path, "its name is not a percent-encoded key")
            return None
        return key

    def _look(self, file: "os.DirEntry[str]", known: _Seen | None, now: float, wall: float) -> _Seen | None:
        try:
            status = file.stat(follow_symlinks=False)
            if known and known.inode == status.st_ino and known.mtime_ns == status.st_mtime_ns:
                return known
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_VALUE_BYTES:
                self._warn_once(file.path, f"it is not a file of at most {MAX_VALUE_BYTES} bytes")
                return None
            with open(file.path, "rb") as content:
                value = content.read(MAX_VALUE_BYTES)
        except FileNotFoundError:
            return None
        except PermissionError:
            self._warn_once(file.path, "it may not be read")
            return None
        # The first look has only the file's own clock to go by; later ones see whether the mtime moves.
        age_s = 0.0 if known else max(0.0, wall - status.st_mtime)
        return _Seen(value, status.st_ino, status.st_mtime_ns, now - age_s)

    def _sweep(self, path: Path, mtime_ns: int) -> None:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime_ns == mtime_ns:
                path.unlink()

    def _warn_once(self, path: str, reason: str) -> None:
        if path not in self._warned_names and len(self._warned_names) < 1000:
            self._warned_names.add(path)
            log.warning("ignoring %s in the discovery directory: %s", path, reason)


def _try_lock(fd: int, how: int) -> bool:
    """Whether the lock was taken. A file system without locks counts as taken by somebody else."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    return True
