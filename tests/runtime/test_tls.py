"""Requests over TLS: who is let in, who is believed, and what becomes of certificates that are renewed."""

import asyncio
import logging
import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest
import uvloop

from dynamo.runtime import DistributedRuntime, wire
from dynamo.runtime.errors import CannotConnect, DynamoException
from dynamo.runtime.tls import TlsSettings
from tests.runtime.etcd_server import make_certificates
from tests.runtime.plane_helpers import ENDPOINT, SOON_S, Held, Sink, caller, connect, dial, push, until

pytestmark = [
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates"),
    pytest.mark.filterwarnings('ignore:Overriding the "event_loop_policy"'),
]

FILES = {
    "CERT_PATH": "server.pem",
    "KEY_PATH": "server.key",
    "CA_CERT_PATH": "ca.pem",
    "CLIENT_CA_CERT_PATH": "ca.pem",
    "CLIENT_CERT_PATH": "client.pem",
    "CLIENT_KEY_PATH": "client.key",
}


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Programs run on uvloop, other people's on asyncio's loop; each has its own TLS."""
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture(scope="module")
def two_authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two directories with files of the same names, by authorities that know nothing of each other."""
    found = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    for directory in found:
        make_certificates(directory)
    return found


@pytest.fixture
def files(two_authorities: tuple[Path, Path], tmp_path: Path) -> Path:
    """Our certificates, to be renewed as the test likes."""
    return Path(shutil.copytree(two_authorities[0], tmp_path / "files"))


