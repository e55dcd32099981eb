"""How does a model come into a deployment, and leave it?"""

import asyncio
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dynamo.llm import (
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    register_llm,
    register_model,
    unregister_model,
    update_model_taints,
)
from dynamo.llm.model_card import CARD_PREFIX, CardKey, ModelDeploymentCard
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.errors import DynamoException, InvalidArgument

if TYPE_CHECKING:
    from dynamo.runtime import Endpoint

CHAT = ModelType.Chat | ModelType.Completions


@pytest.fixture
def endpoint(runtime: DistributedRuntime) -> "Endpoint":
    return runtime.endpoint("ns.backend.generate")


async def published(runtime: DistributedRuntime) -> dict[CardKey, ModelDeploymentCard]:
    found = await runtime.discovery.get_prefix(CARD_PREFIX)
    return {CardKey.parse(key): ModelDeploymentCard.from_json(value) for key, value in found.items()}


async def test_a_registered_model_stands_in_discovery(
    runtime: DistributedRuntime, endpoint: "Endpoint", model_dir: Path
) -> None:
    await register_model(
        ModelInput.Tokens,
        CHAT,
        endpoint,
        str(model_dir),
        "tiny",
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=16,
        model_aliases=["small"],
        needs=[[WorkerType.Prefill]],
        user_data={"x": 1},
    )
    ((key, card),) = (await published(runtime)).items()
    assert key == CardKey("ns", "backend", "generate", runtime.instance_id)
    assert card.names == ["tiny", "small"]
    assert (card.kv_cache_block_size, card.endpoint, card.user_data) == (16, "ns.backend.generate", {"x": 1})
    assert card.needs == [[WorkerType.Prefill]]


async def test_an_unregistered_model_is_gone(
    runtime: DistributedRuntime, endpoint: "Endpoint", model_dir: Path
) -> None:
    await register_llm(ModelInput.Tokens, "chat", endpoint, model_dir)
    files = await runtime.endpoint("ns.backend.model_files").client()
    await files.wait_for_instances(5)
    await unregister_model(endpoint)
    assert await published(runtime) == {}
    assert runtime.served == []
    await unregister_model(endpoint)


async def test_the_name_defaults_to_the_directory_s(endpoint: "Endpoint", model_dir: Path) -> None:
    card = await register_model(ModelInput.Tokens, CHAT, endpoint, model_dir)
    assert card.display_name == model_dir.name


async def test_adapters_come_and_go_beside_their_model(
    runtime: DistributedRuntime, endpoint: "Endpoint", model_dir: Path
) -> None:
    await register_model(ModelInput.Tokens, CHAT, endpoint, model_dir, "base")
    for name in ("pirate", "poet"):
        await register_model(
            ModelInput.Tokens, CHAT, endpoint, "/adapters", "base", lora_name=name, base_model_path=model_dir
        )
    cards = await published(runtime)
    assert sorted(card.display_name for card in cards.values()) == ["base", "pirate", "poet"]
    await unregister_model(endpoint, lora_name="pirate")
    assert sorted(card.display_name for card in (await published(runtime)).values()) == ["base", "poet"]
    await unregister_model(endpoint)
    assert await published(runtime) == {}


async def test_taints_are_published_anew(runtime: DistributedRuntime, endpoint: "Endpoint", model_dir: Path) -> None:
    with pytest.raises(InvalidArgument, match="call register_model first"):
        await update_model_taints(endpoint, {"a"})
    await register_model(ModelInput.Tokens, CHAT, endpoint, model_dir)
    await update_model_taints(endpoint, {"slow"})
    (card,) = (await published(runtime)).values()
    assert card.runtime_config.taints == {"slow"}


async def test_two_workers_of_one_process_have_their_own_cards(
    runtime: DistributedRuntime, endpoint: "Endpoint", model_dir: Path
) -> None:
    for instance_id in (1, 2):
        await register_model(ModelInput.Tokens, CHAT, endpoint, model_dir, instance_id=instance_id)
    await unregister_model(endpoint, instance_id=1)
    assert [key.instance_id for key in await published(runtime)] == [2]


async def test_an_instance_id_of_another_live_worker_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_dir: Path
) -> None:
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    first, second = (DistributedRuntime(discovery_backend="file") for _ in range(2))
    try:
        for runtime in (first, second):
            runtime.instance_id = 7
        await register_model(ModelInput.Tokens, CHAT, first.endpoint("a.b.c"), model_dir)
        with pytest.raises(DynamoException):
            await register_model(ModelInput.Tokens, CHAT, second.endpoint("a.b.c"), model_dir)
    finally:
        await asyncio.gather(first.close(), second.close())


@pytest.mark.parametrize(
    "arguments",
    [
        {"media_decoder": object()},
        {"router_config": object()},
        {"tensor_model_config": {}},
        {"model_input": ModelInput.Tensor},
        {"model_type": ModelType.Embedding},
        {"runtime_config": ModelRuntimeConfig(tool_call_parser="hermes")},
        {"runtime_config": ModelRuntimeConfig(reasoning_parser="basic")},
    ],
)
async def test_features_of_later_versions_are_refused(
    endpoint: "Endpoint", model_dir: Path, arguments: dict[str, Any]
) -> None:
    call = {"model_input": ModelInput.Tokens, "model_type": CHAT, **arguments}
    with pytest.raises(NotImplementedError, match="is not in this version"):
        await register_model(endpoint=endpoint, model_path=model_dir, **call)


async def test_a_broken_directory_registers_nothing(
    runtime: DistributedRuntime, endpoint: "Endpoint", tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        await register_model(ModelInput.Tokens, CHAT, endpoint, tmp_path)
    assert await published(runtime) == {}


async def test_files_are_also_served_by_the_system_server(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    monkeypatch.setenv("DYN_SYSTEM_HOST", "127.0.0.1")
    runtime = DistributedRuntime(discovery_backend="mem")
    try:
        await register_model(ModelInput.Tokens, CHAT, runtime.endpoint("ns.c.e"), model_dir, "Tiny Model")
        assert runtime.system_server is not None
        url = f"{runtime.system_server.url}/v1/metadata/ns/c/e/tiny_model/_base/config.json"
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())
        assert body == (model_dir / "config.json").read_bytes()
    finally:
        await runtime.close()
