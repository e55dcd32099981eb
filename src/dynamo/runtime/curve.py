"""Who may hear what is published over ZeroMQ, and who is believed to be a publisher?

CurveZMQ (rfc.zeromq.org/spec/26): each process has a key pair of its own, or one that the deployment shares, and a
directory with the public keys of the others. Files are ZeroMQ's certificates, as `dynamo event-keys` makes them.
"""

import importlib.util
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import zmq
from zmq.auth import load_certificate
from zmq.utils import z85

from dynamo.runtime.logs import Rarely

log = logging.getLogger(__name__)
rarely = Rarely(log)

PREFIX: Final = "DYN_EVENT_PLANE_CURVE_"
KEY: Final = f"{PREFIX}KEY_PATH"
PEERS: Final = f"{PREFIX}PEERS_PATH"
INSTALL: Final = "pip install 'ai-dynamo[curve]'"
OTHERS: Final = 0o006  # the mode's bits by which everybody may read or write
ZAP: Final = "inproc://zeromq.zap.01"  # where ZeroMQ asks (rfc.zeromq.org/spec/27)


class CurveKeys:
    """A process's own pair, and whom it knows. Keys are Z85, as in the files.

    Raises ValueError naming the variable if a file cannot be used, or may be read by everybody.
    """

    def __init__(self, key_file: Path, peers: Path | None = None) -> None:
        self.public, self.secret = _own_pair(key_file)
        self._peers = peers
        self._seen: list[tuple[str, int, int]] | None = None
        self._known: frozenset[bytes] = frozenset()
        if peers is not None and not peers.is_dir():
            raise ValueError(f"{PEERS}: there is no directory {peers}")

    @classmethod
    def from_environ(cls, event_plane: str, environ: Mapping[str, str] = os.environ) -> "CurveKeys | None":
        """As the variables say; None if they say nothing. Raises ValueError for what cannot work."""
        for name, value in environ.items():
            if name.startswith(PREFIX) and value and name not in (KEY, PEERS):
                raise ValueError(f"{name}: there is no such variable; there are {KEY}, {PEERS}")
        key, peers = environ.get(KEY, ""), environ.get(PEERS, "")
        if not key:
            if peers:
                raise ValueError(f"{PEERS} needs {KEY}")
            return None
        if event_plane != "zmq":
            raise ValueError(f"{KEY}: events travel by {event_plane}, which has keys of its own; unset it")
        if not zmq.has("curve"):
            raise ValueError(f"{KEY}: this ZeroMQ was built without CURVE: pip install --force-reinstall pyzmq")
        if importlib.util.find_spec("nacl") is None:
            raise ValueError(f"{KEY}: CURVE needs the package PyNaCl: {INSTALL}")
        return cls(Path(key), Path(peers) if peers else None)

    def knows(self, public: bytes) -> bool:
        """Whether this public key is ours or another member's, by what the directory holds now."""
        return public == self.public or (self._peers is not None and public in self._members(self._peers))

    def _members(self, directory: Path) -> frozenset[bytes]:
        files = sorted(directory.glob("*.key"))
        seen = [(file.name, stat.st_mtime_ns, stat.st_size) for file in files if (stat := _stat(file)) is not None]
        if seen != self._seen:
            self._known = frozenset(public for file in files if (public := _public_in(file)) is not None)
            self._seen = seen
        return self._known

    def guard(self, socket: "zmq.Socket[bytes]") -> None:
        """Let only members connect to a socket, which is not bound yet."""
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, self.public)
        socket.set(zmq.CURVE_SECRETKEY, self.secret)
        socket.set(zmq.ZAP_DOMAIN, _domain_of(self, socket.context))
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else ZeroMQ lets everybody in where nobody answers its question


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:  # removed a moment ago
        return None


def _own_pair(file: Path) -> tuple[bytes, bytes]:
    try:
        mode = file.stat().st_mode
        public, secret = load_certificate(file)
    except (OSError, ValueError) as e:
        raise ValueError(f"{KEY}: {file}: {getattr(e, 'strerror', None) or e}") from None
    if secret is None:
        raise ValueError(f"{KEY}: {file} has no secret key: it is the one whose name ends with _secret")
    if mode & OTHERS:
        raise ValueError(f"{KEY}: everybody may read {file}: chmod 600 it, and make a new key if others could")
    for key in (public, secret):
        _check(key, f"{KEY}: {file}")
    return public, secret


def _check(key: bytes, where: str) -> None:
    try:
        right = len(key) == 40 and len(z85.decode(key)) == 32
    except (ValueError, KeyError, OverflowError):
        right = False
    except Exception:  # noqa: BLE001 - pyzmq has no one class for letters that are not Z85's
        right = False
    if not right:
        raise ValueError(f"{where}: no CURVE key: 40 letters of Z85")


def _public_in(file: Path) -> bytes | None:
    """A member's key; a file that has none is told once, and keeps nobody else out."""
    try:
        public, _ = load_certificate(file)
        _check(public, str(file))
    except (OSError, ValueError) as e:
        rarely.warning(str(file), "%s: ignoring %s: %s", PEERS, file, e)
        return None
    return public


# --- answering ZeroMQ's question whether a key may come in

_domains: dict[bytes, CurveKeys] = {}
_judged: set[tuple[int, int]] = set()  # processes and their contexts whose question is answered
_lock = threading.Lock()


def _domain_of(keys: CurveKeys, context: "zmq.Context[zmq.Socket[bytes]]") -> bytes:
    """The name under which ZeroMQ asks about a socket of these keys."""
    domain = b"dynamo-%x" % id(keys)
    with _lock:
        _domains[domain] = keys
        if (os.getpid(), id(context)) not in _judged:
            asked = context.socket(zmq.REP)
            asked.bind(ZAP)
            threading.Thread(target=_judge, args=(asked,), name="curve", daemon=True).start()
            _judged.add((os.getpid(), id(context)))
    return domain


def _judge(asked: "zmq.Socket[bytes]") -> None:
    """Answer for as long as the process lives."""
    while True:
        try:
            version, number, *about = asked.recv_multipart()
            asked.send_multipart([version, number, *verdict(about), b"", b""])
        except zmq.ZMQError:  # the context has ended
            return


def verdict(about: list[bytes]) -> tuple[bytes, bytes]:
    """Status and reason for who asks to come in: domain, address, identity, mechanism, and its public key."""
    try:
        domain, address, _, mechanism, key = about
        keys = _domains[domain]
        if mechanism == b"CURVE" and keys.knows(z85.encode(key)):
            return b"200", b"OK"
    except Exception:
        log.exception("cannot tell whether a subscriber may come in")
        return b"500", b"cannot tell"
    rarely.warning(
        f"stranger {address!r}", "a subscriber at %s has no key that is known here", address.decode(errors="replace")
    )
    return b"400", b"unknown key"
