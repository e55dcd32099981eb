"""Discovery where the store is the API server of Kubernetes.

Without a `kube-apiserver` at hand these run against `ScriptedApiServer`, which does what the API's reference says and
is no real server; with one, those that do not hurt the server run against both.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dynamo.runtime.discovery.kubernetes.__main__ import manifests
from dynamo.runtime.discovery.kubernetes.backend import KubernetesDiscovery
from dynamo.runtime.discovery.kubernetes.objects import POD_UID
from dynamo.runtime.discovery.kubernetes.settings import POD_ENV, Credentials, KubernetesSettings, Pod
from dynamo.runtime.errors import DiscoveryError
from tests.runtime.etcd_server import EtcdServer, Follower, eventually
from tests.runtime.kubernetes_server import (
    NAMESPACE,
    TOKEN,
    WORKERS,
    Cluster,
    RealApiServer,
    ScriptedApiServer,
    real_binary,
    scripted,
)

PREFIX = "v1/instances/ns/comp/ep/"
KEY = PREFIX + "1a"


@pytest.fixture
async def server() -> AsyncIterator[ScriptedApiServer]:
    async with scripted() as running:
        yield running


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, etcd: EtcdServer) -> Iterator[RealApiServer]:
    if real_binary() is None:
        pytest.skip("no real kube-apiserver on the PATH or in TEST_KUBE_APISERVER")
    running = RealApiServer(tmp_path_factory.mktemp("kubernetes"), etcd)
    try:
        running.start()
        running.wait_ready()
        running.install()
        yield running
    finally:
        running.kill()


@pytest.fixture(params=["scripted", pytest.param("real", marks=pytest.mark.etcd)])
def running(request: pytest.FixtureRequest) -> RealApiServer | None:
    """The real server; None for the scripted one, that each test has for itself."""
    found: RealApiServer | None = request.getfixturevalue("real") if request.param == "real" else None
    return found


@pytest.fixture
async def cluster(running: RealApiServer | None, server: ScriptedApiServer) -> Cluster:
    """Either server, without objects of an earlier test."""
    if running is None:
        return server
    await running.delete_workers()
    return running


@asynccontextmanager
async def member(settings: KubernetesSettings) -> AsyncIterator[KubernetesDiscovery]:
    """One process's discovery, closed in the end."""
    discovery = KubernetesDiscovery(settings)
    try:
        yield discovery
    finally:
        await discovery.close()


@asynccontextmanager
async def worker(cluster: Cluster, name: str, key: str = KEY) -> AsyncIterator[KubernetesDiscovery]:
    """A process of a ready pod, that has put a key."""
    async with member(cluster.settings(await cluster.add_pod(name))) as discovery:
        await discovery.put(key, b"value", create=True)
        yield discovery


@asynccontextmanager
async def watcher(settings: KubernetesSettings) -> AsyncIterator[Follower]:
    """A process outside any pod, that looks."""
    async with member(settings) as discovery:
        yield Follower(discovery.watch(PREFIX))


# --- who is seen


async def test_two_watchers_see_a_worker_come_change_and_go(cluster: Cluster) -> None:
    async with watcher(cluster.settings()) as one, watcher(cluster.settings()) as other:
        async with worker(cluster, "come-and-go") as discovery:
            await eventually(lambda: one.known == other.known == {KEY: b"value"})
            await discovery.put(KEY, b"changed")
            await eventually(lambda: one.known == other.known == {KEY: b"changed"})
        await eventually(lambda: one.gone == other.gone == [KEY])
    assert await cluster.workers() == {}


async def test_a_pod_that_is_not_ready_is_not_seen_but_by_itself(cluster: Cluster) -> None:
    pod = await cluster.add_pod("not-ready", ready=False)
    async with member(cluster.settings(pod)) as starting, watcher(cluster.settings()) as others:
        itself = Follower(starting.watch(PREFIX))
        await starting.put(KEY, b"value")
        await eventually(lambda: itself.known == {KEY: b"value"})
        async with member(cluster.settings()) as looking:
            assert await looking.get_prefix(PREFIX) == {}
        assert others.known == {}
        await cluster.set_ready(pod, True)
        await eventually(lambda: others.known == {KEY: b"value"})
        await cluster.set_ready(pod, False)
        await eventually(lambda: others.gone == [KEY], within_s=0.4)  # said, and so believed at once
        assert itself.gone == []


