"""What can be set about the selection service?"""

import argparse
from collections.abc import Sequence

import msgspec

from dynamo.router.config import RouterConfig
from dynamo.router.options import add_router_options, router_config
from dynamo.router.queue_profile import load_profile
from dynamo.runtime.options import OptionParser
from dynamo.runtime.selection import RouterMode
from dynamo.services.options import add_http_options, add_replica_options, positive, urls
from dynamo.services.selection.pending import MAX_BYTES, MAX_ENTRIES, TTL_S, SelectionCacheConfig


class SelectOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, read and checked."""

    host: str
    port: int
    indexer_peers: tuple[str, ...]
    replica_sync_port: int | None
    replica_sync_peers: tuple[str, ...]
    cache: SelectionCacheConfig
    router: RouterConfig


def make_parser() -> OptionParser:
    """The parser of `python -m dynamo.select_service`."""
    parser = OptionParser(
        "python -m dynamo.select_service",
        "Choose workers for a gateway over HTTP: by what their engines have cached and by how busy they are.",
    )
    parser.usage = "%(prog)s [option ...]"
    add_http_options(parser, "DYN_SELECT_SERVICE", 8092)
    option = parser.option
    kept = parser.add_argument_group("selections that may be reserved later")
    option(
        kept,
        "--selection-cache-ttl-secs",
        env="DYN_SELECTION_CACHE_TTL_SECS",
        metavar="S",
        default=TTL_S,
        type=float,
        help="how long one is kept",
    )
    option(
        kept,
        "--selection-cache-max-entries",
        env="DYN_SELECTION_CACHE_MAX_ENTRIES",
        metavar="N",
        default=MAX_ENTRIES,
        type=positive,
        help="how many are kept",
    )
    option(
        kept,
        "--selection-cache-max-bytes",
        env="DYN_SELECTION_CACHE_MAX_BYTES",
        metavar="N",
        default=MAX_BYTES,
        type=positive,
        help="about how much memory they may take",
    )
    index = parser.add_argument_group("index")
    option(
        index,
        "--indexer-peers",
        env="DYN_SELECT_SERVICE_INDEXER_PEERS",
        metavar="URLS",
        default="",
        type=urls,
        help="selectors or indexers, asked for what a worker stored before it joined here: http://host:port,...",
    )
    option(
        index,
        "--threads",
        env="DYN_SELECT_SERVICE_THREADS",
        metavar="N",
        default=4,
        type=positive,
        help="taken and without effect: one thread keeps the index",
    )
    add_replica_options(parser, "DYN_SELECT_SERVICE")
    parser.add_argument(
        "--session-affinity-ttl-secs",
        metavar="S",
        type=int,
        dest="session_affinity_ttl_secs",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,  # the name without --router- that users of this service know
    )
    add_router_options(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> SelectOptions:
    """Read the command line. Ends the program with one line on stderr where it is wrong."""
    parser = make_parser()
    given = vars(parser.parse(argv))
    try:
        router = router_config(given, RouterMode.KV)
        assert router.config is not None
        load_profile(router.config)
        cache = SelectionCacheConfig(
            ttl_secs=given["selection_cache_ttl_secs"],
            max_entries=given["selection_cache_max_entries"],
            max_bytes=given["selection_cache_max_bytes"],
        )
    except ValueError as e:
        parser.error(str(e))
    if router.config.router_replica_sync:
        parser.error(
            "--router-replica-sync: there is no runtime here; use --replica-sync-port and --replica-sync-peers"
        )
    if given["replica_sync_peers"] and given["replica_sync_port"] is None:
        parser.error("--replica-sync-peers: needs --replica-sync-port, where this service tells the others")
    return SelectOptions(
        host=given["host"],
        port=given["port"],
        indexer_peers=given["indexer_peers"],
        replica_sync_port=given["replica_sync_port"],
        replica_sync_peers=given["replica_sync_peers"],
        cache=cache,
        router=router,
    )
