"""Where is etcd, and how does one get in? The `ETCD_*` environment variables, checked (facts row R12)."""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dynamo.runtime.discovery.protocol import LEASE_TTL_S
from dynamo.runtime.options import both_or_neither, env_file, env_seconds
from dynamo.runtime.tls import client_context

DEFAULT_ENDPOINT = "http://localhost:2379"
DEFAULT_STARTUP_S = 120.0  # a cluster that starts together has its etcd later than its workers


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How one process uses etcd.

    `endpoints` are base URLs without a slash at the end. `ttl_s` is how long a process's keys outlive it. `startup_s`
    bounds the wait for the first answer.
    """

    endpoints: tuple[str, ...] = (DEFAULT_ENDPOINT,)
    ttl_s: int = int(LEASE_TTL_S)
    startup_s: float = DEFAULT_STARTUP_S
    username: str = ""
    password: str = field(default="", repr=False)
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    @property
    def beat_s(self) -> float:
        """How often the lease is renewed: two beats may fail before it ends."""
        return self.ttl_s / 3

    @property
    def attempt_s(self) -> float:
        """How long one endpoint may take to answer: several are tried, or one again, before the lease ends."""
        return self.ttl_s / 4

    @property
    def doubt_s(self) -> float:
        """How long a key without a lease is kept: an owner that lives puts it again at its next beat."""
        return self.ttl_s / 2

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "EtcdSettings":
        """Read the variables. Raises ValueError naming the one that is wrong."""
        ca, cert, key = (
            env_file(environ, name) for name in ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY")
        )
        both_or_neither("ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY", (cert, key))
        username, password = environ.get("ETCD_AUTH_USERNAME", ""), environ.get("ETCD_AUTH_PASSWORD", "")
        both_or_neither("ETCD_AUTH_USERNAME", "ETCD_AUTH_PASSWORD", (username, password))
        return cls(
            endpoints=_endpoints(environ.get("ETCD_ENDPOINTS") or DEFAULT_ENDPOINT, encrypted=bool(ca or cert)),
            ttl_s=int(env_seconds(environ, "ETCD_LEASE_TTL", LEASE_TTL_S, least=1, whole=True)),
            startup_s=env_seconds(environ, "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS", DEFAULT_STARTUP_S),
            username=username,
            password=password,
            ca=ca,
            client_cert=cert,
            client_key=key,
        )


class Certificates:
    """The TLS context for https endpoints. Certificates that were replaced on disk are used from `refresh` on."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self.context = self._load()
        self._stamp = self._stamps()

    def refresh(self) -> None:
        """Look whether files were replaced. Raises ValueError if they cannot be used; the old ones then stay."""
        stamp = self._stamps()
        if stamp != self._stamp:
            self.context = self._load()
            self._stamp = stamp

    def _load(self) -> ssl.SSLContext:
        ca, cert, key = self._settings.ca, self._settings.client_cert, self._settings.client_key
        return client_context(ca, cert, key, ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT, ETCD_AUTH_CLIENT_KEY"))

    def _stamps(self) -> list[int]:
        files = (self._settings.ca, self._settings.client_cert, self._settings.client_key)
        return [file.stat().st_mtime_ns if file and file.exists() else 0 for file in files]


def _endpoints(text: str, encrypted: bool) -> tuple[str, ...]:
    """`http://a:2379,b:2379` as base URLs. One without a scheme is https if certificates are given, else http."""
    found = []
    for word in filter(None, (word.strip().rstrip("/") for word in text.split(","))):
        url = word if "://" in word else f"{'https' if encrypted else 'http'}://{word}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as e:
            raise ValueError(f"ETCD_ENDPOINTS: {word!r}: {e}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.username:
            raise ValueError(f"ETCD_ENDPOINTS: {word!r} is not like http://host:2379 (several: separated by commas)")
        if encrypted and parts.scheme == "http":
            raise ValueError(f"ETCD_ENDPOINTS: {word!r} is not encrypted, but certificates are given: say https://")
        found.append(url if port else f"{url}:2379")
    if not found:
        raise ValueError("ETCD_ENDPOINTS: no endpoint in it; write http://host:2379")
    return tuple(dict.fromkeys(found))
