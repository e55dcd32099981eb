"""What do tokenizing, detokenizing, stop strings, templates and block hashes cost?

CPU of this process, the median of many runs, on a demo model's byte-level BPE of 4096 tokens (made on the spot) or the
tokenizer of `--model DIR`. The prompt is 6000 random English-like words (36 KB). `words known` has every word cached
but no part of the text; `prefix known` shares 5800 words with an earlier text and has 200 of its own.

    python benchmarks/tokenizer.py [--model DIR] [--json]

Results and what they mean: docs/explanation/tokenizer-cache.md.
"""

import argparse
import json
import random
import re
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from dynamo.cli.demo_model import make_demo_model
from dynamo.llm.block_hash import BlockHasher, compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.chat_template import ChatTemplate
from dynamo.llm.stop_matcher import StopMatcher
from dynamo.llm.tokenizer import Tokenizer

WORDS, SHARED = 6000, 5800
TEXTS = 30
TOKENS = 10_000
BLOCK = 16
BURST = 1000  # calls per clock reading where one call is shorter than the clock's own cost


def median_ms(call: Callable[[str], object], texts: Iterable[str]) -> float:
    """Median CPU milliseconds a text."""
    spent = []
    for text in texts:
        begun = time.process_time()
        call(text)
        spent.append(time.process_time() - begun)
    return statistics.median(spent) * 1e3


def best_us(call: Callable[[], object], calls: int = 1, runs: int = 50) -> float:
    """Microseconds a call, the best of `runs`; `call` itself makes `calls` of them."""
    spent = []
    for _ in range(runs):
        begun = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begun)
    return min(spent) / calls * 1e6


def random_texts(draw: random.Random) -> tuple[list[str], list[str]]:
    """Texts of random words, and texts that share a beginning."""
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    vocabulary = re.findall(r"[a-zA-Z]+", source)

    def words(count: int) -> str:
        return " ".join(draw.choices(vocabulary, k=count))

    shared = words(SHARED)
    return [words(WORDS) for _ in range(TEXTS)], [f"{shared} {words(WORDS - SHARED)}" for _ in range(TEXTS)]


def encoding(directory: Path) -> dict[str, float]:
    draw = random.Random(1)
    random_words, shared = random_texts(draw)
    # Different letters each time, as the library remembers words too.
    unseen = [" ".join("".join(draw.choices("etaoinshrdlu", k=6)) for _ in range(WORDS)) for _ in range(24)]
    tokenizer = Tokenizer.load(directory)
    plain = tokenizer._backend.encode
    found: dict[str, float] = {}
    file = directory / "tokenizer.json"
    if file.exists():
        library = HfTokenizer.from_file(str(file))
        found["encode, library's usual call (ms)"] = median_ms(
            lambda text: library.encode(text, add_special_tokens=False).ids, random_words
        )
    found["encode, without offsets (ms)"] = median_ms(lambda text: plain(text, False), random_words)
    for text in [*random_words[:2], *shared[:2]]:
        assert tokenizer.encode(text) == plain(text, False)
    found["encode, words known (ms)"] = median_ms(tokenizer.encode, random_words[2:])
    found["encode, prefix known (ms)"] = median_ms(tokenizer.encode, shared[2:])
    found["encode, all known (ms)"] = median_ms(tokenizer.encode, shared[2:])
    found["random letters, without the cache (ms)"] = median_ms(lambda text: plain(text, False), unseen[::2])
    found["random letters, nothing known (ms)"] = median_ms(tokenizer.encode, unseen[1::2])
    found["cache (MB)"] = tokenizer.cache_bytes / 1e6
    return found


def decoding(directory: Path) -> dict[str, float]:
    tokenizer = Tokenizer.load(directory)
    found = {}
    for name, text in (
        ("ASCII", "the quick brown fox jumps over the lazy dog "),
        ("CJK and emoji", "你好世界👍🏽한국"),
    ):
        chunks = [[id_] for id_ in tokenizer.encode(text * 200)[:BURST]]
        push = tokenizer.decoder().push

        def decode(push: Callable[[list[int]], str] = push, chunks: list[list[int]] = chunks) -> None:
            for chunk in chunks:
                push(chunk)

        found[f"detokenize a token, {name} (us)"] = best_us(decode, len(chunks))
    matchers = {"no stop string": StopMatcher([]), "two stop strings": StopMatcher(["</s>", "\n\nUser:"])}
    for name, matcher in matchers.items():

        def match(push: Callable[[str], object] = matcher.push) -> None:
            for _ in range(BURST):
                push(" word")

        found[f"match a token's text, {name} (us)"] = best_us(match, BURST)
    return found


def rendering(directory: Path) -> dict[str, float]:
    template = ChatTemplate.load(directory)
    if template is None:
        return {}
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"message {i} " * 20} for i in range(21)]
    return {
        "render 1 message (us)": best_us(lambda: template.render(turns[:1])),
        "render 21 messages (us)": best_us(lambda: template.render(turns)),
    }


def hashing() -> dict[str, float]:
    tokens = [i * 7919 % 150_000 for i in range(TOKENS)]
    local = compute_block_hash_for_seq(tokens, BLOCK)
    hasher = BlockHasher(BLOCK)

    def grow() -> None:
        for token in tokens[:BURST]:
            hasher.extend([token])

    return {
        "local hashes of 10 000 tokens, block 16 (us)": best_us(
            lambda: compute_block_hash_for_seq(tokens, BLOCK), runs=200
        ),
        "sequence hashes of 625 blocks (us)": best_us(lambda: sequence_hashes(local), runs=200),
        "local hashes of 10 000 tokens, block 64 (us)": best_us(
            lambda: compute_block_hash_for_seq(tokens, 64), runs=200
        ),
        "grow a sequence by a token (us)": best_us(grow, BURST),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model directory (default: a demo model)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.model or make_demo_model(Path(scratch) / "model", weights=False)
        found = {**encoding(directory), **decoding(directory), **rendering(directory), **hashing()}
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
        return
    for name, value in found.items():
        print(f"{name:52} {value:9.3f}")


if __name__ == "__main__":
    main()
