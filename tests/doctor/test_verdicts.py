"""Does the right verdict follow from each fact? Every row of the matrix is reached by a fact here."""

import msgspec
import pytest

from dynamo.doctor import facts
from dynamo.doctor.facts import Answer, Distribution, Gpu, Unknown
from dynamo.doctor.judge.checks import CHECKS, judge
from dynamo.doctor.judge.verdict import Finding
from dynamo.doctor.matrix import Matrix, Rule, read_matrix

MATRIX = read_matrix()
GIB, MIB = 2**30, 2**20
S, E, U = "supported", "experimental", "unsupported"
OF_THE_CORE = {package.name: package.highest_run for package in MATRIX.packages if not package.extra}


def graphics(*capabilities: str, cuda: str = "13.0") -> facts.Graphics:
    return facts.Graphics(tuple(Gpu(f"GPU {c}", c, 80 * GIB) for c in capabilities), "580.1", cuda)


def depends(broken: dict[str, str] | None = None, **changed: str | None) -> facts.Dependencies:
    return facts.Dependencies(OF_THE_CORE | {k.replace("_", "-"): v for k, v in changed.items()}, broken or {})


def linux(distribution: str = "debian 12", libc: str = "glibc", version: str = "2.36") -> facts.System:
    return facts.System("Linux", distribution, distribution, libc, version)


def engine(version: str | None, python: str = "3.11", architecture: str = "x86_64") -> facts.Engine:
    return facts.Engine("vllm", version, python, architecture)


def port(*states: str) -> facts.Ports:
    return facts.Ports(tuple(facts.Port(8000 + i, "frontend", state) for i, state in enumerate(states)))


def answers(*versions: str) -> facts.Service:
    """One server a version; the empty one is silent."""
    return facts.Service(
        tuple(Answer(f"http://h{i}", v, "" if v else "connection refused") for i, v in enumerate(versions))
    )


def nixl(*plugins: str, **more: object) -> facts.Nixl:
    return facts.Nixl("nixl_cu12", "1.5.1", plugins, **more)  # type: ignore[arg-type]


def dists(*found: Distribution) -> facts.Packages:
    return facts.Packages(found)


OURS, RUNTIME = Distribution("ai-dynamo", "0.1.0"), Distribution("ai-dynamo-runtime", "0.1.0")
API = Answer("https://10.0.0.1:443", "1.33.1")

