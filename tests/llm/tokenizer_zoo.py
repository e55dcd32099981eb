"""Small tokenizers of every kind that models come with, trained on the spot.

Each entry of `MAKERS` writes a model directory's tokenizer files and returns nothing; `load(kind)` gives the loaded
`Tokenizer`, made once a session. `texts(tokens)` are texts that try what such tokenizers differ in.
"""

# ruff: noqa: RUF001 - characters of other scripts are the point

import base64
import io
import json
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import sentencepiece
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as HfTokenizer

from dynamo.llm.tokenizer import Tokenizer

SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<unk>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB = 900
_FOREIGN = [
    "你好，世界。今天天气很好。\n我们去公园吧！",
    "日本語のテキストです。カタカナも。",
    "한국어 문장입니다. 안녕하세요",
    "café naïve Ångström coöperate über straße",
    "cafe\u0301 A\u030a o\u0308",
    "Привет, мир! Как дела?",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🧑🏽‍🚀 🇩🇪 👍🏽 3️⃣",
    "x = [1, 22, 333, 4444] # 1,000.50 %\n\treturn   x\r\n",
]


@cache
def corpus() -> tuple[str, ...]:
    """Python sources and a little of many scripts."""
    names = ("argparse.py", "textwrap.py", "heapq.py", "string.py")
    sources = [(Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8") for name in names]
    return (*sources, *(_FOREIGN * 20))


def _save(library: HfTokenizer, directory: Path, **config: object) -> None:
    library.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**named, **config}), encoding="utf-8")


def _byte_level(
    directory: Path,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    special: Sequence[str | AddedToken] = SPECIAL,
    added: Sequence[str | AddedToken] = (),
) -> None:
    library = HfTokenizer(models.BPE())
    if normalizer is not None:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    library.add_tokens(list(added))
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", library.token_to_id("<|begin|>"))]
    )
    _save(library, directory)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2(directory: Path) -> None:
    _byte_level(directory, pre_tokenizers.ByteLevel(add_prefix_space=False))


def gpt2_prefix_space(directory: Path) -> None:
    _byte_level(directory, pre_tokenizers.ByteLevel(add_prefix_space=True))


def llama3(directory: Path) -> None:
    _byte_level(directory, _split(LLAMA3))


def qwen2(directory: Path) -> None:
    _byte_level(directory, _split(QWEN2), normalizers.NFC())


def o200k(directory: Path) -> None:
    _byte_level(directory, _split(O200K))


def deepseek(directory: Path) -> None:
    _byte_level(directory, _split(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK))


def starcoder(directory: Path) -> None:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    _byte_level(directory, pre_tokenizers.Sequence(steps))


def swallowing(directory: Path) -> None:
    """Special tokens that take white space beside them along, on either side (as Phi's and RoBERTa's)."""
    flags = {"<|im_start|>": (True, True), "<|im_end|>": (False, True), "<unk>": (True, False)}
    special = [
        AddedToken(text, lstrip=flags.get(text, (False, False))[0], rstrip=flags.get(text, (False, False))[1])
        for text in SPECIAL
    ]
    _byte_level(directory, _split(LLAMA3), special=special)


def neox(directory: Path) -> None:
    """Runs of spaces, and words, as tokens that are added but not special (as GPT-NeoX's)."""
    runs = [AddedToken(" " * n, normalized=True) for n in range(2, 9)]
    words = [AddedToken("café", normalized=True), AddedToken("\n\n", normalized=False)]
    _byte_level(directory, pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(), added=[*runs, *words])


def overlapping(directory: Path) -> None:
    """Special tokens that begin with one another, overlap, and hold spaces."""
    special = [*SPECIAL, "<|im|>", "<|im|>x", "|><|", "aa", "<|im_end|>\n"]
    _byte_level(directory, _split(LLAMA3), special=special)


def spaced_token(directory: Path) -> None:
    """An added token with a space after a letter, over which nothing may be cut."""
    _byte_level(directory, _split(LLAMA3), special=[*SPECIAL, "word other"])


