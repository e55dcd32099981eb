"""Does the doctor tell the well from the ill?"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo.doctor.workers import examine
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.instances import instance_record
from tests.runtime.nats_server import NatsServer, nats_running


@pytest.fixture
async def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DistributedRuntime]:
    """A runtime whose discovery others on this machine can read."""
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")
    runtime = DistributedRuntime(discovery_backend="file")
    yield runtime
    await runtime.close()


async def handler(request: object) -> AsyncIterator[object]:
    yield request


async def register(runtime: DistributedRuntime, host_port: str) -> None:
    address = EndpointAddress("ns", "comp", "ep")
    await runtime.discovery.put(address.instance_key(7), instance_record(address, 7, host_port))


async def test_a_worker_that_serves_answers(shared: DistributedRuntime) -> None:
    await shared.endpoint("ns.comp.ep").start_endpoint(handler)
    (found,) = await examine("file")
    assert (found.endpoint, found.instance_id) == ("ns.comp.ep", shared.instance_id)
    assert found.answer_ms is not None


async def test_an_address_where_nobody_listens_is_told(shared: DistributedRuntime) -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    server.close()
    await server.wait_closed()
    await register(shared, f"{host}:{port}")
    (found,) = await examine("file")
    assert found.answer_ms is None
    assert "refused" in found.trouble or "Connect call failed" in found.trouble


async def test_a_stranger_on_the_port_is_told(shared: DistributedRuntime) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example.org\r\n")

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        await register(shared, f"{host}:{port}")
        (found,) = await examine("file")
    assert found.answer_ms is None
    assert "opening" in found.trouble


async def test_a_hung_worker_is_told_in_bounded_time(
    shared: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.doctor.workers.ANSWER_S", 0.2)
    async with await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        await register(shared, f"{host}:{port}")
        (found,) = await examine("file")
    assert "no answer within" in found.trouble


async def test_a_worker_that_is_reached_by_way_of_nats_answers_until_its_server_is_gone(
    shared: DistributedRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nats_running(NatsServer(tmp_path / "nats")) as server:
        monkeypatch.setenv("NATS_SERVER", server.url)
        by_nats = DistributedRuntime(discovery_backend="file", request_plane="nats")
        await by_nats.endpoint("ns.comp.ep").start_endpoint(handler)
        (found,) = await examine("file")
        assert found.answer_ms is not None
        assert found.address.startswith("nats:dynamo.inbox.")
        await register(shared, "nats:dynamo.inbox.00")
        nobody, there = sorted(await examine("file"), key=lambda f: f.answer_ms or 0)
        assert (nobody.instance_id, "no process listens there" in nobody.trouble) == (7, True)
        assert there.answer_ms is not None
        server.kill()
        assert all("cannot connect to NATS" in f.trouble for f in await examine("file"))
        monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "0")
        await by_nats.close()
