#!/usr/bin/env python3
"""Has every dependency of the core and of each extra a wheel for each processor and Python that is supported?

usage: python3 scripts/check_wheels.py [--extra NAME ...] [--markdown]

Asks pip to resolve the core, then the core with each extra, all with what they need in turn, for x86_64 and aarch64
with glibc 2.28 and CPython 3.11, 3.12 and 3.13, from wheels alone; nothing is installed. NIXL is asked for without what
it needs in turn. Exit status 1 if something cannot be had.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSORS = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("nats", "otel", "curve", "nixl")
ALONE = {"nixl"}  # its build requires torch, gigabytes of metadata to follow: asked for without what it needs in turn
TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
PURE_SDISTS = {"nkeys"}  # has no wheels at all; it is one file of Python, which pip builds without a compiler
LIMIT_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", choices=EXTRAS, help="this extra alone, and the core")
    parser.add_argument("--markdown", action="store_true", help="a table for the documents")
    args = parser.parse_args()
    sets = ["", *(args.extra or EXTRAS)]
    jobs = [(extra, processor, python) for extra in sets for processor in PROCESSORS for python in PYTHONS]
    with ThreadPoolExecutor(4) as pool:
        said = dict(zip(jobs, pool.map(lambda job: resolve(*job), jobs), strict=True))
    print("\n".join(table(sets, said) if args.markdown else lines(said)))
    return int(any(not word.startswith("all of") for word in said.values()))


def requirements(extra: str) -> list[str]:
    """What the core or an extra asks for, without packages that are built from source without a compiler."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][extra] if extra else []
    wanted = wanted if extra in ALONE else project["dependencies"] + wanted
    # An extra of nats-py that asks for such a package: ask for what that package needs instead.
    return [re.sub(r"\[nkeys\]", "", line) for line in wanted] + (["pynacl"] if extra == "nats" else [])


def resolve(extra: str, processor: str, python: str) -> str:
    """`all of N`, or what pip could not find."""
    tags = [f"--platform={tag}_{processor}" for tag in TAGS]
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-input", "--ignore-installed",
        "--disable-pip-version-check", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}",
        *tags, "--report=-", "--target=/nonexistent", *(["--no-deps"] if extra in ALONE else []), *requirements(extra),
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "PIP_CONSTRAINT")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env)
    if done.returncode:
        found = re.findall(r"No matching distribution found for (\S+)", done.stderr)
        return "no wheel for " + ", ".join(found) if found else done.stderr.strip().splitlines()[-1]
    return f"all of {len(json.loads(done.stdout)['install'])}"


def lines(said: dict[tuple[str, str, str], str]) -> Iterator[str]:
    for (extra, processor, python), word in said.items():
        yield f"{extra or 'core':6} {processor:8} {python}  {word}"


def table(sets: list[str], said: dict[tuple[str, str, str], str]) -> Iterator[str]:
    heads = [(processor, python) for processor in PROCESSORS for python in PYTHONS]
    yield "| | " + " | ".join(f"{processor}, {python}" for processor, python in heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for extra in sets:
        words = [said[(extra, *head)] for head in heads]
        name = f"[{extra}] alone" if extra in ALONE else f"core and [{extra}]" if extra else "core"
        yield f"| {name} | " + " | ".join(words) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