def _byte_fallback_bpe() -> HfTokenizer:
    library = HfTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    library.train_from_iterator(
        corpus()[:4],
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[*SPECIAL, *bytes_], show_progress=False, limit_alphabet=90
        ),
    )
    # Bytes are of the vocabulary, not added tokens.
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    spec["pre_tokenizer"] = None
    return HfTokenizer.from_str(json.dumps(spec))


def llama2(directory: Path) -> None:
    library = _byte_fallback_bpe()
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", library.token_to_id("<|begin|>"))]
    )
    _save(library, directory)


def gemma(directory: Path) -> None:
    library = _byte_fallback_bpe()
    library.normalizer = normalizers.Replace(" ", "▁")
    library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _save(library, directory)


def _unigram(scheme: str) -> HfTokenizer:
    library = HfTokenizer(models.Unigram())
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Metaspace(prepend_scheme=scheme)
    library.train_from_iterator(
        [line for text in corpus() for line in text.splitlines()],
        trainers.UnigramTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return library


def t5(directory: Path) -> None:
    _save(_unigram("always"), directory)


def metaspace_first(directory: Path) -> None:
    _save(_unigram("first"), directory)


def metaspace_never(directory: Path) -> None:
    _save(_unigram("never"), directory)


def _word_piece(cleanup: bool) -> HfTokenizer:
    library = HfTokenizer(models.WordPiece(unk_token="<unk>"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=cleanup)
    library.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False)
    )
    return library


def bert(directory: Path) -> None:
    library = _word_piece(cleanup=True)
    ends = [(token, library.token_to_id(token)) for token in ("<|begin|>", "<|end|>")]
    library.post_processor = processors.TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=ends)
    _save(library, directory)


def bert_untidy(directory: Path) -> None:
    _save(_word_piece(cleanup=False), directory)


def word_level(directory: Path) -> None:
    """No decoder at all: words joined by spaces."""
    library = HfTokenizer(models.WordLevel(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(
        corpus(), trainers.WordLevelTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False)
    )
    _save(library, directory)


def clip(directory: Path) -> None:
    """Word ends marked in the pieces."""
    library = HfTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.BPEDecoder("</w>")
    library.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False),
    )
    _save(library, directory)


def _sentence_piece(directory: Path, config: dict[str, object], **options: object) -> None:
    lines = [line for text in corpus() for line in text.splitlines() if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCAB,
        character_coverage=0.98,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        control_symbols=["<ctl>"],
        minloglevel=2,
        **options,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def sp_bpe(directory: Path) -> None:
    """As Llama-2's."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    _sentence_piece(directory, {}, model_type="bpe", byte_fallback=True, **options)


def sp_bpe_first_only(directory: Path) -> None:
    """With Hugging Face's corrected treatment of text after special tokens."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    _sentence_piece(directory, {"legacy": False}, model_type="bpe", byte_fallback=True, **options)


def sp_plain(directory: Path) -> None:
    """Without a space before the first word."""
    options = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    _sentence_piece(directory, {}, model_type="bpe", byte_fallback=True, **options)


def sp_unigram(directory: Path) -> None:
    """As T5's: spaces collapsed, and an unknown symbol instead of bytes; more tokens added beside the model."""
    added = {
        str(VOCAB): {"content": "<extra>", "special": True, "lstrip": True},
        str(VOCAB + 1): {"content": "<visible>", "special": False, "rstrip": True},
    }
    _sentence_piece(directory, {"add_eos_token": True, "added_tokens_decoder": added}, model_type="unigram")


@cache
def _ranks() -> dict[bytes, int]:
    """Ranks in tiktoken's sense: bytes, then merges in the order in which they were learnt."""
    library = load("llama3")
    found: dict[bytes, int] = {bytes([value]): value for value in range(256)}
    for token_id in range(library.vocab_size):
        data = library.token_bytes(token_id)
        if token_id not in library.special_ids and len(data) > 1:
            found.setdefault(data, len(found))
    return found


def _write_ranks(path: Path) -> None:
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in _ranks().items()]
    path.write_bytes(b"\n".join(lines) + b"\n")


