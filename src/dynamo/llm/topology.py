"""Where does a worker stand, and how near must a decode worker be to a prefill worker whose KV it fetches? [K48]

A worker reads its place from files, one for each kind of place (`zone`, `rack`), as Kubernetes writes a pod's labels.
It publishes all of them in its model card, where they count as taints [K47], and the one that matters for KV.
Frontends hold decode workers to the place of the prefill worker that they chose.
"""

import asyncio
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo.llm.model_card import ModelRuntimeConfig
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import env_bool

log = logging.getLogger(__name__)

DEFAULT_PATH = "/etc/dynamo/topology"  # where ai-dynamo's operator mounts them
REQUIRED, PREFERRED = "required", "preferred"
DEFAULT_WEIGHT = 0.85  # of a near worker against a far one, whose cost is then 3.2 times as high
WAIT_S = 30.0  # a pod's labels may be written after it has started
LOOK_S = 0.5
MAX_VALUE_BYTES = 256  # a label of Kubernetes has 63 characters


@dataclass(frozen=True, slots=True)
class Topology:
    """A worker's place. `domains`: kind of place → which; `domain` is the kind that KV must, or should, not leave."""

    domains: dict[str, str]
    domain: str
    enforcement: str = REQUIRED
    weight: float | None = None

    def write(self, config: ModelRuntimeConfig) -> None:
        """Say it in a model card."""
        config.topology_domains = dict(self.domains)
        config.kv_transfer_domain = self.domain
        config.kv_transfer_enforcement = self.enforcement
        config.kv_transfer_preferred_weight = self.weight


async def read_topology(wait_s: float = WAIT_S) -> Topology | None:
    """What `DYN_TOPOLOGY_ENABLED`, `DYN_TOPOLOGY_MOUNT_PATH` and `DYN_KV_TRANSFER_*` say; None where it is not on.

    Raises:
        ValueError: a variable is wrong, or nobody has written the file that `DYN_KV_TRANSFER_DOMAIN` names.
    """
    if not env_bool("DYN_TOPOLOGY_ENABLED", False):
        return None
    environ = os.environ
    domain = environ.get("DYN_KV_TRANSFER_DOMAIN", "").strip()
    if not domain:
        raise ValueError(
            "DYN_KV_TRANSFER_DOMAIN: must name a kind of place, such as zone, as DYN_TOPOLOGY_ENABLED is on"
        )
    enforcement = environ.get("DYN_KV_TRANSFER_ENFORCEMENT", "").strip() or REQUIRED
    directory = Path(environ.get("DYN_TOPOLOGY_MOUNT_PATH") or DEFAULT_PATH)
    topology = Topology({}, domain, enforcement, _weight(environ.get("DYN_KV_TRANSFER_PREFERRED_WEIGHT", "")))
    if enforcement not in (REQUIRED, PREFERRED):
        raise ValueError(f"DYN_KV_TRANSFER_ENFORCEMENT: {enforcement!r} is not one of required, preferred")
    deadline = time.monotonic() + wait_s
    while domain not in topology.domains:
        topology.domains.update(await asyncio.to_thread(_read_files, directory))
        if domain not in topology.domains:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"DYN_KV_TRANSFER_DOMAIN: there is no {directory / domain}, or nothing in it, after {wait_s:g} s "
                    "(DYN_TOPOLOGY_MOUNT_PATH)"
                )
            await asyncio.sleep(LOOK_S)
    log.info("this worker is in %s; KV must not leave its %s (%s)", topology.domains, domain, enforcement)
    return topology


def _weight(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= 1:
        raise ValueError(f"DYN_KV_TRANSFER_PREFERRED_WEIGHT: {text.strip()!r} is not a number from 0 to 1")
    return weight


def _read_files(directory: Path) -> dict[str, str]:
    """What is in files of a directory, by their names. Hidden ones are how Kubernetes replaces the others at once."""
    found = {}
    try:
        files = sorted(file for file in directory.iterdir() if not file.name.startswith(".") and file.is_file())
        for file in files:
            with file.open("rb") as opened:
                value = opened.read(MAX_VALUE_BYTES).decode("utf-8", "replace").strip()
            if value:
                found[file.name] = value
    except FileNotFoundError:
        pass  # not there yet, or being replaced
    except OSError as e:
        log.warning("DYN_TOPOLOGY_MOUNT_PATH: %s", e)
    return found


def check(config: ModelRuntimeConfig) -> None:
    """Raises InvalidArgument for a place that cannot be meant."""
    domain, enforcement = config.kv_transfer_domain, config.kv_transfer_enforcement
    weight = config.kv_transfer_preferred_weight
    if domain is not None and not config.topology_domains.get(domain):
        names = ", ".join(sorted(config.topology_domains)) or "none"
        raise InvalidArgument(
            f"kv_transfer_domain: {domain!r} is not in topology_domains ({names})", "kv_transfer_domain"
        )
    if enforcement not in (None, REQUIRED, PREFERRED):
        raise InvalidArgument(
            f"kv_transfer_enforcement: {enforcement!r} is not required or preferred", "kv_transfer_enforcement"
        )
    if weight is not None and not 0 <= weight <= 1:
        raise InvalidArgument(
            f"kv_transfer_preferred_weight: {weight!r} is not from 0 to 1", "kv_transfer_preferred_weight"
        )


def taints_of(config: ModelRuntimeConfig) -> frozenset[str]:
    """A worker's taints: its own, and those that its places make."""
    if not config.topology_domains:
        return frozenset(config.taints)
    return frozenset((*config.taints, *(_taint(*place) for place in config.topology_domains.items())))


def places_of(config: ModelRuntimeConfig) -> frozenset[str]:
    """Those of a worker's taints that say where it is."""
    return frozenset(_taint(*place) for place in config.topology_domains.items())


def _taint(domain: str, value: str) -> str:
    return f"dynamo.topology/{domain}={value}"


@dataclass(frozen=True, slots=True)
class Near:
    """Where the KV of a prefill worker may go: to workers with this taint alone, or, with a weight, rather there."""

    taint: str
    weight: float | None = None

    def describe(self) -> dict[str, Any]:
        """For people."""
        if self.weight is None:
            return {"taint": self.taint, "enforcement": REQUIRED}
        return {"taint": self.taint, "enforcement": PREFERRED, "weight": self.weight}


def near(config: ModelRuntimeConfig) -> Near | None:
    """What a prefill worker's card says of decode workers. A place that it does not name is one where nobody is."""
    domain = config.kv_transfer_domain
    if domain is None:
        return None
    taint = _taint(domain, config.topology_domains.get(domain, ""))
    if config.kv_transfer_enforcement != PREFERRED:
        return Near(taint)
    weight = config.kv_transfer_preferred_weight
    return Near(taint, DEFAULT_WEIGHT if weight is None else weight)
