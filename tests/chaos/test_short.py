"""Does a deployment hold what it promises while some of it is broken? A short form of `make chaos`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.network import ROOT, why_not

FAULTS = "worker killed,worker left,frontend left,worker paused,2 % of packets,clock one hour ahead"


@pytest.mark.chaos
@pytest.mark.timeout(300)  # about 30 s on an idle machine; whole again after each fault is waited for, not timed
def test_what_breaks_loses_no_request(tmp_path: Path) -> None:
    if (why := why_not()) is not None:
        pytest.skip(f"it {why}")
    argv = [sys.executable, "-m", "chaos", "--once", "--no-rolling", "--clients", "6", "--faults", FAULTS]
    done = subprocess.run([*argv, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["faults"]) == len(FAULTS.split(","))
    assert report["sent"] > 100


@pytest.mark.chaos
@pytest.mark.timeout(200)
def test_a_run_that_is_told_to_stop_leaves_nothing(tmp_path: Path) -> None:
    if (why := why_not()) is not None:
        pytest.skip(f"it {why}")
    argv = [sys.executable, "-m", "chaos", "--clients", "2", "--faults", "worker paused", "--out", str(tmp_path)]
    run = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        assert "worker paused" in run.stdout.readline()  # it is in the middle of things
        assert processes_with(tmp_path)
        run.terminate()
        assert run.wait(60) == 128 + signal.SIGTERM
    finally:
        run.kill()
        run.wait()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"dynchaos-{run.pid}-" not in listed
    assert processes_with(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def processes_with(place: Path) -> list[str]:
    """The command lines of processes that name a file there."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(place) in words and int(pid) != os.getpid():
            found.append(words.replace("\0", " "))
    return found
