"""Are the pieces of a stream, joined, the text of all its tokens at once?"""

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders

from dynamo.llm.piece_steps import chain_of
from dynamo.llm.piece_stream import PieceRules, WindowRules
from dynamo.llm.tokenizer import Tokenizer
from tests.llm.tokenizer_zoo import BYTE_LEVEL, MAKERS, PIECES, SPECIAL, cut_anywhere, directory_of, load, texts

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=60)
BYTE_FALLBACK = ["llama2", "gemma", "sp_bpe", "sp_bpe_first_only", "sp_plain"]


def streamed(tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int], skip: bool) -> list[str]:
    decoder = tokenizer.decoder(skip)
    pieces = [decoder.push(chunk) for chunk in cut_anywhere(ids, iter(sizes))]
    return [*pieces, decoder.finish()]


@cache
def some_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, with special, unknown, and single-byte tokens far more often than by chance."""
    tokenizer = load(kind)
    rare = [*tokenizer.special_ids, tokenizer.vocab_size, tokenizer.vocab_size + 7]
    partial = [id_ for id_ in range(tokenizer.vocab_size) if is_partial(tokenizer, id_)]
    rest = st.integers(0, tokenizer.vocab_size - 1)
    return st.lists(st.one_of(rest, st.sampled_from(rare), *([st.sampled_from(partial)] * 2 if partial else [])))


def is_partial(tokenizer: Tokenizer, id_: int) -> bool:
    try:
        tokenizer.token_bytes(id_).decode()
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=50, deadline=None)
@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_any_tokens_in_any_chunks_give_the_one_shot_text(
    kind: str, data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    tokenizer = load(kind)
    ids = data.draw(some_ids(kind))
    assert "".join(streamed(tokenizer, ids, sizes, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=40, deadline=None)
@given(text=texts(), sizes=SIZES, skip=st.booleans())
def test_tokens_of_a_text_give_the_one_shot_text(kind: str, text: str, sizes: list[int], skip: bool) -> None:
    tokenizer = load(kind)
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids, sizes, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize(
    "kind", [kind for kind in BYTE_LEVEL if kind not in ("gpt2_prefix_space", "qwen2", "neox", "swallowing")]
)
@settings(max_examples=40, deadline=None)
@given(text=texts())
def test_byte_level_text_comes_back_as_it_went_in_and_no_character_is_torn(kind: str, text: str) -> None:
    tokenizer = load(kind)
    pieces = streamed(tokenizer, tokenizer.encode(text), [1] * 10_000, skip=False)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "한국어", "你好", "\U0010ffff", "नमस्ते"])
def test_characters_of_many_bytes_come_whole(text: str) -> None:
    tokenizer = load("gpt2")
    id_of = byte_ids("gpt2")
    ids = [id_of[byte] for byte in text.encode()]
    assert [piece for piece in streamed(tokenizer, ids, [1] * len(ids), skip=True) if piece] == list(text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xf0\x9f\x98", "\ufffd"),
        (b"\xf0\x9f\x98A", "\ufffdA"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"\xe4\xbd\xe4\xbd\xa0", "\ufffd你"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\xc0\x80", "\ufffd\ufffd"),
        (b"\xf5\x80\x80\x80", "\ufffd\ufffd\ufffd\ufffd"),
    ],
)
def test_bytes_that_are_no_character_become_replacement_characters_as_in_one_shot(data: bytes, text: str) -> None:
    tokenizer = load("gpt2")
    id_of = {tokenizer.token_bytes(id_): id_ for id_ in range(tokenizer.vocab_size)}
    ids = [id_of[data[i : i + 1]] for i in range(len(data))]
    assert "".join(streamed(tokenizer, ids, [1] * len(ids), skip=True)) == text == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(data=st.lists(st.integers(0, 255), max_size=12), sizes=SIZES)
def test_any_bytes_decode_as_in_one_shot(data: list[int], sizes: list[int]) -> None:
    for kind in ("gpt2", *BYTE_FALLBACK):
        tokenizer = load(kind)
        id_of = byte_ids(kind)
        ids = [id_of[byte] for byte in data]
        assert "".join(streamed(tokenizer, ids, sizes, skip=True)) == tokenizer.decode(ids)


@cache
def byte_ids(kind: str) -> dict[int, int]:
    """Ids of the 256 single-byte tokens."""
    tokenizer = load(kind)
    if kind == "gpt2":
        return {data[0]: id_ for id_ in range(tokenizer.vocab_size) if len(data := tokenizer.token_bytes(id_)) == 1}
    return {byte: id_ for byte in range(256) if (id_ := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None}


@cache
def sentencepiece_library(kind: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory_of(kind) / "tokenizer.model"))


@pytest.mark.parametrize("kind", [kind for kind in PIECES if kind.startswith("sp_")])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sentencepiece_text_is_that_of_the_library(kind: str, data: st.DataObject) -> None:
    library = sentencepiece_library(kind)
    bytes_ = [id_ for id_ in range(library.vocab_size()) if library.is_byte(id_)]
    some = st.one_of(st.integers(0, library.vocab_size() - 1), st.integers(0, 8), st.sampled_from(bytes_ or [0]))
    ids = data.draw(st.lists(some))
    assert load(kind).decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", MAKERS)
def test_special_tokens_are_skipped_or_shown(kind: str) -> None:
    tokenizer = load(kind)
    token_id = min(tokenizer.special_ids)
    shown = tokenizer.id_to_token(token_id)
    assert shown is not None
    assert "".join(streamed(tokenizer, [token_id], [1], skip=True)) == ""
    assert "".join(streamed(tokenizer, [token_id], [1], skip=False)) == shown


@pytest.mark.parametrize("kind", ["llama2", "t5", "metaspace_first", "sp_bpe", "bert", "word_level"])
def test_space_before_the_first_word_stays_when_a_prompt_came_before(kind: str) -> None:
    tokenizer = load(kind)
    prompt, answer = tokenizer.encode("the import"), tokenizer.encode("other")
    fresh, going_on = tokenizer.decoder(), tokenizer.decoder(prompt_ids=prompt)
    assert fresh.push(answer) + fresh.finish() == "other"
    assert going_on.push(answer) + going_on.finish() == " other"


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prompt_and_continuation_joined_are_the_whole(kind: str, data: st.DataObject) -> None:
    tokenizer = load(kind)
    prompt, answer = (data.draw(texts(max_pieces=8).map(tokenizer.encode)) for _ in range(2))
    before = tokenizer.decoder()
    text_before = before.push(prompt)
    after = tokenizer.decoder(prompt_ids=prompt)
    assert text_before + after.push(answer) + after.finish() == tokenizer.decode(prompt + answer)


@pytest.mark.parametrize("kind", ["gpt2", "sp_bpe", "llama2"])
def test_character_that_the_prompt_began_comes_out_whole(kind: str) -> None:
    tokenizer = load(kind)
    id_of = byte_ids(kind)
    ids = [id_of[byte] for byte in "é你".encode()]
    word = tokenizer.encode("word")
    for cut in range(1, len(ids)):
        decoder = tokenizer.decoder(prompt_ids=[*tokenizer.encode("some long prompt of words") * 20, *ids[:cut]])
        text = decoder.push(ids[cut:]) + decoder.push(word) + decoder.finish()
        assert "\ufffd" not in text
        assert text.removesuffix("word").rstrip().endswith("你")


def test_token_bytes_of_a_text_joined_are_the_text() -> None:
    text = "Hello, 世界! 👍🏽\n<|im_end|> café"
    for kind in ("gpt2", "llama3", "deepseek", "qwen_tiktoken"):
        tokenizer = load(kind)
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    for kind in ("llama2", "sp_bpe"):  # the space before the first word is a token's too
        tokenizer = load(kind)
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("Hello 世 x"))).decode() == " Hello 世 x"


def test_token_text_shows_special_tokens_and_marks_partial_characters() -> None:
    tokenizer = load("gpt2")
    assert tokenizer.token_text(tokenizer.encode("<|im_end|>")[0]) == "<|im_end|>"
    assert tokenizer.token_text(tokenizer.encode("你")[0]) == "\ufffd"
    assert tokenizer.token_text(10**6) == ""
    assert tokenizer.token_bytes(-1) == b""


@pytest.mark.parametrize("kind", MAKERS)
def test_unknown_ids_give_nothing(kind: str) -> None:
    tokenizer = load(kind)
    decoder = tokenizer.decoder()
    ids = [*tokenizer.encode("word"), tokenizer.vocab_size + 5, 2**31, *tokenizer.encode("other")]
    assert decoder.push(ids) + decoder.finish() == tokenizer.decode(ids)


DECODERS = [
    None,
    decoders.Metaspace(prepend_scheme="always"),
    decoders.Metaspace(prepend_scheme="first"),
    decoders.Metaspace(prepend_scheme="never"),
    decoders.Metaspace(replacement="_", prepend_scheme="always"),
    decoders.WordPiece(cleanup=True),
    decoders.WordPiece(prefix="@@", cleanup=False),
    decoders.BPEDecoder("</w>"),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Replace("▁", " "),
    decoders.Replace("##", ""),
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 3, 0)]
    ),
    decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    decoders.Sequence([decoders.Fuse(), decoders.Strip("#", 2, 0)]),
    decoders.Sequence([decoders.BPEDecoder("</w>"), decoders.ByteFallback(), decoders.WordPiece()]),
]
PIECE = st.one_of(
    st.sampled_from(
        ["▁", "▁the", "the", " ", "  ", "##ing", "@@x", "</w>", "a</w>", "#", "n't", "'s", ".", "do not", ""]
    ),
    st.sampled_from(
        ["<0x41>", "<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0x0A>", "<0x+A>", "<0xe4>", "<0xG1>", "<0x0>"]
    ),
    st.text(max_size=3),
)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(PIECE, max_size=12), sizes=SIZES)
def test_steps_give_what_the_library_gives(
    decoder: decoders.Decoder | None, pieces: list[str], sizes: list[int]
) -> None:
    chain = chain_of(decoder.__getstate__() if decoder is not None else None)
    assert chain is not None
    rules = PieceRules(lambda id_: pieces[id_] if 0 <= id_ < len(pieces) else None, frozenset(), chain)
    stream = rules.decoder(skip_special_tokens=True, prompt_ids=())
    text = "".join(stream.push(chunk) for chunk in cut_anywhere(range(len(pieces)), iter(sizes))) + stream.finish()
    assert text == (decoder.decode(pieces) if decoder is not None else " ".join(pieces))


@pytest.mark.parametrize(
    "decoder", [decoders.CTC(), decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])], ids=str
)
def test_decoder_without_a_streaming_form_is_asked_in_windows(decoder: decoders.Decoder, tmp_path: Path) -> None:
    assert chain_of(decoder.__getstate__()) is None
    library = HfTokenizer.from_file(str(directory_of("gpt2") / "tokenizer.json"))
    library.decoder = decoder
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert isinstance(tokenizer._backend.rules, WindowRules)
    ids = tokenizer.encode("one two three four five")
    stream = tokenizer.decoder()
    assert "".join(stream.push([id_]) for id_ in ids) + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "sp_bpe"])
def test_cost_of_a_token_does_not_grow_with_the_text(kind: str) -> None:
    tokenizer = load(kind)
    ids = tokenizer.encode("the import of other words ") * 400
    decoder = tokenizer.decoder()
    decoder.push(ids[:2000])
    spent: list[float] = []
    for start in (0, 20_000):
        chunk = (ids * 10)[:20_000]
        begun = time.process_time()
        for id_ in chunk:
            decoder.push([id_])
        spent.append(time.process_time() - begun)
        assert start >= 0
    assert max(spent) < 5 * min(spent)
    assert min(spent) / 20_000 < 10e-6  # seconds; ten times what it is, as the machine may be busy


def test_special_list_of_the_zoo_is_special() -> None:
    tokenizer = load("gpt2")
    assert {tokenizer.token_to_id(token) for token in SPECIAL} == tokenizer.special_ids
