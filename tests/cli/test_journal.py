"""Does the journal of a batch lose nothing that was written, and take nothing that was torn?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.cli.journal import Journal, JournalError, Work

WORK = Work("abc", 4, {"model": "m"})


def test_results_come_in_the_order_of_the_input(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", WORK)
    for line in (2, 0, 3, 1):
        journal.append(line, {"answer": line})
    journal.write_output(tmp_path / "out")
    assert [json.loads(r)["answer"] for r in (tmp_path / "out").read_text().splitlines()] == [0, 1, 2, 3]
    assert not (tmp_path / "j").exists()


def test_a_second_run_knows_what_the_first_did(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", WORK)
    first.append(2, "x")
    first.close()
    second = Journal(tmp_path / "j", WORK)
    assert [second.has(i) for i in range(4)] == [False, False, True, False]
    assert second.done == 1


@given(cut=st.integers(min_value=0, max_value=200))
def test_a_torn_end_costs_only_the_torn_line(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    journal = Journal(path, WORK)
    ends = [path.stat().st_size]
    for line in range(4):
        journal.append(line, {"text": "é" * 10})
        ends.append(path.stat().st_size)
    journal.close()
    size = max(0, ends[-1] - cut)
    os.truncate(path, size)
    again = Journal(path, WORK)
    assert again.done == sum(size >= end for end in ends[1:])
    for line in range(4):
        if not again.has(line):
            again.append(line, {"text": "again"})
    assert len(list(again.results())) == 4
    again.close()


def test_garbage_after_a_power_failure_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", WORK)
    journal.append(0, "x")
    journal.close()
    with (tmp_path / "j").open("ab") as f:
        f.write(b"\0" * 50 + b"\n")
    assert Journal(tmp_path / "j", WORK).done == 1


@pytest.mark.parametrize("other", [Work("abd", 4, {"model": "m"}), Work("abc", 4, {"model": "n"})])
def test_other_work_is_refused_and_kept(tmp_path: Path, other: Work) -> None:
    journal = Journal(tmp_path / "j", WORK)
    journal.append(0, "x")
    journal.close()
    with pytest.raises(JournalError, match="remove the file to begin anew"):
        Journal(tmp_path / "j", other)
    assert Journal(tmp_path / "j", WORK).done == 1


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", WORK)
    with pytest.raises(JournalError, match="in use"):
        Journal(tmp_path / "j", WORK)
    journal.close()


def test_what_was_appended_survives_sigkill(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from dynamo.cli.journal import Journal, Work
j = Journal(Path({str(tmp_path / "j")!r}), Work("abc", 4, {{"model": "m"}}))
j.append(1, "x"); j.append(3, "y")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert list(Journal(tmp_path / "j", WORK).results()) == [b'"x"', b'"y"']
