"""What does a library say that may crash, or hang, while it is asked? Asked in a process of its own."""

import signal
import subprocess
import sys
from typing import TypeVar

import msgspec

T = TypeVar("T")


class ChildFailed(Exception):  # noqa: N818 - what is the case
    """The process ended without an answer; the message says how."""


def ask_child(program: str, answer: type[T], limit_s: float) -> T:
    """Run a Python program that prints one line of JSON last, and give that line as an `answer`.

    Raises ChildFailed if it crashes, prints something else or takes longer than `limit_s`.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and words
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"no answer within {limit_s:.1f} s") from None
    if done.returncode < 0:
        raise ChildFailed(f"it crashed while it was asked ({_signal(-done.returncode)})")
    if done.returncode:
        raise ChildFailed(_last_line(done.stderr) or f"it ended with status {done.returncode}")
    try:
        return msgspec.json.decode(_last_line(done.stdout), type=answer)
    except msgspec.DecodeError as e:
        raise ChildFailed(f"its answer is not to be understood: {e}") from None


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
