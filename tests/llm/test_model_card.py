"""What does a model card say, and when do two say the same?"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo.llm.model_card import (
    CardFile,
    CardKey,
    ModelDeploymentCard,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    lora_name_to_id,
    lora_slug,
    slug,
)
from dynamo.llm.model_directory import architectural_context_length, build_card, file_checksum, model_files
from dynamo.runtime.errors import InvalidArgument


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_a_card_lists_the_files_a_frontend_needs(weights_dir: Path) -> None:
    card = build_card(weights_dir, name="Some Model/7B")
    names = [file.name for file in card.files]
    assert "tokenizer.json" in names
    assert "config.json" in names
    assert not any("safetensors" in name for name in names)
    assert all(file.checksum == file_checksum(weights_dir / file.name) for file in card.files)
    assert (card.display_name, card.slug) == ("Some Model/7B", "some_model_7b")
    assert card.file_of_kind("hf_tokenizer_json") is not None
    assert card.types == ModelType.Chat | ModelType.Completions


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda card: setattr(card, "source_path", "/elsewhere"), True),
        (lambda card: setattr(card.runtime_config, "total_kv_blocks", 5), True),
        (lambda card: setattr(card.runtime_config, "taints", {"a"}), True),
        (lambda card: setattr(card, "endpoint", "a.b.c"), True),
        (lambda card: setattr(card, "context_length", 5), False),
        (lambda card: setattr(card, "kv_cache_block_size", 5), False),
        (lambda card: setattr(card, "model_input", ModelInput.Text), False),
        (lambda card: setattr(card, "worker_type", WorkerType.Prefill), False),
        (lambda card: setattr(card.runtime_config, "reasoning_parser", "basic"), False),
        (lambda card: card.files.pop(), False),
    ],
)
def test_the_checksum_covers_what_workers_must_agree_on(
    model_dir: Path, change: Callable[[Any], object], same: bool
) -> None:
    card, other = build_card(model_dir), build_card(model_dir)
    change(other)
    assert (card.checksum == other.checksum) is same


def test_the_engine_s_own_context_length_counts(model_dir: Path) -> None:
    card = build_card(model_dir, runtime_config=ModelRuntimeConfig(context_length=123))
    assert card.context_length == 123
    assert card.architectural_max_context_length != 123


@pytest.mark.parametrize(
    ("config", "tokenizer", "length"),
    [
        ({"max_position_embeddings": 4096}, {}, 4096),
        ({"n_positions": 1024}, {}, 1024),
        ({"max_position_embeddings": 4096, "seq_length": 2048}, {}, 2048),
        ({"text_config": {"max_position_embeddings": 512}}, {}, 512),
        ({"max_position_embeddings": 4096}, {"model_max_length": 1000}, 1000),
        ({"max_position_embeddings": 4096}, {"model_max_length": 10**30}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, {}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, {}, 4096),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            {},
            131072,
        ),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}, 4096),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
            },
            {},
            131072,
        ),
        ({"max_position_embeddings": "long"}, {}, None),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": "x"}}, {}, 4096),
        ({}, {}, None),
    ],
)
def test_the_context_length_follows_vllm_s_rules(
    tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any], length: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert architectural_context_length(tmp_path) == length


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot read the model directory .*absent"):
        build_card(tmp_path / "absent")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
def test_a_broken_file_is_named(copy: Path, name: str) -> None:
    (copy / name).write_text("{ not json")
    with pytest.raises(InvalidArgument, match=name):
        build_card(copy)


def test_a_directory_without_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InvalidArgument, match="has no tokenizer"):
        build_card(copy)


def test_a_directory_without_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(InvalidArgument, match=r"has no config\.json"):
        build_card(copy)


def test_a_text_model_needs_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert build_card(copy, model_input=ModelInput.Text).model_input is ModelInput.Text


def test_named_templates_are_listed_with_their_folder(copy: Path) -> None:
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    assert "additional_chat_templates/tool_use.jinja" in model_files(copy)
    card = build_card(copy)
    assert ModelDeploymentCard.from_json(card.to_json()) == card


@pytest.mark.parametrize(
    "file",
    [
        CardFile("../secrets", "blake3:" + "0" * 64, 1),
        CardFile("/etc/passwd", "blake3:" + "0" * 64, 1),
        CardFile("a/b", "blake3:" + "0" * 64, 1),
        CardFile(".hidden", "blake3:" + "0" * 64, 1),
        CardFile("additional_chat_templates/../../x", "blake3:" + "0" * 64, 1),
        CardFile("name\n", "blake3:" + "0" * 64, 1),
        CardFile("name", "blake3:../../x", 1),
        CardFile("name", "sha256:" + "0" * 64, 1),
        CardFile("name", "blake3:" + "0" * 64, -1),
        CardFile("name", "blake3:" + "0" * 64, 1 << 40),
    ],
)
def test_a_card_whose_files_could_do_harm_is_refused(model_dir: Path, file: CardFile) -> None:
    card = build_card(model_dir)
    card.files = [file]
    with pytest.raises(InvalidArgument, match="model card"):
        ModelDeploymentCard.from_json(card.to_json())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"display_name":1}', b"[" * 100_000])
def test_what_is_no_card_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="model card is malformed"):
        ModelDeploymentCard.from_json(data)


def test_a_card_of_a_newer_version_is_read(model_dir: Path) -> None:
    document = msgspec.json.decode(build_card(model_dir).to_json())
    document["invented_later"] = {"x": 1}
    assert ModelDeploymentCard.from_json(msgspec.json.encode(document)).slug == slug(model_dir.name)


def test_model_types_combine_and_print() -> None:
    both = ModelType.Chat | ModelType.Completions
    assert str(both) == "Chat | Completions"
    assert ModelType.parse("Chat | Completions") == both
    assert ModelType.parse("chat,completions") == both
    assert str(ModelType.Empty) == "Empty"
    assert both.supports_chat()
    assert not both.supports_embedding()
    with pytest.raises(InvalidArgument, match="'poems' is not one of"):
        ModelType.parse("poems")


def test_card_keys_round_trip() -> None:
    for key in (CardKey("ns", "backend", "generate", 255), CardKey("ns", "c", "e", 1, "x-1")):
        assert CardKey.parse(str(key)) == key
    assert str(CardKey("ns", "backend", "generate", 255)) == "v1/mdc/ns/backend/generate/ff"
    for wrong in ("v1/mdc/a/b/c", "v1/instances/a/b/c/1", "v1/mdc/a/b/c/xyz"):
        with pytest.raises(InvalidArgument):
            CardKey.parse(wrong)


def test_adapters_have_stable_ids() -> None:
    """Vectors of upstream's function of the same name."""
    assert [lora_name_to_id(name) for name in ("a", "my-lora", "x/y")] == [1500095571, 868637996, 1290137832]
    assert lora_slug("a.b") != lora_slug("a_b")


def test_the_runtime_config_holds_engine_facts() -> None:
    config = ModelRuntimeConfig()
    config.set_engine_specific("role", "x")
    config.set_disaggregated_endpoint("h", 5)
    assert (config.get_engine_specific("role"), config.bootstrap_host) == ("x", "h")
    assert ModelRuntimeConfig().runtime_data == {}
