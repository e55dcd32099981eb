"""Does the cache ever change a token? Does it find what was seen, and forget in bounds?"""

import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.llm.detokenizer import ByteRules
from dynamo.llm.segment_cache import Generations, SegmentCache
from dynamo.llm.text_cuts import Cuts
from dynamo.llm.tokenizer import Tokenizer
from dynamo.llm.tokenizer_backend import Backend
from tests.llm.tokenizer_zoo import BYTE_LEVEL, MAKERS, SPECIAL, directory_of, load, texts

SMALL_PART = 8  # characters; so that short texts are cut wherever they may be
SMALL_LIMIT = 40_000  # bytes; so that things are forgotten while the test runs
TOKENS = [*SPECIAL, "<|im|>", "<|im|>x", "|><|", "aa", "<|endoftext|>", "[BOS]", "<tool>", "<s>", "</s>", "<extra>"]


def backend_of(kind: str) -> Backend:
    return load(kind)._backend


@cache
def small_cache(kind: str) -> SegmentCache:
    """One cache for all examples, so that texts also meet what others left behind."""
    backend = backend_of(kind)
    assert backend.cuts is not None
    token_bytes = backend.rules.token_bytes if isinstance(backend.rules, ByteRules) else None
    return SegmentCache(backend.cuts, backend.encode_pieces, token_bytes, SMALL_LIMIT, SMALL_PART)


CUTTABLE = [kind for kind in MAKERS if kind not in ("metaspace_first", "sp_bpe_first_only")]


@pytest.mark.parametrize("kind", CUTTABLE)
@settings(max_examples=80, deadline=None)
@given(text=texts(TOKENS))
def test_tokens_are_those_of_the_plain_path(kind: str, text: str) -> None:
    expected = backend_of(kind).encode(text, add_special_tokens=False)
    assert small_cache(kind).encode(text) == expected
    assert small_cache(kind).encode(text) == expected


@pytest.mark.parametrize("kind", CUTTABLE)
@settings(max_examples=40, deadline=None)
@given(text=texts(TOKENS))
def test_every_single_cut_keeps_the_tokens(kind: str, text: str) -> None:
    backend = backend_of(kind)
    assert backend.cuts is not None
    whole = backend.encode(text, add_special_tokens=False)
    for at in {found.end() for found in backend.cuts.anywhere.finditer(text)} - {0, len(text)}:
        left, right = backend.encode_pieces([text[:at], text[at:]])
        assert left + right == whole, (text[:at], text[at:])


@pytest.mark.parametrize("kind", ["metaspace_first", "sp_bpe_first_only"])
def test_tokenizer_that_treats_the_start_of_text_in_its_own_way_has_no_cache(kind: str) -> None:
    assert load(kind).cache_counts is None


@pytest.mark.parametrize("kind", [kind for kind in BYTE_LEVEL if kind != "spaced_token"])
def test_byte_level_tokenizers_are_cut_at_words(kind: str) -> None:
    cuts = backend_of(kind).cuts
    assert cuts is not None
    assert cuts.words is not None
    assert re.split(cuts.words, "two words  and, some\n 12 more") == [
        "two",
        " words",
        "  and,",
        " some\n",
        " 12",
        " more",
    ] or (re.split(cuts.words, "two words  and, some\n 12 more") == ["two", " words", "  and,", " some\n 12", " more"])


def test_added_token_with_a_space_inside_forbids_cuts_at_spaces() -> None:
    cuts = backend_of("spaced_token").cuts
    assert cuts is not None
    assert cuts.words is not None
    assert re.split(cuts.words, "word other\nthing") == ["word other\n", "thing"]


