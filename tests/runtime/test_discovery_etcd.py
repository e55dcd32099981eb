"""Discovery on etcd: what is kept, and what is told, while servers, workers and the network fail."""

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.discovery.etcd.backend import EtcdDiscovery
from dynamo.runtime.discovery.etcd.settings import EtcdSettings
from dynamo.runtime.errors import DiscoveryError
from tests.runtime.etcd_server import (
    TTL_S,
    EtcdServer,
    Follower,
    Gate,
    eventually,
    free_ports,
    make_certificates,
    member,
    running,
)
from tests.runtime.plane_helpers import WorkerProcess, caller, connect

pytestmark = pytest.mark.etcd

PREFIX = "v1/instances/ns/comp/ep/"
KEY, OTHER = PREFIX + "1a", PREFIX + "2b"
GONE_S = 3.0 * TTL_S + 5  # a lease, the time its end is distrusted after a hiccup, and a loaded machine's slowness


async def told(discovery: EtcdDiscovery, *keys: str) -> Follower:
    """A follower of all instances that has been told of these."""
    follower = Follower(discovery.watch("v1/instances/"))
    await eventually(lambda: set(follower.known) >= set(keys))
    return follower


@pytest.fixture
async def gate(etcd: EtcdServer) -> AsyncIterator[Gate]:
    """A way to the shared server that can be shut."""
    gate = Gate(etcd.port)
    await gate.open()
    yield gate
    await gate.shut()


# --- the end of a process


async def test_a_killed_worker_is_gone_when_its_lease_ends_and_leaves_nothing(
    etcd: EtcdServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd.url, "ETCD_LEASE_TTL": str(TTL_S)}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    async with caller("auto") as here:
        with WorkerProcess(tmp_path, "serve", **environ) as worker:
            assert (await worker.line()).startswith("ready")
            client = await connect(here)
            worker.process.kill()
            await eventually(lambda: client.instance_ids() == [], within_s=GONE_S)
        assert etcd.keys() == {}
    assert etcd.leases() == set()


async def test_closing_gives_the_lease_back(etcd: EtcdServer) -> None:
    async with member(etcd.url) as one:
        await one.put(KEY, b"1")
        assert set(etcd.keys().values()) == etcd.leases()
    assert etcd.keys() == {}
    assert etcd.leases() == set()


async def test_a_lease_that_is_renewed_does_not_end(etcd: EtcdServer) -> None:
    async with member(etcd.url) as one, member(etcd.url) as other:
        await one.put(KEY, b"1")
        follower = await told(other, KEY)
        await asyncio.sleep(TTL_S * 1.5)  # it would have ended by now
        assert set(etcd.keys()) == {KEY}
        assert follower.gone == []


# --- two who want one key


async def test_a_key_can_be_had_once_its_holder_has_left(etcd: EtcdServer) -> None:
    async with member(etcd.url) as other:
        async with member(etcd.url) as one:
            await one.put(KEY, b"1", create=True)
            with pytest.raises(DiscoveryError, match="another live process holds it"):
                await other.put(KEY, b"2", create=True)
        await other.put(KEY, b"2", create=True)
        assert await other.get_prefix(PREFIX) == {KEY: b"2"}


async def test_two_who_create_one_key_at_once_are_one_holder(etcd: EtcdServer) -> None:
    async with member(etcd.url) as one, member(etcd.url) as other:
        results = await asyncio.gather(
            *(each.put(KEY, b"x", create=True) for each in (one, other)), return_exceptions=True
        )
        assert sum(isinstance(result, DiscoveryError) for result in results) == 1
        assert sum(result is None for result in results) == 1


