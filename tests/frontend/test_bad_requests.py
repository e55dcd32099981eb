"""What a client may get wrong, and the answer it gets."""

import json

import pytest

from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
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

FLAT_TYPES = {400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 413: "Content Too Large"}


def refused(answer: Answer, status: int, *, param: str | None = None) -> str:
    """Check the form of an error; gives back its message."""
    body = answer.json()
    assert answer.status == status, body
    assert answer.headers["content-type"] == "application/json"
    assert "x-request-id" in answer.headers
    assert body["error"]["message"] == body["message"]
    assert body["code"] == status
    assert body["error"]["param"] == param
    assert body["error"]["type"]
    assert body["error"]["code"]
    return str(body["message"])


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{bad", None, "JSON"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"\xff"}]}', None, ""),
        (b"", None, ""),
        (b"[]", None, ""),
        (b"\x00\x01\x02", None, ""),
        (chat(temperature="hot"), "temperature", "temperature"),
        (chat(temperature=7), "temperature", "between 0 and 2"),
        (chat(foo=1), "foo", "Unsupported parameter(s): `foo`"),
        ({"model": "tiny", "messages": []}, "messages", "messages"),
        ({"model": "tiny"}, "messages", "messages"),
        (chat(max_tokens=0), "max_tokens", "at least 1"),
        (chat(n=0), "n", "at least 1"),
        (chat(stream="yes"), "stream", "stream"),
        (chat(n=2, nvext={"extra_fields": ["completion_token_ids"]}), "nvext.extra_fields", "exactly one choice"),
    ],
)
async def test_a_wrong_chat_request_is_told_what_is_wrong(
    served: Served, body: object, param: str | None, words: str
) -> None:
    service, _ = served
    assert words in refused(await ask(service.port, CHAT, body), 400, param=param)


async def test_the_flat_fields_are_those_of_the_peer(served: Served) -> None:
    service, _ = served
    body = (await ask(service.port, CHAT, {"model": "tiny", "messages": []})).json()
    assert body["type"] == "Bad Request"
    assert body["error"]["type"] == "invalid_request_error"


async def test_a_stream_that_cannot_begin_has_its_own_status(served: Served) -> None:
    service, _ = served
    refused(await ask(service.port, CHAT, chat(stream=True, temperature=7)), 400, param="temperature")


async def test_a_prompt_over_the_context_is_refused_before_the_stream(served: Served) -> None:
    service, _ = served
    body = (await ask(service.port, CHAT, chat("word " * 200_000, stream=True))).json()
    assert body["code"] == 400
    assert body["error"]["code"] == "context_length_exceeded"


async def test_unknown_model(served: Served) -> None:
    service, _ = served
    answer = await ask(service.port, CHAT, chat() | {"model": "nobody"})
    assert "nobody" in refused(answer, 404, param="model")
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_before_any_model_there_is_a_404_with_a_body(start_frontend: StartFrontend) -> None:
    service = await start_frontend()
    assert "tiny" in refused(await ask(service.port, CHAT, chat()), 404, param="model")
    assert (await fetch(service.port, "/v1/models")).json() == {"object": "list", "data": []}


async def test_unknown_route(served: Served) -> None:
    service, _ = served
    assert refused(await fetch(service.port, "/nope"), 404) == "Route not found: GET /nope"
    assert refused(await fetch(service.port, "/busy"), 404) == "Route not found: GET /busy"


async def test_wrong_method_names_the_right_one(served: Served) -> None:
    service, _ = served
    answer = await fetch(service.port, CHAT)
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"
    answer = await ask(service.port, "/v1/models", {})
    refused(answer, 405)
    assert answer.headers["allow"] == "GET, HEAD"


async def test_a_body_that_is_not_json_by_its_own_word(served: Served) -> None:
    service, _ = served
    wire = await Wire.open(service.port)
    wire.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    assert "application/json" in refused(await wire.read(), 415)
    wire.close()


