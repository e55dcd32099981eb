"""Is the machine fit: processor, memory, system, Python, GPU, limits, clock?"""

from dynamo.doctor.facts import Clock, Graphics, Memory, OpenFiles, Ports, Processor, Python, SharedMemory, System
from dynamo.doctor.judge.verdict import Finding, level, named
from dynamo.doctor.matrix import Rule, numbers

GIB, MIB = 2**30, 2**20
NOMINAL = 1.05  # a machine sold with 32 GB shows a little less: the kernel's own share


def architecture(fact: Processor, rule: Rule) -> Finding:
    return named(rule, fact.architecture, fact.architecture)


def cores(fact: Processor, rule: Rule) -> Finding:
    return level(rule, str(int(fact.cores)), f"{fact.cores:g}")


def memory(fact: Memory, rule: Rule) -> Finding:
    gib = fact.total_bytes / GIB
    return level(rule, str(int(gib * NOMINAL)), f"{gib:.1f} GiB")


def distribution(fact: System, rule: Rule) -> Finding:
    if fact.kernel != "Linux":
        return named(rule, "no Linux", fact.kernel)
    return named(rule, fact.distribution, fact.pretty_name or "a Linux that does not say which")


def libc(fact: System, rule: Rule) -> Finding:
    if fact.libc != "glibc":
        return named(rule, fact.libc or "other", fact.libc or "not glibc")
    return level(rule, fact.libc_version, f"glibc {fact.libc_version}")


def python(fact: Python, rule: Rule) -> Finding:
    value = f"{fact.implementation} {fact.version}"
    if fact.implementation != "CPython":
        return named(rule, "no CPython", value)
    return named(rule, ".".join(fact.version.split(".")[:2]), value)


def gpu(fact: Graphics, rule: Rule) -> Finding:
    """The oldest of the GPUs decides: an engine may be given any."""
    if not fact.gpus:
        return named(rule, "none", "none")
    oldest = min(fact.gpus, key=lambda gpu: numbers(gpu.capability))
    values = (f"{gpu.name} ({gpu.capability}, {gpu.memory_bytes / GIB:.0f} GiB)" for gpu in fact.gpus)
    return level(rule, oldest.capability, ", ".join(values))


def driver(fact: Graphics, rule: Rule) -> Finding:
    if not fact.driver:
        return named(rule, "none", "none")
    return level(rule, fact.cuda, f"{fact.driver}, CUDA {fact.cuda}")


def shared_memory(fact: SharedMemory, rule: Rule) -> Finding:
    value = f"{fact.free_bytes / MIB:.0f} of {fact.size_bytes / MIB:.0f} MiB free"
    if not fact.writable:
        return named(rule, "read-only", value)
    return level(rule, str(fact.free_bytes // MIB), value)


def open_files(fact: OpenFiles, rule: Rule) -> Finding:
    return level(rule, str(fact.hard), f"{fact.soft}, at most {fact.hard}")


def ports(fact: Ports, rule: Rule) -> Finding:
    """The worst of the ports decides."""
    value = ", ".join(f"{port.number} {port.state}" for port in fact.ports) or "none asked for"
    states = [port.state for port in fact.ports]
    worst = next((state for state in ("forbidden", "taken", "ours") if state in states), "free")
    which = [f"{port.number} ({port.purpose})" for port in fact.ports if port.state == worst != "free"]
    return named(rule, worst, value, " and ".join(which))


def clock(fact: Clock, rule: Rule) -> Finding:
    day = f"{fact.date[:4]}-{fact.date[4:6]}-{fact.date[6:]}"
    if fact.synchronised:
        return level(rule, fact.date, f"{day}, within {fact.error_s * 1000:.0f} ms")
    by_date = level(rule, fact.date, day)
    return by_date if by_date.row.status == "unsupported" else named(rule, "alone", f"{day}, not synchronised")
