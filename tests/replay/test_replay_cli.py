"""The program: `dynamo replay`."""

import json
import os
import pty
import subprocess
import sys

import pytest

from dynamo.replay.main import main
from tests.replay.workloads import write_jsonl

LOAD = [
    *("--isl", "500", "--osl", "20", "--requests", "40", "--request-rate", "20"),
    *("--prefix-groups", "4", "--shared-prefix-ratio", "0.5"),
]


def run(capsys, *argv):
    try:
        status = main(list(argv))
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_one_run_prints_one_row_and_writes_what_is_asked(capsys, tmp_path):
    files = {name: tmp_path / name for name in ("json", "jsonl", "html")}
    status, out, err = run(capsys, *LOAD, *(x for name, path in files.items() for x in (f"--{name}", str(path))))
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 2
    (outcome,) = json.loads(files["json"].read_text())
    assert outcome["summary"]["completed_requests"] == 40
    assert len(files["jsonl"].read_text().splitlines()) == 40
    assert files["html"].read_text().startswith("<!doctype html>")


def test_policies_are_compared_in_processes_and_agree_with_runs_alone(capsys, tmp_path):
    path = tmp_path / "all.json"
    status, out, _ = run(capsys, *LOAD, "--compare", "round-robin, linear,lmetric", "--json", str(path))
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["policy", "round-robin", "linear", "lmetric"]
    together = {outcome["policy"]: outcome["summary"] for outcome in json.loads(path.read_text())}
    run(capsys, *LOAD, "--policy", "linear", "--json", str(path))
    (alone,) = json.loads(path.read_text())
    for name, value in alone["summary"].items():
        if name not in ("wall_time_ms", "realtime_factor"):
            assert together["linear"][name] == value


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["none.jsonl"], 1, "none.jsonl"),
        ([], 2, "give trace files, or --input-tokens"),
        (["--isl", "5", "--osl", "5"], 2, "exactly one of --request-rate"),
        ([*LOAD, "--policy", "best"], 2, "policy must be one of round-robin"),
        ([*LOAD, "--compare", "linear,best"], 2, "got 'best'"),
        ([*LOAD, "--worker", "2"], 2, "did you mean --workers"),
        ([*LOAD, "--workers", "0"], 2, "num_workers must be at least 1"),
        ([*LOAD, "--compare", "linear,lmetric", "--jsonl", "x"], 2, "leave out --compare"),
        ([*LOAD, "--router-config", '{"router_temperature": -1}'], 2, "router_temperature must be at least 0"),
        ([*LOAD, "--num-gpu-blocks", "4"], 1, "context length is 256"),
        ([*LOAD, "--num-gpu-blocks", "4", "--compare", "linear,lmetric"], 1, "context length is 256"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, tmp_path, monkeypatch, argv, status, words):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *argv)
    assert got == status
    assert out == ""
    assert words in err
    assert "Traceback" not in err


def test_a_bad_line_of_a_trace_ends_a_comparison_with_its_place(capsys, tmp_path):
    line = {"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [1]}
    path = write_jsonl(tmp_path / "t.jsonl", line, {"timestamp": 5})
    status, _, err = run(capsys, str(path), "--compare", "linear,round-robin")
    assert status == 1
    assert "t.jsonl:2: " in err


def test_progress_is_shown_on_a_terminal():
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "dynamo.cli.main", "replay", *LOAD, "--requests", "3000"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # the terminal's other side is closed
            break
        if not data:
            break
        shown += data
    out, _ = child.communicate(timeout=30)
    os.close(ours)
    assert child.returncode == 0
    assert b"3000" in out
    assert b"100%" in shown
