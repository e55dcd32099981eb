"""Are the wheels what they say: the same bytes twice, complete, apart, and alive where nothing else is?"""

import ast
import email
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from dynamo import __version__

ROOT = Path(__file__).parents[2]
BUILD = [sys.executable, str(ROOT / "scripts" / "build_dist.py"), "--out"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = tomllib.loads((ROOT / "packaging" / "runtime" / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` makes."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([*BUILD, str(out)], check=True, capture_output=True, timeout=300)
    return out


def wheel(dist: Path, name: str) -> Path:
    return dist / f"{name}-{__version__}-py3-none-any.whl"


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as z:
        return set(z.namelist())


def metadata(archive: Path) -> email.message.Message:
    with zipfile.ZipFile(archive) as z:
        (name,) = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(z.read(name))


def test_everything_is_made_and_its_sums_are_right(dist: Path) -> None:
    made = {file.name for file in dist.iterdir()}
    stems = [f"{name}-{__version__}" for name in ("ai_dynamo", "ai_dynamo_runtime")]
    suffixes = ("-py3-none-any.whl", ".tar.gz", "-py3-none-any.cdx.json")
    assert made == {stem + suffix for stem in stems for suffix in suffixes} | {"SHA256SUMS"}
    for line in (dist / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest


def test_a_second_build_elsewhere_has_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    """In a copy of the tree with other times and rights, under another umask."""
    tree = tmp_path / "elsewhere"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
            (tree / name).chmod(0o700)
    (tree / "build").mkdir()
    (tree / "build" / "dist-env").symlink_to(ROOT / "build" / "dist-env")  # nothing is to be fetched anew
    when = (dist / f"ai_dynamo-{__version__}-py3-none-any.cdx.json").read_text()
    (stamp,) = re.findall(r'"timestamp": "([^"]+)"', when)
    epoch = subprocess.run(["date", "-d", stamp, "+%s"], capture_output=True, text=True, check=True).stdout.strip()
    again = [sys.executable, "scripts/build_dist.py", "--out", str(tmp_path / "again")]
    env = {"SOURCE_DATE_EPOCH": epoch, "PATH": "/usr/bin:/bin", "TZ": "Asia/Tokyo"}
    subprocess.run(again, cwd=tree, env=env, umask=0o077, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "again" / "SHA256SUMS").read_text() == (dist / "SHA256SUMS").read_text()


def test_the_main_wheel_has_all_packages_the_data_and_the_command(dist: Path) -> None:
    archive = wheel(dist, "ai_dynamo")
    inside = names(archive)
    here = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src" / "dynamo").rglob("*.py")}
    assert {name for name in inside if name.endswith(".py")} == here
    assert {"dynamo/py.typed", "dynamo/doctor/matrix.toml"} <= inside
    with zipfile.ZipFile(archive) as z:
        (entries,) = [n for n in inside if n.endswith("entry_points.txt")]
        assert "dynamo = dynamo.cli.main:main" in z.read(entries).decode()
    assert metadata(archive)["License-Expression"] == "Apache-2.0"


def test_the_runtime_wheel_has_the_runtime_and_nothing_else(dist: Path) -> None:
    inside = {name for name in names(wheel(dist, "ai_dynamo_runtime")) if ".dist-info/" not in name}
    alone = {"dynamo/__init__.py", "dynamo/health_check.py", "dynamo/prometheus_names.py", "dynamo/py.typed"}
    assert {name for name in inside if not name.startswith("dynamo/runtime/")} == alone
    assert inside < names(wheel(dist, "ai_dynamo"))
    assert metadata(wheel(dist, "ai_dynamo_runtime"))["Version"] == metadata(wheel(dist, "ai_dynamo"))["Version"]


def test_the_runtime_asks_for_what_it_imports_in_the_same_ranges() -> None:
    module_of = {"msgspec": "msgspec", "aiohttp": "aiohttp", "zmq": "pyzmq", "uvloop": "uvloop",
                 "prometheus_client": "prometheus-client", "nats": "nats-py", "nkeys": "nats-py",
                 "yaml": "pyyaml", "nacl": "pynacl", "opentelemetry": "opentelemetry-sdk"}  # fmt: skip
    extras = RUNTIME["optional-dependencies"]
    asked = RUNTIME["dependencies"] + [line for lines in extras.values() for line in lines]
    assert {re.split(r"[\[><=]", line)[0] for line in asked} - {"opentelemetry-exporter-otlp-proto-http"} == {
        module_of[module] for module in third_party_imports(ROOT / "src" / "dynamo" / "runtime")
    }
    assert set(RUNTIME["dependencies"]) <= set(PROJECT["dependencies"])
    assert all(lines == PROJECT["optional-dependencies"][extra] for extra, lines in extras.items())
    for key in ("requires-python", "license", "classifiers"):
        assert RUNTIME[key] == PROJECT[key]


def third_party_imports(package: Path) -> set[str]:
    """First words of all imports, those inside functions too, that are neither ours nor the standard library's."""
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"dynamo"}


def test_one_version_is_told_everywhere() -> None:
    assert PROJECT["version"] == __version__


def test_a_source_distribution_is_dated_and_owned_by_nobody(dist: Path) -> None:
    with tarfile.open(dist / f"ai_dynamo-{__version__}.tar.gz") as archive:
        members = archive.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
    assert len({m.mtime for m in members}) == 1
    assert [m.name for m in members] == sorted(m.name for m in members)


@pytest.mark.parametrize("name", ["ai_dynamo", "ai_dynamo_runtime"])
def test_the_sbom_is_valid_and_lists_what_the_wheel_requires(name: str, dist: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (dist / f"{name}-{__version__}-py3-none-any.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    required = metadata(wheel(dist, name)).get_all("Requires-Dist") or []
    assert len(bill["components"]) == len(required)
    assert (
        bill["metadata"]["component"]["hashes"][0]["content"]
        == hashlib.sha256(wheel(dist, name).read_bytes()).hexdigest()
    )


def test_the_sbom_of_an_environment_is_valid_and_the_same_twice() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    script = [sys.executable, str(ROOT / "scripts" / "sbom.py"), "--environment"]
    first, second = (subprocess.run(script, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(first) is None
    assert {"name": "msgspec", "type": "library"}.items() <= next(
        c for c in json.loads(first)["components"] if c["name"] == "msgspec"
    ).items()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_wheels_work_where_nothing_else_is(dist: Path) -> None:
    """With this Python; `scripts/try_wheels.py` alone takes all that are here."""
    script = [sys.executable, str(ROOT / "scripts" / "try_wheels.py"), "--dist", str(dist), sys.executable]
    done = subprocess.run(script, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello_world answers" in done.stdout
