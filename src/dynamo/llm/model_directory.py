"""What does a model directory hold: which files does a frontend need, and how long may a context be?"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blake3

from dynamo.llm.model_card import (
    TEMPLATE_FOLDER,
    CardFile,
    LoraInfo,
    ModelDeploymentCard,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    lora_name_to_id,
    slug,
)
from dynamo.llm.tokenizer_config import read_json_object
from dynamo.runtime.errors import InvalidArgument

CUSTOM_TEMPLATE = "custom_chat_template.jinja"
"""The name under which a card carries a template from outside the model directory."""

KINDS = {
    "config.json": "hf_config_json",
    "generation_config.json": "hf_generation_config_json",
    "tokenizer.json": "hf_tokenizer_json",
    "tokenizer_config.json": "hf_tokenizer_config_json",
    "chat_template.jinja": "hf_chat_template",
    "chat_template.json": "hf_chat_template_json",
    "special_tokens_map.json": "hf_special_tokens_map",
    "added_tokens.json": "hf_added_tokens",
    CUSTOM_TEMPLATE: "custom_chat_template",
}
TOKENIZER_KINDS = ("hf_tokenizer_json", "tiktoken", "sentencepiece")

_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Where model families keep their length, as vLLM looks for it."""

_UNSCALED_ROPES = frozenset({"default", "su", "longrope", "llama3", "mrope", "proportional"})
"""Rope types whose factor is already in `max_position_embeddings`."""
_ALREADY_SCALED_MODELS = ("gemma3",)  # their published length includes the factor

_ENDLESS = 10**9  # tokenizers without a limit say 10**30 in `model_max_length`
_HASH_BLOCK = 1 << 20  # bytes read at a time


def build_card(
    directory: Path,
    *,
    name: str | None = None,
    model_type: ModelType = ModelType.Chat | ModelType.Completions,
    model_input: ModelInput = ModelInput.Tokens,
    worker_type: WorkerType = WorkerType.Aggregated,
    needs: list[list[WorkerType]] | None = None,
    kv_cache_block_size: int | None = None,
    runtime_config: ModelRuntimeConfig | None = None,
    custom_template: Path | None = None,
    model_aliases: list[str] | None = None,
    user_data: dict[str, Any] | None = None,
    lora_name: str | None = None,
    base_model: str | None = None,
    max_gpu_lora_count: int | None = None,
    skip_assets: bool = False,
) -> ModelDeploymentCard:
    """Describe the model in `directory`. Reads and hashes its small files, so call it off the event loop.

    `skip_assets` describes a model whose directory has no files a frontend needs.

    Raises:
        InvalidArgument: the directory is missing, a file in it cannot be read or parsed, or there is no tokenizer.
    """
    config = runtime_config or ModelRuntimeConfig()
    files: list[CardFile] = []
    architectural = None
    if not skip_assets:
        paths = model_files(directory, custom_template)
        for path in paths.values():
            if path.suffix == ".json":
                read_json_object(path)
        if model_input is ModelInput.Tokens:
            _require(directory, paths)
        files = [card_file(known_as, path) for known_as, path in paths.items()]
        architectural = architectural_context_length(directory)
    limits = [limit for limit in (config.context_length, architectural) if limit is not None]
    display_name = lora_name or name or directory.name
    return ModelDeploymentCard(
        display_name=display_name,
        slug=slug(display_name),
        model_type=str(model_type),
        model_input=model_input,
        worker_type=worker_type,
        needs=needs or [],
        source_path=str(directory),
        files=files,
        architectural_max_context_length=architectural,
        # An engine may be told to go beyond what the config says; it knows its own limit best.
        context_length=limits[0] if limits else None,
        kv_cache_block_size=kv_cache_block_size,
        model_aliases=model_aliases or [],
        lora=LoraInfo(lora_name, lora_name_to_id(lora_name), base_model, max_gpu_lora_count) if lora_name else None,
        user_data=user_data,
        runtime_config=config,
    )


