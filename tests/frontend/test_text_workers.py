"""Do requests reach workers that read OpenAI's language themselves as they are, and answers the clients?"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.frontend.chunk_fold import ChunkFold
from dynamo.frontend.service import FrontendService
from dynamo.llm import ModelInput, ModelType, register_model
from dynamo.llm.model_card import ModelRuntimeConfig
from dynamo.llm.protocols.passthrough import OPENAI_BYTES, OpenAIHead, OpenAIRequest
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.annotated import Annotated
from dynamo.runtime.context import Context
from dynamo.runtime.errors import HttpError, InvalidArgument
from dynamo.runtime.streams import ResponseStream
from tests.frontend.front_door import (
    CHAT,
    COMPLETIONS,
    PATIENCE_S,
    Answer,
    Served,
    StartFrontend,
    Wire,
    ask,
    chat,
    model_ready,
)

Handler = Callable[[dict[str, Any], Context], AsyncIterator[Any]]
StartText = Callable[..., Awaitable[FrontendService]]


@pytest.fixture
async def start_text(runtime: DistributedRuntime, start_frontend: StartFrontend, model_dir: Path) -> StartText:
    """A frontend, and a worker of the model `text` in the map form: `await start_text(handler)`."""

    async def start(handler: Handler, **config: Any) -> FrontendService:
        service = await start_frontend(**config)
        endpoint = runtime.endpoint("dynamo.text.generate")
        await endpoint.start_endpoint(handler)
        await register_model(ModelInput.Text, ModelType.Chat | ModelType.Completions, endpoint, model_dir, "text")
        await model_ready(service, "text")
        return service

    return start


def chunk(content: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "theirs", "choices": [choice], **more}


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


async def hello(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
    """A greeting in two pieces."""
    yield chunk("Hel")
    yield chunk("lo", "stop")
    yield {**chunk(), "choices": [], "usage": USAGE}


async def test_a_stream_is_the_workers_chunks_and_a_done(start_text: StartText) -> None:
    service = await start_text(hello)
    answer = await ask(service.port, CHAT, chat(model="text", stream=True))
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.data() == [chunk("Hel"), chunk("lo", "stop"), {**chunk(), "choices": [], "usage": USAGE}]
    assert answer.events()[-1] == "data: [DONE]"


async def test_one_body_is_all_chunks_together(start_text: StartText) -> None:
    service = await start_text(hello)
    answer = await ask(service.port, CHAT, chat(model="text"))
    assert answer.json() == {
        "id": "c1",
        "object": "chat.completion",
        "created": 5,
        "model": "theirs",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": USAGE,
    }


async def test_the_worker_gets_what_the_client_sent_and_is_asked_to_stream(start_text: StartText) -> None:
    seen: list[dict[str, Any]] = []

    async def handler(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        seen.append(request)
        yield chunk("x", "stop")

    service = await start_text(handler)
    body = chat(model="text", field_of_tomorrow={"a": [1]}, temperature=77)
    await ask(service.port, CHAT, body)
    assert seen == [{**body, "stream": True, "stream_options": {"include_usage": True}}]


async def test_completions_are_passed_on_too(start_text: StartText) -> None:
    async def handler(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        for text in request["prompt"].split():
            yield {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": None}]}

    service = await start_text(handler)
    answer = await ask(service.port, COMPLETIONS, {"model": "text", "prompt": "a b"})
    assert answer.json() == {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "ab", "finish_reason": None, "logprobs": None}],
    }


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InvalidArgument("messages are too blue", "messages"), 400, "messages are too blue"),
        (HttpError(418, "a teapot"), 418, "a teapot"),
        (RuntimeError("bug"), 500, "RuntimeError: bug"),
    ],
)
async def test_an_error_before_the_answer_has_its_status(
    start_text: StartText, error: Exception, status: int, words: str
) -> None:
    async def handler(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        raise error
        yield {}

    service = await start_text(handler)
    for stream in (False, True):
        answer = await ask(service.port, CHAT, chat(model="text", stream=stream))
        assert answer.status == status
        assert answer.json()["error"]["message"] == words


async def test_an_error_in_a_stream_is_its_last_event(start_text: StartText) -> None:
    async def handler(request: dict[str, Any], context: Context) -> AsyncIterator[Any]:
        yield chunk("Hel")
        await asyncio.sleep(0.05)  # the first piece goes out by itself
        yield Annotated(event="error", comment=["ran out of ink"])

    service = await start_text(handler)
    answer = await ask(service.port, CHAT, chat(model="text", stream=True))
    first, last = answer.events()
    assert json.loads(first.removeprefix("data: ")) == chunk("Hel")
    assert last.startswith("event: error\ndata: ")
    assert "ran out of ink" in last


@pytest.mark.parametrize("item", [5, b"bytes", ["a"], "text"])
async def test_what_is_no_chunk_is_an_error(start_text: StartText, item: Any) -> None:
    async def handler(request: dict[str, Any], context: Context) -> AsyncIterator[Any]:
        yield item

    service = await start_text(handler)
    for stream in (False, True):
        answer = await ask(service.port, CHAT, chat(model="text", stream=stream))
        assert answer.status == 500
        assert "OpenAI's form" in answer.json()["error"]["message"]


async def test_a_client_that_leaves_takes_the_request_along(start_text: StartText) -> None:
    left = asyncio.Event()

    async def handler(request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        yield chunk("Hel")
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    service = await start_text(handler)
    wire = await Wire.open(service.port)
    wire.post(CHAT, chat(model="text", stream=True))
    await wire.head()
    wire.close()
    async with asyncio.timeout(PATIENCE_S):
        await left.wait()


async def test_models_of_tokens_and_of_text_live_side_by_side(
    served: Served, runtime: DistributedRuntime, model_dir: Path
) -> None:
    service, worker = served
    endpoint = runtime.endpoint("dynamo.text.generate")
    await endpoint.start_endpoint(hello)
    await register_model(ModelInput.Text, ModelType.Chat, endpoint, model_dir, "text")
    await model_ready(service, "text")
    worker.auto = "from tokens"
    tokens, text = await asyncio.gather(
        ask(service.port, CHAT, chat(model="tiny")), ask(service.port, CHAT, chat(model="text"))
    )
    assert tokens.json()["choices"][0]["message"]["content"] == "from tokens"
    assert text.json()["choices"][0]["message"]["content"] == "Hello"
    assert (await ask(service.port, COMPLETIONS, {"model": "text", "prompt": "a"})).status == 404
    assert (await ask(service.port, CHAT, b"{")).status == 400


def counted(service: FrontendService, name: str, **labels: str) -> float:
    """The one sample of a metric of the frontend with these labels."""
    families = text_string_to_metric_families(service.metrics.render().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == f"dynamo_frontend_{name}"]
    (value,) = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
    return float(value)


async def test_requests_are_counted(start_text: StartText) -> None:
    service = await start_text(hello)
    await ask(service.port, CHAT, chat(model="text"))
    assert counted(service, "requests_total", model="text", request_type="unary", status="success") == 1
    assert counted(service, "active_requests", model="text") == 0


def test_tool_calls_and_logprobs_are_put_together() -> None:
    def piece(index: int, **fields: Any) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": fields.pop("delta", {}), **fields}]}

    def call(number: int, id_: str | None, name: str | None, arguments: str) -> dict[str, Any]:
        return {"index": number, "id": id_, "function": {"name": name, "arguments": arguments}}

    fold = ChunkFold()
    fold.add({"id": "x", "object": "chat.completion.chunk", **piece(1, delta={"role": "assistant", "content": "B"})})
    fold.add(piece(0, delta={"tool_calls": [call(0, "a", "f", '{"x"'), call(1, "b", "g", "{}")]}))
    fold.add(piece(0, delta={"tool_calls": [call(0, None, None, ":1}")]}, logprobs={"content": [1]}))
    fold.add(piece(0, delta={"reasoning_content": "hm"}, logprobs={"content": [2]}, finish_reason="tool_calls"))
    first, second = fold.whole()["choices"]
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in first["message"]["tool_calls"]] == [
        ("a", "f", '{"x":1}'),
        ("b", "g", "{}"),
    ]
    assert (first["logprobs"], first["finish_reason"]) == ({"content": [1, 2]}, "tool_calls")
    assert first["message"]["reasoning_content"] == "hm"
    assert second["message"]["content"] == "B"


def test_a_whole_answer_is_its_own_fold() -> None:
    whole = {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": "Hi"}}]}
    fold = ChunkFold()
    fold.add(whole)
    assert fold.whole() == whole


# --- bytes


class Taken:
    """A request that came to a worker of the byte form, and its stream."""

    def __init__(self, request: OpenAIRequest, stream: ResponseStream) -> None:
        self.request = request
        self.stream = stream
        self.cancelled = asyncio.Event()
        stream.context.on_stop(self.cancelled.set)

    def reply(self, status: int, content_type: str, *pieces: bytes, **headers: str) -> None:
        self.stream.send(OpenAIHead(status, content_type, [(k.replace("_", "-"), v) for k, v in headers.items()]))
        for piece in pieces:
            self.stream.send(piece)
        self.stream.end()


class BytesWorker:
    """Leaves the answers to the test."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[Taken] = asyncio.Queue()

    def handle(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        self.requests.put_nowait(Taken(msgspec.msgpack.decode(payload, type=OpenAIRequest), stream))

    async def take(self) -> Taken:
        async with asyncio.timeout(PATIENCE_S):
            return await self.requests.get()


Bytes = tuple[FrontendService, BytesWorker]


@pytest.fixture
async def bytes_served(runtime: DistributedRuntime, start_frontend: StartFrontend, model_dir: Path) -> Bytes:
    """A frontend, and a worker of the model `text` in the byte form."""
    service, worker = await start_frontend(), BytesWorker()
    endpoint = runtime.endpoint("dynamo.backend.generate")
    await endpoint.start_push_endpoint(worker.handle)
    await register_model(
        ModelInput.Text,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        "somewhere/else",
        "text",
        runtime_config=ModelRuntimeConfig(runtime_data={OPENAI_BYTES: True}),
        skip_model_assets=True,
    )
    await model_ready(service, "text")
    return service, worker


BODY = b'{ "stream":false,  "model" : "text", "weird": 1.0e+00, "messages":[{"role":"user","content":"\\u00e9"}] }'


async def test_bodies_go_both_ways_byte_for_byte(bytes_served: Bytes) -> None:
    service, worker = bytes_served
    asking = asyncio.create_task(ask(service.port, CHAT, BODY, "X-Mine: 7\r\nAuthorization: Bearer k\r\n"))
    taken = await worker.take()
    assert (taken.request.path, taken.request.body) == ("/v1/chat/completions", BODY)
    assert dict(taken.request.headers) == {
        "Content-Type": "application/json",
        "X-Mine": "7",
        "Authorization": "Bearer k",
    }
    taken.reply(200, "application/json; charset=utf-8", b'{ "a":', b" 1 }\n", x_engine="e")
    answer = await asking
    assert (answer.status, answer.body) == (200, b'{ "a": 1 }\n')
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers["x-engine"] == "e"


async def test_an_errors_status_body_and_headers_are_the_servers_own(bytes_served: Bytes) -> None:
    service, worker = bytes_served
    asking = asyncio.create_task(ask(service.port, CHAT, BODY))
    (await worker.take()).reply(429, "text/plain", b"not now", Retry_After="9")
    answer = await asking
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (429, b"not now", "9")
    assert counted(service, "requests_total", status="error", error_type="overload") == 1


async def test_events_are_passed_on_as_they_come(bytes_served: Bytes) -> None:
    service, worker = bytes_served
    wire = await Wire.open(service.port)
    wire.post(CHAT, BODY)
    taken = await worker.take()
    taken.stream.send(OpenAIHead(200, "text/event-stream; charset=utf-8"))
    taken.stream.send(b"data: {odd")
    assert (await wire.head())[0] == 200
    assert await wire.chunk() == b"data: {odd"
    taken.stream.send(b"ly cut}\n\n: remark\n\n")
    assert await wire.chunk() == b"ly cut}\n\n: remark\n\n"
    taken.stream.end()
    assert await wire.read_rest() == b""
    wire.close()


async def test_a_client_that_leaves_cancels_at_the_worker(bytes_served: Bytes) -> None:
    service, worker = bytes_served
    wire = await Wire.open(service.port)
    wire.post(CHAT, BODY)
    taken = await worker.take()
    wire.close()
    async with asyncio.timeout(PATIENCE_S):
        await taken.cancelled.wait()


async def test_a_client_that_does_not_read_makes_the_worker_wait(bytes_served: Bytes) -> None:
    service, worker = bytes_served
    wire = await Wire.open(service.port, limit=1 << 10)
    wire.post(CHAT, BODY)
    taken = await worker.take()
    taken.stream.send(OpenAIHead(200, "text/event-stream"))
    piece = b"x" * 65536
    async with asyncio.timeout(PATIENCE_S):
        sent = 0
        while not taken.stream.congested:  # type: ignore[attr-defined]
            taken.stream.send(piece)
            sent += 1
            await asyncio.sleep(0.001)  # as long as it takes to be told
    assert sent < 1000
    taken.stream.end()
    await wire.head()
    assert await wire.read_rest() == piece * sent
    wire.close()


@pytest.mark.parametrize("first", [b"bytes", {"status": "x"}, {"status": 100, "content_type": "a"}, 5])
async def test_an_answer_without_a_head_is_an_error(bytes_served: Bytes, first: Any) -> None:
    service, worker = bytes_served
    asking = asyncio.create_task(ask(service.port, CHAT, BODY))
    taken = await worker.take()
    taken.stream.send(first)
    answer: Answer = await asking
    assert answer.status == 500


async def test_a_head_cannot_smuggle_headers(bytes_served: Bytes) -> None:
    service, worker = bytes_served
    asking = asyncio.create_task(ask(service.port, CHAT, BODY))
    (await worker.take()).reply(200, "text/plain", b"ok", x_bad="a\r\nSet-Cookie: b", x_good="c")
    answer = await asking
    assert answer.headers["x-good"] == "c"
    assert not {"x-bad", "set-cookie"} & set(answer.headers)


async def test_a_worker_that_ends_without_an_answer_is_told(bytes_served: Bytes) -> None:
    service, worker = bytes_served
    asking = asyncio.create_task(ask(service.port, CHAT, BODY))
    (await worker.take()).stream.end()
    assert (await asking).status == 503
