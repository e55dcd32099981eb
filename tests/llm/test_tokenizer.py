"""Does any model directory give its own tokenizer, or an error that names the file?"""

import asyncio
import base64
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from tokenizers import Tokenizer as HfTokenizer

from dynamo.llm import tokenizer as tokenizer_module
from dynamo.llm.tokenizer import INLINE_CHARS, Tokenizer
from dynamo.llm.tokenizer_tiktoken import GPT4_PATTERN, KIMI_PATTERN, QWEN_PATTERN, read_ranks
from dynamo.runtime.errors import InvalidArgument
from tests.llm.tokenizer_zoo import LLAMA3, SPECIAL, directory_of, load, texts

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub

FAST = ["gpt2", "gpt2_prefix_space", "llama3", "qwen2", "swallowing", "neox", "llama2", "gemma", "t5", "bert"]


def copy_of(kind: str, directory: Path) -> Path:
    shutil.copytree(directory_of(kind), directory, dirs_exist_ok=True)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **changes}))


@pytest.mark.parametrize("kind", FAST)
def test_ids_and_text_are_those_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")  # comes with vLLM; the project itself does not need it
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory_of(kind))

    @settings(max_examples=40, deadline=None)
    @given(text=texts())
    def compare(text: str) -> None:
        for special in (False, True):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert load(kind).encode(text, special) == ids
            for skip in (False, True):
                assert load(kind).decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)

    compare()
    assert load(kind).vocab_size == len(theirs)
    assert load(kind).special_ids == frozenset(theirs.all_special_ids) | load(kind).special_ids
    assert (load(kind).bos_id, load(kind).named_tokens["eos_token"]) == (theirs.bos_token_id, theirs.eos_token)


@settings(max_examples=60, deadline=None)
@given(text=texts(["<|im_start|>", "<|im_end|>", "<tool>", "[BOS]", "<|endoftext|>"]))
def test_tiktoken_ids_are_those_of_the_library(text: str) -> None:
    for kind, file, pattern in (
        ("qwen_tiktoken", "qwen.tiktoken", QWEN_PATTERN),
        ("kimi_tiktoken", "tiktoken.model", KIMI_PATTERN),
    ):
        ours = load(kind)
        ranks = read_ranks(directory_of(kind) / file)
        special = {str(ours.id_to_token(id_)): id_ for id_ in range(len(ranks), ours.vocab_size)}
        library = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        assert ours.encode(text) == library.encode(text, allowed_special="all")


@settings(max_examples=60, deadline=None)
@given(text=texts(["<|im_start|>", "##"]))
def test_sentencepiece_ids_are_those_of_the_library(text: str) -> None:
    for kind in ("sp_bpe", "sp_plain"):
        library = sentencepiece.SentencePieceProcessor(model_file=str(directory_of(kind) / "tokenizer.model"))
        if "<s>" not in text and "</s>" not in text:
            assert load(kind).encode(text) == library.encode(text)
            assert load(kind).encode(text, add_special_tokens=True) == [library.bos_id(), *library.encode(text)]


def test_qwen_special_tokens_are_well_known() -> None:
    tokenizer = load("qwen_tiktoken")
    first = len(read_ranks(directory_of("qwen_tiktoken") / "qwen.tiktoken"))
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|>") == [
        first,
        first + 1,
        first + 2,
        first + 3,
    ]
    assert tokenizer.token_to_id("<|extra_204|>") == first + 207 == tokenizer.vocab_size - 1


def test_kimi_special_tokens_come_from_the_config_and_the_free_ids_are_reserved() -> None:
    tokenizer = load("kimi_tiktoken")
    first = len(read_ranks(directory_of("kimi_tiktoken") / "tiktoken.model"))
    assert tokenizer.encode("[BOS]<|im_end|><tool>") == [first, first + 5, first + 9]
    assert tokenizer.token_to_id(f"<|reserved_token_{first + 2}|>") == first + 2
    assert tokenizer.decode([first, first + 9]) == "<tool>"  # the one that is not special
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (first, (first + 1,))


