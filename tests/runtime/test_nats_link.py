"""How a process gets into NATS, what it says when it cannot, and that it comes back."""

import asyncio
import importlib.util
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nkeys
import pytest

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import CannotConnect
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.nats import settings as settings_module
from dynamo.runtime.nats.link import Message, NatsLink
from dynamo.runtime.nats.settings import NatsSettings
from tests.runtime.etcd_server import make_certificates
from tests.runtime.nats_server import NatsServer, nats_running
from tests.runtime.plane_helpers import SOON_S, until


@asynccontextmanager
async def linked(*servers: str, startup_s: float = 0.0, **more: Any) -> AsyncIterator[NatsLink]:
    """A link that is up, closed in the end. With `startup_s` 0 there is one try."""
    link = NatsLink(NatsSettings(servers, startup_s=startup_s, **more), "test", Metrics(1))
    try:
        await link.start()
        yield link
    finally:
        await link.close()


async def echoes(link: NatsLink) -> bool:
    """Whether what is said is heard."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    link.routes["echo"] = lambda message: heard.put_nowait(message.data)
    link.publish(f"{link.inbox}.echo", b"hello")
    return await asyncio.wait_for(heard.get(), SOON_S) == b"hello"


# --- the way in


USERS = 'authorization { users = [ {user: worker, password: "s3cret"}, {nkey: "%s"} ] }'
SEED = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
PUBLIC = nkeys.from_seed(bytearray(SEED)).public_key.decode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server that wants a user's password or key."""
    with nats_running(NatsServer(tmp_path_factory.mktemp("guarded"), USERS % PUBLIC)) as server:
        yield server


async def test_a_user_with_a_password_gets_in(guarded: NatsServer) -> None:
    async with linked(guarded.url, username="worker", password="s3cret", token="not looked at") as link:
        assert await echoes(link)


async def test_a_user_in_the_url_gets_in(guarded: NatsServer) -> None:
    async with linked(f"nats://worker:s3cret@127.0.0.1:{guarded.port}") as link:
        assert await echoes(link)


async def test_a_key_gets_in(guarded: NatsServer) -> None:
    async with linked(guarded.url, nkey=SEED.decode()) as link:
        assert await echoes(link)


async def test_a_token_gets_in(tmp_path: Path) -> None:
    with nats_running(NatsServer(tmp_path, "authorization { token: tok3n }")) as server:
        async with linked(server.url, token="tok3n") as link:
            assert await echoes(link)


@pytest.mark.parametrize("way", [{}, {"username": "worker", "password": "wrong"}, {"token": "worker"}])
async def test_who_may_not_come_in_hears_it_at_once_and_no_secret_is_shown(
    guarded: NatsServer, way: dict[str, str]
) -> None:
    with pytest.raises(CannotConnect, match="Authorization Violation") as caught:
        async with asyncio.timeout(SOON_S), linked(guarded.url, startup_s=60, **way):
            pass
    assert "NATS_SERVER" in str(caught.value)
    assert "wrong" not in str(caught.value)


async def test_a_password_in_a_url_is_not_shown() -> None:
    with pytest.raises(CannotConnect, match="Connect call failed") as caught:
        async with linked("nats://worker:s3cret@127.0.0.1:1"):
            pass
    assert "s3cret" not in str(caught.value)


# --- encryption


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Any:
    """A server that speaks TLS only, to those with a certificate."""
    files = f'cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key"'
    tls = f'tls {{ {files}, ca_file: "{certificates}/ca.pem", verify: true }}'
    with nats_running(NatsServer(tmp_path_factory.mktemp("encrypted"), tls)) as server:
        yield server


async def test_both_sides_show_their_certificates(encrypted: NatsServer, certificates: Path) -> None:
    files = {"ca": certificates / "ca.pem", "cert": certificates / "client.pem", "key": certificates / "client.key"}
    async with linked(encrypted.url, **files) as link:
        assert await echoes(link)


async def test_a_server_whose_certificate_another_signed_is_not_believed(
    encrypted: NatsServer, certificates: Path
) -> None:
    with pytest.raises(CannotConnect, match="CERTIFICATE_VERIFY_FAILED"):
        async with asyncio.timeout(SOON_S), linked(encrypted.url, startup_s=60, ca=certificates / "other.pem"):
            pass


async def test_without_a_certificate_of_ones_own_there_is_no_connection(
    encrypted: NatsServer, certificates: Path
) -> None:
    with pytest.raises(CannotConnect):
        async with linked(encrypted.url, ca=certificates / "ca.pem"):
            pass


