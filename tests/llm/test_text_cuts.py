"""Is a text only ever cut where the tokenizer's description proves that it may be?"""

import json

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from dynamo.llm.split_pattern import NOWHERE, Places, places
from dynamo.llm.text_cuts import GPT2_PATTERN, make_cuts, pipeline_cuts, split_places
from dynamo.llm.tokenizer_config import AddedTokenSpec
from dynamo.llm.tokenizer_tiktoken import KIMI_PATTERN
from tests.llm.tokenizer_zoo import DEEPSEEK, LLAMA3, O200K, QWEN2

EVERYWHERE = Places(before_space=True, before_space_met=True, after_newline=True, after_newline_met=True)
BEFORE_SPACE = Places(before_space=True, before_space_met=True, after_newline=False, after_newline_met=False)
TIKTOKEN_GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)


@pytest.mark.parametrize("pattern", [LLAMA3, QWEN2, O200K, DEEPSEEK, KIMI_PATTERN])
def test_patterns_of_today_may_be_cut_at_spaces_and_newlines(pattern: str) -> None:
    assert places(pattern) == EVERYWHERE


def test_gpt2_may_be_cut_at_spaces_only() -> None:
    # Of two newlines before a letter it makes two tokens, of two at the end of the text one.
    assert places(GPT2_PATTERN) == BEFORE_SPACE


def test_gpt4_in_its_possessive_spelling_may_be_cut_at_spaces() -> None:
    found = places(TIKTOKEN_GPT4)
    assert found.before_space
    assert found.before_space_met
    assert not found.after_newline


@pytest.mark.parametrize(
    "pattern",
    [
        r"\w+ \w+|\s+",  # a match reaches over a space
        r".+",
        r"[^\n]+|\s+",
        r"\p{L}[ x]|\s+",
        r"(?:a b)|\s+",
        r"(?:a| )+",
        r"\S+(?!\s)|\s+",  # looks whether a space follows
        r"\S+(?! )|\s+",
        r"[^\p{Z}]+|\s+",  # a property that is not known
        r"[^a-z]+|\s+",
    ],
)
def test_pattern_that_may_see_over_a_space_is_not_cut_there(pattern: str) -> None:
    assert not places(pattern).before_space


@pytest.mark.parametrize(
    "pattern",
    [
        r"\s*[\r\n]+\p{L}|\s+",  # a match reaches over
        r"\s+(?!\S)|\s*[\r\n]+|\s+",  # looks before the newlines are eaten
        r"\s*\r+|\s+(?!\S)|\s+",  # eats another kind of newline
        r"\s*[\r\n]+|x\n(?!\p{L})|\s+",  # looks whether a letter follows
        r"[^x]+|\s*[\r\n]+",
    ],
)
def test_pattern_that_may_see_over_a_newline_is_not_cut_there(pattern: str) -> None:
    assert not places(pattern).after_newline


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<=a)b|\s+",
        r"a(?=b)|\s+",
        r"\bx|\s+",
        r"^x|\s+",
        r"a*|\s+",
        r"(a|\s+",
        r"a)|\s+",
        r"[a",
        r"\p{Lu",
        r"\P{L}|\s+",
        r"(?i)a|\s+",
        r"(?>a)|\s+",
        r"[[:space:]]+",
        r"[^\s&&[x]]+|\s+",
        r"\Q..\E",
        r"(?!ab)x|\s+",
        r"a{x}|\s+",
        "",
        "|",
    ],
)
def test_what_cannot_be_read_is_cut_nowhere(pattern: str) -> None:
    assert places(pattern) == NOWHERE


def state(step: object) -> bytes:
    found: bytes = step.__getstate__()  # type: ignore[attr-defined]
    return found


def split_of(step: pre_tokenizers.PreTokenizer) -> Places:
    return split_places(json.loads(state(step)))


def test_steps_one_after_another_allow_what_each_allows() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    good = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    bad = pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")
    assert split_of(pre_tokenizers.Sequence([digits, good, byte_level])) == EVERYWHERE
    assert not split_of(pre_tokenizers.Sequence([bad, good, byte_level])).before_space
    assert not split_of(pre_tokenizers.Sequence([digits, byte_level])).before_space_met


@pytest.mark.parametrize(
    "step",
    [
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Split(" ", "merged_with_next"),
        pre_tokenizers.Split(Regex(LLAMA3), "merged_with_previous"),
        pre_tokenizers.UnicodeScripts(),
        pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace()]),
    ],
)
def test_unknown_step_allows_nothing(step: pre_tokenizers.PreTokenizer) -> None:
    assert not split_of(step).before_space
    assert not split_of(step).after_newline


def test_prefixed_space_forbids_parts_that_begin_with_a_letter() -> None:
    step = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    assert split_of(step).before_space
    assert not split_of(step).after_newline


@pytest.mark.parametrize(
    ("normalizer", "at_words"),
    [
        (None, True),
        (normalizers.NFC(), True),
        (normalizers.Sequence([normalizers.NFC()]), True),
        (normalizers.NFKC(), False),
        (normalizers.Replace(" ", "_"), False),
        (normalizers.Strip(), False),
    ],
)
def test_only_a_normalizer_that_keeps_spaces_keeps_words(
    normalizer: normalizers.Normalizer | None, at_words: bool
) -> None:
    byte_level = state(pre_tokenizers.ByteLevel(add_prefix_space=False))
    special = [AddedTokenSpec("<|x|>")]
    cuts = pipeline_cuts(special, state(normalizer) if normalizer else None, byte_level, random_merges=False)
    assert cuts is not None
    assert (cuts.words is not None) == at_words
    assert cuts.anywhere.search("<|x|>") is not None


def test_random_merges_forbid_a_cache() -> None:
    assert pipeline_cuts([], None, state(pre_tokenizers.ByteLevel()), random_merges=True) is None


def test_without_any_known_place_there_are_no_cuts() -> None:
    assert pipeline_cuts([], None, None, random_merges=False) is None
    assert make_cuts([AddedTokenSpec("<x>", single_word=True)], EVERYWHERE) is None


def found_tokens(*contents: str, **flags: bool) -> set[str]:
    """Which of these tokens a text may be cut after."""
    cuts = make_cuts([AddedTokenSpec(content, **flags) for content in contents], NOWHERE)
    return set() if cuts is None else {content for content in contents if cuts.anywhere.fullmatch(content)}


def test_text_is_cut_only_after_tokens_that_no_other_overlaps() -> None:
    assert found_tokens("<|a|>", "<|b|>") == {"<|a|>", "<|b|>"}
    assert found_tokens("<a>", "<a>b") == {"<a>b"}
    assert found_tokens("ab", "bc") == {"ab"}
    assert found_tokens("aa") == set()
    assert found_tokens("x<a>y", "<a>") == {"x<a>y"}
    assert found_tokens("<a>", rstrip=True) == set()
    assert found_tokens("<a>", normalized=True) == set()
    assert found_tokens("<unused7>", "<end>") == {"<end>"}
    assert len(found_tokens(*(f"<{chr(97 + i % 26)}{chr(97 + i // 26)}>" for i in range(500)))) == 64
