"""Which options do all workers share?

`add_worker_options` adds them to a program's parser, `worker_options` reads them back as one struct. Options of
Dynamo that this version does not do are known by name and refused: a worker never runs without what was asked.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec

from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.options import OptionParser
from dynamo.runtime.tls import add_tls_options, take_tls_options

DEFAULT_NAMESPACE = "dynamo"
DEFAULT_COMPONENT = "backend"  # where routers look for workers that do the whole request
PREFILL_COMPONENT = "prefill"  # and where they look for those that only compute prompts
DEFAULT_ENDPOINT = "generate"
DEFAULT_REQUEST_QUEUE_LIMIT = 40000  # requests; the default users know. It bounds memory, not latency
ENDPOINT_TYPES = ("chat", "completions")

Role = Literal["agg", "prefill", "decode"]
ROLES: tuple[Role, ...] = ("agg", "prefill", "decode")

_NATS_TLS = {
    "NATS_TLS_CA_CERT_PATH": "certificates of its authority",
    "NATS_TLS_CERT_PATH": "certificate for it",
    "NATS_TLS_KEY_PATH": "key of that certificate",
}

_LATER = {
    "--kv-state-endpoint": "a KV state endpoint",
    "--connector": "KV connectors",
    "--dyn-tool-call-parser": "parsing tool calls",
    "--dyn-reasoning-parser": "parsing reasoning",
    "--dyn-default-thinking-mode": "thinking modes",
    "--fpm-trace": "the forward pass trace",
    "--media-output-fs-url": "media output",
    "--media-output-http-url": "media output",
    "--multimodal-embedding-cache-capacity-gb": "the multimodal embedding cache",
}


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What every worker needs to know, read and checked. `None` leaves the choice to the part concerned."""

    endpoint: str = f"{DEFAULT_NAMESPACE}.{DEFAULT_COMPONENT}.{DEFAULT_ENDPOINT}"
    discovery_backend: str | None = None
    request_plane: str | None = None
    response_plane: str | None = None
    event_plane: str | None = None
    nats_tls: dict[str, str] = {}
    """Files for TLS with NATS, by the variable that names each."""
    tcp_tls: dict[str, str] = {}
    """The same for TLS between processes."""
    endpoint_types: tuple[str, ...] = ENDPOINT_TYPES
    custom_jinja_template: str | None = None
    engine_request_limit: int | None = None
    request_queue_limit: int = DEFAULT_REQUEST_QUEUE_LIMIT
    health_check_payload: dict[str, Any] | None = None
    dump_config_to: str | None = None
    disaggregation_mode: Role = "agg"
    on_lost_kv: Literal["recompute", "error"] = "recompute"


def _flag(variable: str) -> str:
    return "--" + variable.lower().replace("_", "-")


def add_worker_options(parser: OptionParser) -> None:
    """Add the options that all workers share, in two groups."""
    place = parser.add_argument_group("where")
    parser.option(
        place,
        "--namespace",
        env="DYN_NAMESPACE",
        metavar="NAME",
        default=DEFAULT_NAMESPACE,
        help="namespace of the default endpoint",
    )
    parser.option(
        place, "--endpoint", env="DYN_ENDPOINT", metavar="PATH", help="serve here: [dyn://]namespace.component.endpoint"
    )
    parser.option(
        place, "--discovery-backend", env="DYN_DISCOVERY_BACKEND", metavar="NAME", help="how processes find each other"
    )
    parser.option(
        place, "--request-plane", env="DYN_REQUEST_PLANE", metavar="NAME", help="how requests travel: tcp, nats"
    )
    parser.option(place, "--response-plane", env="DYN_RESPONSE_PLANE", metavar="NAME", help="how responses travel")
    parser.option(place, "--event-plane", env="DYN_EVENT_PLANE", metavar="NAME", help="how events travel: zmq, nats")
    nats = parser.add_rare_group("TLS with NATS")
    for variable, what in _NATS_TLS.items():
        parser.option(nats, _flag(variable), env=variable, metavar="FILE", help=f"PEM {what}")
    add_tls_options(parser)

    serving = parser.add_argument_group("serving")
    parser.option(
        serving,
        "--endpoint-types",
        env="DYN_ENDPOINT_TYPES",
        type=_endpoint_types,
        metavar="LIST",
        default="chat,completions",
        help="what the model does",
    )
    parser.option(
        serving,
        "--output-modalities",
        env="DYN_OUTPUT_MODALITIES",
        choices=["text"],
        default="text",
        help="what comes out",
    )
    parser.option(
        serving,
        "--custom-jinja-template",
        metavar="FILE",
        env="DYN_CUSTOM_JINJA_TEMPLATE",
        help="chat template instead of the model's",
    )
    parser.option(
        serving,
        "--engine-request-limit",
        env="DYN_ENGINE_REQUEST_LIMIT",
        type=positive_int,
        metavar="N",
        help="requests in the engine at once (unset: 1.5 times what it runs)",
    )
    parser.option(
        serving,
        "--dynamo-request-queue-limit",
        env="DYN_DYNAMO_REQUEST_QUEUE_LIMIT",
        type=natural_int,
        metavar="N",
        default=DEFAULT_REQUEST_QUEUE_LIMIT,
        help="requests waiting for the engine, before more are refused",
    )
    parser.option(
        serving,
        "--health-check-payload",
        env="DYN_HEALTH_CHECK_PAYLOAD",
        type=_json_or_file,
        metavar="JSON",
        help="the canary's request: JSON or @FILE",
    )
    parser.option(
        serving,
        "--dump-config-to",
        metavar="FILE",
        env="DYN_DUMP_CONFIG_TO",
        help="write the options in effect to this file as JSON",
    )
    for flag, what in _LATER.items():
        refuse(parser, flag, f"{what} is not in this version" if " " in what else f"{what} are not in this version")


