"""What does a request cost before it is sent, and a token after it came?

usage: python benchmarks/preprocess.py [--model DIR] [--seconds 0.5]
Without --model a small demo model is made. Each line is one step on one core, with everything in memory: decoding and
checking a body, rendering and tokenizing it (`Preprocessor.chat`), and reading one token of an answer
(`ChoiceDecoder.push`), beside what the detokenizer alone costs. The best of five rounds counts, in microseconds.
Budgets: 15 µs for decoding a short chat request, 1 µs above the detokenizer for a plain token.

Last result (2 cores of a shared AMD EPYC machine, Python 3.11, the demo model):
    decode_chat: 1 short message                                            5.05 µs
    decode_chat: 1 short message, ten more fields                          12.85 µs
    decode_chat: 40 messages of 200 words                                  33.08 µs
    decode_chat: refused for an unknown field                               9.42 µs
    decode_completion: 4000 token ids                                     301.39 µs
    Preprocessor.chat: 1 short message                                     61.10 µs
    Preprocessor.chat: 40 messages of 200 words                         11267.54 µs
    detokenizer alone: 1 token                                              0.19 µs
    ChoiceDecoder.push: 1 token, plain (+0.33)                              0.51 µs
    ChoiceDecoder.push: 1 token, 2 stop strings (+0.56)                     0.74 µs
    ChoiceDecoder.push: 1 token, logprobs with 5 alternatives (+8.87)       9.05 µs
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynamo.cli.demo_model import make_demo_model
from dynamo.llm.model_directory import build_card
from dynamo.llm.preprocessor import Preprocessor
from dynamo.llm.protocols.engine import EngineOutput, TopLogprob
from dynamo.llm.protocols.openai import decode_chat, decode_completion
from dynamo.runtime.errors import InvalidArgument

ROUNDS = 5
TOKENS = 2000  # of the answer that is read, once a call


def best_us(call: Callable[[], object], seconds: float, each: int = 1) -> float:
    """Microseconds of one call, divided by `each`; the best of five rounds that take `seconds` together."""
    call()
    best = float("inf")
    for _ in range(ROUNDS):
        count, start = 0, time.perf_counter()
        end = start + seconds / ROUNDS
        while (now := time.perf_counter()) < end or not count:
            call()
            count += 1
        best = min(best, (now - start) / max(count, 1))
    return best * 1e6 / each


def chat_body(messages: int, words: int, **more: Any) -> bytes:
    text = " ".join(["how are you today, my friend?"] * (words // 6 or 1))
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(messages)]
    return json.dumps({"model": "m", "messages": turns, "max_tokens": 64, "stream": True, **more}).encode()


def report(name: str, microseconds: float) -> None:
    print(f"{name:<66}{microseconds:>10.2f} µs")


def decoding(seconds: float) -> None:
    full = {"temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": ["\n\n"], "user": "u", "nvext": {"top_k": 5}}
    bodies = {
        "decode_chat: 1 short message": chat_body(1, 6),
        "decode_chat: 1 short message, ten more fields": chat_body(1, 6, **full, logprobs=True, top_logprobs=5, n=2),
        "decode_chat: 40 messages of 200 words": chat_body(40, 200),
        "decode_chat: refused for an unknown field": chat_body(1, 6, foo=1),
    }
    for name, body in bodies.items():
        report(name, best_us(lambda body=body: _refusing(decode_chat, body), seconds))  # type: ignore[misc]
    ids = json.dumps({"model": "m", "prompt": list(range(4000))}).encode()
    report("decode_completion: 4000 token ids", best_us(lambda: decode_completion(ids), seconds))


def _refusing(decode: Callable[[bytes], object], body: bytes) -> None:
    with contextlib.suppress(InvalidArgument):
        decode(body)


async def preparing(preprocessor: Preprocessor, seconds: float) -> None:
    for name, body in (("1 short message", chat_body(1, 6)), ("40 messages of 200 words", chat_body(40, 200))):
        request = decode_chat(body)
        count, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds or not count:
            await preprocessor.chat(request)
            count += 1
        report(f"Preprocessor.chat: {name}", (time.perf_counter() - start) / count * 1e6)


async def reading(preprocessor: Preprocessor, seconds: float) -> None:
    ids = preprocessor.tokenizer.encode(" the quick brown fox jumps over the lazy dog" * TOKENS)[:TOKENS]
    tops = [TopLogprob(token, -1.0 - token, token) for token in range(1, 6)]
    plain = [EngineOutput(token_ids=[token]) for token in ids]
    logged = [EngineOutput(token_ids=[token], log_probs=[-1.0], top_logprobs=[tops]) for token in ids]

    def detokenize() -> None:
        push = preprocessor.tokenizer.decoder().push
        for output in plain:
            push(output.token_ids)

    alone = best_us(detokenize, seconds, TOKENS)
    report("detokenizer alone: 1 token", alone)
    cases: list[tuple[str, dict[str, Any], list[EngineOutput]]] = [
        ("plain", {}, plain),
        ("2 stop strings", {"stop": ["<<stop>>", "\n\nUser:"]}, plain),
        ("logprobs with 5 alternatives", {"logprobs": True, "top_logprobs": 5}, logged),
    ]
    for name, fields, outputs in cases:
        prepared = await preprocessor.chat(decode_chat(chat_body(1, 6, **fields | {"max_tokens": 10**6})))

        def read(prepared: Any = prepared, outputs: Any = outputs) -> None:
            push = prepared.decoder_for(0).push
            for output in outputs:
                push(output)

        cost = best_us(read, seconds, TOKENS)
        report(f"ChoiceDecoder.push: 1 token, {name} (+{cost - alone:.2f})", cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        directory = args.model or make_demo_model(Path(made) / "demo", weights=False)
        preprocessor = Preprocessor(build_card(directory), directory)
        decoding(args.seconds)
        asyncio.run(preparing(preprocessor, args.seconds))
        asyncio.run(reading(preprocessor, args.seconds))


if __name__ == "__main__":
    main()
