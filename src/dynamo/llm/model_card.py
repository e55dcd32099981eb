"""What must a frontend know of a model to serve it, and do two workers mean the same model?

A `ModelDeploymentCard` is what a worker publishes at `v1/mdc/{namespace}/{component}/{endpoint}/{instance:x}`
(with `/{slug}` behind it for a LoRA adapter) [R20]. `checksum` covers what workers of one model must agree on;
what differs from worker to worker by right (paths, capacity, ranks, taints) is left out [R22].
"""

import enum
import re
from typing import Any, NamedTuple

import blake3
import msgspec

from dynamo.runtime.errors import InvalidArgument

CARD_PREFIX = "v1/mdc/"
MAX_FILES = 64  # a card of a real model lists under ten
MAX_FILE_BYTES = 1 << 30  # tokenizers are under 100 MB; more is a mistake or an attack
TEMPLATE_FOLDER = "additional_chat_templates"
"""The only folder a file of a card may be in; Hugging Face puts named templates there."""
_FILE_NAME = re.compile(rf"(?:{TEMPLATE_FOLDER}/)?[A-Za-z0-9_][A-Za-z0-9._+-]{{0,199}}")
_CHECKSUM = re.compile(r"blake3:[0-9a-f]{64}")


class ModelInput(enum.Enum):
    """What a worker reads: text (OpenAI's request itself), tokens, or tensors."""

    Text = "Text"
    Tokens = "Tokens"
    Tensor = "Tensor"


class ModelType(enum.Flag):
    """Which kinds of request a model answers. Combine with `|`; as text `Chat | Completions`."""

    Empty = 0
    Chat = enum.auto()
    Completions = enum.auto()
    Embedding = enum.auto()
    TensorBased = enum.auto()
    Prefill = enum.auto()
    Images = enum.auto()
    Audios = enum.auto()
    Videos = enum.auto()
    Realtime = enum.auto()
    Classify = enum.auto()
    Pooling = enum.auto()
    Rerank = enum.auto()

    def __str__(self) -> str:
        return " | ".join(str(member.name) for member in type(self) if member and member in self) or "Empty"

    @classmethod
    def parse(cls, text: str) -> "ModelType":
        """The inverse of `str()`; commas work too. Raises InvalidArgument for an unknown word."""
        found = cls.Empty
        for word in re.split(r"[|,]", text):
            member = {name.lower(): value for name, value in cls.__members__.items()}.get(word.strip().lower())
            if member is None:
                raise InvalidArgument(
                    f"model_type: {word.strip()!r} is not one of {', '.join(cls.__members__)}", "model_type"
                )
            found |= member
        return found

    def supports_chat(self) -> bool:
        """Whether it answers chat requests."""
        return ModelType.Chat in self

    def supports_completions(self) -> bool:
        """Whether it answers completion requests."""
        return ModelType.Completions in self

    def supports_embedding(self) -> bool:
        """Whether it answers embedding requests."""
        return ModelType.Embedding in self

    def supports_classify(self) -> bool:
        """Whether it answers classification requests."""
        return ModelType.Classify in self

    def supports_pooling(self) -> bool:
        """Whether it answers pooling requests."""
        return ModelType.Pooling in self

    def supports_rerank(self) -> bool:
        """Whether it answers rerank requests."""
        return ModelType.Rerank in self


class WorkerType(enum.Enum):
    """Which part of a request's work a worker does."""

    Prefill = "prefill"
    Decode = "decode"
    Encode = "encode"
    Aggregated = "aggregated"


class ModelRuntimeConfig(msgspec.Struct, omit_defaults=True):
    """What a worker says of its engine. Sizes in tokens unless the name says blocks.

    `context_length` is the engine's own limit, where it is below the model's.
    """

    context_length: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    tokenizer_backend: str | None = None
    structural_tag: dict[str, Any] | None = None
    exclude_tools_when_tool_choice_none: bool = True
    default_thinking_mode: str | None = None
    data_parallel_start_rank: int = 0
    data_parallel_size: int = 1
    enable_local_indexer: bool = True
    kv_event_publishing_enabled: bool = True
    kv_event_source_mode: str | None = None
    kv_state_endpoint: str | None = None
    enable_eagle: bool = False
    taints: set[str] = set()
    stable_routing_id: str | None = None
    runtime_data: dict[str, Any] = {}
    topology_domains: dict[str, str] = {}
    kv_transfer_domain: str | None = None
    kv_transfer_enforcement: str | None = None
    kv_transfer_preferred_weight: float | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None

    def set_engine_specific(self, key: str, value: Any) -> None:
        """Publish one more fact about the engine under `runtime_data`."""
        self.runtime_data[key] = value

    def get_engine_specific(self, key: str) -> Any:
        """What was set under this key, or None."""
        return self.runtime_data.get(key)

    def set_structural_tag(self, tag: dict[str, Any]) -> None:
        """The structural-tag constraint for tool syntax [M9]."""
        self.structural_tag = tag

    def set_disaggregated_endpoint(self, host: str | None, port: int | None) -> None:
        """Where decode workers reach this prefill worker."""
        self.bootstrap_host, self.bootstrap_port = host, port


class CardFile(msgspec.Struct, omit_defaults=True, frozen=True):
    """One file a frontend needs. `checksum` is `blake3:` and 64 hex digits, `kind` says what the file is for."""

    name: str
    checksum: str
    size: int
    kind: str = ""


