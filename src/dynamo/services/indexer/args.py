"""What can be set about the stand-alone indexer?"""

import argparse
from collections.abc import Sequence

import msgspec

from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import OptionParser
from dynamo.services.bodies import check_zmq_endpoint
from dynamo.services.options import add_http_options, positive, urls


class IndexerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, read and checked. `workers` are the ranks to hear from the start, and where."""

    host: str = "127.0.0.1"
    port: int = 8090
    block_size: int | None = None
    workers: dict[WorkerKey, str] = {}
    model_name: str = "default"
    routing_group: str = "default"
    peers: tuple[str, ...] = ()
    min_initial_workers: int = 0
    access_log: str | None = None
    access_log_local_time: bool = False
    trace_id_header: str = "x-trace-id"


def make_parser() -> OptionParser:
    """The parser of `python -m dynamo.indexer`."""
    parser = OptionParser(
        "python -m dynamo.indexer", "Hear the KV events of engines, and answer over HTTP who holds what of a prompt."
    )
    parser.usage = "%(prog)s [option ...]"
    add_http_options(parser, "DYN_INDEXER", 8090)
    option = parser.option
    workers = parser.add_argument_group("workers heard from the start (others come by POST /register)")
    option(
        workers,
        "--workers",
        env="DYN_INDEXER_WORKERS",
        metavar="LIST",
        default="",
        type=worker_list,
        help="where each rank publishes its KV events: id[:rank]=tcp://host:port,...",
    )
    option(
        workers,
        "--block-size",
        env="DYN_INDEXER_BLOCK_SIZE",
        metavar="N",
        type=positive,
        help="tokens of a KV block of these workers",
    )
    option(
        workers,
        "--model-name",
        env="DYN_INDEXER_MODEL_NAME",
        metavar="NAME",
        default="default",
        help="the model they serve",
    )
    option(
        workers,
        "--routing-group",
        env="DYN_INDEXER_ROUTING_GROUP",
        metavar="NAME",
        default="default",
        help="the group they are of; groups know nothing of each other",
    )
    option(
        workers,
        "--min-initial-workers",
        env="DYN_ROUTER_MIN_INITIAL_WORKERS",
        metavar="N",
        default=0,
        type=int,
        help="/health says 503 until so many workers have joined",
    )
    index = parser.add_argument_group("index")
    option(
        index,
        "--peers",
        env="DYN_INDEXER_PEERS",
        metavar="URLS",
        default="",
        type=urls,
        help="other indexers, asked for what a worker stored before it joined here: http://host:port,...",
    )
    option(
        index,
        "--threads",
        env="DYN_INDEXER_THREADS",
        metavar="N",
        default=4,
        type=positive,
        help="taken and without effect: one thread keeps the index, at over a million blocks a second",
    )
    logs = parser.add_argument_group("access log")
    option(logs, "--access-log", env="DYN_INDEXER_ACCESS_LOG", metavar="FILE", help="write a JSON line a request")
    option(
        logs,
        "--access-log-local-time",
        env="DYN_INDEXER_ACCESS_LOG_LOCAL_TIME",
        default=False,
        type=bool,
        help="times of the local zone, not of UTC",
    )
    option(
        logs,
        "--trace-id-header",
        env="DYN_INDEXER_TRACE_ID_HEADER",
        metavar="NAME",
        default="x-trace-id",
        help="the header whose value is logged as trace_id",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> IndexerOptions:
    """Read the command line. Ends the program with one line on stderr where it is wrong."""
    parser = make_parser()
    given = vars(parser.parse(argv))
    del given["threads"]
    options = IndexerOptions(**given)
    if options.workers and options.block_size is None:
        parser.error("--workers: needs --block-size, the size of their KV blocks in tokens")
    if not options.workers and options.block_size is not None:
        parser.error("--block-size: is of the workers in --workers; others say theirs when they register")
    if options.min_initial_workers < 0:
        parser.error(f"--min-initial-workers: {options.min_initial_workers} is negative")
    return options


def worker_list(text: str) -> dict[WorkerKey, str]:
    """`1=tcp://host:5557,1:1=tcp://host:5558`, for argparse."""
    workers: dict[WorkerKey, str] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, equals, endpoint = word.partition("=")
        worker_id, _, rank = name.partition(":")
        if not equals or not worker_id.isdecimal() or not (rank or "0").isdecimal() or int(worker_id) >= 1 << 64:
            raise argparse.ArgumentTypeError(f"{word!r} is not id=endpoint or id:rank=endpoint")
        worker = WorkerKey(int(worker_id), int(rank or 0))
        if worker in workers:
            raise argparse.ArgumentTypeError(f"{name!r} is given twice")
        try:
            workers[worker] = check_zmq_endpoint(name, endpoint)
        except InvalidArgument as e:
            raise argparse.ArgumentTypeError(str(e)) from None
    return workers
