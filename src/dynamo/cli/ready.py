"""When do all the processes that were started serve?"""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from dynamo.cli.children import Children
from dynamo.cli.client import ApiError, ChatClient

POLL_S = 0.1
SHOWN_CHARACTERS = 100  # of a log line beside the spinner


class NotReady(Exception):  # noqa: N818 - what is the case
    """The deadline passed."""


def wait_until_ready(children: Children, client: ChatClient, workers: int, timeout_s: float, console: Console) -> float:
    """Wait until the frontend lists the model and has found `workers` workers; returns the seconds it took.

    Raises:
        ChildDied: a process ended meanwhile.
        NotReady: `timeout_s` passed.
    """
    started = time.monotonic()
    with _spinner(console, children) as turn:
        while not _serves(client, workers):
            children.check()
            took = time.monotonic() - started
            if took > timeout_s:
                said = children.last_line()
                raise NotReady(f"not ready after {timeout_s:.0f} s (--ready-timeout). Last line: {said or 'none'}")
            turn(took)
            time.sleep(POLL_S)
    return time.monotonic() - started


def _serves(client: ChatClient, workers: int) -> bool:
    try:
        return client.model in client.models() and client.instances("generate") >= workers
    except (OSError, ApiError):  # not listening yet; whatever lasts, the deadline ends
        return False


@contextlib.contextmanager
def _spinner(console: Console, children: Children) -> Iterator[Callable[[float], None]]:
    if children.show or not console.is_terminal:
        console.print("waiting for the workers to be ready ...", highlight=False)
        yield lambda took: None
        return
    with console.status("starting", spinner="dots") as status:

        def turn(took: float) -> None:
            line = escape(children.last_line()[:SHOWN_CHARACTERS])
            status.update(f"starting, {took:.0f} s  [dim]{line}[/dim]")

        yield turn