def test_llama3_ranks_under_the_name_of_a_sentencepiece_model(tmp_path: Path) -> None:
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    triples = [bytes([97, a, b]) for a in range(256) for b in range(256)]
    tokens = [*(bytes([byte]) for byte in range(256)), *pairs, *triples][:128_000]
    (tmp_path / "tokenizer.model").write_bytes(
        b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<|begin_of_text|><|start_header_id|><|eot_id|>") == [128_000, 128_006, 128_009]
    assert tokenizer.vocab_size == 128_256
    assert tokenizer.decode(tokenizer.encode("Hello 世界")) == "Hello 世界"


def test_pattern_of_a_tiktoken_file_may_be_given_in_the_config(tmp_path: Path) -> None:
    shutil.copy(directory_of("qwen_tiktoken") / "qwen.tiktoken", tmp_path / "other.tiktoken")
    edit_json(tmp_path / "tokenizer_config.json", pat_str=r".", added_tokens_decoder={})
    by_character = Tokenizer.load(tmp_path)
    assert len(by_character.encode("the word")) == len("the word")
    assert GPT4_PATTERN == LLAMA3


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "no tokenizer in"),
        ({"tokenizer.json": b"{broken"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": b""}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": b'{"model": 1}'}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": b"\xff\xfe\x00"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.model": b"\x0a\x00garbage"}, "tokenizer.model is not a SentencePiece model"),
        ({"tokenizer.model": b""}, "tokenizer.model"),
        ({"x.tiktoken": b"!!! 0\n"}, "x.tiktoken, line 1"),
        ({"x.tiktoken": b"YQ== 0\nYg== x\n"}, "x.tiktoken, line 2"),
        ({"x.tiktoken": b"YQ== 0\n"}, "x.tiktoken has no rank for byte 0x00"),
        ({"x.tiktoken": b""}, "x.tiktoken is empty"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json holds a JSON list"),
        ({"generation_config.json": b"nonsense"}, "generation_config.json is not valid JSON"),
    ],
)
def test_broken_or_missing_file_is_named(tmp_path: Path, files: dict[str, bytes], named: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument) as caught:
        Tokenizer.load(tmp_path)
    assert named in caught.value.message


def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="gone is not a directory"):
        Tokenizer.load(tmp_path / "gone")


def test_truncation_and_padding_of_the_file_are_not_in_effect(tmp_path: Path) -> None:
    library = HfTokenizer.from_file(str(directory_of("llama3") / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    text = "many words that make many tokens"
    assert Tokenizer.load(tmp_path).encode(text) == load("llama3").encode(text)


def test_end_ids_are_the_union_of_all_configs(tmp_path: Path) -> None:
    directory = copy_of("llama3", tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 9, 3]}')
    (directory / "config.json").write_text('{"eos_token_id": 4, "text_config": {"eos_token_id": [9, 5]}}')
    own = load("llama3").token_to_id("<|end|>")
    assert Tokenizer.load(directory).eos_ids == (3, 9, 4, 5, own)


def test_special_tokens_map_counts_where_the_config_lists_no_added_tokens(tmp_path: Path) -> None:
    directory = copy_of("gpt2", tmp_path)
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>", "lstrip": false}}')
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.named_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.eos_ids == (tokenizer.token_to_id("<|im_end|>"),)


def test_tokens_that_only_the_config_knows_are_added(tmp_path: Path) -> None:
    directory = copy_of("gpt2", tmp_path)
    size = load("gpt2").vocab_size
    edit_json(
        directory / "tokenizer_config.json",
        added_tokens_decoder={str(size): {"content": "<|new|>", "special": True}},
        pad_token="<|pad|>",
        additional_special_tokens=["<|more|>"],
    )
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("a<|new|><|pad|><|more|>")[1:]
    assert ids == [size, size + 1, size + 2]
    assert tokenizer.decode(ids) == ""


def test_word_of_the_vocabulary_that_the_config_calls_special_is_special(tmp_path: Path) -> None:
    directory = copy_of("gpt2", tmp_path)
    edit_json(directory / "tokenizer_config.json", eos_token="the")
    tokenizer = Tokenizer.load(directory)
    token_id = tokenizer.token_to_id("the")
    assert tokenizer.encode("xthex")[1] == token_id
    assert token_id in tokenizer.special_ids
    assert tokenizer.decode([token_id]) == ""


def test_special_tokens_open_and_close_as_the_file_says() -> None:
    begin, end = (load("bert").token_to_id(token) for token in ("<|begin|>", "<|end|>"))
    ids = load("bert").encode("word")
    assert load("bert").encode("word", add_special_tokens=True) == [begin, *ids, end]
    assert load("bert").encode("", add_special_tokens=True) == [begin, end]
    assert load("sp_unigram").encode("", add_special_tokens=True) == [1, 2]


def test_sentencepiece_finds_its_ends_in_text_and_names_them() -> None:
    tokenizer = load("sp_bpe")
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    word = tokenizer.encode("word")
    assert tokenizer.encode("<s>word</s>word") == [1, *word, 2, *word]


def test_sentencepiece_puts_its_space_after_special_tokens_only_in_legacy_mode() -> None:
    legacy, first_only = load("sp_bpe"), load("sp_bpe_first_only")
    assert legacy.encode("a<s>a") == [*legacy.encode("a"), 1, *legacy.encode("a")]
    assert first_only.encode("a")[0] == legacy.encode("a")[0]
    assert first_only.decode(first_only.encode("<s>the")) == "the"
    assert first_only.encode("<s>the") != legacy.encode("<s>the")


def test_sentencepiece_added_tokens_take_spaces_as_their_flags_say() -> None:
    tokenizer = load("sp_unigram")
    extra, visible = tokenizer.token_to_id("<extra>"), tokenizer.token_to_id("<visible>")
    word = tokenizer.encode("word")
    assert tokenizer.encode("word  <extra>word") == [*word, extra, *word]
    assert tokenizer.encode("word<visible>  word") == [*word, visible, *word]
    assert tokenizer.decode([extra, visible]) == "<visible>"


@pytest.mark.parametrize("kind", ["llama3", "qwen_tiktoken", "sp_bpe", "metaspace_first"])
def test_text_that_is_not_unicode_is_refused(kind: str) -> None:
    for text in ("a\ud800b", "\udfff" * 3, "word " * 4000 + "\ud800"):
        with pytest.raises(InvalidArgument, match="not valid Unicode"):
            load(kind).encode(text)


def test_run_of_spaces_that_the_library_cannot_split_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="shorten its runs of white space"):
        load("qwen_tiktoken").encode(" " * 2_000_000 + "x")


