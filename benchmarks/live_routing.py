"""How much sooner does a first token come, over HTTP, if requests go to where their prefix is?

usage: python benchmarks/live_routing.py [--seconds 20] [--rate 20] [--prefixes 64] [--mode kv --mode round-robin]

One frontend and 8 simulated workers in real time, twice: `--router-mode kv` and `round-robin`. Requests come at random
(open loop), each begins with one of many long system prompts and ends with a question of its own. A worker's cache has
room for an eighth of the prompts and a little more. Reported: TTFT as clients see it, prompt tokens that workers had
cached (`usage`), and the hit rate by the answers (`nvext.timing.kv_hit_rate`) and by `/metrics`.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from dynamo.cli.demo_model import make_demo_model

WORKERS = 8
BLOCK_TOKENS = 16
SPEEDUP = 1.0  # as fast as the GPUs that are simulated
PREFIX_WORDS = 3000
ROOM = 1.3  # of a worker's cache, in prompts of an eighth of them all
READY_S = 60.0
GOAL = 2.0  # TTFT p50 of round robin over that of kv
WORDS = "time year people way day man thing woman life child world school state family student group country problem"


@dataclass
class Run:
    """What came out of one mode."""

    ttft_ms: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    hit_rates: list[float] = field(default_factory=list)
    errors: int = 0
    metrics_hit_rate: float | None = None
    elapsed_s: float = 0.0


def prompts(count: int, seed: int = 1) -> list[str]:
    """System prompts that begin like no other."""
    draw, words = random.Random(seed), WORDS.split()
    return [f"You are assistant {i}. " + " ".join(draw.choices(words, k=PREFIX_WORDS)) for i in range(count)]


async def stack(mode: str, model: Path, blocks: int) -> AsyncIterator[str]:
    """A frontend in this mode with its workers; gives its address."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        env = os.environ | {"DYN_FILE_KV": f"{directory}/kv", "DYN_DISCOVERY_BACKEND": "file", "DYN_LOG": "error"}
        worker = ["--model-path", str(model), "--model-name", "m", "--num-workers", str(WORKERS)]
        worker += ["--speedup-ratio", str(SPEEDUP), "--num-gpu-blocks-override", str(blocks)]
        worker += ["--block-size", str(BLOCK_TOKENS)]
        words = (
            ["-m", "dynamo.frontend", "--http-port", str(port), "--router-mode", mode],
            ["-m", "dynamo.mocker", *worker],
        )
        started = [start(each, env) for each in words]
        try:
            url = f"http://127.0.0.1:{port}"
            await ready(url)
            yield url
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def start(words: list[str], env: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Run `python *words`."""
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, start_new_session=True, env=env)


async def ready(url: str) -> None:
    """Wait until all workers are there."""
    deadline = time.monotonic() + READY_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/v1/models/m/ready") as response:
                    if response.status == 200:
                        namespaces = (await response.json())["namespaces"].values()
                        kinds = [kind for each in namespaces for kind in each["worker_types"].values()]
                        if sum(kind["workers"] for kind in kinds) == WORKERS:
                            return
            await asyncio.sleep(0.2)
    raise SystemExit(f"the workers did not come up within {READY_S:.0f} s")


async def ask(session: aiohttp.ClientSession, url: str, system: str, number: int, run: Run) -> None:
    """One request, streamed."""
    body = {
        "model": "m",
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": f"Question {number}?"}],
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "nvext": {"extra_fields": ["timing"]},
    }
    start, first = time.perf_counter(), 0.0
    try:
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                first = first or time.perf_counter()
                event = json.loads(line[6:])
                note(event, run)
    except aiohttp.ClientError:
        run.errors += 1
    else:
        run.ttft_ms.append((first - start) * 1e3)


def note(event: dict[str, Any], run: Run) -> None:
    """What an event says of caches."""
    timing = event.get("nvext", {}).get("timing", {})
    if "kv_hit_rate" in timing:
        run.hit_rates.append(timing["kv_hit_rate"])
    if usage := event.get("usage"):
        run.prompt_tokens += usage["prompt_tokens"]
        run.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]


async def measure(url: str, systems: list[str], rate: float, seconds: float) -> Run:
    """Send requests at random for so long; wait for all answers."""
    run, draw = Run(), random.Random(2)
    tasks: list[asyncio.Task[None]] = []
    connector = aiohttp.TCPConnector(limit=0)
    start = time.monotonic()
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        due = start
        while (due := due + draw.expovariate(rate)) < start + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(session, url, draw.choice(systems), len(tasks), run)))
        await asyncio.gather(*tasks)
        run.elapsed_s = time.monotonic() - start
        async with session.get(f"{url}/metrics") as response:
            text = await response.text()
    total = re.search(r"^dynamo_component_router_kv_hit_rate_sum\{.*\} (.*)$", text, re.MULTILINE)
    count = re.search(r"^dynamo_component_router_kv_hit_rate_count\{.*\} (.*)$", text, re.MULTILINE)
    if total and count:
        run.metrics_hit_rate = float(total[1]) / float(count[1])
    return run


def line(mode: str, run: Run) -> str:
    """One row of the table."""
    ranked = sorted(run.ttft_ms)
    p50, p99 = statistics.median(ranked), ranked[int(0.99 * (len(ranked) - 1))]

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return (
        f"{mode:12} {len(ranked):8} {p50:12.1f} {p99:12.1f} {statistics.fmean(ranked):12.1f} "
        f"{share(run.cached_tokens / run.prompt_tokens):>10} "
        f"{share(statistics.fmean(run.hit_rates) if run.hit_rates else None):>10} {share(run.metrics_hit_rate):>10} "
        f"{run.errors:7}"
    )


async def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seconds", type=float, default=20.0, help="of requests, in each mode")
    ap.add_argument("--rate", type=float, default=20.0, help="requests a second")
    ap.add_argument("--prefixes", type=int, default=64, help="different system prompts")
    ap.add_argument("--mode", action="append", help="router modes to run, the first against the last")
    a = ap.parse_args()
    modes = a.mode or ["kv", "round-robin"]
    systems = prompts(a.prefixes)
    with tempfile.TemporaryDirectory() as directory:
        model = make_demo_model(Path(directory) / "m", weights=False)
        from dynamo.llm.tokenizer import Tokenizer

        tokens = len(Tokenizer.load(model).encode(systems[0]))
        blocks = int(ROOM * a.prefixes / WORKERS * tokens / BLOCK_TOKENS)
        print(
            f"{WORKERS} workers of {blocks} blocks of {BLOCK_TOKENS} tokens, {a.prefixes} prefixes of about {tokens} "
            f"tokens, {a.rate:g} requests a second for {a.seconds:g} s"
        )
        print(
            f"{'mode':12} {'requests':>8} {'TTFT p50 ms':>12} {'p99':>12} {'mean':>12} {'cached':>10} {'by nvext':>10} "
            f"{'/metrics':>10} {'errors':>7}"
        )
        runs = {}
        for mode in modes:
            async with contextlib.asynccontextmanager(stack)(mode, model, blocks) as url:
                runs[mode] = await measure(url, systems, a.rate, a.seconds)
            print(line(mode, runs[mode]), flush=True)
    if len(modes) > 1:
        ratio = statistics.median(runs[modes[-1]].ttft_ms) / statistics.median(runs[modes[0]].ttft_ms)
        verdict = "reached" if ratio >= GOAL else "missed"
        print(f"TTFT p50 of {modes[-1]} / {modes[0]}: {ratio:.1f} (goal: at least {GOAL:g}, {verdict})")
    return 1 if any(run.errors for run in runs.values()) else 0


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