def words_text(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return " ".join(
        draw.choice(["alpha", "beta", "gamma", "delta,", "return", "x1", "naïve", "\nnew"]) for _ in range(count)
    )


def test_shared_beginning_is_found_and_the_rest_counted() -> None:
    tokenizer = Tokenizer.load(directory_of("llama3"))
    shared = words_text(1, 3000)
    first, second = f"{shared} one two", f"{shared} three four five"
    tokenizer.encode(first)
    counts = tokenizer.cache_counts
    assert counts is not None
    assert (counts.hits, counts.misses, counts.cached_tokens) == (0, 1, 0)
    total = counts.uncached_tokens
    ids = tokenizer.encode(second)
    assert (counts.hits, counts.misses) == (1, 1)
    assert counts.cached_tokens + counts.uncached_tokens == total + len(ids)
    assert counts.cached_tokens > 0.8 * len(ids)


def test_known_text_is_not_encoded_again() -> None:
    backend = backend_of("llama3")
    assert backend.cuts is not None
    asked: list[str] = []

    def encode_pieces(pieces: list[str]) -> list[list[int]]:
        asked.extend(pieces)
        return backend.encode_pieces(pieces)

    segments = SegmentCache(backend.cuts, encode_pieces, backend.rules.token_bytes)
    text = words_text(2, 2000)
    segments.encode(text)
    asked.clear()
    segments.encode(text)
    segments.encode(words_text(3, 2000))
    assert sum(map(len, asked)) < 100  # a few words at the edges of parts, out of 24 000 characters


def test_many_new_words_cost_one_call_a_part() -> None:
    backend = backend_of("llama3")
    assert backend.cuts is not None
    calls = 0

    def encode_pieces(pieces: list[str]) -> list[list[int]]:
        nonlocal calls
        calls += len(pieces)
        return backend.encode_pieces(pieces)

    segments = SegmentCache(backend.cuts, encode_pieces, backend.rules.token_bytes)
    draw = random.Random(4)
    text = " ".join("".join(draw.choices("abcdefgh", k=7)) for _ in range(1000))
    assert segments.encode(text) == backend.encode(text, add_special_tokens=False)
    assert calls < 20


@pytest.mark.parametrize("limit", [0, 300, 5_000, 50_000])
def test_memory_stays_within_its_limit(limit: int) -> None:
    backend = backend_of("qwen2")
    assert backend.cuts is not None
    segments = SegmentCache(backend.cuts, backend.encode_pieces, backend.rules.token_bytes, limit)
    for seed in range(40):
        text = words_text(seed, 400) + f" {seed * 7919}"
        assert segments.encode(text) == backend.encode(text, add_special_tokens=False)
        assert segments.held_bytes <= limit


def test_estimate_covers_the_memory_that_entries_take() -> None:
    held = Generations(10**7)
    for number in range(5000):
        held.put(f"word{number}", (number + 1000, number + 2000), 36)
    real = sum(sys.getsizeof(k) + sys.getsizeof(v) + 2 * sys.getsizeof(10**6) for k, v in held.young.items())
    assert real + sys.getsizeof(held.young) <= held.held_bytes <= 2 * real


def test_entry_that_is_asked_for_outlives_one_that_is_not() -> None:
    held = Generations(4000)
    held.put("kept", (1,), 36)
    for number in range(200):
        if number % 4 == 0:
            held.put("kept", (1,), 36)
        held.put(f"passing{number}", (1,), 36)
    assert held.get("kept") == (1,)
    assert held.get("passing0") is None
    assert held.get("passing199") == (1,)


def test_threads_may_share_a_cache() -> None:
    backend = backend_of("llama3")
    assert backend.cuts is not None
    segments = SegmentCache(backend.cuts, backend.encode_pieces, backend.rules.token_bytes, SMALL_LIMIT, 64)
    many = [words_text(seed, 300) for seed in range(30)] * 4
    expected = {text: backend.encode(text, add_special_tokens=False) for text in many}
    with ThreadPoolExecutor(4) as pool:
        for text, ids in zip(many, pool.map(segments.encode, many), strict=True):
            assert ids == expected[text]


def test_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TOKENIZER_CACHE", "0")
    off = Tokenizer.load(directory_of("llama3"))
    assert off.cache_counts is None
    assert off.cache_bytes == 0
    assert off.encode("some text") == load("llama3").encode("some text")


def test_cache_of_no_bytes_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TOKENIZER_CACHE_BYTES", "0")
    assert Tokenizer.load(directory_of("llama3")).cache_counts is None


def test_wrong_cuts_are_noticed_at_load(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    everywhere = re.compile(r"(?<=.)(?=.)", re.DOTALL)
    monkeypatch.setattr("dynamo.llm.tokenizer_hf.pipeline_cuts", lambda *_, **__: Cuts(everywhere, everywhere))
    tokenizer = Tokenizer.load(directory_of("llama3"))
    assert tokenizer.cache_counts is None
    assert "tokenizer cache is off" in caplog.text
    assert tokenizer.encode("some text") == load("llama3").encode("some text")


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30))
def test_public_encode_equals_the_plain_path(text: str) -> None:
    for kind in ("llama3", "qwen2"):
        for special in (False, True):
            assert load(kind).encode(text, special) == backend_of(kind).encode(text, special)
