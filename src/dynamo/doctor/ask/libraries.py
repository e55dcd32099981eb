"""What is installed here, and does it load? Versions are read from metadata; what may crash is loaded by a child."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from dynamo.doctor.ask.child import ChildFailed, ask_child
from dynamo.doctor.facts import Dependencies, Distribution, Engine, Nixl, Packages
from dynamo.doctor.matrix import Package

OURS = ("ai-dynamo", "ai-dynamo-runtime")
FOREIGN_FILE = "dynamo/_core"  # the compiled heart of NVIDIA's ai-dynamo-runtime; nothing here is compiled
NIXL_BUILDS = ("nixl_cu13", "nixl_cu12", "nixl_rocm")  # as dynamo.nixl_connect looks for them
RDMA = Path("/sys/class/infiniband")

_LOAD = """
import importlib, json
failed = {}
for module in %r:
    print(json.dumps({"loading": module}), flush=True)
    try:
        importlib.import_module(module)
    except Exception as e:
        failed[module] = f"{type(e).__name__}: {e}"
print(json.dumps({"failed": failed}))
"""
_PLUGINS = """
import json, %(build)s._bindings as nixl
agent = nixl.nixlAgent("doctor", nixl.nixlAgentConfig())
print(json.dumps(sorted(agent.getAvailPlugins())), flush=True)
import os; os._exit(0)  # UCX may take its time to end
"""


class _Loaded(msgspec.Struct):
    failed: dict[str, str]


def packages() -> Packages:
    """The distributions that give `dynamo` in this environment."""
    found = []
    for name in OURS:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        foreign = any(str(file).startswith(FOREIGN_FILE) for file in distribution.files or ())
        found.append(Distribution(name, distribution.version, foreign))
    return Packages(tuple(found))


def dependencies(needed: Sequence[Package], limit_s: float) -> Dependencies:
    """Versions of the core's and the installed extras' distributions, and which of them do not load."""
    versions = {package.name: version(package.name) for package in needed}
    there = {package.name: package.module for package in needed if versions[package.name] is not None}
    try:
        failed = ask_child(_LOAD % (tuple(there.values()),), _Loaded, limit_s).failed
    except ChildFailed:
        failed = _one_by_one(tuple(there.values()), limit_s)
    return Dependencies(versions, {name: failed[module] for name, module in there.items() if module in failed})


def _one_by_one(modules: Sequence[str], limit_s: float) -> dict[str, str]:
    """Which modules fail to load, each in a child of its own: one of them took the others with it."""
    failed: dict[str, str] = {}
    for module in modules:
        try:
            failed |= ask_child(_LOAD % ((module,),), _Loaded, limit_s / len(modules)).failed
        except ChildFailed as e:
            failed[module] = str(e)
    return failed


def engine(*names: str) -> Engine:
    """The first of these distributions that is installed. It is not loaded: that takes seconds."""
    found = next(((name, text) for name in names if (text := version(name)) is not None), (names[0], None))
    python = ".".join(platform.python_version_tuple()[:2])
    return Engine(found[0], found[1], python, platform.machine())


def nixl(limit_s: float, rdma: Path = RDMA, program: str = _PLUGINS) -> Nixl:
    """The NIXL that is here, its plugins, and the devices that it could go by. Never raises: trouble is a fact."""
    devices = tuple(sorted(path.name for path in rdma.glob("*")))
    tls = os.environ.get("UCX_TLS", "")
    build = next((name for name in NIXL_BUILDS if importlib.util.find_spec(name) is not None), "")
    if not build:
        return Nixl(rdma_devices=devices, ucx_tls=tls)
    number = version(build.replace("_", "-")) or ""
    try:
        plugins = ask_child(program % {"build": build}, tuple[str, ...], limit_s)
    except ChildFailed as e:
        return Nixl(build, number, (), devices, tls, str(e))
    return Nixl(build, number, plugins, devices, tls)


def version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