class LoraInfo(msgspec.Struct, omit_defaults=True, frozen=True):
    """An adapter on a base model; `id` is what engines call it (`lora_name_to_id`)."""

    name: str
    id: int
    base_model: str | None = None
    max_gpu_lora_count: int | None = None


class ModelDeploymentCard(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Everything a frontend needs to serve one model of one worker."""

    display_name: str
    slug: str
    model_type: str
    model_input: ModelInput = ModelInput.Tokens
    worker_type: WorkerType = WorkerType.Aggregated
    needs: list[list[WorkerType]] = []
    endpoint: str = ""
    source_path: str = ""
    files: list[CardFile] = []
    architectural_max_context_length: int | None = None
    context_length: int | None = None
    kv_cache_block_size: int | None = None
    migration_limit: int = 0
    model_aliases: list[str] = []
    lora: LoraInfo | None = None
    user_data: dict[str, Any] | None = None
    runtime_config: ModelRuntimeConfig = msgspec.field(default_factory=ModelRuntimeConfig)

    @property
    def types(self) -> ModelType:
        """`model_type` as flags."""
        return ModelType.parse(self.model_type)

    @property
    def names(self) -> list[str]:
        """Every name a request may call the model by, the display name first."""
        return [self.display_name, *(alias for alias in self.model_aliases if alias != self.display_name)]

    @property
    def checksum(self) -> str:
        """mdcsum: equal for workers that may answer each other's requests; 64 hex digits."""
        config = self.runtime_config
        agreed = (
            self.display_name,
            self.model_type,
            self.model_input,
            self.worker_type,
            self.context_length,
            self.kv_cache_block_size,
            sorted((file.name, file.checksum) for file in self.files),
            None if self.lora is None else (self.lora.name, self.lora.base_model),
            config.tool_call_parser,
            config.reasoning_parser,
            config.tokenizer_backend,
            config.structural_tag,
            config.exclude_tools_when_tool_choice_none,
            config.default_thinking_mode,
            config.enable_eagle,
        )
        return blake3.blake3(msgspec.json.encode(agreed, order="sorted")).hexdigest()

    def file_of_kind(self, kind: str) -> CardFile | None:
        """The file that serves this purpose, if the model has one."""
        return next((file for file in self.files if file.kind == kind), None)

    def to_json(self) -> bytes:
        """The card as it is published."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> "ModelDeploymentCard":
        """Read a published card. Fields of newer versions are ignored.

        Raises:
            InvalidArgument: the data is no card, or its file list is not one a worker of ours would write.
        """
        try:
            card = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            raise InvalidArgument(f"model card is malformed: {e}") from None
        ModelType.parse(card.model_type)
        check_files(card.files)
        return card


_decoder = msgspec.json.Decoder(ModelDeploymentCard)


def check_files(files: list[CardFile]) -> None:
    """Refuse a file list whose names could become paths, or whose sizes could fill a disk.

    Raises:
        InvalidArgument: naming the file.
    """
    if len(files) > MAX_FILES:
        raise InvalidArgument(f"model card lists {len(files)} files, more than {MAX_FILES}")
    if len({file.name for file in files}) != len(files):
        raise InvalidArgument("model card lists a file name twice")
    for file in files:
        if not _FILE_NAME.fullmatch(file.name):
            raise InvalidArgument(f"model card: {file.name!r} is not a plain file name")
        if not _CHECKSUM.fullmatch(file.checksum):
            raise InvalidArgument(f"model card: the checksum of {file.name} is not blake3")
        if not 0 <= file.size <= MAX_FILE_BYTES:
            raise InvalidArgument(f"model card: {file.name} has an impossible size of {file.size} bytes")


class CardKey(NamedTuple):
    """Where a card is published; `lora_slug` is set for an adapter's."""

    namespace: str
    component: str
    endpoint: str
    instance_id: int
    lora_slug: str | None = None

    def __str__(self) -> str:
        key = f"{CARD_PREFIX}{self.namespace}/{self.component}/{self.endpoint}/{self.instance_id:x}"
        return f"{key}/{self.lora_slug}" if self.lora_slug else key

    @classmethod
    def parse(cls, key: str) -> "CardKey":
        """Read a discovery key. Raises InvalidArgument for one that is no card's."""
        parts = key.removeprefix(CARD_PREFIX).split("/")
        if not key.startswith(CARD_PREFIX) or len(parts) not in (4, 5):
            raise InvalidArgument(f"{key!r} is not the key of a model card")
        try:
            return cls(parts[0], parts[1], parts[2], int(parts[3], 16), parts[4] if len(parts) == 5 else None)
        except ValueError:
            raise InvalidArgument(f"{key!r} is not the key of a model card") from None


def slug(name: str) -> str:
    """A model's name as part of a key or a URL: lower case, anything but letters, digits, `_` and `-` becomes `_`."""
    return re.sub(r"[^a-z0-9_-]", "_", name.lower())


def lora_slug(name: str) -> str:
    """An adapter's name as the last part of its card's key; names that differ have keys that differ."""
    return f"{slug(name)}-{lora_name_to_id(name):x}"


def lora_name_to_id(name: str) -> int:
    """The number engines call an adapter by: the low 31 of the first 64 bits of its name's blake3 hash.

    The same on every worker, and the same as upstream's. 0 would mean "no adapter", so it becomes 1.
    """
    first = int.from_bytes(blake3.blake3(name.encode()).digest()[:8], "big")
    return (first & 0x7FFF_FFFF) or 1