def qwen_tiktoken(directory: Path) -> None:
    _write_ranks(directory / "qwen.tiktoken")


def kimi_tiktoken(directory: Path) -> None:
    _write_ranks(directory / "tiktoken.model")
    first = len(_ranks())
    added = {
        str(first): {"content": "[BOS]", "special": True},
        str(first + 1): {"content": "[EOS]", "special": True},
        str(first + 5): {"content": "<|im_end|>", "special": True},
        str(first + 9): {"content": "<tool>", "special": False},
    }
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]"},
        "added_tokens_decoder": added,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


BYTE_LEVEL: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        gpt2,
        gpt2_prefix_space,
        llama3,
        qwen2,
        o200k,
        deepseek,
        starcoder,
        swallowing,
        neox,
        overlapping,
        spaced_token,
        qwen_tiktoken,
        kimi_tiktoken,
    )
}
PIECES: dict[str, Callable[[Path], None]] = {
    make.__name__: make
    for make in (
        llama2,
        gemma,
        t5,
        metaspace_first,
        metaspace_never,
        bert,
        bert_untidy,
        word_level,
        clip,
        sp_bpe,
        sp_bpe_first_only,
        sp_plain,
        sp_unigram,
    )
}
MAKERS = BYTE_LEVEL | PIECES
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def directory_of(kind: str) -> Path:
    """The directory with this kind's files, made once."""
    kept = tempfile.TemporaryDirectory(prefix=f"tokenizer-{kind}-")
    _KEPT.append(kept)
    path = Path(kept.name)
    MAKERS[kind](path)
    return path


@cache
def load(kind: str) -> Tokenizer:
    """This kind's tokenizer, loaded once."""
    return Tokenizer.load(directory_of(kind))


_WORDS = st.sampled_from(
    ["the", "word", "other", "import", "café", "Über", "def", "naïve", "It's", "don't", "WE'LL", "x", "aa", "aaa"]
)
_SPACES = st.sampled_from([" ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\u3000", "\u00a0", "\x0b"])
_MARKS = st.sampled_from([*".,;:!?'\"()[]{}<>|/\\-_=+*&^%$#@~`", "。", "，", "…", "'s", "<0x0A>", "▁", "</w>", "##"])
_FOREIGN_TEXTS = st.sampled_from(
    [*_FOREIGN, "你", "好", "日", "カ", "한", "국", "👍", "\u0301", "\u200d", "\ufe0f", "½"]
)
_DIGITS = st.text("0123456789٣", min_size=1, max_size=7)
_RARE = st.sampled_from(
    ["\x00", "\x1c", "\x1d", "\x85", "\u2028", "\u200b", "\ufeff", "\ufffd", "\U0010ffff", "\u037e"]
)


def texts(tokens: Sequence[str] = SPECIAL, max_pieces: int = 25) -> st.SearchStrategy[str]:
    """Mixtures of words, white space, punctuation, digits, many scripts and special tokens."""
    some = st.sampled_from([*tokens, *tokens, *(token[:-1] for token in tokens), *(token[1:] for token in tokens)])
    anything = st.text(max_size=4)
    piece = st.one_of(_WORDS, _SPACES, some, _WORDS, _SPACES, _MARKS, _DIGITS, _FOREIGN_TEXTS, _RARE, anything)
    return st.lists(piece, max_size=max_pieces).map("".join)


def cut_anywhere(ids: Sequence[int], sizes: Iterator[int]) -> Iterator[list[int]]:
    """The ids in chunks of the given sizes, the last of whatever is left."""
    at = 0
    for size in sizes:
        if at >= len(ids):
            return
        yield list(ids[at : at + size])
        at += size
    if at < len(ids):
        yield list(ids[at:])
