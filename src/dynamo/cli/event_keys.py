"""How are the keys made that events over ZeroMQ are sealed with?"""

import os
import sys
from pathlib import Path

import zmq
from zmq.auth import create_certificates

from dynamo.runtime.curve import KEY, PEERS
from dynamo.runtime.options import OptionParser


def parser() -> OptionParser:
    """The command line."""
    p = OptionParser("dynamo event-keys", "Make the keys that events over ZeroMQ are sealed with (CURVE).")
    p.add_argument("path", type=Path, metavar="DIRECTORY/NAME", help="makes NAME.key_secret and NAME.key there")
    return p


def main(argv: list[str]) -> int:
    """`dynamo event-keys`. Returns the exit status."""
    path: Path = parser().parse(argv).path
    kept = [path.with_name(path.name + end) for end in (".key_secret", ".key")]
    taken = [str(file) for file in kept if file.exists()]
    if taken:
        sys.stderr.write(f"dynamo event-keys: error: {taken[0]} is there already, and somebody may need it\n")
        return 1
    others = os.umask(0o077)  # nobody else may read the secret, not even for the moment before a chmod
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_certificates(path.parent, path.name)
    except (OSError, zmq.ZMQError) as e:
        sys.stderr.write(f"dynamo event-keys: error: {path}: {getattr(e, 'strerror', None) or e}\n")
        return 1
    finally:
        os.umask(others)
    secret, public = kept
    public.chmod(0o644)
    print(f"made {secret}: for {KEY} of the processes that have this key, and nobody else's eyes")
    print(f"made {public}: for the directory {PEERS} of all others, if not all have the same key")
    return 0