async def test_a_dead_pod_is_gone_with_its_readiness(cluster: Cluster) -> None:
    pod = await cluster.add_pod("dies")
    dying = KubernetesDiscovery(cluster.settings(pod))
    await dying.put(KEY, b"value")
    async with watcher(cluster.settings()) as others:
        await eventually(lambda: KEY in others.known)
        for task in dying._chores._tasks.values():
            task.cancel()  # killed: it says nothing
        await cluster.set_ready(pod, None)  # its machine is gone, and the slices with it
        took_s = await eventually(lambda: others.gone == [KEY])
    assert took_s >= 0.4  # the slice vanished without a word, which may be a mistake: that was the doubt
    await dying._api.close()


async def test_whoever_lives_in_a_container_removes_what_a_dead_process_left(cluster: Cluster) -> None:
    pod = await cluster.add_pod("supervised")
    script = f"""
import asyncio, os
from dynamo.runtime.discovery.kubernetes.backend import KubernetesDiscovery
from dynamo.runtime.discovery.kubernetes.settings import *
from pathlib import PosixPath
async def main():
    await KubernetesDiscovery({without_secrets(cluster.settings(pod))}).put({KEY!r}, b"left behind")
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    died = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    async with watcher(cluster.settings()) as others:
        await eventually(lambda: KEY in others.known)
        assert await died.wait() == -9
        async with member(cluster.settings(pod)) as survivor:
            await survivor.put(PREFIX + "2", b"alive")
            await eventually(lambda: list(others.known) == [PREFIX + "2"])
            assert len(await cluster.workers()) == 1


def without_secrets(settings: KubernetesSettings) -> str:
    """Settings as Python text; the token, that is never shown, by hand."""
    return repr(settings).replace("Credentials(", f"Credentials(token={TOKEN!r}, ")


async def test_containers_of_a_pod_leave_each_other_alone(cluster: Cluster) -> None:
    pod = await cluster.add_pod("two-containers")
    async with member(cluster.settings(replace(pod, container="engine-0"))) as one:
        await one.put(KEY, b"value")
        [there] = (await cluster.workers()).values()
        there["spec"]["data"]["process"]["pid"] = 1 << 22  # in another container our number is nobody's
        async with member(cluster.settings(replace(pod, container="engine-1"))) as other:
            await other.put(PREFIX + "2", b"value")
            await asyncio.sleep(0.5)  # two beats
            assert len(await cluster.workers()) == 2


async def test_of_two_who_create_a_key_at_once_at_most_one_holds_it(cluster: Cluster) -> None:
    pods = [await cluster.add_pod(f"rival-{i}") for i in range(4)]
    rivals = [KubernetesDiscovery(cluster.settings(pod)) for pod in pods]
    tries = await asyncio.gather(*(rival.put(KEY, b"mine", create=True) for rival in rivals), return_exceptions=True)
    assert tries.count(None) <= 1
    assert all(one is None or "already taken" in str(one) for one in tries)
    for rival in rivals:
        await rival.close()


# --- what strangers and servers do


async def test_objects_deleted_by_mistake_are_put_again_and_nobody_notices(cluster: Cluster) -> None:
    async with worker(cluster, "deleted-by-mistake"), watcher(cluster.settings()) as others:
        await eventually(lambda: KEY in others.known)
        await cluster.delete_workers()
        await asyncio.sleep(0.8)  # longer than the doubt, in which they are put again
        assert len(await cluster.workers()) == 1
        assert others.known == {KEY: b"value"}
        assert others.gone == []


async def test_a_slice_that_is_replaced_costs_no_worker(cluster: Cluster) -> None:
    pod = await cluster.add_pod("replaced")
    async with member(cluster.settings(pod)) as discovery, watcher(cluster.settings()) as others:
        await discovery.put(KEY, b"value")
        await eventually(lambda: KEY in others.known)
        await cluster.set_ready(pod, None)
        await cluster.set_ready(pod, True)
        await asyncio.sleep(0.6)
        assert others.gone == []


async def test_a_watch_that_was_cut_goes_on_where_it_ended(server: ScriptedApiServer) -> None:
    async with watcher(server.settings()) as others, worker(server, "first"):
        await eventually(lambda: KEY in others.known)
        assert server.listed.count(POD_UID) == 1
        await server.cut_watches()
        async with member(server.settings(await server.add_pod("second"))) as second:
            await second.put(PREFIX + "2", b"value")
            await eventually(lambda: len(others.known) == 2)
        assert server.listed.count(POD_UID) == 1
        await eventually(lambda: others.gone == [PREFIX + "2"])


async def test_a_server_that_has_forgotten_the_past_is_listed_again(server: ScriptedApiServer) -> None:
    async with watcher(server.settings()) as others, worker(server, "stays"):
        async with worker(server, "leaves", PREFIX + "2"):
            await eventually(lambda: len(others.known) == 2)
            await server.stop()
        pod = await server.add_pod("comes")
        server.forget()
        await server.start()
        async with member(server.settings(pod)) as comes:
            await comes.put(PREFIX + "3", b"value")
            await eventually(lambda: PREFIX + "3" in others.known)
        assert KEY in others.known
        assert KEY not in others.gone


async def test_an_outage_loses_no_instance_and_what_happened_in_it_is_made_good(server: ScriptedApiServer) -> None:
    async with watcher(server.settings()) as others, worker(server, "lives") as lives:
        await lives.put(PREFIX + "2", b"value")
        await eventually(lambda: len(others.known) == 2)
        await server.stop()
        with pytest.raises(DiscoveryError, match="does not answer"):
            await lives.delete(PREFIX + "2")
        await eventually(lambda: lives._api.down)
        await asyncio.sleep(0.8)  # longer than the doubt and several beats
        assert others.gone == []
        followed = Follower(lives.watch(PREFIX))  # begun while the server is away
        await server.start()
        await eventually(lambda: others.gone == [PREFIX + "2"])
        await eventually(lambda: followed.known == {KEY: b"value"})


async def test_a_look_that_is_behind_the_watch_brings_nobody_back(server: ScriptedApiServer) -> None:
    async with member(server.settings()) as frontend:
        followed = Follower(frontend.watch(PREFIX))
        async with worker(server, "leaves"):
            await eventually(lambda: KEY in followed.known)
            answers = server.hold_lists()
            looking = asyncio.create_task(frontend.get_prefix(PREFIX))
            await eventually(lambda: answers.held == 1)
        await eventually(lambda: followed.gone == [KEY])
        answers.release()
        assert KEY in await looking  # so it was when the server looked
        await asyncio.sleep(0.1)
        assert followed.known == {}


async def test_while_the_server_is_away_a_look_shows_what_is_known(server: ScriptedApiServer) -> None:
    async with worker(server, "known"), member(server.settings()) as frontend:
        followed = Follower(frontend.watch(PREFIX))
        await eventually(lambda: KEY in followed.known)
        await server.stop()
        assert await frontend.get_prefix(PREFIX) == {KEY: b"value"}
        await server.start()


async def test_a_token_that_is_replaced_on_disk_is_used(server: ScriptedApiServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    settings = server.settings(await server.add_pod("rotates"), credentials=Credentials(token_file=token))
    async with member(settings) as discovery:
        await discovery.put(KEY, b"1")
        server.tokens = {"the-next"}
        token.write_text("the-next")
        await discovery.put(KEY, b"2")
        server.tokens = {"another"}
        with pytest.raises(DiscoveryError, match=r"does not know us.*token is .*/token"):
            await discovery.put(KEY, b"3")
        token.write_text("another")
        await eventually(lambda: stored(server) == [{KEY: "1"}] or stored(server) == [{KEY: "2"}])


def stored(server: ScriptedApiServer) -> list[dict[str, str]]:
    return [one["spec"]["data"]["entries"] for one in server.kinds[WORKERS].objects.values()]


async def test_many_objects_come_in_pages(server: ScriptedApiServer) -> None:
    server.page = 2
    async with AsyncExitStack() as stack:
        for name in "abc":
            await stack.enter_async_context(worker(server, name, PREFIX + name))
        looking = await stack.enter_async_context(member(server.settings()))
        assert len(await looking.get_prefix(PREFIX)) == 3


async def test_a_server_with_too_much_to_do_is_asked_again(server: ScriptedApiServer) -> None:
    pod = await server.add_pod("patient")
    async with member(server.settings(pod)) as discovery:
        server.overloaded = 2
        await discovery.put(KEY, b"value")
        assert stored(server) == [{KEY: "value"}]


# --- what is said when it cannot work


@pytest.mark.parametrize(("verb", "resource"), [("create", WORKERS), ("patch", WORKERS), ("list", WORKERS)])
async def test_a_missing_right_is_named_with_what_grants_it(
    server: ScriptedApiServer, verb: str, resource: str
) -> None:
    server.forbidden = {(verb, resource)}
    async with member(server.settings(await server.add_pod("without"))) as discovery:
        with pytest.raises(DiscoveryError, match=rf"cannot {verb} resource \"{resource}\".*kubectl apply"):
            await discovery.put(KEY, b"value", create=True)


async def test_a_real_server_names_the_missing_right_so_too(real: RealApiServer) -> None:
    async with member(real.settings(token="nobody-token")) as discovery:
        with pytest.raises(DiscoveryError, match=rf"cannot list resource \"{WORKERS}\".*kubectl apply"):
            await discovery.get_prefix(PREFIX)
    async with member(real.settings(token="of-another-cluster")) as discovery:
        with pytest.raises(DiscoveryError, match="does not know us"):
            await discovery.get_prefix(PREFIX)


async def test_a_cluster_without_the_definition_names_what_to_apply(server: ScriptedApiServer) -> None:
    server.defined = False
    async with member(server.settings(await server.add_pod("undefined"))) as discovery:
        with pytest.raises(DiscoveryError, match=r"does not know DynamoWorkerMetadata.*kubernetes \| kubectl apply"):
            await discovery.put(KEY, b"value")


async def test_nobody_there_is_an_error_within_the_time_that_was_set(server: ScriptedApiServer) -> None:
    await server.stop()
    async with member(server.settings(startup_s=0.3)) as discovery:
        with pytest.raises(DiscoveryError, match=r"Connection refused.*DYN_KUBE_CONNECT_TIMEOUT_SECONDS"):
            await discovery.get_prefix(PREFIX)


async def test_a_server_that_comes_late_is_waited_for(server: ScriptedApiServer) -> None:
    pod = await server.add_pod("early")
    await server.stop()
    async with member(server.settings(pod)) as discovery:
        putting = asyncio.create_task(discovery.put(KEY, b"value"))
        await asyncio.sleep(0.3)
        await server.start()
        await putting


async def test_a_process_outside_a_pod_may_look_but_is_told_why_it_is_not_seen(server: ScriptedApiServer) -> None:
    async with member(server.settings()) as outside:
        assert await outside.get_prefix(PREFIX) == {}
        with pytest.raises(DiscoveryError, match=r"POD_NAME(.|\n)*fieldPath: metadata.uid"):
            await outside.put(KEY, b"value")


async def test_a_pod_that_no_service_names_is_told_of(
    server: ScriptedApiServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.runtime.discovery.kubernetes.members.UNLISTED_S", 0.2)
    async with watcher(server.settings()), member(server.settings(await server.add_pod("alone", None))) as alone:
        await alone.put(KEY, b"value")
        await eventually(lambda: "no EndpointSlice labelled" in caplog.text)
        assert "alone-" in caplog.text


# --- settings


def test_what_must_be_applied_is_in_the_package_and_grants_what_is_asked_for(server_verbs: set[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "dynamo.runtime.discovery.kubernetes"], capture_output=True, text=True, check=True
    ).stdout
    assert shown == manifests()
    objects = {one["kind"]: one for one in yaml.safe_load_all(shown)}
    rules = objects["Role"]["rules"]
    granted = {f"{verb} {resource}" for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert server_verbs == granted
    assert objects["CustomResourceDefinition"]["spec"]["names"]["plural"] == WORKERS


@pytest.fixture
async def server_verbs(server: ScriptedApiServer) -> set[str]:
    """All that a worker and a watcher ever ask for."""
    async with watcher(server.settings()) as others, worker(server, "asks"):
        await eventually(lambda: KEY in others.known)
        await eventually(lambda: server.seen.count(f"watch {WORKERS}") == 2)
    return set(server.seen)


def account(directory: Path) -> Path:
    """What the kubelet puts into a container."""
    (directory / "token").write_text("t")
    (directory / "namespace").write_text("of-the-account\n")
    return directory


POD = {"POD_NAME": "p", "POD_UID": "u"}
IN_CLUSTER = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}


def test_in_a_pod_the_service_account_tells(tmp_path: Path) -> None:
    settings = KubernetesSettings.from_environ(IN_CLUSTER | POD, account(tmp_path))
    assert (settings.server, settings.namespace) == ("https://[fd00::1]:6443", "of-the-account")
    assert settings.pod == Pod("p", "u")
    assert settings.credentials.token_file == tmp_path / "token"
    given = KubernetesSettings.from_environ(IN_CLUSTER | POD | {"POD_NAMESPACE": "given"}, account(tmp_path))
    assert given.namespace == "given"


def test_elsewhere_a_kubeconfig_tells(tmp_path: Path) -> None:
    config = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:8001/"}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    settings = KubernetesSettings.from_environ(IN_CLUSTER | {"KUBECONFIG": str(path)}, tmp_path)
    assert (settings.server, settings.namespace, settings.pod) == ("http://127.0.0.1:8001", NAMESPACE, None)
    assert settings.credentials.token == "secret"
    assert "secret" not in repr(settings)
    config["users"][0]["user"] = {"exec": {"command": "aws"}}  # type: ignore[index]
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"KUBECONFIG.*'exec'.*kubectl proxy"):
        KubernetesSettings.from_environ({"KUBECONFIG": str(path)})


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"HOME": "/nowhere"}, "no API server is known.*KUBECONFIG"),
        (IN_CLUSTER, "no token at .*serviceAccountName"),
        ({"KUBECONFIG": "/nowhere/config"}, "KUBECONFIG: there is no file /nowhere/config"),
        (IN_CLUSTER | {"POD_NAME": "p"}, "POD_NAME and POD_UID belong together"),
        (IN_CLUSTER | {"DYN_KUBE_DISCOVERY_MODE": "container"}, "needs CONTAINER_NAME"),
        (IN_CLUSTER | {"DYN_KUBE_DISCOVERY_MODE": "node"}, "not one of pod, container"),
        (IN_CLUSTER | {"DYN_KUBE_CONNECT_TIMEOUT_SECONDS": "soon"}, "DYN_KUBE_CONNECT_TIMEOUT_SECONDS: 'soon'"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], said: str, tmp_path: Path) -> None:
    directory = tmp_path if environ == IN_CLUSTER else account(tmp_path)
    with pytest.raises(ValueError, match=said):
        KubernetesSettings.from_environ(environ, directory)


def test_what_a_container_is_to_be_given_is_yaml() -> None:
    names = [one["name"] for one in yaml.safe_load(POD_ENV)["env"]]
    assert names == ["POD_NAME", "POD_NAMESPACE", "POD_UID"]