# By check: a fact, the row that is for it, and the verdict.
CASES: dict[str, list[tuple[object, str, str]]] = {
    "architecture": [
        (facts.Processor("x86_64", 8), "x86_64", S),
        (facts.Processor("aarch64", 8), "aarch64", E),
        (facts.Processor("riscv64", 8), "*", U),
    ],
    "cores": [
        (facts.Processor("x86_64", 4), "4", S),
        (facts.Processor("x86_64", 3.5), "2", E),
        (facts.Processor("x86_64", 0.5), "0", U),
    ],
    "memory": [
        (facts.Memory(31 * GIB), "32", S),  # what a machine with 32 GB shows
        (facts.Memory(24 * GIB), "4", E),
        (facts.Memory(2 * GIB), "0", U),
    ],
    "distribution": [
        (linux("debian 12"), "debian 12", S),
        (linux("debian 13"), "debian 13", E),
        (linux("ubuntu 24.04"), "ubuntu 24.04", E),
        (linux("ubuntu 22.04"), "ubuntu 22.04", E),
        (linux("gentoo"), "*", E),
        (linux(""), "*", E),
        (facts.System("Darwin", "", "", "", ""), "no Linux", U),
    ],
    "libc": [
        (linux(version="2.28"), "2.28", S),
        (linux(version="2.100"), "2.28", S),
        (linux(version="2.27"), "2.17", U),
        (linux(version="2.12"), "0", U),
        (linux(libc="musl", version=""), "musl", E),
        (linux(libc="", version=""), "*", U),
    ],
    "python": [
        (facts.Python("CPython", "3.11.7"), "3.11", S),
        (facts.Python("CPython", "3.12.1"), "3.12", E),
        (facts.Python("CPython", "3.13.0"), "3.13", E),
        (facts.Python("CPython", "3.14.0"), "3.14", E),
        (facts.Python("CPython", "3.15.0a1"), "*", U),
        (facts.Python("PyPy", "3.11.7"), "no CPython", U),
    ],
    "gpu": [
        (graphics("12.0"), "10.0", E),
        (graphics("9.0"), "9.0", E),
        (graphics("8.9"), "8.9", E),
        (graphics("8.0", "9.0"), "8.0", E),
        (graphics("9.0", "7.5"), "0", U),  # the oldest decides
        (facts.Graphics(), "none", S),
    ],
    "driver": [
        (graphics("9.0", cuda="13.1"), "13.0", E),
        (graphics("9.0", cuda="12.8"), "0", U),
        (facts.Graphics(), "none", S),
    ],
    "packages": [
        (dists(OURS), "one", S),
        (dists(RUNTIME), "one", S),
        (dists(OURS, RUNTIME), "both", E),
        (dists(OURS, Distribution("ai-dynamo-runtime", "0.2.0")), "mixed", U),
        (dists(OURS, Distribution("ai-dynamo-runtime", "0.1.0", foreign=True)), "foreign", U),
        (dists(), "none", E),
    ],
    "dependencies": [
        (depends(), "in range", S),
        (depends(aiohttp="99.1"), "newer", E),
        (depends(aiohttp="3.10.11"), "outside", U),
        (depends(nats_py="3.0"), "outside", U),
        (depends(aiohttp=None), "missing", U),
        (depends({"pyzmq": "ImportError: GLIBC_2.38 not found"}), "broken", U),
    ],
    "vllm": [
        (engine("0.32.0+cpu"), "0.32", S),
        (engine("0.31.1"), "*", E),
        (engine(None), "not installed", S),
        (engine(None, "3.14"), "not installed, Python 3.14 on x86_64", U),
        (engine(None, "3.14", "aarch64"), "not installed, Python 3.14 on aarch64", U),
    ],
    "sglang": [(engine("0.5.0"), "*", U), (engine(None), "*", U)],
    "tensorrt_llm": [(engine("1.0.0"), "*", U), (engine(None), "*", U)],
    "nixl": [
        (nixl("POSIX", "UCX"), "UCX", S),
        (nixl("UCX", rdma_devices=("mlx5_0",)), "RDMA", E),
        (nixl("UCX", rdma_devices=("mlx5_0",), ucx_tls="tcp"), "UCX", S),
        (facts.Nixl(), "none", E),
        (nixl("POSIX"), "without UCX", U),
        (nixl(trouble="it crashed while it was asked (SIGSEGV)"), "broken", U),
    ],
    "shared_memory": [
        (facts.SharedMemory(4096 * MIB, 8192 * MIB, True), "1024", S),
        (facts.SharedMemory(64 * MIB, 64 * MIB, True), "64", E),
        (facts.SharedMemory(63 * MIB, 64 * MIB, True), "0", U),
        (facts.SharedMemory(4096 * MIB, 8192 * MIB, False), "read-only", U),
    ],
    "open_files": [
        (facts.OpenFiles(1024, 65536), "65536", S),
        (facts.OpenFiles(1024, 20000), "4096", E),
        (facts.OpenFiles(1024, 1024), "0", U),
    ],
    "ports": [
        (port("free", "free"), "free", S),
        (port(), "free", S),
        (port("ours", "free"), "ours", E),
        (port("free", "ours", "taken"), "taken", U),
        (port("taken", "forbidden"), "forbidden", U),
    ],
    "clock": [
        (facts.Clock("20270101", True, 0.01), "20261101", S),
        (facts.Clock("20270101", False, 16), "alone", E),
        (facts.Clock("19700101", True, 0.01), "0", U),
        (facts.Clock("19700101", False, 16), "0", U),
    ],
    "etcd": [
        (facts.Service(), "not used", S),
        (answers("3.6.1", "3.5.0"), "3.5", S),
        (answers("3.4.30", "3.6.1"), "3.4", E),  # the oldest decides
        (answers("3.3.0", ""), "0", U),
        (answers("3.5.1", ""), "some silent", E),
        (answers("", ""), "silent", U),
        (facts.Service(trouble="ETCD_AUTH_CA: there is no file"), "wrong settings", U),
    ],
    "nats": [
        (facts.Service(), "not used", S),
        (answers("2.15.1"), "2.10", S),
        (answers("2.9.0"), "2.2", E),
        (answers("2.1.9"), "0", U),
        (answers("2.15.1", ""), "some silent", E),
        (answers(""), "silent", U),
        (facts.Service(trouble="NATS_SERVER: no server in it"), "wrong settings", U),
    ],
    "kubernetes": [
        (facts.Kubernetes(None, "file"), "not used", S),
        (facts.Kubernetes(API, "etcd"), "in a pod", E),
        (facts.Kubernetes(None, "etcd", "there is no token"), "in a pod", E),
        (facts.Kubernetes(API, "kubernetes"), "1.21", E),
        (facts.Kubernetes(Answer(API.where, "1.20.4"), "kubernetes"), "0", U),
        (facts.Kubernetes(Answer(API.where, "unnamed"), "kubernetes"), "unnamed", E),
        (facts.Kubernetes(Answer(API.where, trouble="timed out"), "kubernetes"), "silent", U),
        (facts.Kubernetes(None, "kubernetes", "there is no token"), "wrong settings", U),
    ],
    "model": [
        (facts.Model("", "not asked"), "not asked", S),
        (facts.Model("/m", "complete"), "complete", S),
        (facts.Model("a/b", "in the cache"), "in the cache", S),
        (facts.Model("a/b", "on the hub"), "on the hub", S),
        (facts.Model("/m", "without weights"), "without weights", E),
        (facts.Model("a/b", "refused"), "refused", U),
        (facts.Model("a/b", "not in the cache"), "not in the cache", U),
        (facts.Model("/m", "no model"), "no model", U),
        (facts.Model("a/b", "strange answer"), "strange answer", U),
    ],
    "workers": [
        (facts.Workers("file", 0), "nobody", S),
        (facts.Workers("file", 2), "all answer", S),
        (facts.Workers("file", 1, ("ns.c.e: refused",)), "some silent", E),
        (facts.Workers("file", 0, ("ns.c.e: refused",)), "all silent", U),
    ],
}  # fmt: skip


