"""Events that are sealed: who hears them, who is believed, and what cannot work."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_box_afternm
from zmq.auth import create_certificates, load_certificate
from zmq.utils.monitor import parse_monitor_message

from dynamo.cli.event_keys import main as event_keys
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.curve import CurveKeys, verdict
from dynamo.runtime.curve_session import CurveSession
from dynamo.runtime.events import create_publisher, create_subscriber, scope_of
from dynamo.runtime.zmq_channel import reached_in, zmq_record
from dynamo.runtime.zmtp import ZmtpSubscription
from tests.runtime.plane_helpers import until
from tests.runtime.test_events import SCOPE, TOPIC, heard, take

DEADLINE_S = 10.0
FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Members:
    """Key pairs in a directory, and runtimes that have one of them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self._monkeypatch = monkeypatch
        self._runtimes: list[DistributedRuntime] = []

    def key(self, name: str) -> Path:
        create_certificates(self.directory, name)
        file = self.directory / f"{name}.key_secret"
        file.chmod(0o600)
        return file

    def public(self, name: str) -> bytes:
        return load_certificate(self.directory / f"{name}.key")[0]

    def runtime(self, key: Path | None, peers: Path | None = None) -> DistributedRuntime:
        self._monkeypatch.setenv("DYN_EVENT_PLANE_CURVE_KEY_PATH", str(key or ""))
        self._monkeypatch.setenv("DYN_EVENT_PLANE_CURVE_PEERS_PATH", str(peers or ""))
        self._runtimes.append(DistributedRuntime(discovery_backend="mem"))
        return self._runtimes[-1]

    async def close(self) -> None:
        for runtime in self._runtimes:
            await runtime.close()


@pytest.fixture
async def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Members]:
    one = Members(tmp_path, monkeypatch)
    yield one
    await one.close()


# --- who hears


@pytest.mark.parametrize("size", [1, 300, 300_000])
async def test_members_with_the_same_key_hear_each_other(members: Members, size: int) -> None:
    key = members.key("all")
    publisher = await create_publisher(members.runtime(key), SCOPE, TOPIC)
    subscriber = await create_subscriber(members.runtime(key), SCOPE, TOPIC)
    await heard(publisher, subscriber)
    for i in range(20):
        publisher.publish([i, "x" * size])
    assert [event.decode() for event in await take(subscriber, 20)] == [[i, "x" * size] for i in range(20)]
    await subscriber.close()
    await publisher.close()


async def test_members_know_each_other_by_a_directory_that_may_change(members: Members, tmp_path: Path) -> None:
    worker, frontend = members.key("worker"), members.key("frontend")
    known = tmp_path / "known"
    known.mkdir()
    publisher = await create_publisher(members.runtime(worker, known), SCOPE, TOPIC)
    subscriber = await create_subscriber(members.runtime(frontend, known), SCOPE, TOPIC)
    [link] = subscriber._links.values()  # type: ignore[attr-defined]
    await until(lambda: "is not among those that are known" in link.trouble)
    (known / "broken.key").write_text("no key")
    (tmp_path / "worker.key").rename(known / "worker.key")
    await until(lambda: "does not know our key" in link.trouble)
    (tmp_path / "frontend.key").rename(known / "frontend.key")
    await heard(publisher, subscriber)
    await subscriber.close()
    await publisher.close()


