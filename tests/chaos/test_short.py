"""Does a deployment hold what it promises while some of it is broken? A short form of `make chaos`."""

import json
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
