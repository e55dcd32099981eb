"""Does the whole command answer in time, in each form, whatever is wrong?"""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dynamo.doctor.facts import Unknown
from dynamo.doctor.gather import Source, gather
from dynamo.doctor.judge.checks import CHECKS, judge
from dynamo.doctor.judge.verdict import Check, Verdict
from dynamo.doctor.main import examine, main
from dynamo.doctor.matrix import FILE, MatrixError, numbers, read_matrix
from dynamo.doctor.report import as_json, as_markdown, exit_status, show
from dynamo.doctor.sources import Wanted, sources


def test_facts_come_in_bounded_time_whatever_one_of_them_does() -> None:
    def fail(_: float) -> object:
        raise RuntimeError("the library says no")

    never = threading.Event()
    started = time.monotonic()
    facts = gather(
        {
            "hangs": Source(lambda _: never.wait(), 60.0),
            "short": Source(lambda _: never.wait(), 0.05),
            "fails": Source(fail, 60.0),
            "well": Source(lambda limit_s: limit_s < 1, 60.0),
        },
        timeout_s=0.5,
    )
    took_s = time.monotonic() - started
    never.set()
    assert facts == {
        "hangs": Unknown("no answer within 0.5 s"),
        "short": Unknown("no answer within 0.05 s"),
        "fails": Unknown("the library says no"),
        "well": True,
    }
    assert 0.5 <= took_s < 5


def test_every_fact_that_is_judged_has_a_source() -> None:
    assert {spec.fact for spec in CHECKS.values()} == set(sources(read_matrix(), Wanted()))


def test_offline_asks_nobody() -> None:
    some = {name: s for name, s in sources(read_matrix(), Wanted(offline=True)).items() if name in ("etcd", "workers")}
    assert set(gather(some, 5.0).values()) == {Unknown("not asked: --offline")}


@pytest.fixture(scope="module")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dynamo.cli.main", "doctor", *words]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("ETCD_", "NATS_"))} | variables
        return subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)

    return run


@pytest.fixture(scope="module")
def by_json(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    done = run("--json", "--timeout", "50", DYN_FILE_KV=str(tmp_path_factory.mktemp("nobody")))
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_json_has_every_check_and_the_exit_status(by_json: tuple[int, dict[str, Any]]) -> None:
    status, report = by_json
    assert [check["id"] for check in report["checks"]] == list(CHECKS)
    assert report["exit_status"] == status
    assert {check["verdict"] for check in report["checks"]} <= {"supported", "experimental", "unsupported", "unknown"}


def test_what_is_on_every_machine_is_known(by_json: tuple[int, dict[str, Any]]) -> None:
    unknown = {check["id"] for check in by_json[1]["checks"] if check["verdict"] == "unknown"}
    assert unknown <= {"clock", "gpu", "driver"}  # a container may forbid the first, a broken driver the others


def test_a_service_that_hangs_costs_its_own_check_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{silent.getsockname()[1]}")
        some = {name: s for name, s in sources(read_matrix(), Wanted()).items() if name in ("etcd", "python")}
        by = {check.id: check for check in judge(gather(some, 10.0), read_matrix())}
    assert (by["etcd"].verdict, "no answer within" in by["etcd"].why) == ("unsupported", True)
    assert by["python"].verdict == "supported"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--timeout", "0"], "--timeout"),
        (["--worker"], "did you mean --workers"),
        (["--workers", "--json"], "--json"),
        (["--workers", "--discovery-backend", "zookeeper"], "zookeeper"),
    ],
)
def test_wrong_words_end_with_status_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "cannot be read"), (b"[check", "malformed"), (b"\xff\xfe", "malformed"), (b"", "says nothing of")],
)
def test_a_matrix_that_cannot_be_used_leaves_every_check_unknown(
    content: bytes | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    file = tmp_path / "matrix.toml"
    if content is not None:
        file.write_bytes(content)
    checks = examine(Wanted(), matrix_file=file)
    assert {check.verdict for check in checks} == {"unknown"}
    assert all(why in check.why for check in checks)
    assert exit_status(checks) == 2


def test_a_malformed_part_of_the_matrix_spoils_its_check_alone(tmp_path: Path) -> None:
    file = tmp_path / "matrix.toml"
    text = FILE.read_text()
    assert 'at_least = "4", status = "supported"' in text
    file.write_text(text.replace('at_least = "4", status = "supported"', 'at_least = "4", status = "perfect"'))
    checks = judge({}, read_matrix(file))
    broken = [c for c in checks if "malformed at check.cores" in c.why]
    assert [c.id for c in broken] == ["cores"]
    assert "perfect" in broken[0].why


def test_a_matrix_without_a_row_for_a_fact_says_so() -> None:
    with pytest.raises(MatrixError, match="no row is named 'purple'"):
        read_matrix().rule("ports").named("purple")
    with pytest.raises(MatrixError, match="no row is for"):
        read_matrix().rule("ports").level("1")


def test_versions_are_compared_as_numbers() -> None:
    assert numbers("2.100") > numbers("2.28")
    assert numbers("3.0") == numbers("3")
    assert numbers("2.13.0+cpu") == (2, 13)


def check(verdict: Verdict, optional: bool = False) -> Check:
    return Check("id", "a | title", "machine", "[value]", verdict, "why", "fix", optional)


@pytest.mark.parametrize(
    ("checks", "status"),
    [
        ([check("supported"), check("experimental")], 0),
        ([check("supported"), check("unknown")], 2),
        ([check("unknown"), check("unsupported")], 1),
        ([check("unsupported", optional=True), check("unknown", optional=True)], 0),
    ],
)
def test_the_exit_status_is_of_what_counts(checks: list[Check], status: int) -> None:
    assert exit_status(checks) == status


def test_the_table_shows_values_as_they_are_and_the_fixes() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    show([check("unsupported")], console)
    text = console.export_text()
    assert "[value]" in text
    assert "a | title: fix" in text
    assert "will not run all" in text


def test_a_document_gets_the_table_with_bars_escaped() -> None:
    assert as_markdown([check("unsupported")]).splitlines()[-1] == (
        "| a \\| title | [value] | unsupported | why | `fix` |"
    )
    assert json.loads(as_json([check("unsupported")]))["exit_status"] == 1
