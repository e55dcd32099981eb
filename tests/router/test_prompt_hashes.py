"""Prompts that were hashed before have the hashes that they would have anew."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.router import prompt_hashes as module
from dynamo.router.prompt_hashes import PromptHashes
from dynamo.runtime.errors import InvalidArgument


def anew(tokens, size, lora=None, salt=None) -> list[int]:
    return sequence_hashes(compute_block_hash_for_seq(tokens, size, lora_name=lora, cache_namespace=salt))


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 7, 16, 64, 600]),
    cuts=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 700), st.sampled_from([None, "a", "b"])), max_size=6),
    seed=st.integers(0, 9),
)
def test_any_order_of_prompts_that_share_beginnings_gives_the_hashes_of_each(size, cuts, seed):
    draw = random.Random(seed)
    story = [draw.randrange(1 << 32) for _ in range(3000)]
    hashes = PromptHashes(size)
    for shared, own, name in cuts:
        prompt = story[:shared] + [draw.randrange(1 << 32) for _ in range(own)]
        assert hashes.of(prompt, name, name) == anew(prompt, size, name, name)
        assert hashes.of(prompt) == anew(prompt, size)


def test_what_it_keeps_is_bounded_and_what_is_used_stays(monkeypatch):
    monkeypatch.setattr(module, "MAX_CHUNKS", 8)
    hashes, draw = PromptHashes(16), random.Random(1)
    used = [draw.randrange(1000) for _ in range(600)]
    for _ in range(100):
        hashes.of(used)
        hashes.of([draw.randrange(1000) for _ in range(600)])
        assert len(hashes._young) <= 8
        assert len(hashes._old) <= 8
    (key,) = [key for key, value in {**hashes._old, **hashes._young}.items() if value == hashes.of(used)[:32]]
    assert key[0] == 1337


@pytest.mark.parametrize("token", [-1, 1 << 32, "x"])
def test_tokens_that_are_none_are_refused(token):
    with pytest.raises(InvalidArgument, match="token ids"):
        PromptHashes(16).of([1, token])
