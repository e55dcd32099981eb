"""How does a worker tell the deployment which model it serves, and take that back?

The card of a model is put into discovery for as long as the process lives, and its files are served through the
runtime (`dynamo.llm.model_files`), so that frontends need no shared disk.
"""

import asyncio
import os
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from dynamo.llm import topology
from dynamo.llm.hub import fetch_model
from dynamo.llm.model_card import (
    CardKey,
    ModelDeploymentCard,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    lora_slug,
)
from dynamo.llm.model_directory import build_card, model_files
from dynamo.llm.model_files import ENDPOINT, ModelFileServer
from dynamo.runtime.component import Endpoint, ServedEndpoint
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.options import env_bool

_SERVED_TYPES = ModelType.Chat | ModelType.Completions | ModelType.Prefill
_LATER_CONFIG = (
    "tool_call_parser",
    "reasoning_parser",
    "tokenizer_backend",
    "structural_tag",
    "kv_state_endpoint",
)
"""Fields of `ModelRuntimeConfig` that ask for features of later versions."""


class _Published(NamedTuple):
    card: ModelDeploymentCard
    paths: dict[str, Path]  # by the file's name in the card; empty if the files are not served


class _Registry:
    """What one process has published through one runtime. The only owner of that state."""

    def __init__(self) -> None:
        self.cards: dict[CardKey, _Published] = {}
        self.lock = asyncio.Lock()
        self._servers: dict[tuple[str, str], tuple[ModelFileServer, ServedEndpoint]] = {}

    async def serve_files(self, runtime: DistributedRuntime, namespace: str, component: str) -> None:
        """Serve the files of all cards of a component; stop when there are none."""
        files = [
            (file.checksum, published.paths[file.name])
            for key, published in self.cards.items()
            if (key.namespace, key.component) == (namespace, component) and published.paths
            for file in published.card.files
        ]
        running = self._servers.get((namespace, component))
        if running is None and files:
            server = ModelFileServer()
            server.replace(files)
            endpoint = runtime.endpoint(f"{namespace}.{component}.{ENDPOINT}")
            served = await endpoint.start_endpoint(server.handle, graceful_shutdown=False)
            self._servers[namespace, component] = server, served
        elif running is not None:
            running[0].replace(files)
            if not files:
                del self._servers[namespace, component]
                await running[1].stop()

    async def metadata_file(self, name: str) -> bytes | None:
        """What the system server answers at `/v1/metadata/{name}`; see `metadata_name` [R21]."""
        for key, published in self.cards.items():
            for file, path in published.paths.items():
                if metadata_name(key, published.card, file) == name:
                    return await asyncio.to_thread(path.read_bytes)
        return None


def metadata_name(key: CardKey, card: ModelDeploymentCard, file: str) -> str:
    """The path of a card's file below `/v1/metadata/`."""
    return f"{key.namespace}/{key.component}/{key.endpoint}/{card.slug}/_base/{file}"


_registries: WeakKeyDictionary[DistributedRuntime, _Registry] = WeakKeyDictionary()


async def register_model(
    model_input: ModelInput,
    model_type: ModelType | str,
    endpoint: Endpoint,
    model_path: str | Path,
    model_name: str | None = None,
    *,
    worker_type: WorkerType = WorkerType.Aggregated,
    kv_cache_block_size: int | None = None,
    router_config: Any = None,
    runtime_config: ModelRuntimeConfig | None = None,
    tensor_model_config: Any = None,
    user_data: dict[str, Any] | None = None,
    custom_template_path: str | Path | None = None,
    media_decoder: Any = None,
    media_fetcher: Any = None,
    lora_name: str | None = None,
    base_model_path: str | Path | None = None,
    needs: list[list[WorkerType]] | None = None,
    self_host_metadata: bool | None = None,
    ignore_weights: bool = False,
    max_gpu_lora_count: int | None = None,
    model_aliases: list[str] | None = None,
    skip_model_assets: bool = False,
    instance_id: int | None = None,
) -> ModelDeploymentCard:
    """Publish that `endpoint` serves a model. Frontends begin to send requests once the endpoint is served too.

    Args:
        model_input: whether the worker reads tokens (the frontend does the text) or OpenAI's requests themselves.
        model_type: which requests it answers, as flags or as text such as `chat,completions`.
        model_path: a directory in Hugging Face layout, or the id of one on the hub, which is then downloaded.
        model_name: what requests call the model; default the directory's name, or the hub id.
        needs: worker types that must be there before the model is ready: an OR of ANDs [R23].
        self_host_metadata: whether to serve the model's files to frontends; default DYN_SELF_HOST_METADATA, on.
        lora_name: publish an adapter of the model at `base_model_path` (default: at `model_path`) under this name.
        skip_model_assets: the model has no files that a frontend needs.
        instance_id: for several workers in one process; default the endpoint's own.

    Raises:
        InvalidArgument: the model directory is missing or broken, or an argument is wrong.
        NotImplementedError: an argument asks for a feature of a later version.
        DiscoveryError: discovery cannot be written, or another live worker has this instance id.
    """
    _refuse_later_features(
        router_config=router_config,
        tensor_model_config=tensor_model_config,
        media_decoder=media_decoder,
        media_fetcher=media_fetcher,
    )
    types = ModelType.parse(model_type) if isinstance(model_type, str) else model_type
    _check_kind(model_input, types, runtime_config)
    reference = os.path.expanduser(str((lora_name and base_model_path) or model_path))  # noqa: ASYNC240 - no I/O
    directory = Path(reference)
    name = model_name or (directory.name if await asyncio.to_thread(directory.is_dir) else reference)
    if not skip_model_assets:
        directory = Path(await fetch_model(reference, ignore_weights=ignore_weights))
    custom = Path(custom_template_path) if custom_template_path else None
    card = await asyncio.to_thread(
        build_card,
        directory.absolute(),
        name=name,
        model_type=types,
        model_input=model_input,
        worker_type=worker_type,
        needs=needs,
        kv_cache_block_size=kv_cache_block_size,
        runtime_config=runtime_config,
        custom_template=custom,
        model_aliases=model_aliases,
        user_data=user_data,
        lora_name=lora_name,
        base_model=name if lora_name else None,
        max_gpu_lora_count=max_gpu_lora_count,
        skip_assets=skip_model_assets,
    )
    card.endpoint = endpoint.path
    hosted = env_bool("DYN_SELF_HOST_METADATA", True) if self_host_metadata is None else self_host_metadata
    paths = model_files(directory, custom) if hosted and card.files else {}
    await _publish(endpoint, instance_id, _Published(card, paths))
    return card


