"""Do etcd, NATS and Kubernetes answer, where this environment says that they are used?"""

import http.client
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from dynamo.doctor.ask.web import ENOUGH_BYTES, get
from dynamo.doctor.facts import Answer, Kubernetes, Service
from dynamo.runtime.discovery import choose_backend


class _EtcdVersion(msgspec.Struct):
    etcdserver: str


class _NatsInfo(msgspec.Struct):
    version: str
    jetstream: bool = False


class _KubernetesVersion(msgspec.Struct):
    gitVersion: str = ""  # noqa: N815 - Kubernetes' word; empty for an answer without it


def etcd(limit_s: float, environ: Mapping[str, str] = os.environ) -> Service:
    """The version of each member that `ETCD_ENDPOINTS` names."""
    if not environ.get("ETCD_ENDPOINTS") and environ.get("DYN_DISCOVERY_BACKEND") != "etcd":
        return Service()
    from dynamo.runtime.discovery.etcd.settings import Certificates, EtcdSettings

    try:
        settings = EtcdSettings.from_environ(environ)
        context = Certificates(settings).context if any(map(_is_https, settings.endpoints)) else None
    except ValueError as e:
        return Service(trouble=str(e))

    def ask(url: str, within_s: float) -> str:
        return msgspec.json.decode(get(f"{url}/version", within_s, context=context)[1], type=_EtcdVersion).etcdserver

    return Service(_ask_each(settings.endpoints, ask, limit_s))


def nats(limit_s: float, environ: Mapping[str, str] = os.environ) -> Service:
    """The version of each server that `NATS_SERVER` names, by the line it greets with."""
    planes = (environ.get("DYN_REQUEST_PLANE"), environ.get("DYN_EVENT_PLANE"))
    if not environ.get("NATS_SERVER") and "nats" not in planes:
        return Service()
    from dynamo.runtime.nats.settings import NatsSettings, without_secrets

    try:
        settings = NatsSettings.from_environ(environ)
    except ValueError as e:
        return Service(trouble=str(e))
    streams: list[bool] = []

    def ask(url: str, within_s: float) -> str:
        info = _nats_info(url, within_s)
        streams.append(info.jetstream)
        return info.version

    answers = _ask_each(settings.servers, ask, limit_s, shown=without_secrets)
    notes = (("with JetStream",) if any(streams) else ("without JetStream",)) if streams else ()
    return Service(answers, notes=notes)


def kubernetes(limit_s: float, service_account: Path | None = None) -> Kubernetes:
    """The API server's version, in a pod or where discovery goes by it. Raises ValueError for an unknown backend."""
    discovery = choose_backend()
    if discovery != "kubernetes" and not os.environ.get("KUBERNETES_SERVICE_HOST"):
        return Kubernetes(None, discovery)
    from dynamo.runtime.discovery.kubernetes.settings import SERVICE_ACCOUNT, KubernetesSettings, tls_context

    try:
        settings = KubernetesSettings.from_environ(service_account=service_account or SERVICE_ACCOUNT)
        context = tls_context(settings.credentials) if _is_https(settings.server) else None
    except ValueError as e:
        return Kubernetes(None, discovery, trouble=str(e))

    def ask(url: str, within_s: float) -> str:
        status, body = get(f"{url}/version", within_s, context=context)
        if status in (401, 403):
            return "unnamed"  # it answers, to others
        return msgspec.json.decode(body, type=_KubernetesVersion).gitVersion.removeprefix("v")

    return Kubernetes(_ask_each((settings.server,), ask, limit_s)[0], discovery)


def _ask_each(
    urls: tuple[str, ...], ask: Callable[[str, float], str], limit_s: float, shown: Callable[[str], str] = str
) -> tuple[Answer, ...]:
    """Ask one after the other; together they take no longer than `limit_s`."""
    ends = time.monotonic() + limit_s
    answers = []
    for i, url in enumerate(urls):
        within_s = max(0.05, (ends - time.monotonic()) / (len(urls) - i))
        try:
            answers.append(Answer(shown(url), version=ask(url, within_s)))
        except TimeoutError:
            answers.append(Answer(shown(url), trouble=f"no answer within {within_s:.1f} s"))
        except msgspec.DecodeError:
            answers.append(Answer(shown(url), trouble="something else answers there"))
        except (OSError, http.client.HTTPException) as e:
            answers.append(Answer(shown(url), trouble=str(e) or type(e).__name__))
    return tuple(answers)


def _nats_info(url: str, within_s: float) -> _NatsInfo:
    """What a server says of itself before it is asked anything, TLS or not."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 4222), timeout=within_s) as s:
        line = b""
        while b"\r\n" not in line and len(line) < ENOUGH_BYTES:
            more = s.recv(4096)
            if not more:
                break
            line += more
    word, _, rest = line.partition(b"\r\n")[0].partition(b" ")
    return msgspec.json.decode(rest if word == b"INFO" else b"", type=_NatsInfo)


def _is_https(url: str) -> bool:
    return url.startswith("https:")
