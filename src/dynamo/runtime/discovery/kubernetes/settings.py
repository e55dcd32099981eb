"""Where is the API server, who are we to it, and which pod is this?

Inside a pod the service account tells; outside, a kubeconfig. `KUBECONFIG` wins where both are there, as for kubectl.
"""

import base64
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from dynamo.runtime.address import join_host_port
from dynamo.runtime.options import env_seconds

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where every pod finds its credentials
DEFAULT_STARTUP_S = 120.0  # what users know of etcd: a cluster that starts together is not there all at once

POD_ENV = """\
env:
- {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
- {name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}"""
"""What a container needs to know of its pod."""


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod of this process. `container` is only needed where several containers of it are ours."""

    name: str
    uid: str
    container: str = ""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What we show, and what we believe. A token in a file is read again when the file changes."""

    token: str = field(default="", repr=False)
    token_file: Path | None = None
    ca: bytes = b""
    ca_file: Path | None = None
    client_cert: bytes = b""
    client_key: bytes = field(default=b"", repr=False)
    verify: bool = True


@dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """How one process uses the API server. `pod` is None outside a pod: such a process can look, and not be seen."""

    server: str
    namespace: str
    credentials: Credentials = Credentials()
    pod: Pod | None = None
    startup_s: float = DEFAULT_STARTUP_S
    attempt_s: float = 5.0
    """How long one request may take."""
    beat_s: float = 5.0
    """How often a process looks after what it has put, and after the dead of its own container."""
    doubt_s: float = 10.0
    """How long a worker is kept that vanished without a word: slices are rewritten, objects deleted by mistake."""
    watch_s: float = 120.0
    """How long one watch lasts: then a server that has stopped answering is noticed at the latest."""
    slices_version: str = "v1"
    """Of discovery.k8s.io; Kubernetes before 1.21 has `v1beta1`, which is the same as far as it is read here."""

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str] = os.environ, service_account: Path = SERVICE_ACCOUNT
    ) -> "KubernetesSettings":
        """Read the variables and files. Raises ValueError naming what is wrong or missing, and what to do."""
        server, namespace, credentials = _where(environ, service_account)
        return cls(
            server=server,
            namespace=environ.get("POD_NAMESPACE") or namespace or "default",
            credentials=credentials,
            pod=_pod(environ),
            startup_s=env_seconds(environ, "DYN_KUBE_CONNECT_TIMEOUT_SECONDS", DEFAULT_STARTUP_S),
        )


def _pod(environ: Mapping[str, str]) -> Pod | None:
    mode = environ.get("DYN_KUBE_DISCOVERY_MODE", "pod")
    container = environ.get("CONTAINER_NAME", "")
    if mode not in ("pod", "container"):
        raise ValueError(f"DYN_KUBE_DISCOVERY_MODE: {mode!r} is not one of pod, container")
    if mode == "container" and not container:
        raise ValueError("DYN_KUBE_DISCOVERY_MODE=container needs CONTAINER_NAME: the name of this container")
    name, uid = environ.get("POD_NAME", ""), environ.get("POD_UID", "")
    if bool(name) != bool(uid):
        raise ValueError(f"POD_NAME and POD_UID belong together; give the container\n{POD_ENV}")
    return Pod(name, uid, container) if name else None


def _where(environ: Mapping[str, str], service_account: Path) -> tuple[str, str, Credentials]:
    """The server's base URL, the namespace if it is known, the credentials."""
    if environ.get("KUBECONFIG"):
        return _kubeconfig(_first_file(environ["KUBECONFIG"]))
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if host:
        return _in_cluster(host, environ.get("KUBERNETES_SERVICE_PORT") or "443", service_account)
    home = Path(environ.get("HOME", "/")) / ".kube" / "config"
    if home.is_file():
        return _kubeconfig(home)
    raise ValueError(
        "discovery on Kubernetes: no API server is known. Inside a pod KUBERNETES_SERVICE_HOST names it; "
        "elsewhere set KUBECONFIG to a kubeconfig file"
    )