class Fleet:
    """A worker that shows its certificate and asks for one, and what callers need to get there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
        self._monkeypatch = monkeypatch
        self.files = files
        self.held = Held()

    def say(self, **others: str | Path | None) -> None:
        """The variables of the next runtime: those of a member of the fleet, but for some."""
        for name, value in ({name: self.files / file for name, file in FILES.items()} | others).items():
            self._monkeypatch.setenv(f"DYN_TCP_TLS_{name}", str(value or ""))

    async def start(self) -> DistributedRuntime:
        self.say()
        worker = DistributedRuntime(discovery_backend="mem")
        await worker.endpoint(ENDPOINT).start_push_endpoint(self.held)
        return worker

    async def asked(self, runtime: DistributedRuntime) -> Sink:
        """A request that was answered, or what became of it."""
        client = await connect(runtime)
        answered = len(self.held.streams)
        sink = push(client, "ping")
        await until(lambda: sink.done.is_set() or len(self.held.streams) > answered)
        if not sink.done.is_set():
            self.held.streams[-1].send("pong")
            self.held.streams[-1].end()
        return await sink.finished()


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, files: Path) -> Fleet:
    return Fleet(monkeypatch, files)


@pytest.fixture
async def worker(fleet: Fleet) -> Any:
    runtime = await fleet.start()
    yield runtime
    await runtime.close()


async def closed(reader: asyncio.StreamReader) -> bytes:
    """Everything until the worker closes the connection."""
    async with asyncio.timeout(SOON_S):
        try:
            return await reader.read(-1)
        except OSError:
            return b""


def certificate_of(connection: Any) -> dict[str, Any]:
    found: dict[str, Any] = connection._transport.get_extra_info("peercert")
    return found


# --- who comes in


async def test_both_sides_show_their_certificates(fleet: Fleet, worker: DistributedRuntime) -> None:
    async with caller() as other:
        assert (await fleet.asked(other)).items == ["pong"]
        [connection] = worker.server.connections
        assert certificate_of(connection)["subject"] == ((("commonName", "client"),),)


@pytest.mark.parametrize("size", [1, 100_000, 5_000_000])
async def test_what_is_sent_comes_whole_whatever_its_size(fleet: Fleet, worker: DistributedRuntime, size: int) -> None:
    async with caller() as other:
        sink = push(await connect(other), "x" * size)
        [stream] = await fleet.held.wait()
        for _ in range(3):
            stream.send("y" * size)
        stream.end()
        assert (await sink.finished()).items == ["y" * size] * 3
    assert fleet.held.payloads == ["x" * size]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"CA_CERT_PATH": "other.pem"}, "DYN_TCP_TLS_CA_CERT_PATH"),
        ({"SERVER_NAME": "another"}, "ostname mismatch.*SERVER_NAME"),
        ({"CLIENT_CERT_PATH": None, "CLIENT_KEY_PATH": None}, "DYN_TCP_TLS_CLIENT_CERT_PATH"),
        ({"CLIENT_CERT_PATH": "other.pem", "CLIENT_KEY_PATH": "other.key"}, "gave no greeting"),
    ],
    ids=["believes another authority", "wants another name", "no certificate", "a certificate by another"],
)
async def test_a_caller_that_does_not_fit_reaches_no_handler_and_is_told_why(
    fleet: Fleet, worker: DistributedRuntime, others: dict[str, str | None], said: str
) -> None:
    fleet.say(**{name: fleet.files / v if v and "PATH" in name else v for name, v in others.items()})
    async with caller() as other:
        sink = await fleet.asked(other)
    assert isinstance(sink.error, CannotConnect)
    with pytest.raises(DynamoException, match=said):
        raise sink.error
    assert fleet.held.streams == []


async def test_a_caller_that_checks_nobody_comes_in_all_the_same(fleet: Fleet, worker: DistributedRuntime) -> None:
    fleet.say(CA_CERT_PATH=fleet.files / "other.pem", INSECURE="true")
    async with caller() as other:
        assert (await fleet.asked(other)).items == ["pong"]


async def test_a_caller_in_the_clear_is_told_what_may_be_missing(fleet: Fleet, worker: DistributedRuntime) -> None:
    fleet.say(**dict.fromkeys(FILES))
    async with caller() as other:
        sink = await fleet.asked(other)
    with pytest.raises(CannotConnect, match="if it speaks TLS, set DYN_TCP_TLS_CA_CERT_PATH"):
        raise sink.error or AssertionError
    assert fleet.held.streams == []


async def test_a_caller_by_tls_of_a_worker_in_the_clear_sends_nothing(
    fleet: Fleet, runtime: DistributedRuntime
) -> None:
    await runtime.endpoint(ENDPOINT).start_push_endpoint(fleet.held)
    fleet.say()
    async with caller() as other:
        sink = await fleet.asked(other)
    with pytest.raises(CannotConnect, match=r"does not speak TLS|gave no greeting"):
        raise sink.error or AssertionError
    assert fleet.held.streams == []


GREETING = wire.PREAMBLE + bytes(wire.frame(wire.HELLO, (wire.DEFAULT_MAX_MESSAGE_BYTES, "stranger")))


@pytest.mark.parametrize(
    "said",
    [GREETING, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x40\x00\x01" + b"\xff" * 100, bytes(10_000)],
    ids=["our protocol in the clear", "HTTP", "a record that never ends", "zeros"],
)
async def test_what_is_no_handshake_ends_its_connection_only(
    fleet: Fleet, worker: DistributedRuntime, said: bytes
) -> None:
    reader, writer = await dial(worker)
    writer.write(said)
    writer.write_eof()
    assert wire.PREAMBLE not in await closed(reader)
    writer.close()
    async with caller() as other:
        assert (await fleet.asked(other)).items == ["pong"]


async def test_half_a_handshake_is_waited_for_no_longer_than_the_bound(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS", "0.2")
    worker = await fleet.start()
    out = ssl.MemoryBIO()
    begun = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        begun.do_handshake()
    hello = out.read()
    for said in (b"", hello[: len(hello) // 2]):
        reader, writer = await dial(worker)
        writer.write(said)
        assert await closed(reader) == b""
        writer.close()
    await worker.close()


# --- certificates are renewed


def renew(files: Path, source: Path, *names: str) -> None:
    """Put other files in their place at once, as those who renew certificates do."""
    for name in names:
        shutil.copy(source / name, files / f"{name}.new")
        (files / f"{name}.new").rename(files / name)


ALL = ("server.pem", "server.key", "ca.pem", "client.pem", "client.key")


async def test_renewed_certificates_are_used_for_new_connections_and_old_ones_go_on(
    fleet: Fleet, worker: DistributedRuntime, two_authorities: tuple[Path, Path]
) -> None:
    async with caller() as before:
        assert (await fleet.asked(before)).items == ["pong"]
        renew(fleet.files, two_authorities[1], *ALL)
        async with caller() as after:
            assert (await fleet.asked(after)).items == ["pong"]
            assert len({certificate_of(each)["serialNumber"] for each in worker.server.connections}) == 2
        assert (await fleet.asked(before)).items == ["pong"]


async def test_a_caller_that_runs_uses_its_renewed_certificate_for_its_next_connection(
    fleet: Fleet, worker: DistributedRuntime, two_authorities: tuple[Path, Path]
) -> None:
    async with caller() as one:
        renew(fleet.files, two_authorities[1], *ALL)
        assert (await fleet.asked(one)).items == ["pong"]


async def test_who_has_a_certificate_of_the_old_authority_stays_out(
    fleet: Fleet, worker: DistributedRuntime, two_authorities: tuple[Path, Path]
) -> None:
    ours, theirs = two_authorities
    renew(fleet.files, theirs, "server.pem", "server.key", "ca.pem")
    fleet.say(CLIENT_CERT_PATH=ours / "client.pem", CLIENT_KEY_PATH=ours / "client.key")
    async with caller() as other:
        assert isinstance((await fleet.asked(other)).error, CannotConnect)
    assert fleet.held.streams == []


@pytest.mark.parametrize("broken", ["cut short", "of another key", "gone"])
async def test_a_renewal_that_cannot_be_used_keeps_the_old_and_is_told_once(
    fleet: Fleet,
    worker: DistributedRuntime,
    two_authorities: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    certificate = fleet.files / "server.pem"
    if broken == "cut short":
        certificate.write_text(certificate.read_text()[:200])
    elif broken == "of another key":
        renew(fleet.files, two_authorities[1], "server.pem")
    else:
        certificate.rename(fleet.files / "elsewhere.pem")
    fleet.say(CERT_PATH=None, KEY_PATH=None, CLIENT_CA_CERT_PATH=None)  # callers that nobody calls
    for _ in range(3):
        async with caller() as other:
            assert (await fleet.asked(other)).items == ["pong"]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert "DYN_TCP_TLS_CERT_PATH" in said[0]
    renew(fleet.files, two_authorities[1], *ALL)
    async with caller() as other:
        assert (await fleet.asked(other)).items == ["pong"]


# --- settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"CERT": "x"}, "DYN_TCP_TLS_CERT: there is no such variable"),
        ({"CERT_PATH": "server.pem"}, "belong together"),
        ({"CLIENT_KEY_PATH": "client.key"}, "belong together"),
        ({"CLIENT_CA_CERT_PATH": "ca.pem"}, "needs DYN_TCP_TLS_CERT_PATH"),
        ({"CA_CERT_PATH": "nowhere.pem"}, "DYN_TCP_TLS_CA_CERT_PATH: there is no file"),
        ({"CA_CERT_PATH": "client.key"}, "DYN_TCP_TLS_CA_CERT_PATH: no PEM"),
        ({"CERT_PATH": "server.pem", "KEY_PATH": "client.key"}, "DYN_TCP_TLS_CERT_PATH.*no PEM"),
        ({"INSECURE": "perhaps"}, "DYN_TCP_TLS_INSECURE"),
        ({"INSECURE": "1", "HANDSHAKE_TIMEOUT_SECS": "0"}, "HANDSHAKE"),
    ],
)
async def test_what_cannot_work_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, files: Path, words: dict[str, str], said: str
) -> None:
    for name, value in words.items():
        monkeypatch.setenv(f"DYN_TCP_TLS_{name}", str(files / value) if "PATH" in name else value)
    with pytest.raises(ValueError, match=said) as caught:
        DistributedRuntime(discovery_backend="mem")
    assert "\n" not in str(caught.value)


async def test_without_a_certificate_nothing_listens_in_the_clear(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setenv("DYN_TCP_TLS_CA_CERT_PATH", str(files / "ca.pem"))
    async with caller() as runtime:
        with pytest.raises(CannotConnect, match="set DYN_TCP_TLS_CERT_PATH"):
            await runtime.endpoint(ENDPOINT).start_push_endpoint(Held())


# --- the system server


async def test_the_system_server_answers_those_of_its_authority_alone(
    monkeypatch: pytest.MonkeyPatch, files: Path, two_authorities: tuple[Path, Path]
) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    for name, file in (("CERT", "server.pem"), ("KEY", "server.key"), ("CLIENT_CA_CERT", "ca.pem")):
        monkeypatch.setenv(f"DYN_SYSTEM_TLS_{name}_PATH", str(files / file))

    async def asked(authority: Path, certificate: bool) -> bytes:
        context = ssl.create_default_context(cafile=str(authority / "ca.pem"))
        if certificate:
            context.load_cert_chain(authority / "client.pem", authority / "client.key")
        reader, writer = await asyncio.open_connection("127.0.0.1", system.port, ssl=context)
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await closed(reader)
        writer.close()
        return answer[:12]

    async with caller() as runtime:
        await runtime.started()
        system = runtime.system_server
        assert system is not None
        assert system.url.startswith("https://")
        assert await asked(files, certificate=True) == b"HTTP/1.1 200"
        assert await asked(files, certificate=False) == b""
        renew(files, two_authorities[1], *ALL)
        assert await asked(two_authorities[1], certificate=True) == b"HTTP/1.1 200"
        assert await asked(two_authorities[1], certificate=False) == b""


def test_empty_variables_are_none() -> None:
    assert TlsSettings.from_environ({"DYN_TCP_TLS_CERT_PATH": ""}) is None
