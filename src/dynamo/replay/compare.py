"""How do several policies do with the same requests? Each runs in a process of its own, as many at a time as there
are cores; they are told what to do by one line of JSON and answer in lines of JSON.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import msgspec

from dynamo.replay.experiment import Experiment, Outcome

PROGRESS_S = 0.1  # between two reports of a child
Progress = Callable[[int, int, float], None]


class RunError(RuntimeError):
    """A run ended without an outcome; says which, and why."""


class _Said(msgspec.Struct, omit_defaults=True):
    """One line of a child: how far it is, or what came out."""

    done: int = 0
    clock_s: float = 0.0
    outcome: Outcome | None = None
    error: str | None = None


class _Children:
    """The processes under way. Once closed, no more are started and those there are end."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def run(self, position: int, experiment: Experiment, on_progress: Progress | None) -> Outcome:
        """One experiment from beginning to end, in a process of its own."""
        if self._closed:
            raise RunError(f"{experiment.policy}: was not begun, as another run had failed")
        command = [sys.executable, "-m", "dynamo.replay.compare"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:  # noqa: S603 - ours
            self._running.add(child)
            if self._closed:
                child.kill()
            try:
                return _converse(child, position, experiment, on_progress)
            finally:
                self._running.discard(child)
                child.kill()

    def close(self) -> None:
        """End them all."""
        self._closed = True
        for child in self._running.copy():
            child.kill()


def _converse(
    child: subprocess.Popen[bytes], position: int, experiment: Experiment, on_progress: Progress | None
) -> Outcome:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(experiment) + b"\n")
    child.stdin.flush()
    for line in child.stdout:
        said = msgspec.json.decode(line, type=_Said)
        if said.error is not None:
            raise RunError(f"{experiment.policy}: {said.error}")
        if said.outcome is not None:
            return said.outcome
        if on_progress:
            on_progress(position, said.done, said.clock_s)
    raise RunError(f"{experiment.policy}: the process ended without an outcome (status {child.wait()})")


def run_all(
    experiments: Sequence[Experiment], *, jobs: int | None = None, on_progress: Progress | None = None
) -> list[Outcome]:
    """The outcomes, in order. `on_progress` gets a run's position, its requests done and its clock, from any thread.

    Raises:
        RunError: a run could not be made. The others are ended.
    """
    children = _Children()
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        runs = [pool.submit(children.run, i, experiment, on_progress) for i, experiment in enumerate(experiments)]
        try:
            done, _ = wait(runs, return_when=FIRST_EXCEPTION)
            for run in done:
                run.result()
        finally:  # also when interrupted
            children.close()
    return [run.result() for run in runs]


def main() -> int:
    """A child: run the experiment on stdin, tell on stdout."""
    from dynamo.replay.progress import every

    out = sys.stdout.buffer

    def say(said: _Said) -> None:
        out.write(msgspec.json.encode(said) + b"\n")
        out.flush()

    try:
        experiment = msgspec.json.decode(sys.stdin.buffer.readline(), type=Experiment)
        outcome = experiment.run(
            on_progress=every(PROGRESS_S, lambda done, clock_s: say(_Said(done=done, clock_s=clock_s)))
        )
    except ValueError as e:  # settings or a trace that cannot be meant; anything else is a bug and shows its trace
        say(_Said(error=str(e)))
        return 1
    say(_Said(outcome=outcome))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