register_llm = register_model
"""The name of `register_model` in earlier versions."""


async def unregister_model(endpoint: Endpoint, lora_name: str | None = None, instance_id: int | None = None) -> None:
    """Take back what `register_model` published for this endpoint: one adapter, or the model with its adapters.

    A model that is not published is ignored. Raises DiscoveryError.
    """
    registry = _registry(endpoint.runtime)
    async with registry.lock:
        for key in _keys(registry, endpoint, instance_id):
            if lora_name is None or key.lora_slug == lora_slug(lora_name):
                del registry.cards[key]
                await endpoint.runtime.discovery.delete(str(key))
        await registry.serve_files(endpoint.runtime, endpoint.namespace, endpoint.component)


async def update_model_taints(endpoint: Endpoint, taints: set[str], instance_id: int | None = None) -> None:
    """Publish other taints [K47] for the models of this endpoint.

    Raises:
        InvalidArgument: no model is published for it.
        DiscoveryError: discovery cannot be written.
    """
    registry = _registry(endpoint.runtime)
    async with registry.lock:
        keys = _keys(registry, endpoint, instance_id)
        if not keys:
            raise InvalidArgument(f"no model is registered for {endpoint.path}: call register_model first")
        for key in keys:
            card = registry.cards[key].card
            card.runtime_config.taints = set(taints)
            await endpoint.runtime.discovery.put(str(key), card.to_json())


async def _publish(endpoint: Endpoint, instance_id: int | None, published: _Published) -> None:
    runtime, card = endpoint.runtime, published.card
    key = _key(endpoint, instance_id, card.lora.name if card.lora else None)
    registry = _registry(runtime)
    await runtime.started()
    if runtime.system_server is not None:
        runtime.system_server.serve_files(registry.metadata_file)
    async with registry.lock:
        before = registry.cards.get(key)
        registry.cards[key] = published
        try:
            # The files first: whoever sees the card may ask for them at once.
            await registry.serve_files(runtime, endpoint.namespace, endpoint.component)
            await runtime.discovery.put(str(key), card.to_json(), create=True)
        except BaseException:
            if before is None:
                del registry.cards[key]
            else:
                registry.cards[key] = before
            raise


def _registry(runtime: DistributedRuntime) -> _Registry:
    return _registries.setdefault(runtime, _Registry())


def _key(endpoint: Endpoint, instance_id: int | None, lora_name: str | None = None) -> CardKey:
    instance = endpoint.connection_id() if instance_id is None else instance_id
    return CardKey(endpoint.namespace, endpoint.component, endpoint.name, instance, lora_name and lora_slug(lora_name))


def _keys(registry: _Registry, endpoint: Endpoint, instance_id: int | None) -> list[CardKey]:
    own = _key(endpoint, instance_id)
    return [key for key in registry.cards if key[:4] == own[:4]]


def _check_kind(model_input: ModelInput, types: ModelType, config: ModelRuntimeConfig | None) -> None:
    if not types:
        raise InvalidArgument("model_type is empty: say which requests the model answers", "model_type")
    if types & ~_SERVED_TYPES:
        raise NotImplementedError(f"register_model: model_type {types & ~_SERVED_TYPES} is not in this version")
    if model_input is ModelInput.Tensor:
        raise NotImplementedError("register_model: ModelInput.Tensor is not in this version")
    if config is not None:
        default = ModelRuntimeConfig()
        asked = {name: getattr(config, name) for name in _LATER_CONFIG}
        _refuse_later_features(
            **{f"runtime_config.{name}": v for name, v in asked.items() if v != getattr(default, name)}
        )
        topology.check(config)


def _refuse_later_features(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"register_model: {name} is not in this version")
