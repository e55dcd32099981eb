"""With which certificates does a process speak TLS on its own connections, also once they were renewed?

`Renewed` holds a context made from files and makes it anew when a file was replaced. The `DYN_TCP_TLS_*` variables
(facts row Q17) are the request plane's.
"""

import logging
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dynamo.runtime.options import OptionParser, both_or_neither, env_file, env_seconds, parse_bool

log = logging.getLogger(__name__)

HANDSHAKE_S: Final = 3.0  # DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS, the default users know
PREFIX: Final = "DYN_TCP_TLS_"
VARIABLES: Final = {
    "DYN_TCP_TLS_CERT_PATH": "PEM certificate for those who connect to this process",
    "DYN_TCP_TLS_KEY_PATH": "PEM key of that certificate",
    "DYN_TCP_TLS_CLIENT_CA_CERT_PATH": "PEM authority: let in only those with a certificate signed by it",
    "DYN_TCP_TLS_CA_CERT_PATH": "PEM authority that workers' certificates are checked against (default: the system's)",
    "DYN_TCP_TLS_CLIENT_CERT_PATH": "PEM certificate to show to workers",
    "DYN_TCP_TLS_CLIENT_KEY_PATH": "PEM key of that certificate",
    "DYN_TCP_TLS_SERVER_NAME": "name that workers' certificates must have, instead of their addresses",
    "DYN_TCP_TLS_INSECURE": "check no worker's certificate",
    "DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS": "bound for a handshake (default: 3)",
}
"""Each of the request plane's variables, and what it is for."""


