"""Clients that people use, unchanged: the official `openai` package and LangChain's `ChatOpenAI`."""

import openai
import pytest
from langchain_openai import ChatOpenAI

from dynamo.runtime.errors import EngineShutdown, WorkerOverloaded
from tests.frontend.front_door import Served, Wire


@pytest.fixture
def client(served: Served) -> openai.AsyncOpenAI:
    service, worker = served
    worker.auto = "a fine answer"
    return openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=10)


MESSAGES = [{"role": "user", "content": "Hello"}]


async def test_openai_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=50)
    assert answer.choices[0].message.content == "a fine answer"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


async def test_openai_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    text, usage, role = "", None, None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            role = choice.delta.role or role
    assert (text, role) == ("a fine answer", "assistant")
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_openai_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "a fine answer"


async def test_openai_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt=["one", "two"], n=2)
    assert [choice.text for choice in answer.choices] == ["a fine answer"] * 4
    stream = await client.completions.create(model="tiny", prompt="one", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "a fine answer"


async def test_openai_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_openai_bad_request(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    assert "temperature" in caught.value.message


async def test_openai_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_openai_sees_overload_and_errors_mid_stream(client: openai.AsyncOpenAI, served: Served) -> None:
    _, worker = served
    worker.auto = None
    stream = await _begun(client, worker)
    worker_error = EngineShutdown("the engine died")
    stream[1].stream.fail(worker_error)
    with pytest.raises(openai.APIError, match="the engine died"):
        async for _ in stream[0]:
            pass


async def _begun(client: openai.AsyncOpenAI, worker):
    import asyncio

    asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    taken = await worker.take()
    taken.say("half")
    return await asking, taken


async def test_openai_overload(client: openai.AsyncOpenAI, served: Served) -> None:
    import asyncio

    _, worker = served
    worker.auto = None
    asking = asyncio.create_task(client.chat.completions.create(model="tiny", messages=MESSAGES))
    (await worker.take()).stream.fail(WorkerOverloaded("full"))
    with pytest.raises(openai.APIStatusError) as caught:
        await asking
    assert caught.value.status_code == 529


async def test_langchain_chat_and_stream(served: Served) -> None:
    service, worker = served
    worker.auto = "a fine answer"
    model = ChatOpenAI(model="tiny", base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    answer = await model.ainvoke("Hello")
    assert answer.content == "a fine answer"
    assert answer.usage_metadata is not None
    pieces = [piece.content async for piece in model.astream("Hello")]
    assert "".join(map(str, pieces)) == "a fine answer"
    assert len(pieces) > 2


async def test_langchain_bad_request(served: Served) -> None:
    service, _ = served
    model = ChatOpenAI(model="tiny", base_url=f"{service.url}/v1", api_key="none", max_retries=0, temperature=9)
    with pytest.raises(openai.BadRequestError):
        await model.ainvoke("Hello")


async def test_curl_like_clients_read_the_flat_error(served: Served) -> None:
    service, _ = served
    wire = await Wire.open(service.port)
    wire.post("/v1/chat/completions", {"model": "nobody", "messages": MESSAGES})
    body = (await wire.read()).json()
    assert (body["type"], body["code"]) == ("Not Found", 404)
    wire.close()
