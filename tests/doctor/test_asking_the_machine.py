"""Are facts of the machine and its libraries learnt as they are, and is what crashes or hangs survived?"""

import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.doctor.ask import graphics, libraries, machine, ports
from dynamo.doctor.ask.child import ChildFailed, ask_child
from dynamo.doctor.facts import Distribution, Nixl
from dynamo.doctor.matrix import Package, read_matrix
from tests.doctor.web_server import answering

LIMIT_S = 20.0


def test_a_control_group_that_grants_less_than_the_machine_has_is_believed(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("104857600\n")
    assert machine.processor(tmp_path).cores == 0.5
    assert machine.memory(tmp_path).total_bytes == 100 * 2**20


def test_a_control_group_without_limits_leaves_the_machine(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.processor(tmp_path).cores == len(os.sched_getaffinity(0))
    assert machine.memory(tmp_path).total_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.memory(tmp_path / "none").total_bytes == machine.memory(tmp_path).total_bytes


def test_the_kernel_is_asked_what_it_is_and_how_its_clock_is() -> None:
    system = machine.system()
    assert (system.kernel, system.libc) == ("Linux", "glibc")
    assert system.libc_version == platform.libc_ver()[1]
    assert machine.clock().date > "20260101"
    assert machine.open_files().hard >= machine.open_files().soft > 0
    assert machine.shared_memory().size_bytes >= machine.shared_memory().free_bytes
    assert machine.python().version == platform.python_version()


def test_shared_memory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        machine.shared_memory(tmp_path / "none")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed while it was asked .SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), 40)", "crashed while it was asked .signal 40"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import threading; threading.Event().wait()", "no answer within 1.0 s"),
        ("raise SystemExit('NVML: Driver/library version mismatch')", "version mismatch"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("print('no JSON')", "not to be understood"),
        ("print('[1]')", "not to be understood"),
        ("", "not to be understood"),
    ],
)
def test_a_library_that_crashes_hangs_or_babbles_is_survived(program: str, why: str) -> None:
    with pytest.raises(ChildFailed, match=why):
        ask_child(program, dict[str, int], 1.0 if "wait" in program else LIMIT_S)


def test_a_child_may_say_other_things_before_its_answer() -> None:
    assert ask_child("print('loading'); print('{\"a\": 1}')", dict[str, int], LIMIT_S) == {"a": 1}


FAKE_NVML = """
import ctypes, types
class Nvml:
    nvmlErrorString = types.SimpleNamespace()
    def __getattr__(self, name):
        def call(*words):
            if name == "nvmlSystemGetDriverVersion": words[0].value = b"580.95.05"
            if name == "nvmlSystemGetCudaDriverVersion_v2": words[0]._obj.value = 13010
            if name == "nvmlDeviceGetCount_v2": words[0]._obj.value = 2
            if name == "nvmlDeviceGetName": words[1].value = b"NVIDIA H100 80GB HBM3"
            if name == "nvmlDeviceGetCudaComputeCapability": words[1]._obj.value, words[2]._obj.value = 9, 0
            if name == "nvmlDeviceGetMemoryInfo": words[1][0] = 85520809984
            return 0
        return call
ctypes.CDLL = lambda name: Nvml()
"""


def test_what_nvml_says_is_read() -> None:
    found = graphics.graphics(LIMIT_S, FAKE_NVML + graphics._NVML)
    assert (found.driver, found.cuda, len(found.gpus)) == ("580.95.05", "13.1", 2)
    assert (found.gpus[0].capability, found.gpus[0].memory_bytes) == ("9.0", 85520809984)


def test_no_driver_is_a_fact_and_a_device_without_its_library_is_not(tmp_path: Path) -> None:
    absent = "import ctypes\ndef CDLL(name): raise OSError('no such file')\nctypes.CDLL = CDLL\n" + graphics._NVML
    assert graphics.graphics(LIMIT_S, absent, str(tmp_path / "*")).gpus == ()
    (tmp_path / "0000:01:00.0").touch()
    with pytest.raises(ChildFailed, match="no such file"):
        graphics.graphics(LIMIT_S, absent, str(tmp_path / "*"))