async def test_no_password_goes_to_a_server_that_does_not_encrypt(certificates: Path) -> None:
    said: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576,"auth_required":true}\r\n')
        said.append(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(CannotConnect, match="encryption was asked for"):
        async with linked(f"tls://127.0.0.1:{port}", ca=certificates / "ca.pem", username="u", password="s3cret"):
            pass
    await until(lambda: bool(said))
    assert said == [b""]
    server.close()


# --- the variables


def test_the_variables_are_read() -> None:
    found = NatsSettings.from_environ(
        {
            "NATS_SERVER": "a, nats://b:1234,tls://c",
            "NATS_AUTH_TOKEN": "t",
            "NATS_STARTUP_CONNECT_TIMEOUT_SECONDS": "7",
        }
    )
    assert found.servers == ("nats://a:4222", "nats://b:1234", "tls://c:4222")
    assert (found.token, found.startup_s, found.encrypted) == ("t", 7.0, True)
    assert NatsSettings.from_environ({}) == NatsSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NATS_SERVER", "http://a"),
        ("NATS_SERVER", "nats://"),
        ("NATS_SERVER", ","),
        ("NATS_SERVER", "nats://a:port"),
        ("NATS_AUTH_USERNAME", "alone"),
        ("NATS_AUTH_PASSWORD", "alone"),
        ("NATS_AUTH_NKEY", "not a seed"),
        ("NATS_AUTH_CREDENTIALS_FILE", "/nowhere"),
        ("NATS_TLS_CA_CERT_PATH", "/nowhere"),
        ("NATS_TLS_CA_CERT_PATH", __file__),
        ("NATS_TLS_CERT_PATH", __file__),
        ("NATS_STARTUP_CONNECT_TIMEOUT_SECONDS", "soon"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        NatsSettings.from_environ({name: value})


@pytest.mark.parametrize("plane", ["request_plane", "event_plane"])
async def test_a_missing_package_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        settings_module.importlib.util, "find_spec", lambda name, *rest: None if name == "nats" else find(name, *rest)
    )
    with pytest.raises(ValueError, match=r"pip install 'ai-dynamo\[nats\]'$"):
        DistributedRuntime(discovery_backend="mem", **{plane: "nats"})


# --- coming back


async def test_a_server_that_comes_later_than_its_clients_is_waited_for(tmp_path: Path) -> None:
    server = NatsServer(tmp_path)
    link = NatsLink(NatsSettings((server.url,), startup_s=20), "test", Metrics(1))
    starting = asyncio.ensure_future(link.start())
    await asyncio.sleep(0.2)
    assert not starting.done()
    with nats_running(server):
        await asyncio.wait_for(starting, SOON_S)
        assert await echoes(link)
        await link.close()


async def test_a_link_is_back_soon_after_its_server_and_hears_what_it_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[bytes] = []

    def hear(message: Message) -> None:
        heard.append(message.data)

    caplog.set_level(logging.INFO)
    with nats_running(NatsServer(tmp_path)) as server:
        async with linked(server.url) as link:
            await link.subscribe("test.subject", hear)
            server.kill()
            await until(lambda: not link.up)
            assert not link.publish("test.subject", b"lost"), "who sends knows that it is not sent"
            server.start()
            await until(lambda: link.up)
            assert link.publish("test.subject", b"again")
            await until(lambda: heard == [b"again"])
    assert "the connection to NATS broke" in caplog.text
    assert "connected to NATS again" in caplog.text


async def test_another_server_of_several_takes_over(tmp_path: Path) -> None:
    servers = [NatsServer(tmp_path / name) for name in "ab"]
    with nats_running(servers[0]), nats_running(servers[1]):
        async with linked(*(server.url for server in servers)) as link:
            for server in servers:  # one of them is the one it is connected to
                server.kill()
                async with asyncio.timeout(SOON_S):
                    while not await tries(link):
                        pass
                server.start()


async def tries(link: NatsLink) -> bool:
    """Whether what is said is heard by a server that may just have died."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    link.routes["try"] = lambda message: heard.put_nowait(message.data)
    link.publish(f"{link.inbox}.try", b"hello")
    try:
        return await asyncio.wait_for(heard.get(), 0.2) == b"hello"
    except TimeoutError:
        return False


async def test_a_handler_that_fails_keeps_no_other_message_from_being_heard(nats: NatsServer) -> None:
    heard: list[bytes] = []

    def hear(message: Message) -> None:
        heard.append(message.data)
        raise RuntimeError("no")

    async with linked(nats.url) as link:
        await link.subscribe("test.failing", hear)
        link.publish("test.failing", b"one")
        link.publish("test.failing", b"two")
        await until(lambda: heard == [b"one", b"two"])


async def test_a_server_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.runtime.nats.link.PING_S", 0.1)
    monkeypatch.setattr("dynamo.runtime.nats.link.SILENCE_S", 1)
    with nats_running(NatsServer(tmp_path)) as server:
        async with linked(server.url) as link:
            server.signal(signal.SIGSTOP)
            await until(lambda: not link.up)
            server.signal(signal.SIGCONT)
            await until(lambda: link.up, timeout_s=10)
            assert await echoes(link)