def add_disaggregation_options(parser: OptionParser, group: argparse._ArgumentGroup) -> None:
    """Add the options of engines that can compute prompts for each other."""
    parser.option(
        group,
        "--disaggregation-mode",
        choices=list(ROLES),
        default="agg",
        metavar="MODE",
        help="agg: whole requests; prefill: prompts and first tokens; decode: go on from a prefill worker's KV",
    )
    parser.option(
        group,
        "--on-lost-kv",
        choices=["recompute", "error"],
        default="recompute",
        metavar="WHAT",
        help="what a decode worker does where a prefill worker's KV cannot be had: recompute, or error",
    )


def worker_options(args: argparse.Namespace) -> WorkerOptions:
    """The shared options, from a parsed command line. Raises ValueError that names the flag."""
    role: Role = getattr(args, "disaggregation_mode", None) or "agg"  # None where an engine refuses the flag
    component = PREFILL_COMPONENT if role == "prefill" else DEFAULT_COMPONENT
    endpoint = args.endpoint or f"{args.namespace}.{component}.{DEFAULT_ENDPOINT}"
    try:
        address = EndpointAddress.parse(endpoint)
    except ValueError as e:
        raise ValueError(f"--endpoint: {e}") from None
    types = args.endpoint_types if isinstance(args.endpoint_types, tuple) else _endpoint_types(args.endpoint_types)
    if args.custom_jinja_template and not Path(args.custom_jinja_template).is_file():
        raise ValueError(f"--custom-jinja-template: there is no file {args.custom_jinja_template}")
    return WorkerOptions(
        endpoint=str(address),
        discovery_backend=args.discovery_backend,
        request_plane=args.request_plane,
        response_plane=args.response_plane,
        event_plane=args.event_plane,
        nats_tls={name: path for name in _NATS_TLS if (path := getattr(args, _flag(name)[2:].replace("-", "_")))},
        tcp_tls=take_tls_options(dict(vars(args))),
        endpoint_types=types,
        custom_jinja_template=args.custom_jinja_template,
        engine_request_limit=args.engine_request_limit,
        request_queue_limit=args.dynamo_request_queue_limit,
        health_check_payload=args.health_check_payload,
        dump_config_to=args.dump_config_to,
        disaggregation_mode=role,
        on_lost_kv=getattr(args, "on_lost_kv", "recompute"),
    )


def dump_config(path: str | None, options: Mapping[str, Any]) -> None:
    """Write what is in effect as JSON, where `--dump-config-to` asks for it."""
    if path:
        Path(path).write_text(json.dumps(dict(options), indent=1, default=str) + "\n")


def refuse(parser: OptionParser, flag: str, why: str) -> None:
    """Know `flag` without taking it: whoever gives it reads why, instead of getting less than was asked for."""

    class Refuse(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: str | Sequence[Any] | None,
            option_string: str | None = None,
        ) -> NoReturn:
            parser.error(f"{option_string}: {why}")

    parser.add_argument(flag, nargs="?", action=Refuse, help=argparse.SUPPRESS)


def positive_int(text: str) -> int:
    """A whole number from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def natural_int(text: str) -> int:
    """A whole number from 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return value


def _endpoint_types(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in words:
        if word not in ENDPOINT_TYPES:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(ENDPOINT_TYPES)}")
    if not words:
        raise argparse.ArgumentTypeError(f"names none of {', '.join(ENDPOINT_TYPES)}")
    return words


def _json_or_file(text: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as e:
        raise argparse.ArgumentTypeError(f"is neither JSON nor @FILE with JSON in it: {e}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
