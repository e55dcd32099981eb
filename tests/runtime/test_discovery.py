"""What every discovery backend of this version must do, and which one is chosen."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.discovery import Change, Delete, Discovery, Put, choose_backend
from dynamo.runtime.discovery.etcd.backend import EtcdDiscovery
from dynamo.runtime.discovery.etcd.settings import EtcdSettings
from dynamo.runtime.discovery.file import FileDiscovery
from dynamo.runtime.discovery.kubernetes.backend import KubernetesDiscovery
from dynamo.runtime.discovery.mem import MemDiscovery
from dynamo.runtime.errors import DiscoveryError
from tests.runtime.kubernetes_server import scripted

PREFIX = "v1/instances/ns/comp/ep/"
KEY = PREFIX + "1a"

Open = Callable[[], Discovery]


@pytest.fixture(params=["mem", "file", "kubernetes", pytest.param("etcd", marks=pytest.mark.etcd)])
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend's name, and where its server is if it has one."""
    return request.param, request.getfixturevalue("etcd").url if request.param == "etcd" else ""


@pytest.fixture
async def open_store(backend: tuple[str, str], tmp_path: Path) -> AsyncIterator[Open]:
    """Makes members of one store, and closes them."""
    members: list[Discovery] = []
    name, url = backend
    async with scripted() as kubernetes:
        pods = [await kubernetes.add_pod(f"member-{i}") for i in range(3)]

        def make() -> Discovery:
            if name == "etcd":
                members.append(EtcdDiscovery(EtcdSettings((url,))))
            elif name == "kubernetes":
                members.append(KubernetesDiscovery(kubernetes.settings(pods.pop())))
            else:
                members.append(MemDiscovery() if name == "mem" else FileDiscovery(tmp_path / "kv"))
            return members[-1]

        yield make
        for member in members:
            await member.close()


async def following(changes: AsyncIterator[Change]) -> Change:
    return await asyncio.wait_for(anext(changes), 5)


async def test_what_one_puts_another_gets(open_store: Open) -> None:
    one, other = open_store(), open_store()
    await one.put(KEY, b"value")
    await one.put("v1/instances/ns/comp/other/1", b"x")
    assert await other.get_prefix(PREFIX) == {KEY: b"value"}


async def test_a_watch_begins_with_what_is_there_and_goes_on_with_changes(open_store: Open) -> None:
    one, other = open_store(), open_store()
    await one.put(KEY, b"1")
    changes = other.watch(PREFIX)
    assert await following(changes) == Put(KEY, b"1")
    await one.put(PREFIX + "2", b"2")
    assert await following(changes) == Put(PREFIX + "2", b"2")
    await one.put(KEY, b"3")
    assert await following(changes) == Put(KEY, b"3")
    await one.delete(KEY)
    assert await following(changes) == Delete(KEY)


async def test_a_watch_begun_before_a_look_tells_when_what_was_seen_goes(open_store: Open) -> None:
    one, other = open_store(), open_store()
    await one.put(KEY, b"1")
    changes = other.watch(PREFIX)
    assert KEY in await other.get_prefix(PREFIX)
    await one.delete(KEY)
    async with asyncio.timeout(5):
        while await anext(changes) != Delete(KEY):
            pass


async def test_a_watch_does_not_hear_other_prefixes(open_store: Open) -> None:
    one, other = open_store(), open_store()
    changes = other.watch(PREFIX)
    await one.put("v1/instances/ns/comp/ep2/1", b"x")
    await one.put(KEY, b"1")
    assert await following(changes) == Put(KEY, b"1")


async def test_closing_removes_the_members_keys_and_no_others(open_store: Open) -> None:
    one, other = open_store(), open_store()
    await one.put(KEY, b"1")
    await other.put(PREFIX + "2", b"2")
    await one.close()
    assert await other.get_prefix(PREFIX) == {PREFIX + "2": b"2"}


async def test_a_key_held_by_a_live_member_cannot_be_created(open_store: Open) -> None:
    one, other = open_store(), open_store()
    await one.put(KEY, b"1", create=True)
    with pytest.raises(DiscoveryError, match="1a"):
        await other.put(KEY, b"2", create=True)
    assert await other.get_prefix(PREFIX) == {KEY: b"1"}


async def test_a_member_may_create_its_own_key_again(open_store: Open) -> None:
    one = open_store()
    await one.put(KEY, b"1", create=True)
    await one.put(KEY, b"2", create=True)
    assert await one.get_prefix(PREFIX) == {KEY: b"2"}


async def test_deleting_what_is_not_there_is_ignored(open_store: Open) -> None:
    one, other = open_store(), open_store()
    await one.put(KEY, b"1")
    await other.delete(KEY)
    await other.delete(PREFIX + "ff")
    assert await other.get_prefix(PREFIX) == {KEY: b"1"}


async def test_closing_ends_watches(open_store: Open) -> None:
    one = open_store()
    changes = one.watch(PREFIX)
    await one.close()
    with pytest.raises(StopAsyncIteration):
        await following(changes)


async def test_a_slow_watcher_keeps_only_the_last_word_of_a_key(open_store: Open) -> None:
    one = open_store()
    changes = one.watch(PREFIX)
    for i in range(100):
        await one.put(KEY, str(i).encode())
    async with asyncio.timeout(5):
        while await anext(changes) != Put(KEY, b"99"):
            pass


@pytest.mark.parametrize(
    ("environ", "backend"),
    [
        ({}, "file"),
        ({"ETCD_ENDPOINTS": "http://localhost:2379"}, "etcd"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({"DYN_DISCOVERY_BACKEND": "mem", "ETCD_ENDPOINTS": "x"}, "mem"),
    ],
)
def test_auto_looks_at_the_environment(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], backend: str) -> None:
    for name in ("ETCD_ENDPOINTS", "KUBERNETES_SERVICE_HOST", "DYN_DISCOVERY_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert choose_backend() == backend


async def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="auto, file, mem"):
        DistributedRuntime(discovery_backend="zookeeper")


async def test_a_codec_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_REQUEST_PLANE_CODEC", "json")
    with pytest.raises(ValueError, match=r"json.*DYN_REQUEST_PLANE_CODEC"):
        DistributedRuntime(discovery_backend="mem")


@pytest.mark.parametrize(
    ("plane", "name", "said"),
    [
        ("request_plane", "quic", "not one of tcp, nats"),
        ("event_plane", "kafka", "not one of zmq, nats"),
        ("response_plane", "nats", "use tcp"),
    ],
)
async def test_a_plane_that_is_not_there_says_so(plane: str, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistributedRuntime(discovery_backend="mem", **{plane: name})