class Renewed:
    """A TLS context made by `make` from `files`, and made again once one of them was replaced.

    `make` raises ValueError for files that cannot be used: at the start that is raised, later it is logged once and
    the context stays what it was.
    """

    def __init__(self, files: Sequence[Path | None], make: Callable[[], ssl.SSLContext]) -> None:
        self._files = [file for file in files if file is not None]
        self._make = make
        self._seen = self._stamps()
        self._context = make()

    def context(self) -> ssl.SSLContext:
        """The context for one new connection."""
        seen = self._stamps()
        if seen != self._seen:
            self._seen = seen  # before they are read: what changes meanwhile is seen next time
            try:
                self._context = self._make()
            except ValueError as e:
                log.error("%s; going on with the certificates from before", e)  # noqa: TRY400 - the line says it all
            else:
                log.info("certificates were renewed: %s", ", ".join(map(str, self._files)))
        return self._context

    def door(self) -> ssl.SSLContext:
        """The context for a listener: whoever comes in is answered with what `context` gives then."""
        door = self._make()

        def answer(handshake: ssl.SSLObject, name: str | None, door: ssl.SSLContext) -> None:
            handshake.context = self.context()

        door.sni_callback = answer  # OpenSSL calls it for each handshake, also for one that names no server
        return door

    def _stamps(self) -> list[tuple[int, int, int]]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError:  # between a removal and a renewal
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def server_context(cert: Path, key: Path, client_ca: Path | None, name: str) -> ssl.SSLContext:
    """What a listener shows, and whom it lets in. `name` is what the files are called where they were given.

    Raises ValueError.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
        if client_ca is not None:
            context.num_tickets = 0  # a resumed session is not checked against the authority of today
            context.options |= ssl.OP_NO_TICKET
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as e:
        raise ValueError(f"{name}: no PEM files that can be used: {e}") from e
    return context


def client_context(ca: Path | None, cert: Path | None, key: Path | None, names: tuple[str, str]) -> ssl.SSLContext:
    """Whom a caller believes (the system's authorities, if not `ca`), and what it shows. `names` are what the authority
    and the certificate with its key are called where they were given.

    Raises ValueError.
    """
    name = names[0]
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        if cert is not None:
            name = names[1]
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as e:
        raise ValueError(f"{name}: no PEM files that can be used: {e}") from e
    return context


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How one process speaks TLS on the request plane. See `VARIABLES`."""

    cert: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    server_name: str = ""
    insecure: bool = False
    handshake_s: float = HANDSHAKE_S

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> "TlsSettings | None":
        """Read the variables; None if there are none. Raises ValueError naming the one that is wrong."""
        given = sorted(name for name, value in environ.items() if name.startswith(PREFIX) and value)
        if not given:
            return None
        for name in given:
            if name not in VARIABLES:
                raise ValueError(f"{name}: there is no such variable; there are {', '.join(VARIABLES)}")
        cert, key = _pair(environ, "DYN_TCP_TLS_CERT_PATH", "DYN_TCP_TLS_KEY_PATH")
        client_cert, client_key = _pair(environ, "DYN_TCP_TLS_CLIENT_CERT_PATH", "DYN_TCP_TLS_CLIENT_KEY_PATH")
        client_ca = env_file(environ, "DYN_TCP_TLS_CLIENT_CA_CERT_PATH")
        if client_ca is not None and cert is None:
            raise ValueError("DYN_TCP_TLS_CLIENT_CA_CERT_PATH needs DYN_TCP_TLS_CERT_PATH and DYN_TCP_TLS_KEY_PATH")
        try:
            insecure = parse_bool(environ.get("DYN_TCP_TLS_INSECURE", ""))
        except ValueError as e:
            raise ValueError(f"DYN_TCP_TLS_INSECURE: {e}") from None
        handshake_s = env_seconds(environ, "DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS", HANDSHAKE_S)
        if handshake_s == 0:
            raise ValueError("DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS: no handshake ends within 0 s")
        return cls(
            cert=cert,
            key=key,
            client_ca=client_ca,
            ca=env_file(environ, "DYN_TCP_TLS_CA_CERT_PATH"),
            client_cert=client_cert,
            client_key=client_key,
            server_name=environ.get("DYN_TCP_TLS_SERVER_NAME", ""),
            insecure=insecure,
            handshake_s=handshake_s,
        )


class RequestTls:
    """TLS for the connections between processes. Raises ValueError naming the variable whose file cannot be used."""

    def __init__(self, settings: TlsSettings) -> None:
        self.settings = settings
        self.callers = Renewed([settings.ca, settings.client_cert, settings.client_key], self._caller)
        """For connections from here."""
        self.listener: Renewed | None = None
        """For connections to here; None without a certificate, and then there can be none."""
        if settings.cert is not None and settings.key is not None:
            self.listener = Renewed([settings.cert, settings.key, settings.client_ca], self._listener)
        if settings.insecure:
            log.warning("DYN_TCP_TLS_INSECURE: whoever answers at a worker's address is believed to be that worker")

    @classmethod
    def from_environ(cls) -> "RequestTls | None":
        """As the environment says; None where it says nothing of TLS. Raises ValueError."""
        settings = TlsSettings.from_environ()
        return None if settings is None else cls(settings)

    def _caller(self) -> ssl.SSLContext:
        settings = self.settings
        names = ("DYN_TCP_TLS_CA_CERT_PATH", "DYN_TCP_TLS_CLIENT_CERT_PATH, DYN_TCP_TLS_CLIENT_KEY_PATH")
        context = client_context(settings.ca, settings.client_cert, settings.client_key, names)
        if settings.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _listener(self) -> ssl.SSLContext:
        settings = self.settings
        assert settings.cert is not None
        assert settings.key is not None
        name = "DYN_TCP_TLS_CERT_PATH, DYN_TCP_TLS_KEY_PATH, DYN_TCP_TLS_CLIENT_CA_CERT_PATH"
        return server_context(settings.cert, settings.key, settings.client_ca, name)


def system_door(environ: Mapping[str, str] = os.environ) -> ssl.SSLContext | None:
    """For the system server's listener, as `DYN_SYSTEM_TLS_*` say; None for plain HTTP. Raises ValueError."""
    cert, key = _pair(environ, "DYN_SYSTEM_TLS_CERT_PATH", "DYN_SYSTEM_TLS_KEY_PATH")
    client_ca = env_file(environ, "DYN_SYSTEM_TLS_CLIENT_CA_CERT_PATH")
    if cert is None or key is None:
        if client_ca is not None:
            raise ValueError("DYN_SYSTEM_TLS_CLIENT_CA_CERT_PATH needs DYN_SYSTEM_TLS_CERT_PATH and ..._KEY_PATH")
        return None
    names = "DYN_SYSTEM_TLS_CERT_PATH, ..._KEY_PATH, ..._CLIENT_CA_CERT_PATH"
    return Renewed([cert, key, client_ca], lambda: server_context(cert, key, client_ca, names)).door()


def _pair(environ: Mapping[str, str], cert: str, key: str) -> tuple[Path | None, Path | None]:
    found = env_file(environ, cert), env_file(environ, key)
    both_or_neither(cert, key, found)
    return found


def flag_of(variable: str) -> str:
    """The flag of a variable: `--tcp-tls-cert-path` of `DYN_TCP_TLS_CERT_PATH`."""
    return "--" + variable.removeprefix("DYN_").lower().replace("_", "-")


def add_tls_options(parser: OptionParser) -> None:
    """Add a flag for each of the request plane's variables."""
    group = parser.add_rare_group("TLS between processes")
    for variable, about in VARIABLES.items():
        if variable == "DYN_TCP_TLS_INSECURE":
            parser.option(group, flag_of(variable), env=variable, type=bool, help=about)
        else:
            metavar = "FILE" if variable.endswith("_PATH") else "VALUE"
            parser.option(group, flag_of(variable), env=variable, metavar=metavar, help=about)


def take_tls_options(given: dict[str, object]) -> dict[str, str]:
    """Take what those flags said out of the parsed options, by variable: for the environment of what is started."""
    taken = {variable: given.pop(flag_of(variable)[2:].replace("-", "_"), None) for variable in VARIABLES}
    return {variable: str(value) for variable, value in taken.items() if value}
