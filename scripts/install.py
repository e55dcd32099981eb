#!/usr/bin/env python3
"""Is .venv as this checkout needs it? If not, make it so.

usage: python3 scripts/install.py [--dev] [--no-engine]

Installs the package (editable) and, with --dev, what tests, linters and benchmarks need; then the engine, vLLM, by
scripts/install_vllm.py. What was installed is remembered in a stamp inside .venv under a key made of pyproject.toml,
install_vllm.py and the Python version: a second run with the same key returns at once.

Runs with the system's Python and its standard library alone.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
OLDEST = (3, 11)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dev", action="store_true", help="also what tests, linters and benchmarks need")
    ap.add_argument("--no-engine", action="store_true", help="leave vLLM out (mocker and echo only)")
    a = ap.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(
            "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 run"
        )
    make_venv()
    package = "package-dev" if a.dev or is_done("package-dev", ["pyproject.toml"]) else "package"
    step(package, ["pyproject.toml"], lambda: install_package(a.dev))
    if not a.no_engine:
        step("engine", ["scripts/install_vllm.py"], install_engine)


def make_venv():
    """A virtual environment with a current pip, also where the system's Python lacks ensurepip (Debian)."""
    if os.path.exists(os.path.join(VENV, "bin", "pip")):
        return
    say("making .venv with Python " + sys.version.split()[0])
    made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
    if made.returncode:
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", VENV)
        run(sys.executable, "-m", "pip", "--python", PYTHON, "install", "--quiet", "pip")
    run(PYTHON, "-m", "pip", "install", "-qq", "--upgrade", "pip")


def install_package(dev):
    run(PYTHON, "-m", "pip", "install", "-qq", "--editable", ROOT + ("[dev]" if dev else ""))


def install_engine():
    run(PYTHON, os.path.join(ROOT, "scripts", "install_vllm.py"))


def stamp_and_key(name, files):
    key = hashlib.sha256(sys.version.encode())
    for file in files:
        with open(os.path.join(ROOT, file), "rb") as f:
            key.update(f.read())
    return os.path.join(VENV, ".installed-" + name), key.hexdigest()


def is_done(name, files):
    """Whether a stamp says that this was installed from these very files by this Python."""
    stamp, key = stamp_and_key(name, files)
    try:
        with open(stamp) as f:
            return f.read() == key
    except OSError:
        return False


def step(name, files, install):
    """Run `install` unless it is done."""
    if is_done(name, files):
        return
    say("installing " + name)
    started = time.time()
    install()
    stamp, key = stamp_and_key(name, files)
    with open(stamp, "w") as f:
        f.write(key)
    say(f"installed {name} in {time.time() - started:.0f} s")


def run(*command):
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        sys.exit("failed: " + " ".join(command))


def say(text):
    print("[install] " + text, flush=True)


if __name__ == "__main__":
    main()
