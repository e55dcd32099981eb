"""How are requests routed in KV mode whose workers read OpenAI's language themselves?"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo.frontend.service import FrontendService
from dynamo.frontend.text_prompt import Asked, prompt_tokens
from dynamo.llm import ModelInput, ModelType, register_model
from dynamo.llm.model_card import ModelRuntimeConfig
from dynamo.llm.protocols.passthrough import OPENAI_BYTES, OpenAIHead, OpenAIRequest
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.context import Context
from tests.frontend.front_door import CHAT, COMPLETIONS, StartFrontend, Wire, ask, chat, model_ready
from tests.frontend.kv_fleet import eventually, kv, router_of, series

STORY = "Once there was a cat that slept all day and hunted all night, and nobody minded. " * 20


class TextWorker:
    """Answers with its own name, once it may."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.runtime = DistributedRuntime(discovery_backend="mem")
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.running = 0

    async def start(self, directory: Path, *, as_bytes: bool) -> None:
        endpoint = self.runtime.endpoint("dynamo.text.generate")
        await endpoint.start_endpoint(self.answer_bytes if as_bytes else self.answer)
        config = ModelRuntimeConfig(runtime_data={OPENAI_BYTES: True} if as_bytes else {})
        kinds = ModelType.Chat | ModelType.Completions
        await register_model(ModelInput.Text, kinds, endpoint, directory, "text", runtime_config=config)

    async def answer(self, request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        self.running += 1
        try:
            await self.may_answer.wait()
            delta = {"role": "assistant", "content": self.name}
            yield {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
        finally:
            self.running -= 1

    async def answer_bytes(self, request: OpenAIRequest, context: Context) -> AsyncIterator[Any]:
        self.running += 1
        try:
            yield OpenAIHead(200, "application/json", [])
            await self.may_answer.wait()
            yield b'{"choices":[{"message":{"content":"%b"}}]}' % self.name.encode()
        finally:
            self.running -= 1


StartText = Callable[..., Awaitable[tuple[FrontendService, list[TextWorker]]]]


@pytest.fixture
async def start_text(
    start_frontend: StartFrontend, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartText]:
    """A frontend in KV mode with two text workers: `await start_text(as_bytes=False, **settings)`."""
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0.05")
    monkeypatch.setenv("DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS", "0.5")
    workers = [TextWorker("a"), TextWorker("b")]

    async def start(as_bytes: bool = False, **settings: Any) -> tuple[FrontendService, list[TextWorker]]:
        service = await start_frontend(**kv(**settings))
        for worker in workers:
            await worker.start(model_dir, as_bytes=as_bytes)
        await model_ready(service, "text", workers=2)
        return service, workers

    yield start
    for worker in workers:
        worker.may_answer.set()
        await worker.runtime.close()


async def who(service: FrontendService, content: str, headers: str = "") -> str:
    answer = await ask(service.port, CHAT, chat(content, model="text"), headers)
    assert answer.status == 200
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("as_bytes", [False, True])
async def test_load_decides_and_every_end_frees(start_text: StartText, as_bytes: bool) -> None:
    service, workers = await start_text(as_bytes)
    router = router_of(service, "text")
    for worker in workers:
        worker.may_answer.clear()
    wires = []
    for number in range(4):
        wires.append(await Wire.open(service.port))
        wires[-1].post(CHAT, chat(f"{number} {STORY}", model="text"))
        await eventually(lambda number=number: sum(router.scheduler.load.requests) == number + 1)
    await eventually(lambda: [worker.running for worker in workers] == [2, 2])
    assert sum(router.scheduler.load.prefill_tokens) == pytest.approx(4 * len(STORY) / 4, rel=0.1)
    wires[0].close()
    await eventually(lambda: sum(router.scheduler.load.requests) == 3)
    for worker in workers:
        worker.may_answer.set()
    for wire in wires[1:]:
        assert (await wire.read()).status == 200
    assert router.scheduler.load.idle
    assert not router._tickets
    assert router.stats.time_to_first_token_seconds.count == 3


@pytest.mark.parametrize("as_bytes", [False, True])
async def test_without_events_a_conversation_stays_where_it_began(start_text: StartText, as_bytes: bool) -> None:
    service, _ = await start_text(as_bytes, use_kv_events=False)
    homes = {number: await who(service, f"{number} {STORY}") for number in range(4)}
    for turn in range(3):
        for number in homes:
            assert await who(service, f"{number} {STORY}" + " and then?" * turn) == homes[number]
    hits = await series(service, "dynamo_component_router_kv_hit_rate_sum")
    assert sum(hits.values()) > 9


async def test_a_session_of_a_text_model_stays_where_it_was(start_text: StartText) -> None:
    service, _ = await start_text(session_affinity_ttl_secs=60)
    header = "x-dynamo-session-id: s\r\n"
    assert len({await who(service, f"{number} {STORY}", header) for number in range(6)}) == 1


async def test_overload_refuses_text_too(start_text: StartText) -> None:
    service, workers = await start_text(active_prefill_tokens_threshold=10)
    for worker in workers:
        worker.may_answer.clear()
    wires = [await Wire.open(service.port) for _ in workers]
    for wire in wires:
        wire.post(CHAT, chat(STORY, model="text"))
    await eventually(lambda: all(worker.running for worker in workers))
    refused = await ask(service.port, COMPLETIONS, {"model": "text", "prompt": [1, 2, 3]})
    assert refused.status == 529
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"prompt": b"[5, 6, 7]"}, [5, 6, 7]),
        ({"prompt": b'"abcdefghij"'}, [0x63626122, 0x67666564, 0x226A6968]),
        ({"prompt": b"[-1]"}, [0x5D312D5B]),
        ({"messages": b'[{"a":1}]'}, [0x61227B5B, 0x7D313A22]),
        ({"prompt": b"[[1,2],[3]]"}, [0x2C315B5B, 0x5B2C5D32]),
        ({}, [0]),
    ],
)
def test_what_is_known_of_a_prompt(asked: dict[str, bytes], tokens: list[int]) -> None:
    import msgspec

    assert prompt_tokens(Asked(**{name: msgspec.Raw(value) for name, value in asked.items()})) == tokens
