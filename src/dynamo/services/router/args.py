"""What can be set about the stand-alone router?"""

from collections.abc import Sequence

import msgspec

from dynamo.engine.worker_args import WorkerOptions, positive_int
from dynamo.router.config import RouterConfig
from dynamo.router.options import add_router_options, router_config
from dynamo.router.queue_profile import load_profile
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import OptionParser
from dynamo.runtime.selection import RouterMode

DEFAULT_BLOCK_SIZE = 128  # tokens; what users know [K7]


class RouterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, read and checked. `namespace` is where the router serves."""

    endpoint: str
    namespace: str
    block_size: int
    min_initial_workers: int
    router: RouterConfig
    planes: WorkerOptions


def make_parser() -> OptionParser:
    """The parser of `python -m dynamo.router`."""
    parser = OptionParser(
        "python -m dynamo.router",
        "Route requests to the workers of an endpoint, for callers on the request plane: "
        "NAMESPACE.router.generate, .best_worker_id and .get_overlap_scores.",
    )
    parser.usage = "%(prog)s --endpoint NS.COMPONENT.ENDPOINT [option ...]"
    option = parser.option
    workers = parser.add_argument_group("workers")
    option(
        workers,
        "--endpoint",
        env="DYN_ROUTER_ENDPOINT",
        metavar="PATH",
        help="where they serve: namespace.component.endpoint",
    )
    option(
        workers,
        "--router-block-size",
        "--block-size",
        env="DYN_ROUTER_BLOCK_SIZE",
        metavar="N",
        type=positive_int,
        default=DEFAULT_BLOCK_SIZE,
        help="tokens of a KV block of theirs; a worker with another size gets nothing for what it has cached",
    )
    option(
        workers,
        "--router-min-initial-workers",
        env="DYN_ROUTER_MIN_INITIAL_WORKERS",
        metavar="N",
        type=int,
        default=0,
        help="serve only once so many have joined",
    )
    option(
        workers,
        "--namespace",
        env="DYN_NAMESPACE",
        metavar="NS",
        help="where the router serves (unset: the workers' namespace)",
    )
    planes = parser.add_argument_group("runtime")
    for flag, env, text in (
        ("--discovery-backend", "DYN_DISCOVERY_BACKEND", "where all announce themselves (unset: file)"),
        ("--request-plane", "DYN_REQUEST_PLANE", "how requests travel: tcp, nats (unset: tcp)"),
        ("--event-plane", "DYN_EVENT_PLANE", "how events travel: zmq, nats (unset: zmq)"),
    ):
        option(planes, flag, env=env, metavar="NAME", help=text)
    add_router_options(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> RouterOptions:
    """Read the command line. Ends the program with one line on stderr where it is wrong."""
    parser = make_parser()
    given = vars(parser.parse(argv))
    path = given["endpoint"]
    if not path:
        parser.error("--endpoint: is required: where the workers serve, such as dynamo.prefill.generate")
    try:
        address = EndpointAddress.parse(path)
        namespace = given["namespace"] or address.namespace
        own = EndpointAddress(namespace, "router", "generate")
    except (InvalidArgument, ValueError) as e:
        parser.error(f"--endpoint: {e}")
    if address == own:
        parser.error(f"--endpoint: {path} is where the router itself serves")
    try:
        router = router_config(given, RouterMode.KV)
        assert router.config is not None
        load_profile(router.config)
    except ValueError as e:
        parser.error(str(e))
    if given["router_min_initial_workers"] < 0:
        parser.error(f"--router-min-initial-workers: {given['router_min_initial_workers']} is negative")
    return RouterOptions(
        endpoint=str(address),
        namespace=namespace,
        block_size=given["router_block_size"],
        min_initial_workers=given["router_min_initial_workers"],
        router=router,
        planes=WorkerOptions(
            endpoint=str(own),
            discovery_backend=given["discovery_backend"],
            request_plane=given["request_plane"],
            event_plane=given["event_plane"],
        ),
    )