@asynccontextmanager
async def libzmq(endpoint: str, *keys: bytes) -> AsyncIterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    """ZeroMQ's own subscriber, and what tells how its handshake goes. `keys`: public, secret, the publisher's."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.linger = 0
    if keys:
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys
    socket.subscribe(b"")
    monitor = socket.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    socket.connect(endpoint)
    yield socket, monitor
    context.destroy(0)


async def outcome(monitor: zmq.asyncio.Socket) -> int:
    event: int = parse_monitor_message(await asyncio.wait_for(monitor.recv_multipart(), DEADLINE_S))["event"]
    return event


@pytest.mark.parametrize("who", ["member", "stranger", "in the clear", "wrong publisher"])
async def test_zeromqs_own_subscriber_hears_exactly_if_it_is_a_member(members: Members, who: str) -> None:
    publisher = await create_publisher(members.runtime(members.key("all")), SCOPE, TOPIC)
    stranger = zmq.curve_keypair()
    mine = load_certificate(members.directory / "all.key_secret")
    keys: dict[str, tuple[Any, ...]] = {
        "member": (*mine, mine[0]),
        "stranger": (*stranger, mine[0]),
        "in the clear": (),
        "wrong publisher": (*mine, stranger[0]),
    }
    async with libzmq(publisher.endpoint, *keys[who]) as (socket, monitor):  # type: ignore[attr-defined]
        event = await outcome(monitor)
        if who != "member":
            assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
            return
        assert event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        hearing = asyncio.ensure_future(socket.recv_multipart())
        async with asyncio.timeout(DEADLINE_S):
            while not hearing.done():
                publisher.publish("x")
                await asyncio.wait([hearing], timeout=0.02)
        assert hearing.result()[0] == TOPIC.encode()
    await publisher.close()


class Between:
    """Passes on what a publisher and a subscriber say, looks at it, and may change what the publisher says."""

    def __init__(self, endpoint: str, change: Callable[[bytes], bytes] = bytes) -> None:
        self._host, _, self._port = endpoint.removeprefix("tcp://").rpartition(":")
        self._change = change
        self.passed = b""

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes] = bytes
    ) -> None:
        while data := await reader.read(65536):
            self.passed += data
            writer.write(change(data))
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(self._host, int(self._port))
        there, back = self._pump(reader, other_writer), self._pump(other_reader, writer, self._change)
        await asyncio.gather(there, back, return_exceptions=True)

    @asynccontextmanager
    async def heard_by(self, *keys: bytes) -> AsyncIterator[tuple[ZmtpSubscription, "asyncio.Queue[list[bytes]]"]]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        messages: asyncio.Queue[list[bytes]] = asyncio.Queue()
        port = server.sockets[0].getsockname()[1]
        session = partial(CurveSession, *keys)
        link = ZmtpSubscription("127.0.0.1", port, b"", 1 << 20, messages.put_nowait, lambda: None, session)
        link.open()
        yield link, messages
        await link.close()
        server.close()


async def test_nothing_of_an_event_can_be_read_on_the_way(members: Members) -> None:
    publisher = await create_publisher(members.runtime(members.key("all")), SCOPE, TOPIC)
    public, secret = load_certificate(members.directory / "all.key_secret")
    between = Between(publisher.endpoint)  # type: ignore[attr-defined]
    async with between.heard_by(public, secret or b"", public) as (link, messages):
        await until(lambda: link.connected)
        while messages.empty():
            publisher.publish("a secret")
            await asyncio.sleep(0.01)
        assert b"a secret" in b"".join(await messages.get())
    assert b"a secret" not in between.passed
    assert TOPIC.encode() not in between.passed
    await publisher.close()


async def test_what_was_changed_on_the_way_is_not_heard(members: Members) -> None:
    publisher = await create_publisher(members.runtime(members.key("all")), SCOPE, TOPIC)
    public, secret = load_certificate(members.directory / "all.key_secret")

    def change(data: bytes) -> bytes:
        return data[:-1] + bytes((data[-1] ^ 1,)) if b"MESSAGE" in data else data

    async with Between(publisher.endpoint, change).heard_by(public, secret or b"", public) as (link, messages):  # type: ignore[attr-defined]
        async with asyncio.timeout(DEADLINE_S):
            while "changed on the way" not in link.trouble:
                publisher.publish("a secret")
                await asyncio.sleep(0.01)
        assert messages.empty()
    await publisher.close()


async def test_who_has_taken_a_publishers_address_but_not_its_key_is_not_believed(members: Members) -> None:
    impostor = await create_publisher(members.runtime(members.key("impostor")), SCOPE, TOPIC)
    members.key("real")
    public, secret = load_certificate(members.directory / "impostor.key_secret")  # that it may come in does not help
    between = Between(impostor.endpoint)  # type: ignore[attr-defined]
    async with between.heard_by(public, secret or b"", members.public("real")) as (link, messages):
        await until(lambda: b"\x05HELLO" in between.passed)
        await until(lambda: link._transport is None)
        assert not link.connected
        assert messages.empty()
    await impostor.close()


async def test_publishers_that_are_not_sealed_alike_are_ignored_with_a_word(
    members: Members, caplog: pytest.LogCaptureFixture
) -> None:
    sealed, clear = members.runtime(members.key("all")), members.runtime(None)
    publishers = [await create_publisher(each, SCOPE, TOPIC) for each in (sealed, clear)]
    subscribers = [await create_subscriber(each, SCOPE, TOPIC) for each in (sealed, clear)]
    assert [list(each.publishers) for each in subscribers] == [[each.publisher_id] for each in publishers]
    assert "it speaks in the clear" in caplog.text
    assert "it wants a key of ours" in caplog.text
    for each in (*subscribers, *publishers):
        await each.close()


# --- the session


def test_a_seal_opens_once_and_only_as_it_was_made() -> None:
    session = CurveSession(*zmq.curve_keypair(), zmq.curve_keypair()[0])
    session._shared = bytes(32)
    other = CurveSession(*zmq.curve_keypair(), zmq.curve_keypair()[0])
    other._shared = bytes(32)
    sealed = crypto_box_afternm(b"\1body", b"CurveZMQMESSAGES" + (7).to_bytes(8, "big"), bytes(32))
    message = b"\7MESSAGE" + (7).to_bytes(8, "big") + sealed
    for at in range(len(message)):
        with pytest.raises(ValueError, match=r"seal|before"):
            other.open(message[:at] + bytes((message[at] ^ 0x80,)) + message[at + 1 :])
    assert session.open(message) == (1, b"body")
    with pytest.raises(ValueError, match="there before"):
        session.open(message)


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_whatever_a_publisher_says_the_session_takes_or_refuses(said: list[bytes]) -> None:
    session = CurveSession(*zmq.curve_keypair(), zmq.curve_keypair()[0])
    session.hello()
    for name, body in zip((b"\7WELCOME", b"\5READY", b"\5ERROR", b""), said, strict=False):
        with pytest.raises(ValueError, match=r"."):
            session.answer(name + body, b"")
    assert not session.ready


def test_only_who_is_asked_about_rightly_may_come_in() -> None:
    for about in ([], [b"x"] * 4, [b"no domain", b"1.2.3.4", b"", b"CURVE", bytes(32)]):
        assert verdict(about)[0] == b"500"


# --- what cannot work


async def test_what_cannot_work_is_said_at_the_start(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    key = members.key("all")

    def refused(**variables: object) -> str:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(f"DYN_EVENT_PLANE_CURVE_{name}", str(value))
            with pytest.raises(ValueError, match="DYN_EVENT_PLANE_CURVE_") as caught:
                DistributedRuntime(discovery_backend="mem")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "No such file" in refused(KEY_PATH="/nowhere") or "Invalid" in refused(KEY_PATH="/nowhere")
    assert "no secret key" in refused(KEY_PATH=key.with_suffix(".key"))
    assert "needs DYN_EVENT_PLANE_CURVE_KEY_PATH" in refused(PEERS_PATH=members.directory)
    assert "no directory" in refused(KEY_PATH=key, PEERS_PATH="/nowhere")
    assert "there is no such variable" in refused(KEY=key)
    key.chmod(0o604)
    assert "everybody may read" in refused(KEY_PATH=key)
    key.chmod(0o600)
    key.write_text('public-key = "x"\nsecret-key = "y"\n')
    assert "40 letters" in refused(KEY_PATH=key)
    monkeypatch.setenv("DYN_EVENT_PLANE", "nats")
    assert "travel by nats" in refused(KEY_PATH=key)
    monkeypatch.delenv("DYN_EVENT_PLANE")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package PyNaCl" in refused(KEY_PATH=key)


@pytest.mark.parametrize("record_key", ["", "short", "x" * 40, 5])
def test_a_record_with_a_wrong_key_is_refused_or_known_by_nobody(members: Members, record_key: Any) -> None:
    keys = CurveKeys(members.key("all"))
    record = msgspec.json.decode(zmq_record(scope_of(SCOPE), TOPIC, 7, "tcp://127.0.0.1:1"))
    record["transport"]["config"]["curve_key"] = record_key
    try:
        reached = reached_in(msgspec.json.encode(record), 7)
    except ValueError:
        return
    assert reached.key is None or not keys.knows(reached.key)


def test_keys_are_made_for_their_owner_alone_and_never_over_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert event_keys([str(tmp_path / "keys" / "all")]) == 0
    secret = tmp_path / "keys" / "all.key_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert CurveKeys(secret).knows(load_certificate(tmp_path / "keys" / "all.key")[0])
    made = secret.read_bytes()
    assert event_keys([str(tmp_path / "keys" / "all")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert secret.read_bytes() == made
