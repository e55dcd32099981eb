#!/usr/bin/env python3
"""Do the wheels work where nothing else is, with each Python that is here?

usage: python3 scripts/try_wheels.py [--dist dist] [PYTHON ...]

For each interpreter (those named, or python3.11, 3.12 and 3.13 where they are found): a new environment with
`ai-dynamo-runtime` alone, in which examples/hello_world runs; another with `ai-dynamo`, in which `dynamo doctor --json`
says that the machine is fit and a mocker answers a prompt. Dependencies come from the package index. Exit status 1 if
one fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
LIMIT_S = 600
GREETINGS = "1 worker(s) found\nHello world!\nHello sun!\nHello moon!\nHello star!\n"


class Failed(Exception):  # noqa: N818 - what is the case
    """One line: which step, and what it said."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    args = parser.parse_args()
    failed = False
    for python in args.pythons or pythons():
        for name, check in (("ai_dynamo_runtime", runtime_alone), ("ai_dynamo", everything)):
            started = time.monotonic()
            try:
                (wheel,) = args.dist.glob(f"{name}-*.whl")
                said = in_a_new_environment(python, wheel, check)
            except Failed as e:
                failed, said = True, f"FAILED: {e}"
            print(f"{version(python)}  {name:18} {said} ({time.monotonic() - started:.0f} s)", flush=True)
    return int(failed)


def pythons() -> list[str]:
    """The interpreters that are on the path, or installed by pyenv, and start."""
    found = []
    for wanted in PYTHONS:
        places = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{wanted}.*/bin/python"))
        names = [*map(str, places), shutil.which(f"python{wanted}") or ""]
        found += [name for name in names if name and version(name).startswith(wanted)][:1]
    return found


def version(python: str) -> str:
    done = subprocess.run([python, "-c", "import platform; print(platform.python_version())"], capture_output=True)
    return done.stdout.decode().strip()


def in_a_new_environment(python: str, wheel: Path, check: Callable[[Path, Path], str]) -> str:
    """Install a wheel beside nothing, and say what `check` says of its `bin` directory."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch) / "env"
        run([python, "-m", "venv", "--without-pip", str(environment)])
        there = str(environment / "bin" / "python")
        run([sys.executable, "-m", "pip", "--python", there, "install", "-qq", "--no-input", str(wheel)])
        return check(environment / "bin", Path(scratch))


def runtime_alone(programs: Path, scratch: Path) -> str:
    """examples/hello_world, and that there is nothing of `dynamo` besides."""
    python = str(programs / "python")
    for absent in ("dynamo.llm", "dynamo.frontend", "tokenizers"):
        if subprocess.run([python, "-c", f"import {absent}"], capture_output=True).returncode == 0:
            raise Failed(f"{absent} is there")
    env = os.environ | {"DYN_FILE_KV": str(scratch / "store"), "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0"}
    server = subprocess.Popen([python, "examples/hello_world/server.py"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    try:
        said = run([python, "examples/hello_world/client.py"], env)
    finally:
        server.terminate()
        server.wait(30)
    if said != GREETINGS:
        raise Failed(f"hello_world said {said!r}")
    return "hello_world answers"


def everything(programs: Path, scratch: Path) -> str:
    """The doctor, and one answer of a mocker."""
    env = os.environ | {"DYN_FILE_KV": str(scratch / "store")}
    dynamo, model = str(programs / "dynamo"), str(scratch / "model")
    done = subprocess.run([dynamo, "doctor", "--json"], env=env, capture_output=True, text=True, timeout=LIMIT_S)
    report = json.loads(done.stdout)
    bad = [f"{c['title']}: {c['why']}" for c in report["checks"] if c["verdict"] == "unsupported" and not c["optional"]]
    if done.returncode or bad:
        raise Failed(f"doctor ends with {done.returncode}: {'; '.join(bad)}")
    run([dynamo, "demo-model", "--no-weights", model])
    said = run([dynamo, "run", model, "out=mocker", "--http-port", "0"], env, "Hello?")
    if not said.strip():
        raise Failed("the mocker said nothing")
    return f"doctor: exit status 0, {len(report['checks'])} checks; a mocker answers"


def run(command: list[str], env: dict[str, str] | None = None, words: str = "") -> str:
    """What a command prints. Raises Failed if it ends with another status than 0."""
    done = subprocess.run(command, cwd=ROOT, env=env, input=words, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise Failed(f"{' '.join(command[:4])} ...: {done.stderr.strip()[-300:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
