#!/usr/bin/env python3
"""How are the wheels and source distributions made, the same bytes from the same commit?

usage: python3 scripts/build_dist.py [--out dist]

Builds `ai-dynamo` and, from the same tree, `ai-dynamo-runtime`, each as wheel and source distribution, with an SBOM
(CycloneDX) beside each wheel and the sums of all in SHA256SUMS. What git does not ignore is copied, as it is in the
tree, to a scratch directory and built there by one version of setuptools. Times are SOURCE_DATE_EPOCH, or else the
last commit's. Needs Python 3.11 with pip; setuptools is fetched into build/dist-env the first time.
"""

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sbom

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = Path("packaging/runtime")
SETUPTOOLS = "80.10.2"  # one version: others write other bytes
EARLIEST = 315532800  # 1980-01-01, before which a wheel cannot be dated
MAIN_FILES = ("LICENSE", "README.md", "pyproject.toml", "src/")
BUILD = """
import contextlib, sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools puts words of its own there
with contextlib.redirect_stdout(sys.stderr):
    made = build_meta.build_wheel(out), build_meta.build_sdist(out)
print(*made)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="directory to write to (default: dist)")
    out = parser.parse_args().out
    for file in build(ROOT, out):
        print(file)
    return 0


def build(root: Path, out: Path) -> list[Path]:
    """Build everything from the tree at `root` into `out`; what older builds left there goes."""
    epoch = commit_time(root)
    python = build_python()
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("ai_dynamo*"), *out.glob("SHA256SUMS")]:
        old.unlink()
    made: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, stage in (("main", stage_main), ("runtime", stage_runtime)):
            tree = Path(scratch) / name
            stage(root, tree)
            made += build_one(python, tree, out.resolve(), epoch)
    sums = out / "SHA256SUMS"
    sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sorted(made)))
    return [*made, sums]


def commit_time(root: Path) -> int:
    """Seconds since 1970 that files are dated with."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return max(EARLIEST, int(given))
    asked = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=root, capture_output=True, text=True)
    return max(EARLIEST, int(asked.stdout)) if asked.returncode == 0 else EARLIEST


def build_python() -> Path:
    """An interpreter with the one setuptools, made when it is first needed."""
    directory = ROOT / "build" / "dist-env" / SETUPTOOLS
    python = directory / "bin" / "python"
    stamp = directory / "complete"
    if not stamp.exists():
        shutil.rmtree(directory, ignore_errors=True)
        run(sys.executable, "-m", "venv", "--without-pip", str(directory))
        run(sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", f"setuptools=={SETUPTOOLS}")
        stamp.touch()
    return python


def stage_main(root: Path, tree: Path) -> None:
    """The tree of `ai-dynamo`."""
    for file in tracked(root):
        if file.startswith(MAIN_FILES):
            copy(root / file, tree / file)


def stage_runtime(root: Path, tree: Path) -> None:
    """The tree of `ai-dynamo-runtime`."""
    wanted = tuple((root / RUNTIME / "FILES").read_text().split())
    for file in tracked(root):
        if file.startswith(wanted):
            copy(root / file, tree / file)
    for name in ("pyproject.toml", "README.md"):
        copy(root / RUNTIME / name, tree / name)


def tracked(root: Path) -> Iterator[str]:
    """Files of the tree that git does not ignore; outside of a repository all but caches."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.rstrip("\0").split("\0")
    else:
        names = [str(path.relative_to(root)) for path in root.rglob("*") if "__pycache__" not in path.parts]
    return (name for name in sorted(names) if (root / name).is_file() and ".egg-info/" not in name)


def copy(source: Path, target: Path) -> None:
    """Copy content alone: no rights or times of the checkout."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    target.chmod(0o644)


def build_one(python: Path, tree: Path, out: Path, epoch: int) -> list[Path]:
    """Wheel, source distribution and SBOM of one staged tree."""
    env = os.environ | {"SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [str(python), "-c", BUILD, str(out)], cwd=tree, env=env, capture_output=True, text=True, umask=0o022
    )
    if done.returncode:
        sys.exit(f"building {tree.name} failed:\n{done.stderr[-3000:]}")
    wheel, sdist = (out / name for name in done.stdout.split())
    make_reproducible(sdist, epoch)
    bill = out / f"{wheel.name.removesuffix('.whl')}.cdx.json"
    bill.write_text(sbom.of_wheel(wheel, epoch))
    return [wheel, sdist, bill]


def make_reproducible(sdist: Path, epoch: int) -> None:
    """Write a source distribution anew, in order and without whose files they were, or when."""
    content = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            data = old.extractfile(member) if member.isfile() else None
            clean = tarfile.TarInfo(member.name)
            clean.type, clean.size, clean.mtime = member.type, member.size, epoch
            clean.mode = 0o755 if member.isdir() else 0o644
            new.addfile(clean, data)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=epoch) as packed:
        packed.write(content.getvalue())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        sys.exit("failed: " + " ".join(command))


if __name__ == "__main__":
    raise SystemExit(main())
