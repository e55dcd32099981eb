"""Which checks are there, and what do all of them say of these facts?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo.doctor.facts import Unknown
from dynamo.doctor.judge import machine, services, software
from dynamo.doctor.judge.verdict import Check, Finding
from dynamo.doctor.matrix import Matrix, MatrixError, Rule


@dataclass(frozen=True)
class Spec:
    """A check: the fact it judges, and how."""

    fact: str
    judge: Callable[..., Finding]
    needs_packages: bool = False


CHECKS: dict[str, Spec] = {
    "architecture": Spec("processor", machine.architecture),
    "cores": Spec("processor", machine.cores),
    "memory": Spec("memory", machine.memory),
    "distribution": Spec("system", machine.distribution),
    "libc": Spec("system", machine.libc),
    "python": Spec("python", machine.python),
    "gpu": Spec("graphics", machine.gpu),
    "driver": Spec("graphics", machine.driver),
    "packages": Spec("packages", software.packages),
    "dependencies": Spec("dependencies", software.dependencies, needs_packages=True),
    "vllm": Spec("vllm", software.engine),
    "sglang": Spec("sglang", software.engine),
    "tensorrt_llm": Spec("tensorrt_llm", software.engine),
    "nixl": Spec("nixl", software.nixl),
    "shared_memory": Spec("shared_memory", machine.shared_memory),
    "open_files": Spec("open_files", machine.open_files),
    "ports": Spec("ports", machine.ports),
    "clock": Spec("clock", machine.clock),
    "etcd": Spec("etcd", services.service),
    "nats": Spec("nats", services.service),
    "kubernetes": Spec("kubernetes", services.kubernetes),
    "model": Spec("model", services.model),
    "workers": Spec("workers", services.workers),
}


def judge(facts: Mapping[str, object], matrix: Matrix) -> list[Check]:
    """All checks, in their order. A fact or a rule that is not there makes its checks `unknown`, and no other."""
    return [_judge_one(check, spec, facts, matrix) for check, spec in CHECKS.items()]


def _judge_one(check: str, spec: Spec, facts: Mapping[str, object], matrix: Matrix) -> Check:
    try:
        rule = matrix.rule(check)
    except MatrixError as e:
        return Check(check, check.replace("_", " "), "other", "", "unknown", str(e))
    fact = facts.get(spec.fact, Unknown("nobody asked"))
    if isinstance(fact, Unknown):
        return _check(check, rule, "", "unknown", fact.why)
    try:
        more: tuple[Any, ...] = (matrix.packages,) if spec.needs_packages else ()
        found = spec.judge(fact, rule, *more)
    except MatrixError as e:
        return _check(check, rule, "", "unknown", str(e))
    row = found.row
    why = f"{found.note}: {row.why}" if found.note else row.why
    fix = "" if row.status == "supported" else found.fix or row.fix or rule.fix
    return _check(check, rule, found.value, row.status, why, fix)


def _check(check: str, rule: Rule, value: str, verdict: Any, why: str, fix: str = "") -> Check:
    return Check(check, rule.title, rule.group, value, verdict, why, fix, rule.optional)
