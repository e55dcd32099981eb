"""Are the answers of a prefill and a decode worker those of one worker, and did the KV really move?

usage: python benchmarks/disagg_correctness.py [--prompts 500] [--longest 8000] [--streams 4] [--transport nixl|shm]
                                               [--driver core|async] [--seed 0]

Starts three `python -m dynamo.vllm` on the demo model (random weights whose output depends on the whole prompt):
prefill, decode with its prefix cache off, and one that does whole requests. Sends every prompt to the third, and to
the first two as a frontend would: prefill makes the first token and a handle, decode goes on from it. Lengths from 1
token to `longest`, half of them shorter than a few hundred; a third begin with a shared prefix; a quarter are sampled
with a seed, the others greedy; one in ten is cancelled somewhere on the way first, and then asked again.
Printed: how many answers differ, vLLM's own count of prompt tokens by source on the decode worker, and the transfers.
Exit status 1 if a greedy answer differs, or if the decode worker computed more of a prompt than it had to.
500 prompts take 15 to 30 minutes on two cores.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dynamo.cli.demo_model import DemoShape, make_demo_model
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.client import Client

START_S, ANSWER_S = 300.0, 300.0  # two cores
MAX_TOKENS = 12


class Worker:
    """One worker process and a client for it."""

    def __init__(self, name: str, home: Path, model: Path, length: int, flags: list[str], environ: dict[str, str]):
        self.log = home / f"{name}.log"
        self.endpoint = f"dynamo.{name}.generate"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dynamo.vllm", "--model", str(model), "--endpoint", self.endpoint,
                 "--max-model-len", str(length), "--enforce-eager", "--max-num-seqs", "32", *flags],
                stdout=out, stderr=out, env=environ,
            )  # fmt: skip
        self.client: Client

    async def ready(self, runtime: DistributedRuntime) -> None:
        deadline = time.monotonic() + START_S
        while "vllm is ready" not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.endpoint} did not start:\n" + self.log.read_text(errors="replace")[-3000:])
            await asyncio.sleep(0.2)
        self.client = await runtime.endpoint(self.endpoint).client()
        await self.client.wait_for_instances(10)

    async def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        async with asyncio.timeout(ANSWER_S):
            return [item async for item in await self.client.generate(request, annotated=False)]

    async def cancelled(self, request: dict[str, Any], after_s: float) -> None:
        stream = await self.client.generate(request, annotated=False)
        await asyncio.sleep(after_s)
        await stream.aclose()

    def series(self, name: str, label: str = "") -> float:
        found = re.search(r"listens on (http://\S+)", self.log.read_text(errors="replace"))
        assert found
        with urllib.request.urlopen(found.group(1) + "/metrics", timeout=20) as response:
            lines = response.read().decode().splitlines()
        return sum(float(x.rpartition(" ")[2]) for x in lines if x.split("{")[0] == name and label in x)


@asynccontextmanager
async def workers(a: argparse.Namespace) -> AsyncIterator[tuple[Worker, Worker, Worker]]:
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        model = make_demo_model(home / "model", DemoShape(context=a.longest + 256))
        environ = os.environ | {"DYN_FILE_KV": str(home / "discovery"), "DYN_SYSTEM_PORT": "0", "DYN_LOG": "info"}
        environ |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_VLLM_DRIVER": a.driver, "TORCH_COMPILE_DISABLE": "1"}
        os.environ["DYN_FILE_KV"] = str(home / "discovery")
        split = ["--kv-transport", a.transport, "--disaggregation-mode"]
        three = [
            Worker("prefill", home, model, a.longest + 256, [*split, "prefill"], environ),
            Worker("decode", home, model, a.longest + 256, [*split, "decode", "--no-enable-prefix-caching"], environ),
            Worker("whole", home, model, a.longest + 256, [], environ),
        ]
        runtime = DistributedRuntime(discovery_backend="file")
        try:
            for worker in three:
                await worker.ready(runtime)
            yield three[0], three[1], three[2]
        finally:
            for worker in three:
                worker.process.terminate()
            for worker in three:
                worker.process.wait(60)
            await runtime.close()


def prompts(a: argparse.Namespace) -> list[dict[str, Any]]:
    rnd = random.Random(a.seed)
    beginnings = [[rnd.randrange(300, 4000) for _ in range(min(700, a.longest // 4))] for _ in range(8)]
    made = []
    for i in range(a.prompts):
        length = max(1, min(a.longest, round(math.exp(rnd.uniform(0, math.log(a.longest))))))
        tokens = [rnd.randrange(300, 4000) for _ in range(length)]
        if i % 3 == 0:
            tokens = (rnd.choice(beginnings) + tokens)[: a.longest]
        sampling = {"temperature": 0.0} if i % 4 else {"temperature": 0.8, "top_p": 0.95, "seed": i}
        stop = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
        made.append({"model": "m", "token_ids": tokens, "sampling_options": sampling, "stop_conditions": stop})
    return made


async def split(prefill: Worker, decode: Worker, request: dict[str, Any], cancel: random.Random | None) -> list[int]:
    if cancel is not None and cancel.random() < 0.5:
        await prefill.cancelled(request, cancel.uniform(0, 0.3))
    (first,) = await prefill.ask(request)
    result = {name: first[name] for name in ("token_ids", "disaggregated_params")}
    if cancel is not None:
        await decode.cancelled(request | {"prefill_result": result}, cancel.uniform(0, 0.05))
        (first,) = await prefill.ask(request)
        result = {name: first[name] for name in ("token_ids", "disaggregated_params")}
    rest = await decode.ask(request | {"prefill_result": result})
    return [token for item in (first, *rest) for token in item.get("token_ids", [])]


async def run(a: argparse.Namespace) -> int:
    requests = prompts(a)
    rnd = random.Random(a.seed + 1)
    cancels = [random.Random(i) if rnd.random() < 0.1 else None for i in range(len(requests))]
    async with workers(a) as (prefill, decode, whole):
        gate = asyncio.Semaphore(a.streams)

        async def one(index: int) -> tuple[list[int], list[int]]:
            async with gate:
                alone = [t for item in await whole.ask(requests[index]) for t in item.get("token_ids", [])]
                pair = await split(prefill, decode, requests[index], cancels[index])
                if index % 50 == 49:
                    print(f"  {index + 1} prompts", file=sys.stderr, flush=True)
                return alone, pair

        began = time.monotonic()
        answers = await asyncio.gather(*(one(i) for i in range(len(requests))))
        seconds = time.monotonic() - began
        sampled = {i for i in range(len(requests)) if requests[i]["sampling_options"]["temperature"]}
        differ = [i for i, (alone, pair) in enumerate(answers) if alone != pair]
        by_source = "vllm:prompt_tokens_by_source_total"
        moved, computed = (
            decode.series(by_source, f'source="{source}"') for source in ("external_kv_transfer", "local_compute")
        )
        single = sum(len(request["token_ids"]) == 1 for request in requests)
        asked = sum(len(request["token_ids"]) for request in requests)
        deadline = time.monotonic() + 60
        while (held := prefill.series("dynamo_component_kv_handles")) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        report = {
            "transport": a.transport, "driver": a.driver, "prompts": len(requests), "prompt_tokens": asked,
            "cancelled_first": sum(cancel is not None for cancel in cancels), "seconds": round(seconds, 1),
            "greedy_answers_that_differ": len([i for i in differ if i not in sampled]),
            "sampled_answers_that_differ": len([i for i in differ if i in sampled]),
            "decode_tokens_moved": moved, "decode_tokens_computed": computed, "prompts_of_one_token": single,
            "recomputes": decode.series("dynamo_component_kv_transfer_recomputes_total"),
            "first_token_mismatches": decode.series("dynamo_component_kv_first_token_mismatches_total"),
            "transfers": decode.series("dynamo_component_kv_transfer_bytes_count"),
            "gigabytes": round(decode.series("dynamo_component_kv_transfer_bytes_sum") / 1e9, 3),
            "transfer_seconds": round(decode.series("dynamo_component_kv_transfer_latency_seconds_sum"), 3),
            "handles_left": held,
        }  # fmt: skip
        print(json.dumps(report, indent=1))
    for i in differ[:5]:
        print(f"prompt {i} ({len(requests[i]['token_ids'])} tokens): {answers[i]}", file=sys.stderr)
    # Of each prompt one position at most is computed: its last, or the first token behind it. A cancelled request may
    # or may not have moved its KV before; it never makes the decode worker compute it.
    wrong = report["greedy_answers_that_differ"] or report["recomputes"] or held or moved + single < asked
    return 1 if wrong or computed > len(requests) + sum(c is not None for c in cancels) else 0


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--prompts", type=int, default=500)
    ap.add_argument("--longest", type=int, default=8000, help="tokens of the longest prompt")
    ap.add_argument("--streams", type=int, default=4, help="prompts at once")
    ap.add_argument("--transport", choices=("nixl", "shm"), default="nixl")
    ap.add_argument("--driver", choices=("core", "async"), default="core")
    ap.add_argument("--seed", type=int, default=0)
    return asyncio.run(run(ap.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
