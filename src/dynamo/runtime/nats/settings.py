"""Where is NATS, and how does one get in? The `NATS_*` environment variables, checked (facts row E7)."""

import importlib.util
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dynamo.runtime.options import both_or_neither, env_file, env_seconds
from dynamo.runtime.tls import client_context

DEFAULT_SERVER = "nats://localhost:4222"
DEFAULT_STARTUP_S = 120.0  # a cluster that starts together has its NATS later than its workers; as for etcd
INSTALL = "pip install 'ai-dynamo[nats]'"


@dataclass(frozen=True, slots=True)
class NatsSettings:
    """How one process uses NATS.

    `servers` are URLs of one cluster. `startup_s` bounds the wait for the first connection. Of the ways to get in the
    first that is set counts: user and password, token, nkey seed, credentials file.
    """

    servers: tuple[str, ...] = (DEFAULT_SERVER,)
    startup_s: float = DEFAULT_STARTUP_S
    username: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    nkey: str = field(default="", repr=False)
    credentials: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def encrypted(self) -> bool:
        """Whether an unencrypted connection is none."""
        return self.ca is not None or self.cert is not None or any(s.startswith("tls://") for s in self.servers)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "NatsSettings":
        """Read the variables. Raises ValueError naming the one that is wrong, or the package that is missing."""
        ca, cert, key, credentials = (
            env_file(environ, name)
            for name in (
                "NATS_TLS_CA_CERT_PATH", "NATS_TLS_CERT_PATH", "NATS_TLS_KEY_PATH", "NATS_AUTH_CREDENTIALS_FILE"
            )
        )  # fmt: skip
        both_or_neither("NATS_TLS_CERT_PATH", "NATS_TLS_KEY_PATH", (cert, key))
        username, password = environ.get("NATS_AUTH_USERNAME", ""), environ.get("NATS_AUTH_PASSWORD", "")
        both_or_neither("NATS_AUTH_USERNAME", "NATS_AUTH_PASSWORD", (username, password))
        settings = cls(
            servers=_servers(environ.get("NATS_SERVER") or DEFAULT_SERVER),
            startup_s=env_seconds(environ, "NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", DEFAULT_STARTUP_S),
            username=username,
            password=password,
            token=environ.get("NATS_AUTH_TOKEN", ""),
            nkey=environ.get("NATS_AUTH_NKEY", ""),
            credentials=credentials,
            ca=ca,
            cert=cert,
            key=key,
        )
        settings.tls()  # a file that cannot be used is an error now, not at the first connection
        _check_packages(settings)
        return settings

    def tls(self) -> ssl.SSLContext | None:
        """The TLS context, from the files as they are now; None if encryption is left to the server.

        Raises ValueError naming the variable.
        """
        if not self.encrypted:
            return None
        names = ("NATS_TLS_CA_CERT_PATH", "NATS_TLS_CERT_PATH, NATS_TLS_KEY_PATH")
        return client_context(self.ca, self.cert, self.key, names)

    def ways_in(self) -> dict[str, Any]:
        """What the client library is told of who we are; none of it where the URLs say."""
        if self.username:
            return {"user": self.username, "password": self.password}
        if self.token:
            return {"token": self.token}
        if self.nkey:
            return {"nkeys_seed_str": self.nkey}
        if self.credentials is not None:
            return {"user_credentials": self.credentials}
        return {}


def _check_packages(settings: NatsSettings) -> None:
    """Raises ValueError for a missing package: at once, and not where somebody waits for a connection."""
    if importlib.util.find_spec("nats") is None:
        raise ValueError(f"NATS needs the package nats-py: {INSTALL}")
    by_key = not (settings.username or settings.token) and (settings.nkey or settings.credentials)
    if not by_key:
        return
    if importlib.util.find_spec("nkeys") is None:
        raise ValueError(f"NATS_AUTH_NKEY, NATS_AUTH_CREDENTIALS_FILE need the package nkeys: {INSTALL}")
    if settings.nkey:
        import nkeys

        try:
            nkeys.from_seed(bytearray(settings.nkey.strip().encode()))
        except Exception as e:  # noqa: BLE001 - nkeys has no one class for what is wrong with a seed
            raise ValueError(
                f"NATS_AUTH_NKEY: not the seed of a user's key (it begins with SU): {type(e).__name__}"
            ) from None


def without_secrets(server: str) -> str:
    """A server's URL, to be shown."""
    parts = urlsplit(server)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _servers(text: str) -> tuple[str, ...]:
    """`nats://a:4222,b:4222` as URLs."""
    found = []
    for word in filter(None, map(str.strip, text.split(","))):
        url = word if "://" in word else f"nats://{word}"
        shown = without_secrets(url)
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as e:
            raise ValueError(f"NATS_SERVER: {shown!r}: {e}") from None
        if parts.scheme not in ("nats", "tls") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError(f"NATS_SERVER: {shown!r} is not like nats://host:4222 (several: separated by commas)")
        found.append(f"{parts.scheme}://{parts.netloc}" + ("" if port else ":4222"))
    if not found:
        raise ValueError("NATS_SERVER: no server in it; write nats://host:4222")
    return tuple(dict.fromkeys(found))
