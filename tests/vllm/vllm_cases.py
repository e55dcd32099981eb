"""What is asked of vLLM both ways: in its own words (`vllm`), and in ours (`ours`)? Imports neither."""

import random
from dataclasses import dataclass, field
from typing import Any

BLOCK = 128  # tokens; vLLM's KV block on a CPU


@dataclass(frozen=True)
class Case:
    """One request. `vllm` are keyword arguments of `SamplingParams`, `ours` sections of `PreprocessedRequest`."""

    name: str
    token_ids: list[int]
    vllm: dict[str, Any]
    ours: dict[str, dict[str, Any]]
    structured: dict[str, Any] = field(default_factory=dict)


def words(seed: int, count: int) -> list[int]:
    """`count` ordinary token ids, the same for the same seed."""
    rnd = random.Random(seed)
    return [rnd.randrange(300, 4000) for _ in range(count)]


SHARED = words(0, 2 * BLOCK)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def _greedy(name: str, token_ids: list[int], max_tokens: int = 24) -> Case:
    return Case(
        name,
        token_ids,
        {"temperature": 0.0, "max_tokens": max_tokens},
        {"sampling_options": {"temperature": 0.0}, "stop_conditions": {"max_tokens": max_tokens}},
    )


def _with(name: str, seed: int, vllm: dict[str, Any], ours: dict[str, dict[str, Any]], **more: Any) -> Case:
    merged = {"stop_conditions": {"max_tokens": 16}} | {k: v for k, v in ours.items() if k != "stop_conditions"}
    merged["stop_conditions"] = merged["stop_conditions"] | ours.get("stop_conditions", {})
    return Case(name, words(seed, 20 + seed % 7), {"max_tokens": 16} | vllm, merged, **more)


def _guided(name: str, seed: int, structured: dict[str, Any], max_tokens: int = 40) -> Case:
    return _with(
        name,
        seed,
        {"temperature": 0.0, "max_tokens": max_tokens},
        {
            "sampling_options": {"temperature": 0.0, "guided_decoding": structured},
            "stop_conditions": {"max_tokens": max_tokens},
        },
        structured=structured,
    )


CASES = [
    *(_greedy(f"plain-{i}", words(100 + i, 3 + 17 * i)) for i in range(12)),
    *(_greedy(f"shared-{i}", [*SHARED, *words(200 + i, 30)]) for i in range(6)),
    _with("stops-by-default-limit", 1, {"temperature": 0.0}, {"sampling_options": {"temperature": 0.0}}),
    _with(
        "logprobs",
        2,
        {"temperature": 0.0, "logprobs": 3},
        {"sampling_options": {"temperature": 0.0}, "output_options": {"logprobs": 3}},
    ),
    _with(
        "prompt-logprobs",
        3,
        {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
        {"sampling_options": {"temperature": 0.0}, "output_options": {"logprobs": 0, "prompt_logprobs": 2}},
    ),
    _with(
        "seeded-sampling",
        4,
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7, "logprobs": 1},
        {
            "sampling_options": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7},
            "output_options": {"logprobs": 1},
        },
    ),
    _with(
        "penalties",
        5,
        {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 1.2, "repetition_penalty": 1.3},
        {
            "sampling_options": {
                "temperature": 0.0,
                "presence_penalty": 1.5,
                "frequency_penalty": 1.2,
                "repetition_penalty": 1.3,
            }
        },
    ),
    _with(
        "logit-bias",
        6,
        {"temperature": 0.0, "logit_bias": {77: 100.0}, "max_tokens": 4},
        {
            "sampling_options": {"temperature": 0.0, "logit_bias": {77: 100.0}},
            "stop_conditions": {"max_tokens": 4},
        },
    ),
    _with(
        "eos-bias",
        7,
        {"temperature": 0.0, "logit_bias": {1: 100.0}},
        {"sampling_options": {"temperature": 0.0, "logit_bias": {1: 100.0}}},
    ),
    _with(
        "min-tokens",
        8,
        {"temperature": 0.0, "logit_bias": {1: 100.0}, "min_tokens": 5},
        {"sampling_options": {"temperature": 0.0, "logit_bias": {1: 100.0}}, "stop_conditions": {"min_tokens": 5}},
    ),
    _with(
        "ignore-eos",
        9,
        {"temperature": 0.0, "logit_bias": {1: 100.0}, "ignore_eos": True, "max_tokens": 6},
        {
            "sampling_options": {"temperature": 0.0, "logit_bias": {1: 100.0}},
            "stop_conditions": {"ignore_eos": True, "max_tokens": 6},
        },
    ),
    _with(
        "stop-token",
        10,
        {"temperature": 0.0, "logit_bias": {99: 100.0}, "stop_token_ids": [99]},
        {
            "sampling_options": {"temperature": 0.0, "logit_bias": {99: 100.0}},
            "stop_conditions": {"stop_token_ids": [99]},
        },
    ),
    _guided("regex", 11, {"regex": r"[0-9]{3}-[0-9]{4}"}),
    _guided("choice", 12, {"choice": ["positive", "negative"]}),
    _guided("json", 13, {"json": SCHEMA}, max_tokens=60),
    _guided("grammar", 14, {"grammar": 'root ::= "yes" | "no"'}),
]

LORA_PROMPT, LORA_TOKENS = words(15, 25), 16
