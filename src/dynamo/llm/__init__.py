"""Models for users of the runtime: publishing them, describing them, hashing their prompts.

Names are loaded when they are first used, wherever they live: importing this package costs nothing, and the lower
rooms stay free of the higher ones.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo.llm.block_hash import compute_block_hash_for_seq
    from dynamo.llm.hub import fetch_model
    from dynamo.llm.model_card import (
        ModelDeploymentCard,
        ModelInput,
        ModelRuntimeConfig,
        ModelType,
        WorkerType,
        lora_name_to_id,
    )
    from dynamo.llm.registration import register_llm, register_model, unregister_model, update_model_taints
    from dynamo.runtime.errors import (
        Cancelled,
        CannotConnect,
        ConnectionTimeout,
        Disconnected,
        DynamoException,
        EngineShutdown,
        HttpError,
        InvalidArgument,
        RouterQueueLimitExceeded,
        SelectionServiceError,
        StreamIncomplete,
        Unknown,
        WorkerOverloaded,
        WorkerUnavailable,
    )
    from dynamo.runtime.selection import RouterMode

_HOME = {
    "Cancelled": "dynamo.runtime.errors",
    "CannotConnect": "dynamo.runtime.errors",
    "ConnectionTimeout": "dynamo.runtime.errors",
    "Disconnected": "dynamo.runtime.errors",
    "DynamoException": "dynamo.runtime.errors",
    "EngineShutdown": "dynamo.runtime.errors",
    "HttpError": "dynamo.runtime.errors",
    "InvalidArgument": "dynamo.runtime.errors",
    "KvEventPublisher": "dynamo.router.publisher",
    "KvRouter": "dynamo.router.kv_router",
    "KvRouterConfig": "dynamo.router.config",
    "LoadThresholdConfig": "dynamo.router.config",
    "ModelDeploymentCard": "dynamo.llm.model_card",
    "ModelInput": "dynamo.llm.model_card",
    "ModelRuntimeConfig": "dynamo.llm.model_card",
    "ModelType": "dynamo.llm.model_card",
    "OverlapScores": "dynamo.router.radix_tree",
    "RadixTree": "dynamo.router.radix_tree",
    "RouterConfig": "dynamo.router.config",
    "RouterMode": "dynamo.runtime.selection",
    "RouterQueueLimitExceeded": "dynamo.runtime.errors",
    "RoutingConstraints": "dynamo.router.constraints",
    "SelectionCacheConfig": "dynamo.services.selection.pending",
    "SelectionService": "dynamo.services.selection.service",
    "SelectionServiceError": "dynamo.runtime.errors",
    "StreamIncomplete": "dynamo.runtime.errors",
    "Unknown": "dynamo.runtime.errors",
    "WorkerMetricsPublisher": "dynamo.router.publisher",
    "WorkerOverloaded": "dynamo.runtime.errors",
    "WorkerType": "dynamo.llm.model_card",
    "WorkerUnavailable": "dynamo.runtime.errors",
    "compute_block_hash_for_seq": "dynamo.llm.block_hash",
    "fetch_model": "dynamo.llm.hub",
    "lora_name_to_id": "dynamo.llm.model_card",
    "register_llm": "dynamo.llm.registration",
    "register_model": "dynamo.llm.registration",
    "run_kv_indexer": "dynamo.services.programs",
    "run_select_service": "dynamo.services.programs",
    "run_slot_tracker": "dynamo.services.programs",
    "unregister_model": "dynamo.llm.registration",
    "update_model_taints": "dynamo.llm.registration",
}

_LATER = frozenset(
    {
        "AisPerfConfig",
        "EngineType",
        "EntrypointArgs",
        "FpmDirectPublisher",
        "FpmEventRelay",
        "FpmEventSubscriber",
        "FrontendExtensionContext",
        "FrontendResponse",
        "FrontendRoute",
        "HttpAsyncEngine",
        "HttpService",
        "KserveGrpcService",
        "KvDcRelay",
        "KvStateAgentHost",
        "KvStateAttachmentOwner",
        "LLMUnaryClient",
        "LoRADownloader",
        "MediaDecoder",
        "MediaFetcher",
        "MultimodalEmbeddingCachePublisher",
        "PythonAsyncEngine",
        "RoutedEngine",
        "UnaryChatModel",
        "make_engine",
        "run_input",
        "with_engine_data",
    }
)
"""Names of the interface users know whose features are not here yet."""

__all__ = [
    "Cancelled",
    "CannotConnect",
    "ConnectionTimeout",
    "Disconnected",
    "DynamoException",
    "EngineShutdown",
    "HttpError",
    "InvalidArgument",
    "ModelDeploymentCard",
    "ModelInput",
    "ModelRuntimeConfig",
    "ModelType",
    "RouterMode",
    "RouterQueueLimitExceeded",
    "SelectionServiceError",
    "StreamIncomplete",
    "Unknown",
    "WorkerOverloaded",
    "WorkerType",
    "WorkerUnavailable",
    "compute_block_hash_for_seq",
    "fetch_model",
    "lora_name_to_id",
    "register_llm",
    "register_model",
    "unregister_model",
    "update_model_taints",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        raise AttributeError(f"dynamo.llm.{name} is not in this version")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
