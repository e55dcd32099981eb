"""The directory backend: its layout, its leases, and bad weather."""

# ruff: noqa: ASYNC221, ASYNC240 - the test handles files and processes itself, and nothing else runs meanwhile

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo.runtime.discovery import Delete, Put
from dynamo.runtime.discovery.file import FileDiscovery, default_root
from dynamo.runtime.errors import DiscoveryError
from tests.runtime.plane_helpers import until

PREFIX = "v1/instances/ns/comp/ep/"
KEY = PREFIX + "1a"
BUCKET = "v1/instances"

HOLD = """
import asyncio, sys
from pathlib import Path
from dynamo.runtime.discovery.file import FileDiscovery
async def main():
    store = FileDiscovery(Path(sys.argv[1]), float(sys.argv[3]))
    await store.put(sys.argv[2], b"held")
    print("held", flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[FileDiscovery]:
    store = FileDiscovery(root)
    yield store
    await store.close()


def holder(root: Path, key: str = KEY, ttl_s: float = 10.0) -> "subprocess.Popen[str]":
    """A process that holds a key."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root), key, str(ttl_s)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


# --- the layout


async def test_layout_is_a_directory_a_bucket_and_a_percent_encoded_file_a_key(
    root: Path, store: FileDiscovery
) -> None:
    await store.put("v1/instances/my-ns/back_end/generate/1a", b"value")
    assert (root / "v1/instances/my%2Dns%2Fback%5Fend%2Fgenerate%2F1a").read_bytes() == b"value"


def test_the_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("DYN_FILE_KV")
    monkeypatch.setattr("tempfile.tempdir", "/some/tmp")
    assert default_root() == Path("/some/tmp/dynamo_store_kv")


@pytest.mark.parametrize("name", ["..", ".", "../../etc/passwd", "a/../../b", ".hidden", "%2e%2e"])
async def test_hostile_names_stay_in_their_bucket(root: Path, store: FileDiscovery, name: str) -> None:
    await store.put(f"{BUCKET}/{name}", b"x")
    files = [p for p in root.rglob("*") if p.is_file() and p.parent.name != "leases"]
    assert [p.parent for p in files if not p.name.startswith(".")] == [root / BUCKET]
    assert await store.get_prefix(f"{BUCKET}/") == {f"{BUCKET}/{name}": b"x"}


@pytest.mark.parametrize("key", ["", "v1", "v1/instances", "v1/instances/", "../x/y", "v1/../y", "/v1/x"])
async def test_a_key_without_a_plain_bucket_is_refused(store: FileDiscovery, key: str) -> None:
    with pytest.raises(DiscoveryError, match="not a discovery key"):
        await store.put(key, b"x")


async def test_a_name_too_long_for_a_file_is_refused_clearly(store: FileDiscovery) -> None:
    with pytest.raises(DiscoveryError, match="use shorter names"):
        await store.put(f"{BUCKET}/{'ä' * 100}", b"x")


async def test_closing_leaves_no_file_of_ours(root: Path, store: FileDiscovery) -> None:
    await store.put(KEY, b"x")
    await store.close()
    assert [p for p in root.rglob("*") if p.is_file() and p.name != ".lock"] == []


# --- leases


async def test_a_killed_process_is_gone_long_before_its_lease_ends(root: Path, store: FileDiscovery) -> None:
    process = holder(root)
    changes = store.watch(PREFIX)
    assert await asyncio.wait_for(anext(changes), 5) == Put(KEY, b"held")
    process.kill()
    process.wait()
    assert await asyncio.wait_for(anext(changes), 4) == Delete(KEY)


async def test_a_stopped_process_expires_after_its_lease(root: Path) -> None:
    store = FileDiscovery(root, ttl_s=1.0)
    process = holder(root, ttl_s=1.0)
    try:
        changes = store.watch(PREFIX)
        assert await asyncio.wait_for(anext(changes), 5) == Put(KEY, b"held")
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(6):
            assert await anext(changes) == Delete(KEY)
            process.send_signal(signal.SIGCONT)
            assert await anext(changes) == Put(KEY, b"held")
    finally:
        process.kill()
        process.wait()
        await store.close()


async def test_a_live_key_outlasts_its_lease(root: Path) -> None:
    one, other = FileDiscovery(root, ttl_s=0.6), FileDiscovery(root, ttl_s=0.6)
    await one.put(KEY, b"x")
    changes = other.watch(PREFIX)
    assert await asyncio.wait_for(anext(changes), 5) == Put(KEY, b"x")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(changes), 2)  # three leases later nobody has said that it is gone
    await one.close()
    await other.close()


async def test_two_live_processes_cannot_claim_one_key(root: Path, store: FileDiscovery) -> None:
    process = holder(root)
    try:
        with pytest.raises(DiscoveryError, match=r"held by another live process .* its own instance id"):
            await store.put(KEY, b"mine", create=True)
    finally:
        process.kill()
        process.wait()
    await store.put(KEY, b"mine", create=True)
    assert await store.get_prefix(PREFIX) == {KEY: b"mine"}


async def test_a_key_whose_owner_stopped_beating_can_be_claimed(root: Path, store: FileDiscovery) -> None:
    await store.get_prefix(PREFIX)
    path = root / BUCKET / "ns%2Fcomp%2Fep%2F1a"
    path.write_bytes(b"old")
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert await store.get_prefix(PREFIX) == {}
    await store.put(KEY, b"new", create=True)
    assert await store.get_prefix(PREFIX) == {KEY: b"new"}