async def test_a_key_that_was_taken_while_its_lease_was_lost_is_not_taken_back(
    etcd: EtcdServer, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    async with member(gate.url) as one, member(etcd.url) as other:
        await one.put(KEY, b"1", create=True)
        await one.put(OTHER, b"1", create=True)
        await gate.shut()
        await eventually(lambda: etcd.keys() == {}, within_s=GONE_S)
        await other.put(KEY, b"2", create=True)
        await gate.open()
        await eventually(lambda: set(etcd.keys()) == {KEY, OTHER})
        await eventually(lambda: "no longer claims it" in caplog.text)
        assert await other.get_prefix(PREFIX) == {KEY: b"2", OTHER: b"1"}


# --- a network that fails


async def test_a_worker_cut_off_for_longer_than_its_lease_registers_again(etcd: EtcdServer, gate: Gate) -> None:
    async with member(gate.url) as one, member(etcd.url) as other:
        await one.put(KEY, b"1", create=True)
        follower = await told(other, KEY)
        [before] = etcd.leases()
        await gate.shut()
        await eventually(lambda: KEY not in follower.known, within_s=GONE_S)
        await gate.open()
        await eventually(lambda: follower.known == {KEY: b"1"})
        assert set(etcd.keys().values()) == etcd.leases()
        assert etcd.leases().isdisjoint({before})


async def test_a_watch_that_was_cut_goes_on_where_it_ended(etcd: EtcdServer, gate: Gate) -> None:
    async with member(etcd.url) as one, member(gate.url) as other:
        await one.put(KEY, b"1")
        await one.put(OTHER, b"1")
        follower = await told(other, KEY, OTHER)
        await gate.shut()
        await one.put(KEY, b"2")
        await one.delete(OTHER)
        await gate.open()
        await eventually(lambda: follower.known == {KEY: b"2"})
        assert follower.gone == [OTHER]


async def test_a_compaction_while_a_watcher_is_away_costs_it_nothing(
    etcd: EtcdServer, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with member(etcd.url) as one, member(gate.url) as other:
        await one.put(KEY, b"1")
        await one.put(OTHER, b"1")
        follower = await told(other, KEY, OTHER)
        await gate.shut()
        await one.put(KEY, b"2")
        await one.delete(OTHER)
        await one.put(PREFIX + "3c", b"3")
        etcd.compact()
        await gate.open()
        await eventually(lambda: follower.known == {KEY: b"2", PREFIX + "3c": b"3"})
        assert follower.gone == [OTHER]
        assert "has been compacted" in caplog.text
        await one.put(KEY, b"4")
        await eventually(lambda: follower.known[KEY] == b"4")


async def test_while_etcd_is_away_the_last_known_set_is_shown(etcd: EtcdServer, gate: Gate) -> None:
    async with member(etcd.url) as one, member(gate.url) as other:
        await one.put(KEY, b"1")
        follower = await told(other, KEY)
        await gate.shut()
        await eventually(lambda: other.gateway.down)
        assert await other.get_prefix(PREFIX) == {KEY: b"1"}
        assert follower.known == {KEY: b"1"}


async def test_what_is_deleted_while_etcd_is_away_is_deleted_when_it_is_back(etcd: EtcdServer, gate: Gate) -> None:
    async with member(gate.url, ttl_s=30) as one:
        await one.put(KEY, b"1")
        await one.put(OTHER, b"1")
        await gate.shut()
        with pytest.raises(DiscoveryError, match="etcd does not answer"):
            await one.delete(KEY)
        assert set(etcd.keys()) == {KEY, OTHER}
        await gate.open()
        await one.put(OTHER, b"2")  # waits for etcd, and shows that it is back
        await one._owned.beat()  # of its own accord in ten seconds, a third of this lease
        assert set(etcd.keys()) == {OTHER}


# --- a server that fails


async def test_a_restarted_server_loses_no_instance(tmp_path: Path) -> None:
    with running(EtcdServer(tmp_path)) as (server,):
        async with member(server.url) as one, member(server.url) as other:
            await one.put(KEY, b"1")
            follower = await told(other, KEY)
            server.kill()
            await eventually(lambda: one.gateway.down and other.gateway.down)
            server.start()
            await eventually(lambda: not one.gateway.down and not other.gateway.down, within_s=20)
            await one.put(OTHER, b"2")
            await eventually(lambda: set(follower.known) == {KEY, OTHER})
            assert follower.gone == []
            assert set(server.keys().values()) == server.leases()


async def test_a_server_that_begins_anew_gets_every_instance_back(tmp_path: Path) -> None:
    with running(EtcdServer(tmp_path)) as (server,):
        async with member(server.url) as one, member(server.url) as other, member(server.url) as leaver:
            await one.put(KEY, b"1", create=True)
            await leaver.put(OTHER, b"1", create=True)
            follower = await told(other, KEY, OTHER)
            server.kill()
            shutil.rmtree(tmp_path / "data")
            await leaver.close()  # nobody is there to be told
            server.start()
            server.wait_ready()
            await eventually(lambda: set(server.keys()) == {KEY})
            await eventually(lambda: follower.gone == [OTHER], within_s=GONE_S)
            assert follower.known == {KEY: b"1"}
            await one.put(KEY, b"2")
            await eventually(lambda: follower.known == {KEY: b"2"})


async def test_a_server_that_stands_still_for_longer_than_a_lease_loses_no_instance(tmp_path: Path) -> None:
    with running(EtcdServer(tmp_path)) as (server,):
        async with member(server.url) as one, member(server.url) as other, member(server.url) as leaver:
            await one.put(KEY, b"1", create=True)
            await leaver.put(OTHER, b"1")
            follower = await told(other, KEY, OTHER)
            server.signal(signal.SIGSTOP)
            await eventually(lambda: one.gateway.down and other.gateway.down)
            with contextlib.suppress(asyncio.CancelledError):
                leaver._chores._tasks["beat"].cancel()  # as if it had died meanwhile
            await asyncio.sleep(TTL_S * 1.5)
            server.signal(signal.SIGCONT)
            await eventually(lambda: follower.gone == [OTHER], within_s=GONE_S)
            assert follower.known == {KEY: b"1"}
            assert set(server.keys()) == {KEY}
            assert set(server.keys().values()) == server.leases()


async def test_three_members_and_the_leader_is_killed(tmp_path: Path) -> None:
    with running(*(EtcdServer(tmp_path / f"m{i}", f"m{i}") for i in range(3))) as servers:
        urls = [server.url for server in servers]
        async with member(*urls) as one, member(*urls) as other, member(*urls) as third:
            await one.put(KEY, b"1", create=True)
            follower, bystander = await told(other, KEY), await told(third, KEY)
            [leader] = [server for server in servers if server.is_leader()]
            followed_leader = leader.url in (one.gateway._endpoint, other.gateway._endpoint)
            if not followed_leader:  # then make it so: all that was open there breaks
                other.gateway._leave(other.gateway._endpoint)
            leader.kill()
            await one.put(OTHER, b"2", create=True)
            await eventually(lambda: set(follower.known) == set(bystander.known) == {KEY, OTHER})
            await asyncio.sleep(TTL_S * 1.5)
            rest = next(server for server in servers if server is not leader)
            assert set(rest.keys()) == {KEY, OTHER}
            assert set(rest.keys().values()) == rest.leases()
            assert follower.gone == bystander.gone == []


async def test_three_members_and_the_leader_stands_still_for_longer_than_a_lease(tmp_path: Path) -> None:
    # As it wakes it thinks that it leads, and that all leases have ended, and may end them (etcd-io/etcd#15247).
    with running(*(EtcdServer(tmp_path / f"m{i}", f"m{i}") for i in range(3))) as servers:
        urls = [server.url for server in servers]
        async with member(*urls) as one, member(*urls) as other:
            await one.put(KEY, b"1", create=True)
            follower = await told(other, KEY)
            [leader] = [server for server in servers if server.is_leader()]
            leader.signal(signal.SIGSTOP)
            await asyncio.sleep(TTL_S * 1.75)
            leader.signal(signal.SIGCONT)
            await asyncio.sleep(TTL_S * 1.5)
            assert follower.gone == []
            assert set(leader.keys()) == {KEY}
            assert set(leader.keys().values()) == leader.leases()


async def test_a_member_that_lost_its_majority_is_not_watched_on(tmp_path: Path) -> None:
    with running(*(EtcdServer(tmp_path / f"m{i}", f"m{i}") for i in range(3))) as servers:
        lonely, *others = servers
        async with member(lonely.url, others[0].url) as one, member(others[0].url) as writer:
            while one.gateway._endpoint != lonely.url:
                one.gateway._leave(one.gateway._endpoint)
            await writer.put(KEY, b"1")
            follower = await told(one, KEY)
            for server in others:
                server.kill()
            await eventually(lambda: one.gateway.down, within_s=15)
            for server in others:
                server.start()
            for server in others:
                server.wait_ready()
            await writer.put(OTHER, b"2")
            await eventually(lambda: set(follower.known) == {KEY, OTHER})
            assert follower.gone == []


# --- the start


async def test_nobody_there_is_an_error_within_the_time_that_was_set() -> None:
    [port] = free_ports(1)
    async with member(f"http://127.0.0.1:{port}", startup_s=0.5) as one:
        async with asyncio.timeout(5):
            with pytest.raises(DiscoveryError) as caught:
                await one.put(KEY, b"1")
    for word in (f"http://127.0.0.1:{port}: Connection refused", "0.5 s", "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS"):
        assert word in str(caught.value)
    assert "ETCD_ENDPOINTS" in str(caught.value)


async def test_a_server_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path)
    async with member(server.url) as one:
        put = asyncio.create_task(one.put(KEY, b"1"))
        await asyncio.sleep(0.2)
        assert not put.done()
        with running(server):
            async with asyncio.timeout(20):
                await put
            assert set(server.keys()) == {KEY}


async def test_a_process_told_to_end_waits_no_longer_for_a_first_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", f"http://127.0.0.1:{free_ports(1)[0]}")
    async with caller("etcd") as runtime:
        serving = asyncio.create_task(runtime.endpoint("test.worker.generate").start_endpoint(lambda request: None))
        await eventually(lambda: "trying again for 11" in caplog.text)  # of 120 seconds
        runtime.shutdown()
        async with asyncio.timeout(5):
            with pytest.raises(DiscoveryError, match="told to end"):
                await serving


async def test_endpoints_that_do_not_answer_are_passed_over(etcd: EtcdServer) -> None:
    dead = [f"http://127.0.0.1:{port}" for port in free_ports(2)]
    async with member(*dead, etcd.url) as one:
        await one.put(KEY, b"1")
        assert await one.get_prefix(PREFIX) == {KEY: b"1"}


async def test_what_is_no_etcd_is_said_at_once() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with member(f"http://127.0.0.1:{port}") as one, asyncio.timeout(5):
        with pytest.raises(DiscoveryError, match="no etcd with its JSON gateway"):
            await one.get_prefix(PREFIX)
    server.close()


# --- users and certificates


async def test_users_and_passwords(tmp_path: Path) -> None:
    with running(EtcdServer(tmp_path)) as (server,):
        server.call("auth/user/add", {"name": "root", "password": "right"})
        server.call("auth/user/grant", {"user": "root", "role": "root"})
        server.call("auth/enable", {})
        async with asyncio.timeout(5):
            async with member(server.url, username="root", password="wrong") as one:
                with pytest.raises(DiscoveryError, match="ETCD_AUTH_PASSWORD"):
                    await one.put(KEY, b"1")
            async with member(server.url) as one:
                with pytest.raises(DiscoveryError, match="set ETCD_AUTH_USERNAME"):
                    await one.put(KEY, b"1")
        async with member(server.url, username="root", password="right") as one:
            await one.put(KEY, b"1")
            follower = await told(one, KEY)
            server.kill()
            server.start()  # it has forgotten all tokens
            server.wait_ready()
            await one.put(OTHER, b"2")
            await eventually(lambda: set(follower.known) == {KEY, OTHER})
            assert follower.gone == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
async def test_tls_and_client_certificates(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    flags = ("--cert-file", str(tmp_path / "server.pem"), "--key-file", str(tmp_path / "server.key"))
    strict = ("--client-cert-auth", "--trusted-ca-file", str(tmp_path / "ca.pem"))
    client = {"client_cert": tmp_path / "client.pem", "client_key": tmp_path / "client.key"}
    with running(EtcdServer(tmp_path / "etcd", "m0", *flags, *strict, scheme="https")) as (server,):
        async with member(server.url, ca=tmp_path / "ca.pem", **client) as one:
            await one.put(KEY, b"1")
            follower = await told(one, KEY)
            await one.delete(KEY)
            await eventually(lambda: follower.gone == [KEY])
        async with asyncio.timeout(5):
            async with member(server.url, ca=tmp_path / "other.pem", **client) as one:
                with pytest.raises(DiscoveryError, match="certificate verify failed"):
                    await one.put(KEY, b"1")
            async with member(server.url, ca=tmp_path / "ca.pem", startup_s=0) as one:
                with pytest.raises(DiscoveryError, match="ETCD_AUTH_CLIENT_CERT"):
                    await one.put(KEY, b"1")
            async with member(server.url.replace("https", "http"), startup_s=0) as one:
                with pytest.raises(DiscoveryError, match="https://"):
                    await one.put(KEY, b"1")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
async def test_certificates_that_are_replaced_on_disk_are_used(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    flags = ("--cert-file", str(tmp_path / "server.pem"), "--key-file", str(tmp_path / "server.key"))
    with running(EtcdServer(tmp_path / "etcd", "m0", *flags, scheme="https")) as (server,):
        async with member(server.url, ca=tmp_path / "ca.pem") as one:
            await one.put(KEY, b"1")
            make_certificates(tmp_path)  # a new CA, and a new certificate of the server by it
            server.kill()
            server.start()
            await one.put(OTHER, b"2")
            assert set(await one.get_prefix(PREFIX)) == {KEY, OTHER}


# --- the raw client


async def test_a_program_may_keep_things_of_its_own(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", etcd.url)
    async with caller("etcd") as runtime:
        client = runtime.etcd_client()
        assert client is not None
        await client.kv_create_or_validate("mine/a", b"1")
        await client.kv_create_or_validate("mine/a", b"1")
        with pytest.raises(DiscoveryError, match="another value"):
            await client.kv_create_or_validate("mine/a", b"2")
        await client.kv_put("mine/b", b"2")
        found = await client.kv_get_prefix("mine/")
        assert [(kv["key"], kv["value"], kv["version"], kv["lease"]) for kv in found] == [
            ("mine/a", b"1", 1, 0),
            ("mine/b", b"2", 1, 0),
        ]


async def test_without_etcd_there_is_no_client_of_it(runtime: DistributedRuntime) -> None:
    assert runtime.etcd_client() is None


# --- settings


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"ETCD_ENDPOINTS": "ftp://a:1"}, "ETCD_ENDPOINTS.*ftp://a:1"),
        ({"ETCD_ENDPOINTS": " , "}, "ETCD_ENDPOINTS: no endpoint"),
        ({"ETCD_ENDPOINTS": "http://a:port"}, "ETCD_ENDPOINTS"),
        ({"ETCD_LEASE_TTL": "0"}, "ETCD_LEASE_TTL"),
        ({"ETCD_LEASE_TTL": "2.5"}, "ETCD_LEASE_TTL.*whole"),
        ({"ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS": "soon"}, "ETCD_STARTUP_CONNECT_TIMEOUT_SECONDS"),
        ({"ETCD_AUTH_USERNAME": "me"}, "ETCD_AUTH_PASSWORD"),
        ({"ETCD_AUTH_CA": "/no/such/file"}, "ETCD_AUTH_CA.*/no/such/file"),
        ({"ETCD_AUTH_CLIENT_CERT": __file__}, "ETCD_AUTH_CLIENT_KEY"),
        ({"ETCD_AUTH_CA": __file__, "ETCD_ENDPOINTS": "http://a:1"}, "not encrypted"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        EtcdSettings.from_environ(environ)


def test_settings_as_users_write_them() -> None:
    given = EtcdSettings.from_environ({"ETCD_ENDPOINTS": "http://a:1/, b, [::1]:3 ,http://a:1", "ETCD_LEASE_TTL": "30"})
    assert given.endpoints == ("http://a:1", "http://b:2379", "http://[::1]:3")
    assert (given.ttl_s, given.startup_s) == (30, 120)
    assert EtcdSettings.from_environ({}).endpoints == ("http://localhost:2379",)


def test_a_password_shows_in_no_log() -> None:
    given = EtcdSettings.from_environ({"ETCD_AUTH_USERNAME": "me", "ETCD_AUTH_PASSWORD": "se-cret"})
    assert "se-cret" not in repr(given)