def packages(*modules: str) -> list[Package]:
    return [Package(f"p-{m}", m, "1", "1", "1") for m in modules]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the path of this process and its children, with three distributions: one that loads, one that
    fails, one that crashes."""
    texts = {
        "fine": "",
        "failing": "raise ImportError('GLIBC_2.38 not found')",
        "crashing": "import os; os.abort()",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / f"p_{name}-1.5.dist-info").mkdir()
        (tmp_path / f"p_{name}-1.5.dist-info" / "METADATA").write_text(f"Name: p-{name}\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_dependencies_that_do_not_load_are_told_from_those_that_do() -> None:
    found = libraries.dependencies(packages("fine", "failing", "absent"), LIMIT_S)
    assert found.versions == {"p-fine": "1.5", "p-failing": "1.5", "p-absent": None}
    assert found.broken == {"p-failing": "ImportError: GLIBC_2.38 not found"}


@pytest.mark.usefixtures("installed")
def test_a_dependency_that_crashes_does_not_take_the_others_with_it() -> None:
    found = libraries.dependencies(packages("fine", "crashing", "failing"), LIMIT_S)
    assert set(found.broken) == {"p-crashing", "p-failing"}
    assert "SIGABRT" in found.broken["p-crashing"]


def test_all_dependencies_of_this_environment_load() -> None:
    assert libraries.dependencies(read_matrix().packages, LIMIT_S).broken == {}


def test_a_foreign_package_of_our_name_is_known_by_its_files(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(installed)])
    info = installed / "ai_dynamo_runtime-1.6.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: ai-dynamo-runtime\nVersion: 1.6.1\n")
    (info / "RECORD").write_text("dynamo/_core.abi3.so,,\n")
    assert libraries.packages().distributions == (Distribution("ai-dynamo-runtime", "1.6.1", foreign=True),)


def test_an_engine_is_found_by_any_of_its_names() -> None:
    assert libraries.engine("no-such-engine", "msgspec").version is not None
    assert libraries.engine("no-such-engine").version is None


def test_nixl_lists_its_plugins_and_devices(tmp_path: Path) -> None:
    (tmp_path / "mlx5_0").mkdir()
    found = libraries.nixl(LIMIT_S, tmp_path)
    assert "UCX" in found.plugins
    assert found.rdma_devices == ("mlx5_0",)


def test_nixl_that_crashes_is_a_fact(tmp_path: Path) -> None:
    found = libraries.nixl(LIMIT_S, tmp_path, "import os; os.abort()  # %(build)s")
    assert isinstance(found, Nixl)
    assert "SIGABRT" in found.trouble


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as s:
        s.settimeout(5)
        yield s.getsockname()[1]


def test_a_port_that_another_program_has_is_taken(listener: int) -> None:
    (port,) = ports.ports({"DYN_HTTP_PORT": str(listener)}).ports
    assert (port.number, port.state) == (listener, "taken")


def test_a_port_that_a_frontend_has_is_ours() -> None:
    with answering({"/health": (200, b'{"status": "healthy", "instances": []}')}) as url:
        (port,) = ports.ports({"DYN_HTTP_PORT": url.rpartition(":")[2]}).ports
    assert port.state == "ours"


def test_ports_are_those_that_variables_name() -> None:
    found = ports.ports({"DYN_HTTP_PORT": "1", "DYN_SYSTEM_PORT": "0", "DYN_TCP_RPC_PORT": "2"}).ports
    assert [(p.number, p.purpose) for p in found] == [(1, "frontend"), (2, "request plane")]
    assert ports.ports({"DYN_HTTP_PORT": "1", "DYN_SYSTEM_PORT": "-1"}).ports == found[:1]
    with pytest.raises(ValueError, match="DYN_HTTP_PORT"):
        ports.ports({"DYN_HTTP_PORT": "eight"})
