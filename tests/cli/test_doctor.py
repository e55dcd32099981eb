"""Does the doctor tell the well from the ill?"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo.cli.doctor import examine
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.instances import instance_record


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
    monkeypatch.setattr("dynamo.cli.doctor.ANSWER_S", 0.2)
    async with await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        await register(shared, f"{host}:{port}")
        (found,) = await examine("file")
    assert "no answer within" in found.trouble
