"""Which options do the HTTP services share?"""

import argparse
from urllib.parse import urlsplit

from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import OptionParser
from dynamo.services.bodies import check_zmq_endpoint

MAX_PEERS = 64


def add_http_options(parser: OptionParser, variable: str, port: int) -> None:
    """`--host` and `--port`, whose variables begin with `variable`."""
    http = parser.add_argument_group("HTTP")
    parser.option(
        http,
        "--host",
        env=f"{variable}_HOST",
        metavar="HOST",
        default="127.0.0.1",
        help="address to bind; 0.0.0.0 to let others in",
    )
    parser.option(
        http,
        "--port",
        env=f"{variable}_PORT",
        metavar="PORT",
        default=port,
        type=port_number,
        help="port; 0 takes a free one",
    )


def add_replica_options(parser: OptionParser, variable: str) -> None:
    """`--replica-sync-port` and `--replica-sync-peers`."""
    group = parser.add_argument_group("replicas of this service")
    parser.option(
        group,
        "--replica-sync-port",
        env=f"{variable}_REPLICA_SYNC_PORT",
        metavar="PORT",
        type=port_number,
        help="port on which others hear what is booked here (unset: no replicas)",
    )
    parser.option(
        group,
        "--replica-sync-peers",
        env=f"{variable}_REPLICA_SYNC_PEERS",
        metavar="ENDPOINTS",
        default="",
        type=zmq_endpoints,
        help="where others say what is booked there: tcp://host:port,...",
    )


def port_number(text: str) -> int:
    """A port, for argparse."""
    number = int(text)
    if not 0 <= number < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port: use 0 to 65535")
    return number


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return number


def zmq_endpoints(text: str) -> tuple[str, ...]:
    """Addresses by commas, for argparse."""
    try:
        return tuple(check_zmq_endpoint("an endpoint", word) for word in _words(text))
    except InvalidArgument as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def urls(text: str) -> tuple[str, ...]:
    """Addresses of HTTP services by commas, for argparse."""
    try:
        return tuple(check_url("a peer", word) for word in _words(text))
    except InvalidArgument as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if len(words) > MAX_PEERS:
        raise argparse.ArgumentTypeError(f"{len(words)} peers are more than {MAX_PEERS}")
    return words


def check_url(field: str, text: str) -> str:
    """An address of an HTTP service, without a slash at its end. Raises InvalidArgument naming the field."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as e:
        raise InvalidArgument(f"{field}: {text[:200]!r}: {e}", field) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise InvalidArgument(f"{field}: {text[:200]!r} is not http://host:port", field)
    return text.rstrip("/")
