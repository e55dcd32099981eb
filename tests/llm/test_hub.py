"""Does a name become a directory, or an error that says what to do?"""

import subprocess
import sys
from pathlib import Path

import pytest

from dynamo.llm.hub import fetch_model
from dynamo.runtime.errors import CannotConnect, InvalidArgument


async def test_existing_directory_wins(model_dir: Path) -> None:
    assert await fetch_model(str(model_dir)) == str(model_dir)


async def test_relative_directory_wins_over_a_hub_name(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").symlink_to(model_dir)
    monkeypatch.chdir(tmp_path)
    assert await fetch_model("org/model") == "org/model"


@pytest.mark.parametrize("name", ["model.gguf", "org/some-model/q4.GGUF"])
async def test_gguf_is_refused_clearly(name: str) -> None:
    with pytest.raises(InvalidArgument, match="GGUF, which this version does not serve"):
        await fetch_model(name)


async def test_directory_of_gguf_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidArgument, match="GGUF"):
        await fetch_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/place", "../up", "a/b/c", "", "a/../b", "~/nothing-here"])
async def test_what_cannot_be_a_hub_name_is_refused_without_network(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await fetch_model(name)
    assert caught.value.param == "model"


async def test_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(InvalidArgument, match="give the directory"):
        await fetch_model(str(path))


async def test_offline_error_names_the_model_and_both_fixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidArgument) as caught:
        await fetch_model("org/not-there", ignore_weights=True)
    for words in ("org/not-there", "HF_HUB_OFFLINE", "path of a directory", "hf download org/not-there"):
        assert words in caught.value.message


def test_cached_snapshot_is_found_offline(tmp_path: Path) -> None:
    # A process of its own: huggingface_hub reads its cache's place once.
    repo = tmp_path / "models--org--cached"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    code = "import asyncio; from dynamo.llm.hub import fetch_model; print(asyncio.run(fetch_model('org/cached')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_unreachable_hub_is_a_connection_error_with_both_fixes(tmp_path: Path) -> None:
    code = (
        "import asyncio\n"
        "from dynamo.llm.hub import fetch_model\n"
        "from dynamo.runtime.errors import CannotConnect\n"
        "try: asyncio.run(fetch_model('org/not-there'))\n"
        "except CannotConnect as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        # Port 9 of this machine: nobody listens.
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "org/not-there" in done.stdout, done.stderr
    assert "path of a directory" in done.stdout
    assert CannotConnect.migratable


def test_importing_hub_does_not_load_the_hub_library() -> None:
    code = "import sys, dynamo.llm.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