async def test_an_owner_whose_key_was_taken_over_does_not_fight_for_it(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = FileDiscovery(root, ttl_s=0.3), FileDiscovery(root, ttl_s=0.3)
    await one.put(KEY, b"one")
    await other.put(KEY, b"other")
    await until(lambda: "belongs to another process" in caplog.text)
    await one.close()
    assert await other.get_prefix(PREFIX) == {KEY: b"other"}
    await other.close()


async def test_long_dead_litter_is_swept_away(root: Path, store: FileDiscovery) -> None:
    await store.get_prefix(PREFIX)
    litter = [root / BUCKET / "ns%2Fcomp%2Fep%2Fdead", root / BUCKET / ".temporary-1"]
    for path in litter:
        path.write_bytes(b"x")
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    await store.get_prefix(PREFIX)
    assert [path for path in litter if path.exists()] == []


# --- bad weather


async def test_an_unusable_directory_is_a_clear_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    store = FileDiscovery(tmp_path / "file")
    with pytest.raises(DiscoveryError, match=r"discovery directory .*/file: .*DYN_FILE_KV"):
        await store.put(KEY, b"x")
    with pytest.raises(DiscoveryError, match=r"discovery directory .*/file: .*DYN_FILE_KV"):
        await store.get_prefix(PREFIX)
    await store.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_an_unwritable_directory_is_a_clear_error_at_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    store = FileDiscovery(tmp_path / "kv")
    with pytest.raises(DiscoveryError, match=r"Permission denied.*DYN_FILE_KV"):
        await store.put(KEY, b"x")
    await store.close()
    tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
async def test_a_default_directory_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DYN_FILE_KV", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "dynamo_store_kv").mkdir()
    os.chown(tmp_path / "dynamo_store_kv", 12345, 12345)
    store = FileDiscovery()
    with pytest.raises(DiscoveryError, match="belongs to another user"):
        await store.get_prefix(PREFIX)
    with pytest.raises(DiscoveryError, match="belongs to another user"):
        await store.put(KEY, b"x")
    await store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
async def test_a_full_disk_is_a_clear_error_and_nothing_half_written_is_seen(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    store = FileDiscovery(tmp_path / "kv")
    try:
        await store.put(KEY, b"before")
        with pytest.raises(DiscoveryError, match=r"No space left on device.*DYN_FILE_KV"):
            await store.put(PREFIX + "2", b"x" * 100_000)
        assert await store.get_prefix(PREFIX) == {KEY: b"before"}
    finally:
        await store.close()
        subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_directory_that_goes_and_comes_back_costs_nobody_his_instances(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    one, other = FileDiscovery(root, ttl_s=1.5), FileDiscovery(root, ttl_s=1.5)
    await one.put(KEY, b"x")
    changes = other.watch(PREFIX)
    assert await asyncio.wait_for(anext(changes), 5) == Put(KEY, b"x")
    shutil.rmtree(root)
    root.write_text("somebody put a file here")
    await until(lambda: "last known set" in caplog.text and "cannot renew" in caplog.text)
    root.unlink()
    change = await asyncio.wait_for(anext(changes), 5)
    assert change == Put(KEY, b"x"), "the owner put its key back, and nobody was told that it had gone"
    assert caplog.text.count("last known set") == 1, "the warning is limited in rate"
    await one.close()
    async with asyncio.timeout(5):
        assert await anext(changes) == Delete(KEY)
    await other.close()


async def test_a_directory_removed_under_us_costs_nobody_his_instances(root: Path) -> None:
    one, other = FileDiscovery(root, ttl_s=1.5), FileDiscovery(root, ttl_s=1.5)
    await one.put(KEY, b"x")
    changes = other.watch(PREFIX)
    assert await asyncio.wait_for(anext(changes), 5) == Put(KEY, b"x")
    shutil.rmtree(root)
    assert await asyncio.wait_for(anext(changes), 5) == Put(KEY, b"x")
    assert len(list((root / "leases").iterdir())) == 1, "the lease file is there again too"
    await one.close()
    await other.close()


async def test_garbage_in_the_directory_is_ignored_and_named_once(
    root: Path, store: FileDiscovery, caplog: pytest.LogCaptureFixture
) -> None:
    await store.put(KEY, b"x")
    bucket = root / BUCKET
    (bucket / "not-encoded").write_bytes(b"x")
    (bucket / "%FF%FE").write_bytes(b"x")
    (bucket / "directory").mkdir()
    (bucket / "ns%2Fcomp%2Fep%2Fhuge").open("wb").truncate(1 << 30)
    (bucket / "ns%2Fcomp%2Fep%2Floop").symlink_to("/dev/zero")
    (root / "leases" / "0123").write_bytes(b"\xff not json")
    for _ in range(3):
        assert await store.get_prefix(PREFIX) == {KEY: b"x"}
    assert caplog.text.count("not-encoded") == 1
    assert caplog.text.count("huge") == 1


async def test_without_inotify_changes_are_noticed_by_looking(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_inotify(_self: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("dynamo.runtime.discovery.inotify.Inotify.__init__", no_inotify)
    one, other = FileDiscovery(root), FileDiscovery(root)
    changes = other.watch(PREFIX)
    await asyncio.sleep(0.1)
    await one.put(KEY, b"x")
    assert await asyncio.wait_for(anext(changes), 5) == Put(KEY, b"x")
    assert "no inotify" in caplog.text
    await one.close()
    await other.close()


async def test_a_change_is_noticed_within_milliseconds(root: Path, store: FileDiscovery) -> None:
    other = FileDiscovery(root)
    changes = other.watch(PREFIX)
    await store.put(KEY, b"0")
    await asyncio.wait_for(anext(changes), 5)
    delays = []
    for i in range(1, 6):
        start = time.monotonic()
        await store.put(KEY, str(i).encode())
        await asyncio.wait_for(anext(changes), 5)
        delays.append(time.monotonic() - start)
    assert min(delays) < 0.5, "slower than that is the look every second, not inotify"
    await other.close()
