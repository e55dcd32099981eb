"""Does what is installed go together: our packages, their dependencies, engines, NIXL?"""

from collections.abc import Iterable

from dynamo.doctor.facts import Dependencies, Engine, Nixl, Packages
from dynamo.doctor.judge.verdict import Finding, and_more, named
from dynamo.doctor.matrix import Package, Rule, numbers


def packages(fact: Packages, rule: Rule) -> Finding:
    """Two distributions may give `dynamo`; both must be ours and of one version."""
    value = ", ".join(f"{d.name} {d.version}" for d in fact.distributions) or "none"
    foreign = [d.name for d in fact.distributions if d.foreign]
    if foreign:
        return named(rule, "foreign", value, fix="pip uninstall " + " ".join(d.name for d in fact.distributions))
    if len(fact.distributions) < 2:
        return named(rule, "one" if fact.distributions else "none", value)
    return named(rule, "both" if len({d.version for d in fact.distributions}) == 1 else "mixed", value)


def dependencies(fact: Dependencies, rule: Rule, known: tuple[Package, ...]) -> Finding:
    """The worst dependency decides: broken, missing, too old or too new, newer than what was run."""
    of = {package.name: package for package in known}
    there = {name: version for name, version in fact.versions.items() if version is not None}
    value = f"{len(there)} of {len(fact.versions)} installed"
    if fact.broken:
        broken = tuple(f"{name} {fact.versions[name]}: {why}" for name, why in sorted(fact.broken.items()))
        return named(rule, "broken", value, and_more(broken), reinstall(fact.broken))
    missing = [name for name in fact.versions if name not in there]
    if missing:
        return named(rule, "missing", value, ", ".join(missing), install(missing, of))
    outside = [name for name, version in there.items() if not _in_range(version, of[name])]
    if outside:
        shown = ", ".join(f"{name} {there[name]}" for name in outside)
        return named(rule, "outside", value, shown, install(outside, of))
    newer = [f"{name} {version}" for name, version in there.items() if _is_newer(version, of[name])]
    return named(rule, "newer" if newer else "in range", value, ", ".join(newer))


def _in_range(version: str, package: Package) -> bool:
    too_new = package.below and numbers(version) >= numbers(package.below)
    return numbers(version) >= numbers(package.at_least) and not too_new


def _is_newer(version: str, package: Package) -> bool:
    """Whether the first number is above that of the newest that the tests ran with: then interfaces may have gone."""
    return numbers(version)[:1] > numbers(package.highest_run)[:1]


def install(names: list[str], of: dict[str, Package]) -> str:
    """The command that brings packages into their ranges."""
    return "pip install " + " ".join(f"'{name}{_range(of[name])}'" for name in names)


def _range(package: Package) -> str:
    return f">={package.at_least}" + (f",<{package.below}" if package.below else "")


def reinstall(broken: Iterable[str]) -> str:
    """The command for packages that are there and do not load."""
    return "pip install --force-reinstall " + " ".join(sorted(broken))


def engine(fact: Engine, rule: Rule) -> Finding:
    """An installed engine by its minor version; one that is not, by whether this Python and processor could have it."""
    if fact.version is not None:
        minor = ".".join(fact.version.split("+")[0].split(".")[:2])
        return named(rule, minor, f"{fact.name} {fact.version}")
    here = f"not installed, Python {fact.python} on {fact.architecture}"
    special = any(row.name == here for row in rule.rows)
    return named(rule, here if special else "not installed", "not installed")


def nixl(fact: Nixl, rule: Rule) -> Finding:
    """Which way KV and tensors would go between processes."""
    if not fact.build:
        return named(rule, "none", "not installed; KV through files in /dev/shm")
    value = f"{fact.build} {fact.version}"
    if fact.trouble:
        return named(rule, "broken", value, fact.trouble, reinstall([fact.build.replace("_", "-")]))
    if "UCX" not in fact.plugins:
        return named(rule, "without UCX", f"{value}, plugins: {', '.join(fact.plugins) or 'none'}")
    value += f", plugins: {', '.join(fact.plugins)}; UCX by {_ucx(fact)}"
    return named(rule, "RDMA" if fact.rdma_devices and not fact.ucx_tls else "UCX", value)


def _ucx(fact: Nixl) -> str:
    if fact.ucx_tls:
        return f"{fact.ucx_tls} (UCX_TLS)"
    if fact.rdma_devices:
        return f"RDMA ({', '.join(fact.rdma_devices)})"
    return "shared memory and TCP"
