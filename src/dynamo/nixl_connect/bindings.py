"""Which NIXL is installed here, and what does it need to be told so that it burns no core?

The only file that knows NIXL's packages. `nixl` is a front that loads one of the builds `nixl_cu13` and `nixl_cu12`;
finding out which takes it a second of torch's import, so a build that is the only one here is loaded directly. There
is one UCX in a process that way, vLLM's and ours.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dynamo.nixl_connect.errors import NixlMissing

BUILDS = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
FRONT = "nixl"
HOW_TO_INSTALL = (
    "dynamo.nixl_connect needs NIXL: pip install 'ai-dynamo[nixl]' (Linux, x86-64 or ARM; works without a GPU too)"
)

PROGRESS_SLEEP_US = 20_000
"""How long NIXL's progress thread sleeps when its sockets are silent, in microseconds. It is woken by them; the sleep
is only its guard against a lost wake-up (its own comment). NIXL's Python wrapper says 0, which makes it spin on a
core for ever; with this an idle agent costs 0.3 % of one."""


def load() -> ModuleType:
    """NIXL's bindings. Raises NixlMissing, which names the extra and why what is installed cannot be loaded."""
    there = [name for name in BUILDS if importlib.util.find_spec(name) is not None]
    loaded = [name for name in there if name in sys.modules]
    if len(loaded) == 1 or len(there) == 1:
        candidates = loaded or there
    else:
        candidates = [FRONT] if importlib.util.find_spec(FRONT) is not None else there
    reasons = []
    for name in candidates:
        try:
            return importlib.import_module(f"{name}._bindings")
        except ImportError as e:
            reasons.append(f"{name} is installed but does not load: {e}")
    raise NixlMissing("; ".join([HOW_TO_INSTALL, *reasons]))


def new_agent(bindings: ModuleType, name: str) -> Any:
    """A NIXL agent with its UCX backend, whose progress thread sleeps until a socket wakes it. Takes half a second
    the first time in a process. Must then be called from one thread at a time."""
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.pthrDelay = PROGRESS_SLEEP_US
    config.syncMode = bindings.nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE  # one thread of ours owns the agent
    agent = bindings.nixlAgent(name, config)
    if "UCX" not in agent.getAvailPlugins():
        raise NixlMissing(f"{bindings.__name__} has no UCX plugin; reinstall it: {HOW_TO_INSTALL}")
    agent.createBackend("UCX", {})
    return agent


Kinds = tuple[type[BaseException], ...]


@dataclass(frozen=True)
class Failures:
    """NIXL's exceptions by what they mean, each a tuple to catch or to ask `isinstance` of."""

    any: Kinds
    unreachable: Kinds
    disconnected: Kinds
    unknown_memory: Kinds


def failures(bindings: ModuleType) -> Failures:
    """The exceptions of these bindings; a name that a version lacks is left out."""

    def named(*names: str) -> Kinds:
        return tuple(getattr(bindings, name) for name in names if hasattr(bindings, name))

    every = named(*(name for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")))
    return Failures(
        any=(*every, RuntimeError),
        unreachable=named("nixlBackendError", "nixlRemoteDisconnectError"),
        disconnected=named("nixlRemoteDisconnectError"),
        unknown_memory=named("nixlNotFoundError", "nixlInvalidParamError", "nixlMismatchError"),
    )