def model_files(directory: Path, custom_template: Path | None = None) -> dict[str, Path]:
    """The files of the directory that a frontend needs, by the name a card gives them, in a fixed order.

    Raises:
        InvalidArgument: the directory, or the custom template, cannot be read.
    """
    try:
        present = sorted(path for path in directory.iterdir() if path.is_file() and kind_of(path.name))
        templates = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    except OSError as e:
        raise InvalidArgument(f"cannot read the model directory {directory}: {e.strerror or e}") from None
    found = {path.name: path for path in present if path.name != CUSTOM_TEMPLATE}
    found |= {f"{TEMPLATE_FOLDER}/{path.name}": path for path in templates}
    if custom_template is not None:
        if not custom_template.is_file():
            raise InvalidArgument(f"the chat template {custom_template} is not a file", "custom_template_path")
        found[CUSTOM_TEMPLATE] = custom_template
    return found


def kind_of(name: str) -> str:
    """What a file of this name is for; empty for a file no frontend needs (weights, mostly)."""
    if name in KINDS:
        return KINDS[name]
    if name.startswith(f"{TEMPLATE_FOLDER}/"):
        return "hf_chat_template_named"
    if name.endswith(".tiktoken") or name == "tiktoken.model":
        return "tiktoken"
    return "sentencepiece" if name.endswith(".model") else ""


def _require(directory: Path, paths: dict[str, Path]) -> None:
    if "config.json" not in paths:
        raise InvalidArgument(f"{directory} has no config.json: is it a model directory in Hugging Face layout?")
    if not any(kind_of(name) in TOKENIZER_KINDS for name in paths):
        raise InvalidArgument(f"{directory} has no tokenizer: expected tokenizer.json, *.model or *.tiktoken")


def card_file(name: str, path: Path) -> CardFile:
    """A file as a card lists it. Raises InvalidArgument when it cannot be read."""
    try:
        return CardFile(name, file_checksum(path), path.stat().st_size, kind_of(name))
    except OSError as e:
        raise InvalidArgument(f"cannot read {path}: {e.strerror or e}") from None


def file_checksum(path: Path) -> str:
    """`blake3:` and the hash of the file's content. Raises OSError."""
    hasher = blake3.blake3()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            hasher.update(block)
    return f"blake3:{hasher.hexdigest()}"


def architectural_context_length(directory: Path) -> int | None:
    """How many tokens the model was made for, or None if its files do not say.

    It is the smallest length `config.json` names, times the factor of its rope scaling where that is not in the
    length already, and at most `model_max_length` of the tokenizer. These are vLLM's rules, so that a frontend
    refuses what an engine would.

    Raises:
        InvalidArgument: a file is broken.
    """
    whole = read_json_object(directory / "config.json")
    config = whole.get("text_config")
    if not isinstance(config, dict):
        config = whole
    lengths = [length for key in _LENGTH_KEYS if (length := _positive(config.get(key))) is not None]
    length = min(lengths) if lengths else None
    if length is not None and not str(config.get("model_type", "")).startswith(_ALREADY_SCALED_MODELS):
        for rope in _ropes(config):
            length = _scaled(length, rope)
    tokenizer_limit = _positive(read_json_object(directory / "tokenizer_config.json").get("model_max_length"))
    if tokenizer_limit is not None and tokenizer_limit < _ENDLESS:
        length = tokenizer_limit if length is None else min(length, tokenizer_limit)
    return length


def _positive(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 1:
        return None
    return int(value)


def _ropes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rope settings; newer configs may have one for each kind of layer."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    nested = [value for value in rope.values() if isinstance(value, dict)]
    yield from nested or [rope]


def _scaled(length: int, rope: dict[str, Any]) -> int:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = rope.get("factor")
    if kind in _UNSCALED_ROPES or isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 1:
        return length
    base = _positive(rope.get("original_max_position_embeddings")) if kind == "yarn" else None
    return int((base or length) * factor)
