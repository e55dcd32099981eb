"""Clients that do not read: they get bigger events, cost bounded memory, and slow nobody else down."""

import asyncio
import socket

import pytest

from dynamo.frontend import stream_answer
from dynamo.frontend.service import FrontendService
from tests.frontend.front_door import CHAT, Served, Taken, Wire, ask, chat

SMALL_BUFFER = 4096  # bytes the two kernels hold, so that few tokens fill them


async def slow_client(service: FrontendService) -> Wire:
    """A connection whose client takes little at a time."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", service.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=SMALL_BUFFER)
    wire = Wire(reader, writer)
    wire.get("/live")
    await wire.read()
    for connection in service._http.connections:  # type: ignore[union-attr]
        assert connection.transport is not None
        ours = connection.transport.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
    return wire


def unsent(service: FrontendService) -> int:
    """Bytes that wait in the write buffers of all client connections."""
    connections = service._http.connections  # type: ignore[union-attr]
    return sum(c.transport.get_write_buffer_size() for c in connections if c.transport is not None)


async def say_much(taken: Taken, tokens: int) -> None:
    """Many tokens, an engine step each."""
    for i in range(tokens):
        taken.send(token_ids=[100 + i % 50])
        await asyncio.sleep(0)


async def test_a_slow_client_gets_all_its_text_in_few_events_and_bounded_memory(served: Served) -> None:
    service, worker = served
    tokens = 5_000
    wire = await slow_client(service)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    saying = asyncio.create_task(say_much(taken, tokens))
    most = 0
    while not saying.done():
        most = max(most, unsent(service))
        await asyncio.sleep(0.001)
    assert most < 128 * 1024  # the high-water mark is 64 KiB; the events of all tokens are 1 MB
    worker.auto = "others are served"
    assert (await ask(service.port, CHAT, chat())).status == 200
    taken.finish("length")
    taken.stream.end()
    wire.reader._limit = 1 << 26  # type: ignore[attr-defined] # now it reads
    answer = await wire.read()
    expected = taken._tokenizer.decode([100 + i % 50 for i in range(tokens)])
    assert answer.text() == expected
    assert len(answer.events()) < tokens / 2
    assert answer.data()[-1]["choices"][0]["finish_reason"] == "length"
    wire.close()


async def test_log_probabilities_of_merged_events_are_kept(served: Served) -> None:
    service, worker = served
    wire = await slow_client(service)
    wire.post(CHAT, chat(stream=True, logprobs=True))
    taken = await worker.take()
    for _ in range(2000):
        taken.send(token_ids=[100], log_probs=[-1.0])
        await asyncio.sleep(0)
    taken.finish("length")
    taken.stream.end()
    wire.reader._limit = 1 << 26  # type: ignore[attr-defined]
    answer = await wire.read()
    entries = [e for d in answer.data() for c in d["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert len(entries) == 2000
    assert len(answer.events()) < 2000
    wire.close()


async def test_a_client_that_never_reads_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_answer, "STALLED_CLIENT_S", 0.05)
    service, worker = served
    wire = await slow_client(service)
    wire.post(CHAT, chat(stream=True))
    taken = await worker.take()
    saying = asyncio.create_task(say_much(taken, 5_000))
    async with asyncio.timeout(10):
        await taken.cancelled.wait()
    taken.stream.end()
    await saying
    wire.close()
