"""Do the published matrix, the data file, the packages' metadata and the code say the same?"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from dynamo.doctor.matrix import numbers, read_matrix

ROOT = Path(__file__).parents[2]
MATRIX = read_matrix()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_page_is_what_the_data_file_says() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "support_matrix.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_has_what_the_doctor_said() -> None:
    page = (ROOT / "docs" / "reference" / "support_matrix.md").read_text()
    (said,) = re.findall(r"<!-- doctor: begin -->\n(.*)<!-- doctor: end -->", page, re.S)
    assert len(said.splitlines()) > 3


def test_ranges_are_those_of_the_metadata() -> None:
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    declared = {
        (
            re.split(r"[\[><=]", line)[0],
            "" if extra == "" else extra,
            ",".join(sorted(re.findall(r"[><=]+[\d.]+", line))),
        )
        for extra, lines in extras.items()
        if extra not in ("dev", "fuzz")  # what only developers install
        for line in lines
    }
    known = {
        (p.name, p.extra, ",".join(sorted([f">={p.at_least}"] + ([f"<{p.below}"] if p.below else []))))
        for p in MATRIX.packages
    }
    optional = {item for item in declared if item[0] in ("numpy", "pydantic")}  # of NIXL's, whichever comes with it
    assert known | optional == declared


def test_both_ends_of_each_range_were_run() -> None:
    for package in MATRIX.packages:
        assert numbers(package.lowest_run) == numbers(package.at_least), package.name
        assert numbers(package.highest_run) >= numbers(package.lowest_run), package.name
        assert not package.below or numbers(package.highest_run) < numbers(package.below), package.name


def test_the_metadata_names_no_python_that_does_not_work_and_all_that_are_supported() -> None:
    rows = MATRIX.rule("python").rows
    classifiers = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert classifiers <= {row.name for row in rows if row.status != "unsupported"}
    assert {row.name for row in rows if row.status == "supported"} <= classifiers


def test_the_supported_vllm_is_the_one_that_is_installed_and_driven() -> None:
    script = (ROOT / "scripts" / "install_vllm.py").read_text()
    (version,) = re.findall(r'^VLLM = "(\d+\.\d+)', script, re.M)
    driven = (ROOT / "src" / "dynamo" / "vllm" / "engine.py").read_text()
    (core,) = re.findall(r"^SUPPORTED_CORE = \(([^)]*)\)", driven, re.M)
    supported = {row.name for row in MATRIX.rule("vllm").rows if re.match(r"\d", row.name)}
    assert supported == {version} == set(re.findall(r"\d+\.\d+", core))
