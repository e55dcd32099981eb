"""How does one of several processes behind a port begin?

usage: python -m dynamo.frontend.http_worker POST [the frontend's flags]
Not for people: `dynamo.frontend.processes` starts it, and says in POST what it hands down.
"""

import ctypes
import os
import signal
import socket
import sys

import msgspec

PR_SET_PDEATHSIG = 1  # linux/prctl.h
READY = b"!"


class Post(msgspec.Struct, frozen=True):
    """What a process is given: files that are open for it, by number, and whose they are."""

    number: int
    listening: list[int]
    inner: int
    ready: int
    """Where it says that it serves."""
    siblings: list[str]
    parent: int


def main() -> None:
    """Serve until told otherwise, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes: the parent decides
    post = msgspec.json.decode(sys.argv[1], type=Post)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != post.parent:  # it died before we asked
        return

    from dynamo.frontend.args import parse
    from dynamo.frontend.main import run
    from dynamo.frontend.siblings import Share
    from dynamo.runtime.logs import configure_logging

    def ready() -> None:
        os.write(post.ready, READY)
        os.close(post.ready)

    config = parse(sys.argv[2:])
    configure_logging()
    listening = [socket.socket(fileno=number) for number in post.listening]
    share = Share(post.number, listening, socket.socket(fileno=post.inner), post.siblings)
    raise SystemExit(run(config, share, ready))


if __name__ == "__main__":
    main()
