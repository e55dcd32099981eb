"""Are blocks named as the reference names them, and the same however a sequence grows?"""

import json
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dynamo.llm.block_hash import (
    BlockHasher,
    compute_block_hash_for_seq,
    hash_seed,
    next_sequence_hash,
    sequence_hashes,
)
from dynamo.runtime.errors import InvalidArgument

VECTORS = json.loads((Path(__file__).parent / "data" / "block_hash_vectors.json").read_text(encoding="utf-8"))[
    "vectors"
]
tokens_strategy = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def test_local_hashes_equal_the_reference() -> None:
    assert len(VECTORS) > 100
    for vector in VECTORS:
        assert compute_block_hash_for_seq(**vector["arguments"]) == vector["hashes"], vector["arguments"]


def test_first_sequence_hash_is_the_local_one_and_others_chain() -> None:
    local = [5, 7, 2**64 - 1]
    second = xxhash.xxh3_64_intdigest((5).to_bytes(8, "little") + (7).to_bytes(8, "little"), 1337)
    third = xxhash.xxh3_64_intdigest(second.to_bytes(8, "little") + local[2].to_bytes(8, "little"), 1337)
    assert sequence_hashes(local) == [5, second, third]
    assert sequence_hashes([]) == []
    assert next_sequence_hash(None, 5) == 5


@given(tokens_strategy, st.integers(1, 9), st.booleans(), st.sampled_from([None, "a"]), st.sampled_from([None, "s"]))
def test_growing_sequence_gets_the_hashes_of_the_whole(
    tokens: list[int], size: int, eagle: bool, lora: str | None, salt: str | None
) -> None:
    local = compute_block_hash_for_seq(tokens, size, None, lora, eagle, salt)
    expected = list(zip(local, sequence_hashes(local), strict=True))
    hasher = BlockHasher(size, lora, eagle, salt)
    one_by_one = [block for token in tokens for block in hasher.extend([token])]
    at_once = BlockHasher(size, lora, eagle, salt)
    assert one_by_one == expected
    assert at_once.extend(tokens[:7]) + at_once.extend(tuple(tokens[7:])) == expected


@given(tokens_strategy, tokens_strategy)
def test_common_prefix_has_common_sequence_hashes_and_nothing_after_it(a: list[int], b: list[int]) -> None:
    size = 4
    ours, theirs = (sequence_hashes(compute_block_hash_for_seq(x, size)) for x in (a, b))
    for i, (x, y) in enumerate(zip(ours, theirs, strict=False)):
        assert (x == y) == (a[: (i + 1) * size] == b[: (i + 1) * size])


@pytest.mark.parametrize("tokens", [(1, 2, 3, 4), array("I", [1, 2, 3, 4]), range(1, 5)])
def test_any_sequence_of_tokens_will_do(tokens: Any) -> None:
    assert compute_block_hash_for_seq(tokens, 2) == compute_block_hash_for_seq([1, 2, 3, 4], 2)


def test_lora_and_cache_namespace_of_the_same_name_differ() -> None:
    assert hash_seed(lora_name="a") != hash_seed(cache_namespace="a")
    assert hash_seed("", "") == hash_seed() == 1337
    assert 0 <= hash_seed("a" * 50, "b" * 50) < 2**64


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"tokens": [1], "kv_block_size": 0}, "kv_block_size"),
        ({"tokens": [-1], "kv_block_size": 1}, "tokens"),
        ({"tokens": [2**32], "kv_block_size": 1}, "tokens"),
        ({"tokens": ["x"], "kv_block_size": 1}, "tokens"),
        ({"tokens": [1], "kv_block_size": 1, "block_mm_infos": [{"mm_objects": [{}]}]}, "block_mm_infos"),
        ({"tokens": [1], "kv_block_size": 1, "block_mm_infos": [{"mm_objects": [{"mm_hash": -1}]}]}, "block_mm_infos"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        compute_block_hash_for_seq(**arguments)
    assert caught.value.param == param


def test_two_processes_with_different_hash_seeds_agree() -> None:
    code = (
        "from dynamo.llm.block_hash import *;"
        "print(sequence_hashes(compute_block_hash_for_seq(list(range(99)), 16, lora_name='a', cache_namespace='s')))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, timeout=60
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
