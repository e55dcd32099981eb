"""What can be set about the frontend, by flag or environment?"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo.router.config import RouterConfig
from dynamo.router.options import add_router_options, router_config
from dynamo.runtime.options import OptionParser, env_bool, env_number
from dynamo.runtime.selection import RouterMode
from dynamo.runtime.tls import add_tls_options, take_tls_options

ROUTER_MODES = ("round-robin", "random", "power-of-two", "kv", "direct", "least-loaded", "device-aware-weighted")


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, read and checked. Paths exist; the router mode is one that works."""

    http_host: str = "127.0.0.1"
    http_port: int = 8000
    http_workers: int = 1
    tls_cert_path: str | None = None
    tls_key_path: str | None = None
    tls_client_ca_cert_path: str | None = None
    tcp_tls: dict[str, str] = {}
    """Of TLS with workers, by the variable of the environment that says it."""
    request_template: str | None = None
    metrics_prefix: str = "dynamo_frontend"
    namespace: str | None = None
    namespace_prefix: str | None = None
    discovery_backend: str | None = None
    request_plane: str | None = None
    event_plane: str | None = None
    router_mode: str = "round-robin"
    router: RouterConfig = RouterConfig()
    """What `router_mode` kv looks at."""
    router_min_initial_workers: int = 0
    migration_limit: int = 0
    migration_max_seq_len: int | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What is set by environment alone, because few ever need to. Times in seconds unless the name says ms."""

    body_limit_bytes: int = 192 << 20
    listen_backlog: int = 4096
    # The patience of the official clients: after it nobody would be waiting for the next token.
    stream_timeout_s: float = 600.0
    request_timeout_s: float = 0.0
    """For the whole of any request; 0: as long as its client says, or waits."""
    max_requests: int = 0
    """Answered at once; 0: no bound."""
    sse_keep_alive_ms: float = 0.0
    error_peek_ms: float | None = None
    graceful_shutdown_s: float = 5.0
    overload_status: int = 529
    fd_limit_target: int = 65536
    force_include_usage: bool = False
    metadata_header: str | None = None
    admin_api: bool = True

    @classmethod
    def from_env(cls) -> "Limits":
        """Read the `DYN_*` variables. Raises ValueError naming the variable."""
        peek = env_number("DYN_HTTP_PRE_COMMIT_ERROR_PEEK_MS", -1)
        overload = os.environ.get("DYN_HTTP_OVERLOAD_STATUS_CODE") or os.environ.get("DYN_HTTP_OVERLOAD_STATUS_CODES")
        limits = cls(
            body_limit_bytes=int(env_number("DYN_HTTP_BODY_LIMIT_MB", 192) * (1 << 20)),
            listen_backlog=int(env_number("DYN_HTTP_LISTEN_BACKLOG", 4096)),
            stream_timeout_s=env_number("DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS", 600),
            request_timeout_s=env_number("DYN_HTTP_REQUEST_TIMEOUT_SECS", 0),
            max_requests=int(env_number("DYN_HTTP_REQUEST_LIMIT", 0)),
            sse_keep_alive_ms=env_number("DYN_HTTP_SSE_KEEP_ALIVE_INTERVAL_MS", 0),
            error_peek_ms=peek if peek >= 0 else None,
            graceful_shutdown_s=env_number("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", 5),
            overload_status=_overload_status(overload or "529"),
            fd_limit_target=int(env_number("DYN_FRONTEND_FD_LIMIT_TARGET", 65536)),
            force_include_usage=env_bool("DYN_ENABLE_FORCE_INCLUDE_USAGE", default=False),
            metadata_header=os.environ.get("DYN_METADATA_HEADER") or None,
            admin_api=not env_bool("DYN_DISABLE_FRONTEND_ADMIN_API", default=False),
        )
        for name, value, least in (
            ("DYN_HTTP_BODY_LIMIT_MB", limits.body_limit_bytes, 1),
            ("DYN_HTTP_LISTEN_BACKLOG", limits.listen_backlog, 1),
            ("DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS", limits.stream_timeout_s, 0.001),
            ("DYN_HTTP_REQUEST_TIMEOUT_SECS", limits.request_timeout_s, 0),
            ("DYN_HTTP_REQUEST_LIMIT", limits.max_requests, 0),
            ("DYN_HTTP_SSE_KEEP_ALIVE_INTERVAL_MS", limits.sse_keep_alive_ms, 0),
            ("DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", limits.graceful_shutdown_s, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least:g}")
        return limits


def _overload_status(text: str) -> int:
    """The first of a comma-separated list of status codes, as the interface users know takes either form."""
    word = text.split(",")[0].strip()
    if not (word.isdigit() and 400 <= int(word) <= 599):
        raise ValueError(f"DYN_HTTP_OVERLOAD_STATUS_CODE: {text!r} is not an HTTP status between 400 and 599")
    return int(word)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError(f"{text} is not a port: use 0 to 65535")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(f"{text} is negative")
    return number


def parser() -> OptionParser:
    """All flags of `python -m dynamo.frontend`, grouped."""
    p = OptionParser(
        "dynamo.frontend", "One OpenAI-compatible HTTP service in front of all workers found through discovery."
    )
    http = p.add_argument_group("HTTP")
    p.option(
        http,
        "--http-host",
        env="DYN_HTTP_HOST",
        metavar="HOST",
        default="127.0.0.1",
        help="address to bind; 0.0.0.0 to let others in",
    )
    p.option(
        http,
        "--http-port",
        env="DYN_HTTP_PORT",
        metavar="PORT",
        default=8000,
        type=_port,
        help="port; 0 takes a free one",
    )
    p.option(
        http,
        "--http-workers",
        env="DYN_HTTP_WORKERS",
        metavar="N",
        default=1,
        type=_count,
        help="processes that share the port, for more than one core",
    )
    p.option(http, "--tls-cert-path", env="DYN_TLS_CERT_PATH", metavar="FILE", help="PEM certificate: serve HTTPS")
    p.option(http, "--tls-key-path", env="DYN_TLS_KEY_PATH", metavar="FILE", help="PEM key of the certificate")
    p.option(
        http,
        "--tls-client-ca-cert-path",
        env="DYN_TLS_CLIENT_CA_CERT_PATH",
        metavar="FILE",
        help="PEM CA: require client certificates signed by it",
    )
    p.option(
        http,
        "--request-template",
        env="DYN_REQUEST_TEMPLATE",
        metavar="FILE",
        help="JSON file with defaults for absent request fields",
    )
    p.option(
        http,
        "--metrics-prefix",
        env="DYN_METRICS_PREFIX",
        metavar="NAME",
        default="dynamo_frontend",
        help="prefix of metric names",
    )
    found = p.add_argument_group("workers")
    p.option(found, "--namespace", env="DYN_NAMESPACE", metavar="NS", help="serve only models of this namespace")
    p.option(
        found,
        "--namespace-prefix",
        env="DYN_NAMESPACE_PREFIX",
        metavar="NS",
        help="serve namespaces NS and NS-*; wins over --namespace",
    )
    p.option(
        found,
        "--discovery-backend",
        env="DYN_DISCOVERY_BACKEND",
        metavar="NAME",
        help="where workers announce themselves: file, mem, etcd, kubernetes (default: file on one machine)",
    )
    p.option(
        found,
        "--request-plane",
        env="DYN_REQUEST_PLANE",
        metavar="NAME",
        help="how requests travel: tcp, nats (default: tcp)",
    )
    p.option(
        found,
        "--event-plane",
        env="DYN_EVENT_PLANE",
        metavar="NAME",
        help="how events travel: zmq, nats (default: zmq)",
    )
    add_tls_options(p)
    routing = p.add_argument_group("routing")
    p.option(
        routing,
        "--router-mode",
        env="DYN_ROUTER_MODE",
        default="round-robin",
        choices=ROUTER_MODES,
        metavar="MODE",
        help="how a worker is chosen: " + ", ".join(ROUTER_MODES),
    )
    p.option(
        routing,
        "--router-min-initial-workers",
        env="DYN_ROUTER_MIN_INITIAL_WORKERS",
        metavar="N",
        default=0,
        type=_count,
        help="a model is ready only once it has had so many workers",
    )
    p.option(
        routing,
        "--migration-limit",
        env="DYN_MIGRATION_LIMIT",
        metavar="N",
        default=0,
        type=_count,
        help="times a request may go on at another worker when its own is lost; 0: it ends with an error",
    )
    p.option(
        routing,
        "--migration-max-seq-len",
        env="DYN_MIGRATION_MAX_SEQ_LEN",
        metavar="TOKENS",
        type=_count,
        help="requests whose prompt and answer are longer stay where they are (default: no bound)",
    )
    add_router_options(p, splits=True)
    other = p.add_argument_group("other")
    p.option(
        other, "-i", "--interactive", env="DYN_INTERACTIVE", default=False, type=bool, help="see dynamo run in=text"
    )
    p.option(
        other,
        "--dump-config-to",
        env="DYN_DUMP_CONFIG_TO",
        metavar="FILE",
        help="write the effective settings to a JSON file",
    )
    other.add_argument("--version", action="version", version=_version(), help="show the version and exit")
    return p


def _version() -> str:
    from importlib.metadata import version  # a tenth of a millisecond, but only here

    return version("ai-dynamo")


def parse(argv: Sequence[str] | None = None) -> FrontendConfig:
    """Read flags and environment. A wrong one ends the program with one line and status 2."""
    p = parser()
    given = vars(p.parse(argv))
    given["tcp_tls"] = take_tls_options(given)
    if given.pop("interactive"):
        p.error("--interactive: the terminal chat is `dynamo run MODEL in=text`")
    try:
        if given["http_workers"] > 1 and (given["router_mode"] == RouterMode.KV.value or given["load_aware"]):
            given["router_replica_sync"] = True  # they are one frontend to who started them
        given["router"] = router = router_config(given, RouterMode(given["router_mode"]), splits=True)
    except ValueError as e:
        p.error(str(e))
    given["router_mode"] = router.mode.value
    if given["http_workers"] < 1:
        p.error("--http-workers must be at least 1")
    if bool(given["tls_cert_path"]) != bool(given["tls_key_path"]):
        p.error("--tls-cert-path and --tls-key-path belong together")
    if given["tls_client_ca_cert_path"] and not given["tls_cert_path"]:
        p.error("--tls-client-ca-cert-path needs --tls-cert-path and --tls-key-path")
    for flag in ("tls_cert_path", "tls_key_path", "tls_client_ca_cert_path", "request_template"):
        if given[flag] and not Path(given[flag]).is_file():
            p.error(f"--{flag.replace('_', '-')}: no file {given[flag]!r}")
    try:
        Limits.from_env()
    except ValueError as e:
        p.error(str(e))
    dump = given.pop("dump_config_to")
    config = FrontendConfig(**given)
    if dump:
        try:
            Path(dump).write_bytes(msgspec.json.format(msgspec.json.encode(config)) + b"\n")
        except OSError as e:
            p.error(f"--dump-config-to: {e}")
    return config
