"""How much do prompts that keep arriving disturb answers, with two workers that do all, and with their work divided?

usage: python benchmarks/disagg_interference.py [--seconds 40] [--every 3] [--chunk 512] [-- engine flags]

Twice the same two vLLM processes behind a frontend, each on a core of its own: both doing whole requests, then one
computing prompts and one answering. Sixteen answers are streamed all the time; meanwhile a prompt of 4,000 tokens comes
every so many seconds, for eight tokens. Measured by the client while prompts come: the time between two tokens of one
of the sixteen answers, and tokens a second of all answers. Goal: the 99th percentile of the one at most half, the other
at least 0.9 times, of what two workers that do all have.

`--chunk` is vLLM's --max-num-batched-tokens: so many tokens of a prompt are computed in one step, for which answers
wait. All engines' processes nap alike while they wait for one another (DYN_VLLM_SPIN_LESS): on a single core, one that
spins stops the other.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from common.fleet import Connection, Fleet, Timed, completion, connect, fleet

from dynamo.cli.demo_model import DemoShape, make_demo_model

STREAMS = 16
PROMPT, SHORT = 4000, 32  # tokens
MADE = 8  # tokens of a long prompt's answer
P99_GOAL, RATE_GOAL = 0.5, 0.9
CONTEXT = 8192
SETTLE_S = 3.0
SIDES = {"both do all": ["agg", "agg"], "divided": ["prefill", "decode"]}
FLAGS = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "32", "--enforce-eager"]
WAITS = {"DYN_VLLM_SPIN_LESS": "1"}


@dataclass
class Run:
    """What one side came to, in a window of time."""

    gaps_ms: list[float] = field(default_factory=list)
    stream_tokens: int = 0
    prompts: list[Timed] = field(default_factory=list)
    late: int = 0
    """Prompts that were not answered when the window closed."""
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second, of all answers."""
        return (self.stream_tokens + sum(len(t.at) for t in self.prompts)) / self.seconds

    def percentile(self, share: float) -> float:
        ranked = sorted(self.gaps_ms)
        return ranked[min(len(ranked) - 1, int(len(ranked) * share))]


def prompt(rnd: random.Random, length: int) -> list[int]:
    """One that no cache has."""
    return [rnd.randrange(300, 4000) for _ in range(length)]


async def measure(side: Fleet, a: argparse.Namespace) -> Run:
    """Start the streams, then let prompts come, and look at what is between the first prompt and the window's end."""
    rnd = random.Random(a.seed)
    streams = [await connect(side.port) for _ in range(STREAMS)]
    long = [await connect(side.port) for _ in range(int(a.seconds / a.every) + 1)]
    for connection in (streams[0], streams[1], long[0], long[1]):  # both workers once, and what connects them
        await asyncio.wait_for(connection.ask(completion(prompt(rnd, 200), 4)), 120)
    asked = [c.ask(completion(prompt(rnd, SHORT), CONTEXT - SHORT - 1)) for c in streams]
    while not all(c.answer.at for c in streams):  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_S)
    began = time.perf_counter()
    prompts = [
        asyncio.create_task(later(connection, number * a.every, prompt(rnd, PROMPT)))
        for number, connection in enumerate(long)
    ]
    await asyncio.sleep(a.seconds)
    ended = time.perf_counter()
    run = Run(seconds=ended - began)
    for connection, answer in zip(streams, asked, strict=True):
        if answer.done():
            raise RuntimeError("an answer ended within the window: --seconds is too long")
        times = [t for t in connection.answer.at if began <= t <= ended]
        run.stream_tokens += len(times)
        run.gaps_ms += [1e3 * (y - x) for x, y in pairwise(times)]
    run.prompts = [task.result() for task in prompts if task.done()]
    run.late = len(prompts) - len(run.prompts)
    for task in prompts:
        task.cancel()
    for connection in (*streams, *long):
        connection.leave()
    return run


async def later(connection: Connection, wait_s: float, tokens: list[int]) -> Timed:
    """Ask when it is time."""
    await asyncio.sleep(wait_s)
    return await connection.ask(completion(tokens, MADE))


def show(name: str, run: Run) -> None:
    """A line of the table."""
    ttft = statistics.median(1e3 * t.ttft_s for t in run.prompts) if run.prompts else float("nan")
    cells = "".join(f"{run.percentile(share):9.1f}" for share in (0.5, 0.9, 0.99, 0.999))
    cells += f"{max(run.gaps_ms):9.1f}{run.rate:11.1f}{len(run.prompts):9}{run.late:6}{ttft:14.0f}"
    print(f"{name:12}{cells}", flush=True)


async def run(a: argparse.Namespace) -> int:
    runs: dict[str, list[Run]] = {name: [] for name in SIDES}
    flags = [*FLAGS, "--max-num-batched-tokens", str(a.chunk), *a.flags]
    print(
        f"{STREAMS} answers; a prompt of {PROMPT} tokens every {a.every:g} s for {a.seconds:g} s; chunks of {a.chunk}"
    )
    print(f"{'ms:':12}" + "".join(f"{word:>9}" for word in ("p50", "p90", "p99", "p99.9", "max")), end="")
    print(f"{'tokens/s':>11}{'prompts':>9}{'late':>6}{'TTFT p50':>14}")
    with tempfile.TemporaryDirectory() as place:
        model = make_demo_model(Path(place) / "model", DemoShape(context=CONTEXT))
        for _ in range(a.rounds):
            for name, roles in SIDES.items():
                async with fleet(model, roles, flags, cores=a.cores, environ=WAITS) as side:
                    print("measuring", file=sys.stderr, flush=True)
                    runs[name].append(await measure(side, a))
                show(name, runs[name][-1])
    both, divided = runs.values()
    p99 = statistics.median(r.percentile(0.99) for r in divided) / statistics.median(r.percentile(0.99) for r in both)
    rate = statistics.median(r.rate for r in divided) / statistics.median(r.rate for r in both)
    reached = p99 <= P99_GOAL and rate >= RATE_GOAL
    print(
        f"divided / both do all: p99 {p99:.2f} x (goal: at most {P99_GOAL}), tokens/s {rate:.2f} x (goal: at least "
        f"{RATE_GOAL}): {'reached' if reached else 'missed'}"
    )
    return int(not reached)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seconds", type=float, default=40.0, help="for which prompts come")
    ap.add_argument("--every", type=float, default=3.0, help="seconds between two prompts")
    ap.add_argument("--chunk", type=int, default=512, help="tokens that an engine computes in one step, at most")
    ap.add_argument("--cores", type=int, nargs=2, default=[0, 1], help="one for each process")
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("flags", nargs="*", help="engine flags for all workers, after --")
    return asyncio.run(run(ap.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