@pytest.mark.parametrize("kind", ["llama3", "metaspace_first", "sp_bpe"])
async def test_long_new_text_is_encoded_in_another_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(directory_of(kind))
    threads: list[str] = []
    plain = tokenizer._backend.encode
    pieces = tokenizer._backend.encode_pieces

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        threads.append(threading.current_thread().name)
        return plain(text, add_special_tokens)

    def encode_pieces(parts: list[str]) -> list[list[int]]:
        threads.append(threading.current_thread().name)
        return pieces(parts)

    monkeypatch.setattr(tokenizer._backend, "encode", encode)
    if tokenizer._cache is not None:
        monkeypatch.setattr(tokenizer._cache, "_encode_pieces", encode_pieces)
    text = "".join(f" word{number}" for number in range(INLINE_CHARS // 4))
    expected = plain(text, True)
    assert await tokenizer.encode_async(text, add_special_tokens=True) == expected
    assert threads
    assert all(name.startswith("tokenizer") for name in threads)
    threads.clear()
    short = "a few words"
    assert await tokenizer.encode_async(short) == plain(short, False)
    assert all(not name.startswith("tokenizer") for name in threads)


async def test_long_text_that_is_known_stays_in_the_loop() -> None:
    tokenizer = Tokenizer.load(directory_of("llama3"))
    text = "".join(f" word{number}" for number in range(INLINE_CHARS // 2))
    first = await tokenizer.encode_async(text)
    running = asyncio.create_task(tokenizer.encode_async(text))
    await asyncio.sleep(0)
    assert running.done()
    assert await running == first


async def test_bad_text_is_refused_from_another_thread_too() -> None:
    with pytest.raises(InvalidArgument, match="not valid Unicode"):
        await load("llama3").encode_async("x y" * INLINE_CHARS + "\ud800")


async def test_threads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_TOKENIZER_THREADS", "2")
    tokenizer_module._pool.cache_clear()
    try:
        many = [f"{number} " * INLINE_CHARS for number in range(12)]
        ids = await asyncio.gather(*(load("llama3").encode_async(text) for text in many))
        assert ids == [load("llama3").encode(text) for text in many]
        assert sum(thread.name.startswith("tokenizer_") for thread in threading.enumerate()) >= 1
        assert tokenizer_module._pool()._max_workers == 2
    finally:
        tokenizer_module._pool.cache_clear()


def test_library_does_not_use_threads_of_its_own() -> None:
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_every_id_has_a_text_and_bytes() -> None:
    for kind in ("gpt2", "llama2", "t5", "bert", "sp_unigram", "kimi_tiktoken"):
        tokenizer = load(kind)
        for token_id in range(tokenizer.vocab_size):
            assert tokenizer.token_text(token_id) == tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    assert {load("gpt2").id_to_token(id_) for id_ in load("gpt2").special_ids} == set(SPECIAL)
