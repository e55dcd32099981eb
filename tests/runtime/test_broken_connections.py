"""What becomes of requests and workers when connections break in ways that a network has, and a test of one worker
has not?"""

import asyncio
import logging

import pytest
import uvloop

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import Disconnected
from tests.runtime.plane_helpers import ENDPOINT, Held, caller, connect, push, until


def test_a_request_on_a_connection_that_is_just_breaking_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        runtime = DistributedRuntime(discovery_backend="mem")
        held = Held()
        await runtime.endpoint(ENDPOINT).start_push_endpoint(held)
        client = await connect(runtime)
        first = push(client, None)
        await held.wait(1)
        [connection] = runtime.pool._connections.values()
        assert connection._transport is not None
        connection._transport.abort()  # as where a peer is found gone: the connection hears of it a turn later
        late = [push(client, None, runtime.instance_id) for _ in range(2)]
        connection.tick()
        for sink in (first, *late):
            assert isinstance((await sink.finished()).error, Disconnected)
        await runtime.close()

    with caplog.at_level(logging.ERROR):
        uvloop.run(scenario())  # workers and frontends run on it; it refuses to write to what is closed
    assert caplog.records == []


async def test_who_lost_all_its_connections_at_once_does_not_wait_out_its_workers_inhibition(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "600")
    async with caller() as one, caller() as other:
        workers = {one.instance_id: one, other.instance_id: other}
        held = Held()
        for worker in workers.values():
            await worker.endpoint(ENDPOINT).start_push_endpoint(held)
        client = await connect(runtime, count=2)
        for instance_id in workers:
            push(client, None, instance_id)
        await held.wait(2)
        for worker in workers.values():
            for connection in tuple(worker.server.connections):
                connection.drop("the test says so")
        await until(lambda: client.available_ids() == [])
        await until(lambda: client.available_ids() == sorted(workers))


async def test_one_lost_worker_among_others_stays_out_for_its_time(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_RUNTIME_INHIBITED_DURATION_SECS", "600")
    monkeypatch.setattr("dynamo.runtime.instances.ALONE_S", 0.01)
    async with caller() as one, caller() as other:
        held = Held()
        for worker in (one, other):
            await worker.endpoint(ENDPOINT).start_push_endpoint(held)
        client = await connect(runtime, count=2)
        push(client, None, one.instance_id)
        await held.wait(1)
        for connection in tuple(one.server.connections):
            connection.drop("the test says so")
        await until(lambda: client.available_ids() == [other.instance_id])
        await asyncio.sleep(0.1)  # ten times as long as it would take
        assert client.available_ids() == [other.instance_id]
