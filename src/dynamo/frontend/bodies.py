"""What do the bodies of answers look like?

Whole answers are encoded from these structs; the events of a stream are assembled from bytes (`dynamo.frontend.sse`)
and only held to them in tests. Fields that are `UNSET` are left out.
"""

from typing import Any, Literal

import msgspec

from dynamo.llm.logprobs import ChatLogprobs, CompletionLogprobs
from dynamo.llm.protocols.tools import ToolCallDelta
from dynamo.router.split_settings import PREFIX, SplitSettings

FinishWord = Literal["stop", "length", "tool_calls", "content_filter"]


class ErrorObject(msgspec.Struct):
    """OpenAI's error object. `param` names the field, `code` the case."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """Every error: OpenAI's object, and the same in flat fields."""

    error: ErrorObject
    message: str
    type: str
    code: int


class CachedTokens(msgspec.Struct):
    """Prompt tokens that a worker had in its prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | msgspec.UnsetType = msgspec.UNSET


class ToolFunction(msgspec.Struct):
    """A function to call; `arguments` is JSON text."""

    name: str | None
    arguments: str


class ToolCall(msgspec.Struct):
    """One call of a tool."""

    id: str | None
    type: Literal["function"]
    function: ToolFunction


class ChatMessage(msgspec.Struct):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: FinishWord
    logprobs: ChatLogprobs | None


class ChatCompletion(msgspec.Struct):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    nvext: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    finish_reason: FinishWord | None
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(msgspec.Struct):
    """The JSON of one event of a streamed chat answer. The last event is the word [DONE]."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    nvext: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class TextChoice(msgspec.Struct):
    """One continuation of a prompt, or in a stream what is added to it."""

    text: str
    index: int
    finish_reason: FinishWord | None
    logprobs: CompletionLogprobs | None


class Completion(msgspec.Struct):
    """The answer to a completion request, and the JSON of one event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    nvext: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class ModelObject(msgspec.Struct):
    """A model that can be asked for. `context_window` in tokens, 0 if unknown."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_window: int


class ModelList(msgspec.Struct):
    """The models that can answer now."""

    object: Literal["list"]
    data: list[ModelObject]


class WorkersOfType(msgspec.Struct):
    """Workers of one kind, and the kinds they need beside them (any one of the lists)."""

    workers: int
    needs: list[list[str]]


class NamespaceReadiness(msgspec.Struct):
    """A model in one namespace."""

    ready: bool
    worker_types: dict[str, WorkersOfType]
    present: list[str]
    missing_worker_types: list[str]


class Readiness(msgspec.Struct):
    """Whether a model can answer, and what is missing if not."""

    model: str
    ready: bool
    namespaces: dict[str, NamespaceReadiness]


class Health(msgspec.Struct):
    """Whether the frontend takes requests, and who is behind it."""

    status: Literal["healthy", "not_ready"]
    endpoints: list[str]
    instances: list[dict[str, Any]]
    stage: str | msgspec.UnsetType = msgspec.UNSET


class Live(msgspec.Struct):
    """That the process answers."""

    status: Literal["live"]
    message: str


class BusyThreshold(msgspec.Struct, forbid_unknown_fields=True):
    """A model's thresholds; in a request, those that are to change."""

    model: str
    active_decode_blocks_threshold: float | None = None
    active_prefill_tokens_threshold: int | None = None
    active_prefill_tokens_threshold_frac: float | None = None


class BusyThresholds(msgspec.Struct):
    """Those of all models."""

    thresholds: list[BusyThreshold]


class ConditionalDisagg(SplitSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which prompts of a model go to prefill workers; in a request, what is to change. See `dynamo.router.split`."""

    model: str
    enabled: bool | msgspec.UnsetType = msgspec.UNSET

    def changes(self) -> dict[str, Any]:
        """What is to change, by its name in `KvRouterConfig`."""
        return self.fields() | ({} if self.enabled is msgspec.UNSET else {f"{PREFIX}enabled": self.enabled})


class ConditionalDisaggs(msgspec.Struct):
    """Those of all models."""

    settings: list[ConditionalDisagg]


class Status(msgspec.Struct):
    """What was asked for, what is in effect, and what is amiss. `router` has the KV router's account of a model."""

    router_mode: str
    warnings: list[str]
    models: dict[str, list[dict[str, Any]]]
