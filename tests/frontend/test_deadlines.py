"""Does a request end when its client stops waiting, and is more than can be answered refused at once?"""

import asyncio
import json
import time

import pytest

from dynamo.frontend.args import Limits, parse
from tests.frontend.front_door import (
    CHAT,
    Answer,
    Served,
    StartFrontend,
    StartWorker,
    Wire,
    ask,
    chat,
    fetch,
    model_ready,
)


def content_of(answer: Answer) -> str:
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


SOON = "x-dynamo-request-timeout-ms: 200\r\n"


async def test_a_request_without_a_token_in_its_time_is_504_and_is_cancelled(served: Served) -> None:
    service, worker = served
    answer = await ask(service.port, CHAT, chat(), SOON)
    assert answer.status == 504
    assert "x-dynamo-request-timeout-ms" in answer.json()["error"]["message"]
    taken = await worker.take()
    async with asyncio.timeout(5):
        await taken.cancelled.wait()


async def test_a_stream_whose_time_is_over_ends_with_an_error(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(stream=True), SOON)
    (await worker.take()).say("half")
    await wire.head()
    rest = (await wire.read_rest()).decode()
    assert '"content":"h' in rest
    error = next(line for line in rest.splitlines() if line.startswith("data: ") and '"error"' in line)
    assert json.loads(error[6:])["code"] == 504
    assert "[DONE]" not in rest


async def test_a_worker_knows_what_is_left_of_the_time(served: Served) -> None:
    service, worker = served
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(), "x-dynamo-request-timeout-ms: 60000\r\n")
    taken = await worker.take()
    left = taken.context.time_left()
    assert left is not None
    assert 50 < left < 60
    taken.answer("in time")
    assert content_of(await wire.read()) == "in time"


async def test_the_servers_own_limit_holds_for_all_and_a_client_may_ask_for_less(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(limits={"request_timeout_s": 0.3})
    worker = await start_worker()
    await model_ready(service, "tiny")
    started = time.monotonic()
    assert (await ask(service.port, CHAT, chat())).status == 504
    assert time.monotonic() - started >= 0.3
    wires = [await Wire.open(service.port) for _ in range(2)]
    for wire, header in zip(wires, ("60000", "100"), strict=True):
        wire.post(CHAT, chat(), f"x-dynamo-request-timeout-ms: {header}\r\n")
    await worker.take()
    left = [(await worker.take()).context.time_left() for _ in range(2)]
    assert all(each is not None for each in left)
    assert sorted(each <= limit for each, limit in zip(left, (0.3, 0.1), strict=True) if each is not None) == [
        True,
        True,
    ]
    for wire in wires:
        assert (await wire.read()).status == 504


@pytest.mark.parametrize("value", ["soon", "0", "-5", "1.5", "604800001"])
async def test_a_timeout_that_is_no_number_is_named(served: Served, value: str) -> None:
    service, _ = served
    answer = await ask(service.port, CHAT, chat(), f"x-dynamo-request-timeout-ms: {value}\r\n")
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "x-dynamo-request-timeout-ms"


async def test_beyond_the_frontends_limit_a_request_is_refused_at_once(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(limits={"max_requests": 2})
    worker = await start_worker()
    await model_ready(service, "tiny")
    wires = [await Wire.open(service.port) for _ in range(2)]
    for wire in wires:
        wire.post(CHAT, chat())
    taken = [await worker.take() for _ in wires]
    refused = await ask(service.port, CHAT, chat())
    assert (refused.status, refused.headers["retry-after"]) == (529, "1")
    assert "DYN_HTTP_REQUEST_LIMIT" in refused.json()["error"]["message"]
    assert (await fetch(service.port, "/health")).status == 200
    for each in taken:
        each.answer("done")
    assert [content_of(await wire.read()) for wire in wires] == ["done", "done"]
    worker.auto = "again"
    assert (await ask(service.port, CHAT, chat())).status == 200


@pytest.mark.parametrize("name", ["DYN_HTTP_REQUEST_TIMEOUT_SECS", "DYN_HTTP_REQUEST_LIMIT"])
def test_limits_are_read_from_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "3")
    limits = Limits.from_env()
    assert (limits.request_timeout_s, limits.max_requests) == ((3, 0) if "TIMEOUT" in name else (0, 3))
    monkeypatch.setenv(name, "-1")
    with pytest.raises(SystemExit):
        parse([])
    assert name in capsys.readouterr().err
