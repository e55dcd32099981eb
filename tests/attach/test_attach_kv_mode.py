"""Are two attached servers routed to by what each was sent before, in either mode of attaching?"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo.frontend.args import FrontendConfig, Limits
from dynamo.frontend.service import FrontendService
from dynamo.router.config import KvRouterConfig, RouterConfig
from dynamo.runtime import DistributedRuntime
from tests.attach.asking import chat, post, until
from tests.attach.pretend_server import PretendServer
from tests.attach.vllm_servers import StartAttach


@pytest.fixture
async def frontend(
    runtime: DistributedRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FrontendService]:
    """A frontend in KV mode that goes by what it sent."""
    monkeypatch.setenv("DYN_CACHE_DIR", str(tmp_path / "cache"))
    router = RouterConfig(config=KvRouterConfig(use_kv_events=False))
    config = FrontendConfig(http_port=0, router_mode="kv", router=router)
    service = FrontendService(runtime, config, Limits(graceful_shutdown_s=0.05))
    await service.start()
    yield service
    await service.close()


@pytest.mark.parametrize("mode", ["tokens", "openai"])
async def test_a_prompt_goes_back_to_the_server_that_had_it(
    server: PretendServer, frontend: FrontendService, attach: StartAttach, model_dir: Path, mode: str
) -> None:
    other = PretendServer(model_dir)
    await other.start()
    try:
        for each in (server, other):
            each.running = 0
            await attach(each.url, mode=mode)
        await until(
            lambda: (
                (model := frontend.models.get("tiny")) is not None
                and model.ready
                and sum(each.worker_count for each in model.sets.values()) == 2
            )
        )

        async def home(number: int) -> PretendServer:
            before = len(server.seen)
            body = chat(f"{number} " + "tell me a story of a cat and a dog " * 8, max_tokens=2)
            assert (await post(frontend.url, "/v1/chat/completions", body))[0] == 200
            asked = [path for path, _, _ in server.seen[before:] if "completions" in path or "generate" in path]
            return server if asked else other

        homes = [await home(number) for number in range(12)]
        assert set(homes) == {server, other}
        assert [await home(number) for number in range(12)] == homes
        model = frontend.models.get("tiny")
        assert model is not None
        (workers,) = model.sets.values()
        assert workers.router is not None
        assert workers.router.scheduler.load.idle
    finally:
        await other.stop()
