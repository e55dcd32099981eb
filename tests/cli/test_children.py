"""Are the processes that a command starts watched, and gone when it is?"""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo.cli.children import ChildDied, Children, ChildSpec


@pytest.fixture
def children() -> Iterator[Children]:
    c = Children(out=io.StringIO())
    yield c
    c.stop()


def python(name: str, code: str) -> ChildSpec:
    return ChildSpec(name, ["-c", code])


def until(true: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_death(children: Children) -> ChildDied:
    died = threading.Event()
    children.on_death(died.set)
    assert died.wait(10)
    with pytest.raises(ChildDied) as caught:
        children.check()
    return caught.value


def test_a_child_that_fails_is_reported_with_its_last_lines(children: Children) -> None:
    children.start(python("worker-1", "print('loading'); raise SystemExit('no such model: x')"))
    message = str(wait_for_death(children))
    assert "worker-1 ended with exit status 1" in message
    assert "worker-1 │ loading" in message
    assert "worker-1 │ no such model: x" in message


def test_a_killed_child_is_reported_with_the_signal(children: Children) -> None:
    children.start(python("worker-1", "import time; time.sleep(60)"))
    os.kill(children.pids()["worker-1"], signal.SIGKILL)
    assert "was ended by SIGKILL" in str(wait_for_death(children))


def test_death_is_seen_though_a_grandchild_holds_the_pipe(children: Children) -> None:
    children.start(
        python("w", "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])")
    )
    assert "exit status 0" in str(wait_for_death(children))


def test_stopping_ends_grandchildren_too(children: Children) -> None:
    code = (
        "import subprocess, sys, time;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid); time.sleep(60)"
    )
    children.start(python("w", code))
    until(lambda: bool(children.last_line()), "the pid is printed")
    grandchild = int(children.last_line().split()[-1])
    children.stop()
    until(lambda: not alive(grandchild), "the grandchild is gone")


def test_a_child_that_ignores_sigterm_is_killed(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.cli.children.STOP_TIMEOUT_S", 0.2)
    children.start(
        python("w", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x'); time.sleep(60)")
    )
    until(lambda: children.last_line() == "w: x", "the child is up")
    pid = children.pids()["w"]
    children.stop()
    assert not alive(pid)


def test_stopping_is_not_a_death(children: Children) -> None:
    children.start(python("w", "import time; time.sleep(60)"))
    children.stop()
    children.check()


def test_lines_are_shown_with_the_name_in_front() -> None:
    out = io.StringIO()
    children = Children(out=out, show=True)
    children.start(python("worker-1", "print('hello')"))
    wait_for_death(children)
    children.stop()
    assert out.getvalue() == "worker-1 │ hello\n"


def test_children_end_when_the_parent_is_killed() -> None:
    code = """
import time
from dynamo.cli.children import Children, ChildSpec
c = Children()
c.start(ChildSpec("w", ["-c", "import time; print('up'); time.sleep(60)"]))
while not c.last_line():
    time.sleep(0.02)
print(c.pids()["w"], flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait(10)
    until(lambda: not alive(child), "the child is gone")