def _in_cluster(host: str, port: str, directory: Path) -> tuple[str, str, Credentials]:
    token = directory / "token"
    if not token.is_file():
        raise ValueError(
            f"discovery on Kubernetes: there is no token at {token}: give the pod a service account "
            "(serviceAccountName, and automountServiceAccountToken not false), or set KUBECONFIG"
        )
    ca = directory / "ca.crt"
    namespace = directory / "namespace"
    return (
        f"https://{join_host_port(host, int(port))}",
        namespace.read_text().strip() if namespace.is_file() else "",
        Credentials(token_file=token, ca_file=ca if ca.is_file() else None),
    )


def _first_file(paths: str) -> Path:
    for path in filter(None, paths.split(os.pathsep)):
        if Path(path).is_file():
            return Path(path)
    raise ValueError(f"KUBECONFIG: there is no file {paths}")


def _kubeconfig(path: Path) -> tuple[str, str, Credentials]:
    """The current context of one file."""
    try:
        config = yaml.safe_load(path.read_text())
        context = _named(config, "contexts", config["current-context"])["context"]
        cluster = _named(config, "clusters", context["cluster"])["cluster"]
        user = _named(config, "users", context["user"])["user"] if context.get("user") else {}
        server = cluster["server"].rstrip("/")
        credentials = _credentials(path.parent, cluster, user or {})
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"KUBECONFIG: {path} cannot be used: {_said(e)}") from None
    if urlsplit(server).scheme not in ("http", "https") or not urlsplit(server).hostname:
        raise ValueError(f"KUBECONFIG: {path}: server {server!r} is no URL such as https://10.0.0.1:6443")
    return server, context.get("namespace", ""), credentials


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _named(config: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    for one in config.get(kind) or []:
        if one.get("name") == name:
            found: dict[str, Any] = one
            return found
    raise ValueError(f"{name!r} is not among its {kind}")


def _credentials(directory: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Credentials:
    for unsupported in ("exec", "auth-provider", "username"):
        if unsupported in user:
            raise ValueError(
                f"its user logs in by {unsupported!r}, which is not in this version: run `kubectl proxy` and use a "
                "kubeconfig with server http://127.0.0.1:8001, or a service account's token"
            )
    return Credentials(
        token=user.get("token", ""),
        token_file=directory / user["tokenFile"] if "tokenFile" in user else None,
        ca=_content(directory, cluster, "certificate-authority"),
        client_cert=_content(directory, user, "client-certificate"),
        client_key=_content(directory, user, "client-key"),
        verify=not cluster.get("insecure-skip-tls-verify", False),
    )


def _content(directory: Path, table: dict[str, Any], name: str) -> bytes:
    if f"{name}-data" in table:
        return base64.b64decode(table[f"{name}-data"], validate=True)
    return (directory / table[name]).read_bytes() if name in table else b""


def tls_context(credentials: Credentials) -> ssl.SSLContext:
    """The context for https. Raises ValueError if a certificate cannot be used."""
    ca = credentials.ca_file.read_bytes() if credentials.ca_file is not None else credentials.ca
    try:
        context = ssl.create_default_context(cadata=ca.decode() if ca else None)
        if credentials.client_cert:
            # OpenSSL takes a client's certificate only from files.
            with tempfile.TemporaryDirectory() as directory:
                cert, key = Path(directory) / "cert", Path(directory) / "key"
                cert.write_bytes(credentials.client_cert)
                key.touch(mode=0o600)
                key.write_bytes(credentials.client_key)
                context.load_cert_chain(cert, key)
    except (OSError, ValueError) as e:  # an SSLError is an OSError
        raise ValueError(f"the API server's CA or our certificate is no PEM that can be used: {e}") from e
    if not credentials.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