async def test_an_announced_oversize_body_is_refused_unread(
    start_frontend: StartFrontend, start_worker: StartWorker
) -> None:
    service = await start_frontend(limits={"body_limit_bytes": 1000})
    wire = await Wire.open(service.port)
    wire.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode())
    assert "1000 bytes" in refused(await wire.read(), 413)
    wire.close()


async def test_an_unannounced_oversize_body_is_refused(start_frontend: StartFrontend) -> None:
    service = await start_frontend(limits={"body_limit_bytes": 1000})
    wire = await Wire.open(service.port)
    wire.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    for _ in range(3):
        wire.send(b"200\r\n" + b"x" * 512 + b"\r\n")
    refused(await wire.read(), 413)
    wire.close()


async def test_a_body_in_pieces_is_put_together(served: Served) -> None:
    service, worker = served
    worker.auto = "whole"
    data = json.dumps(chat("long " * 5000)).encode()
    wire = await Wire.open(service.port)
    wire.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[:10])
    await wire.writer.drain()
    for start in range(10, len(data), 7000):
        wire.send(data[start : start + 7000])
        await wire.writer.drain()
    assert (await wire.read()).json()["choices"][0]["message"]["content"] == "whole"
    wire.close()


async def test_a_client_that_asks_first_is_told_to_continue(served: Served) -> None:
    service, worker = served
    worker.auto = "x"
    data = json.dumps(chat()).encode()
    wire = await Wire.open(service.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(data)}\r\n\r\n"
    wire.send(head.encode())
    assert (await wire.head())[0] == 100
    wire.send(data)
    assert (await wire.read()).status == 200
    wire.close()


async def test_a_truncated_body_harms_nobody(served: Served) -> None:
    service, worker = served
    worker.auto = "x"
    wire = await Wire.open(service.port)
    wire.send(f'POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{"model":'.encode())
    await wire.writer.drain()
    wire.close()
    await wire.writer.wait_closed()
    assert (await ask(service.port, CHAT, chat())).status == 200


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00hello\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nbad header\r\n\r\n"]
)
async def test_bytes_that_are_no_http_get_a_400(served: Served, garbage: bytes) -> None:
    service, _ = served
    wire = await Wire.open(service.port)
    wire.send(garbage)
    answer = await wire.read()
    assert answer.status == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert await wire.closed()


async def test_a_header_injection_in_the_request_id_is_not_echoed(served: Served) -> None:
    service, worker = served
    worker.auto = "x"
    answer = await ask(service.port, CHAT, chat(), "x-request-id: caf\xe9 two words\r\n")
    assert " " not in answer.headers["x-request-id"]
    assert answer.status == 200


async def test_a_pin_that_is_no_number(served: Served) -> None:
    service, _ = served
    answer = await ask(service.port, CHAT, chat(), "x-dynamo-worker-instance-id: nine\r\n")
    assert "nine" in refused(answer, 400, param="x-dynamo-worker-instance-id")


async def test_a_model_that_answers_no_chats(start_frontend: StartFrontend, start_worker: StartWorker) -> None:
    from dynamo.llm import ModelType

    service = await start_frontend()
    worker = await start_worker(model_type=ModelType.Completions)
    await model_ready(service, "tiny")
    refused(await ask(service.port, CHAT, chat()), 404, param="model")
    worker.auto = "x"
    assert (await ask(service.port, COMPLETIONS, {"model": "tiny", "prompt": "a"})).status == 200


async def test_failures_are_counted(served: Served) -> None:
    service, _ = served
    await ask(service.port, CHAT, chat(temperature=7))
    await ask(service.port, CHAT, chat() | {"model": "nobody"})
    text = (await fetch(service.port, "/metrics")).body.decode()
    assert 'dynamo_frontend_failures_total{class="InvalidRequest",reason="request.invalid"} 1.0' in text
    assert 'dynamo_frontend_failures_total{class="NotFound",reason="request.not_found"} 1.0' in text
    assert 'error_type="not_found"' in text
    assert 'model="unknown_model"' in text
    assert "nobody" not in text