def found(check: str, fact: object) -> Finding:
    spec = CHECKS[check]
    return spec.judge(fact, MATRIX.rule(check), *((MATRIX.packages,) if spec.needs_packages else ()))


@pytest.mark.parametrize(
    ("check", "fact", "row", "verdict"), [(check, *case) for check, cases in CASES.items() for case in cases]
)
def test_a_fact_gets_the_verdict_of_its_row(check: str, fact: object, row: str, verdict: str) -> None:
    reached = found(check, fact).row
    assert (reached.name or reached.at_least) == row
    (said,) = [c for c in judge({CHECKS[check].fact: fact}, MATRIX) if c.id == check]
    assert said.verdict == verdict
    assert row in ("free", "none") or said.value
    assert reached.why in said.why
    assert not said.fix if verdict == S else said.fix or verdict == E


@pytest.mark.parametrize("check", CHECKS)
def test_every_row_of_a_check_is_for_some_fact(check: str) -> None:
    rows = {row.name or row.at_least for row in MATRIX.rule(check).rows}
    assert rows == {row for _, row, _ in CASES[check]}


@pytest.mark.parametrize("status", [S, E, U])
@pytest.mark.parametrize("check", CHECKS)
def test_the_verdict_is_the_data_files(check: str, status: str) -> None:
    class Altered(Matrix):
        def rule(self, name: str) -> Rule:
            rule = MATRIX.rule(name)
            return msgspec.structs.replace(
                rule, rows=tuple(msgspec.structs.replace(r, status=status) for r in rule.rows)
            )

    altered = Altered(MATRIX._content)
    for fact, _, _ in CASES[check]:
        assert [c.verdict for c in judge({CHECKS[check].fact: fact}, altered) if c.id == check] == [status]


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_not_known_is_said_to_be_unknown_and_why(check: str) -> None:
    facts_known = {CHECKS[name].fact: cases[0][0] for name, cases in CASES.items()}
    said = judge(facts_known | {CHECKS[check].fact: Unknown("it hung")}, MATRIX)
    mine = [c for c in said if CHECKS[c.id].fact == CHECKS[check].fact]
    assert {(c.verdict, c.why) for c in mine} == {("unknown", "it hung")}
    assert "unknown" not in {c.verdict for c in said if c not in mine}


def test_every_check_of_the_data_file_is_judged_and_in_its_order() -> None:
    assert list(MATRIX.rules()) == list(CHECKS) == list(CASES)


def test_a_note_says_what_exactly_is_wrong_and_the_fix_names_it() -> None:
    (said,) = [c for c in judge({"dependencies": depends(aiohttp=None, pyzmq=None)}, MATRIX) if c.id == "dependencies"]
    assert said.why == "aiohttp, pyzmq: not installed"
    assert said.fix == "pip install 'aiohttp>=3.11' 'pyzmq>=26'"
    (said,) = [c for c in judge({"dependencies": depends({"pyzmq": "GLIBC_2.38"})}, MATRIX) if c.id == "dependencies"]
    assert "GLIBC_2.38" in said.why
    assert said.fix == "pip install --force-reinstall pyzmq"


def test_rows_name_what_they_are_for() -> None:
    for name, rule in MATRIX.rules().items():
        assert all(bool(row.name) != bool(row.at_least) for row in rule.rows), name
        keys = [row.name or row.at_least for row in rule.rows]
        assert len(set(keys)) == len(keys), name


def test_whatever_is_unsupported_has_a_fix() -> None:
    lacking = [
        (name, row.name)
        for name, rule in MATRIX.rules().items()
        for row in rule.rows
        if row.status == U and not (row.fix or rule.fix) and name != "dependencies"
    ]
    assert lacking == []
