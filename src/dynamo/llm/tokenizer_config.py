"""What do the JSON files beside a tokenizer say about its special tokens and its end-of-sequence ids?"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo.runtime.errors import InvalidArgument

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The attributes that Hugging Face knows by name; a chat template sees each that is set."""


@dataclass(frozen=True)
class AddedTokenSpec:
    """One added token: its text, and how text around it is treated when it is found."""

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """`tokenizer_config.json`, `special_tokens_map.json` and the configs that name end-of-sequence ids.

    `named` maps `bos_token`, `eos_token`, … to text. `added` maps id to token, as `added_tokens_decoder` does.
    `extra` are further special tokens without an id of their own. `eos_ids` come from `generation_config.json`
    and `config.json`; the id of `named["eos_token"]` is added by whoever holds the vocabulary.
    """

    named: dict[str, str] = field(default_factory=dict)
    added: dict[int, AddedTokenSpec] = field(default_factory=dict)
    extra: tuple[AddedTokenSpec, ...] = ()
    eos_ids: tuple[int, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict)
    model_type: str = ""


def read_json(path: Path) -> Any:
    """The file's JSON. Raises InvalidArgument naming the file when it cannot be read or parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InvalidArgument(f"cannot read {path}: {e.strerror or e}") from e
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
        raise InvalidArgument(f"{path} is not valid JSON: {e}; fetch the file again") from e


def read_json_object(path: Path) -> dict[str, Any]:
    """As `read_json`, `{}` for a missing file. Raises InvalidArgument when the file holds something else."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} holds a JSON {type(value).__name__}, not an object; fetch the file again")
    return value


def token_content(value: Any) -> str | None:
    """The text of a token written as a string or as an AddedToken object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _spec(value: Any, special: bool) -> AddedTokenSpec | None:
    content = token_content(value)
    if not content:
        return None
    if isinstance(value, str):
        return AddedTokenSpec(content, special)
    flags = {k: bool(value.get(k, False)) for k in ("lstrip", "rstrip", "single_word")}
    special = bool(value.get("special", special))
    # `tokenizers` normalizes by default exactly the tokens that are not special.
    return AddedTokenSpec(content, special, normalized=bool(value.get("normalized", not special)), **flags)


def _added(directory: Path, config: dict[str, Any]) -> dict[int, AddedTokenSpec]:
    table = config.get("added_tokens_decoder")
    if isinstance(table, dict):
        found = {int(id_): _spec(token, special=False) for id_, token in table.items() if id_.isdecimal()}
    else:  # the older form: text → id
        old = read_json_object(directory / "added_tokens.json")
        found = {id_: _spec(text, special=False) for text, id_ in old.items() if isinstance(id_, int)}
    return {id_: token for id_, token in found.items() if token is not None}


def _eos_ids(*configs: dict[str, Any]) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for config in configs:
        value = config.get("eos_token_id")
        for id_ in value if isinstance(value, list) else [value]:
            if isinstance(id_, int) and not isinstance(id_, bool):
                ids[id_] = None
    return tuple(ids)


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Read what is there; every file is optional.

    `special_tokens_map.json` is the older place and counts only where `tokenizer_config.json` has no
    `added_tokens_decoder`; an entry there then wins, as in Hugging Face's loader.

    End-of-sequence ids are the union of `eos_token_id` in `generation_config.json`, `config.json` and the latter's
    `text_config`: vLLM stops on all ids of the first and on the tokenizer's own one, and models of several
    modalities keep theirs in the last. Raises InvalidArgument for a file that is there and broken.
    """
    config = read_json_object(directory / "tokenizer_config.json")
    tokens = dict(config)
    if "added_tokens_decoder" not in config:
        tokens.update(read_json_object(directory / "special_tokens_map.json"))
    named = {name: text for name in NAMED_SPECIAL_TOKENS if (text := token_content(tokens.get(name)))}
    listed = tokens.get("extra_special_tokens") or tokens.get("additional_special_tokens") or []
    values = list(listed.values()) if isinstance(listed, dict) else list(listed)
    model = read_json_object(directory / "config.json")
    text_model = model.get("text_config")
    return TokenizerConfig(
        named=named,
        added=_added(directory, config),
        extra=tuple(spec for value in values if (spec := _spec(value, special=True))),
        eos_ids=_eos_ids(
            read_json_object(directory / "generation_config.json"),
            model,
            text_model if isinstance(text_model, dict) else {},
        ),
        raw=config,
        model_type=str(model.get("model_type") or ""),
    )
