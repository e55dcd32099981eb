"""How does the slot tracker run as a program? `python -m dynamo.slot_tracker --port 8091`."""

import argparse
import asyncio
from collections.abc import Sequence

from dynamo.runtime.options import OptionParser
from dynamo.services.options import add_http_options, add_replica_options
from dynamo.services.program import run_service, say_ready
from dynamo.services.slots.routes import SlotRoutes
from dynamo.services.slots.tracker import SlotTracker
from dynamo.services.web import HttpService


def make_parser() -> OptionParser:
    """The parser of `python -m dynamo.slot_tracker`."""
    parser = OptionParser(
        "python -m dynamo.slot_tracker",
        "Keep one book of what is active at each worker, for routers that choose the workers themselves.",
    )
    parser.usage = "%(prog)s [option ...]"
    add_http_options(parser, "DYN_SLOT_TRACKER", 8091)
    add_replica_options(parser, "DYN_SLOT_TRACKER")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.replica_sync_peers and args.replica_sync_port is None:
        parser.error("--replica-sync-peers: needs --replica-sync-port, where this service tells the others")
    return run_service("slot_tracker", lambda stop: serve(args, stop))


async def serve(args: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until `stop` is set. Raises CannotConnect if a port is taken."""
    service = HttpService("dynamo_slot_tracker")
    tracker = SlotTracker(args.host, args.replica_sync_port, args.replica_sync_peers)
    try:
        SlotRoutes(service, tracker)
        await service.start(args.host, args.port)
        say_ready("slot_tracker", service.url)
        await stop.wait()
    finally:
        await service.close()
        await tracker.close()
