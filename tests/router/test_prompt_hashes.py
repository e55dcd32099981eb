"""Prompts that were hashed before have the hashes that they would have anew."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.segment_cache import TokenIds
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


def test_a_long_prompt_is_hashed_as_far_as_it_is_looked_at():
    hashes_of, draw = PromptHashes(16), random.Random(2)
    prompt = [draw.randrange(1000) for _ in range(5000)]
    hashes = hashes_of.of(prompt)
    assert len(hashes) == 312
    assert len(hashes_of._young) == 1
    assert hashes[40] == anew(prompt, 16)[40]
    assert len(hashes_of._young) == 2
    assert hashes[:100] == anew(prompt, 16)[:100]
    assert len(hashes_of._young) == 4


@given(st.lists(st.one_of(st.integers(-70, 70), st.slices(70)), max_size=5))
def test_however_it_is_looked_at_it_is_the_same_as_a_list(looks):
    prompt = list(range(16 * 66 + 3))
    plain, hashes = anew(prompt, 16), PromptHashes(16).of(prompt)
    for look in looks:
        try:
            expected = plain[look]
        except IndexError:
            with pytest.raises(IndexError):
                hashes[look]
        else:
            assert hashes[look] == expected
    assert list(hashes) == plain
    assert list(reversed(hashes)) == plain[::-1]


def test_a_token_that_is_none_is_refused_where_it_is_looked_at():
    hashes = PromptHashes(16).of([*range(600), 1 << 32, *range(600)])
    assert hashes[31]
    with pytest.raises(InvalidArgument, match="token ids"):
        hashes[40]


class Text:
    """Prompts as a tokenizer's cache gives them: equal parts of their beginnings are the same objects."""

    def __init__(self, draw: random.Random, parts: int) -> None:
        self.parts = [tuple(draw.randrange(1000) for _ in range(draw.randrange(1, 400))) for _ in range(parts)]

    def prompt(self, parts: list[int], own: list[int]) -> TokenIds:
        ids = TokenIds()
        for number in parts:
            ids += self.parts[number]
            ids.parts.append(self.parts[number])
        ids += own
        return ids


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 7, 16, 64, 600]),
    prompts=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 700)), max_size=8),
    looks=st.lists(st.integers(0, 300), min_size=8, max_size=8),
    most=st.sampled_from([3, 8192]),
    seed=st.integers(0, 9),
)
def test_prompts_of_parts_that_were_seen_have_the_hashes_of_their_tokens(size, prompts, looks, most, seed):
    draw = random.Random(seed)
    text, hashes_of = Text(draw, 6), PromptHashes(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_PARTS", most)
        for (parts, own), look in zip(prompts, looks, strict=False):
            prompt = text.prompt(parts, [draw.randrange(1000) for _ in range(own)])
            expected, salted = anew(prompt, size), anew(prompt, size, salt="a")
            hashes = hashes_of.of(prompt)
            if look < len(expected):
                assert hashes[look] == expected[look]
            assert list(hashes_of.of(prompt, None, "a")) == salted
            assert list(hashes_of.of(prompt)) == expected
            assert list(hashes) == expected


def test_a_beginning_that_was_seen_is_not_hashed_again(monkeypatch):
    hashed = []
    chunk = PromptHashes.chunk
    monkeypatch.setattr(
        PromptHashes, "chunk", lambda self, ids, *rest: (hashed.append(len(ids)), chunk(self, ids, *rest))[1]
    )
    text, hashes_of = Text(random.Random(3), 30), PromptHashes(16)
    first, second = (text.prompt(list(range(30)), [own] * 300) for own in (1, 2))
    assert list(hashes_of.of(first)) == anew(first, 16)
    del hashed[:]
    assert list(hashes_of.of(second)) == anew(second, 16)
    assert sum(hashed) < 320


def test_a_part_is_not_taken_for_another_that_came_to_be_where_it_was():
    hashes_of = PromptHashes(16)
    for number in range(200):  # each part's memory may be the one before's
        ids = TokenIds()
        ids += range(number, number + 700)
        ids.parts.append(tuple(ids))
        assert list(hashes_of.of(ids)) == anew(ids, 16)
