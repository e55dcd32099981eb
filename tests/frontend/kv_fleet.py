"""Workers with KV caches behind a frontend: simulated ones, and scripted ones that say how large they are."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dynamo.frontend.service import FrontendService
from dynamo.llm.model_card import ModelRuntimeConfig
from dynamo.mocker.args import parse_args
from dynamo.mocker.main import serve
from dynamo.router.config import KvRouterConfig, RouterConfig
from dynamo.router.model_router import ModelRouter
from dynamo.runtime import DistributedRuntime
from tests.frontend.front_door import CHAT, PATIENCE_S, Answer, StartWorker, ask, chat, fetch

BLOCK = 16
StartMocker = Callable[..., Awaitable["Mocker"]]


class Mocker:
    """One simulated worker with a runtime of its own."""

    def __init__(self) -> None:
        self.runtime = DistributedRuntime(discovery_backend="mem")
        self._serving: asyncio.Task[int] | None = None

    def start(self, directory: Path, *flags: str, name: str = "tiny") -> None:
        words = ["--model-path", str(directory), "--model-name", name, "--block-size", str(BLOCK), *flags]
        self._serving = asyncio.create_task(serve(self.runtime, parse_args(words)))

    @property
    def instance_id(self) -> int:
        return self.runtime.instance_id

    async def leave(self) -> None:
        self.runtime.shutdown()
        await self.runtime.close()
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)


def kv(**settings: Any) -> dict[str, Any]:
    """The frontend's settings for KV mode; those of `RouterConfig` apart from those of `KvRouterConfig`."""
    around = {name: settings.pop(name) for name in RouterConfig.__struct_fields__ if name in settings}
    return {"router_mode": "kv", "router": RouterConfig(config=KvRouterConfig(**settings), **around)}


async def start_sized(start_worker: StartWorker, **settings: Any) -> Any:
    """A scripted worker whose card says what a KV router needs."""
    facts = {"total_kv_blocks": 1000, "max_num_batched_tokens": 100, "kv_event_publishing_enabled": True}
    names = ("model", "endpoint", "model_aliases", "directory", "worker_type")
    options = {name: settings.pop(name) for name in names if name in settings}
    size = settings.pop("block_size", BLOCK)
    return await start_worker(
        kv_cache_block_size=size, runtime_config=ModelRuntimeConfig(**{**facts, **settings}), **options
    )


def router_of(service: FrontendService, model: str = "tiny") -> ModelRouter:
    """The router of a model that is ready."""
    found = service.models.get(model)
    assert found is not None
    (worker_set,) = found.sets.values()
    assert worker_set.router is not None
    return worker_set.router


async def eventually(true: Callable[[], Any], deadline_s: float = PATIENCE_S) -> None:
    """Wait for what nothing tells of."""
    async with asyncio.timeout(deadline_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def asked(service: FrontendService, content: str, headers: str = "", **fields: Any) -> Answer:
    """One chat, not streamed, with all of nvext that is about routing."""
    nvext = {"extra_fields": ["worker_id", "timing", "routing"], **fields.pop("nvext", {})}
    return await ask(service.port, CHAT, chat(content, **{"max_tokens": 3, "nvext": nvext, **fields}), headers)


def worker_of(answer: Answer) -> int:
    """Who answered."""
    return int(answer.json()["nvext"]["worker_id"]["decode_worker_id"])


async def series(service: FrontendService, name: str) -> dict[str, float]:
    """The series of one metric: labels as they stand, and values."""
    text = (await fetch(service.port, "/metrics")).body.decode()
    return {m[1] or "": float(m[2]) for m in re.finditer(rf"^{name}(?:\{{(.*)\}})? (.*)$", text, re.MULTILINE)}


async def total(service: FrontendService, name: str, *labels: str) -> float:
    """The sum over the series of a metric that have these labels."""
    return sum(value for key, value in (await series(service, name)).items() if all(each in key for each in labels))
