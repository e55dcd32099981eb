"""What does one request wait for if its prompt is computed by one worker and its answer by another?

usage: python benchmarks/disagg_latency.py [--rounds 40] [--prompt 1000] [--made 16] [-- engine flags]

Two frontends: one with a vLLM worker that does whole requests, one with a prefill and a decode worker, all on this
machine. Each prompt goes to both, one after the other, either of them first in turn. Measured by the client: the time
to the first token, from there to the second, in which KV travels, and for each token after that. What is added is the
difference for one and the same prompt; of those differences the median is given, and the interval that holds it with
95 %. Goal: until the second token, at most 5 ms more are added than the transfer itself takes, as the decode worker's
engine reports it for that prompt. All engines' processes nap alike while they wait for one another
(DYN_VLLM_SPIN_LESS): one that spins takes the other side's cores.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.fleet import Fleet, Timed, completion, connect, fleet

from dynamo.cli.demo_model import DemoShape, make_demo_model

GOAL_MS = 5.0
WARM = 4  # requests that connect the two workers, and fill what is filled once
PAUSE_S = 0.3  # before each request, so that nothing of the one before is left
WAITS = {"DYN_VLLM_SPIN_LESS": "1"}
PARTS: dict[str, Callable[[Timed], float]] = {
    "to the first token": lambda t: t.ttft_s,
    "from there to the second": lambda t: t.at[1] - t.at[0],
    "to the second": lambda t: t.at[1] - t.sent,
    "a token after that": lambda t: (t.at[-1] - t.at[1]) / (len(t.at) - 2),
}
FLAGS = ["--max-model-len", "8192", "--max-num-seqs", "32", "--enforce-eager"]


class Asked(NamedTuple):
    """One prompt: its answers by one worker and by two, and how long its KV travelled."""

    one: Timed
    apart: Timed
    transfer_s: float

    def added_s(self, part: Callable[[Timed], float]) -> float:
        """What the second took longer."""
        return part(self.apart) - part(self.one)

    @property
    def takeover_s(self) -> float:
        """From when the decode worker got it until that had its first token."""
        return float(self.apart.facts["engine_data"]["kv_transfer"]["seconds"])


async def measure(whole: Fleet, pair: Fleet, a: argparse.Namespace) -> int:
    """Ask both in turn and compare."""
    print("measuring", file=sys.stderr, flush=True)
    rnd = random.Random(a.seed)
    connections = [await connect(whole.port), await connect(pair.port)]
    asked: list[Asked] = []
    begun = transfers(pair)
    for number in range(WARM + a.rounds):
        body = completion([rnd.randrange(300, 4000) for _ in range(a.prompt)], a.made, "engine_data")
        answers: dict[int, Timed] = {}
        for side in (0, 1) if number % 2 else (1, 0):
            await asyncio.sleep(PAUSE_S)
            answers[side] = await asyncio.wait_for(connections[side].ask(body), 120)
        ended = transfers(pair)
        asked.append(Asked(answers[0], answers[1], ended.seconds - begun.seconds))
        begun = ended
    return report(asked[WARM:], ended, pair, a)


def report(asked: list[Asked], ended: "Transfers", pair: Fleet, a: argparse.Namespace) -> int:
    """Print; the exit status."""
    print(
        f"{len(asked)} prompts of {a.prompt} tokens for {a.made}, one at a time; ms, medians, and of what is added the"
    )
    print("median of the differences for the same prompt, with its 95 % interval")
    print(f"{'':34}{'one worker':>12}{'apart':>12}{'added':>12}")
    for name, part in PARTS.items():
        sides = [x.one for x in asked], [x.apart for x in asked]
        one, apart = (statistics.median(1e3 * part(t) for t in side) for side in sides)
        print(f"{name:34}{one:12.1f}{apart:12.1f}{interval([1e3 * x.added_s(part) for x in asked])}")
    transfer_ms = statistics.median(1e3 * x.transfer_s for x in asked)
    second = PARTS["to the second"]
    beyond = [1e3 * (x.added_s(second) - x.transfer_s) for x in asked]
    elsewhere = [1e3 * (x.apart.at[1] - x.apart.at[0] - x.takeover_s) for x in asked]
    takeover_ms = statistics.median(1e3 * x.takeover_s for x in asked)
    size = ended.bytes / ended.count / 1e6
    recomputed = pair.workers[1].series("dynamo_component_kv_transfer_recomputes_total")
    print(f"transfer: {size:.2f} MB in {transfer_ms:.2f} ms; recomputed: {recomputed:.0f}")
    print(
        f"from the first token to the second: {takeover_ms:.1f} ms at the decode worker, transfer and step included; "
        f"frontend and sockets {statistics.median(elsewhere):.1f}"
    )
    missed = statistics.median(beyond) > GOAL_MS
    print(f"added until the second token, beyond the transfer: {interval(beyond).strip()} ms", end=" ")
    print(f"(goal: at most {GOAL_MS:g}, {'missed' if missed else 'reached'})")
    return int(missed or recomputed > 0 or ended.count != WARM + len(asked))


def interval(values: list[float]) -> str:
    """The median, and between which two of the values it lies with 95 %: a matter of coins, whatever they are like."""
    values = sorted(values)
    off = round(0.98 * len(values) ** 0.5)
    middle = len(values) // 2
    low, high = values[max(0, middle - off)], values[min(len(values) - 1, middle + off)]
    return f"{statistics.median(values):12.1f}  ({low:.1f} to {high:.1f})"


class Transfers(NamedTuple):
    """What the decode worker's engine has counted."""

    count: float
    seconds: float
    bytes: float


def transfers(pair: Fleet) -> Transfers:
    """All until now."""
    decode = pair.workers[1]
    names = ("kv_transfer_latency_seconds_count", "kv_transfer_latency_seconds_sum", "kv_transfer_bytes_sum")
    return Transfers(*(decode.series(f"dynamo_component_{name}") for name in names))


async def run(a: argparse.Namespace) -> int:
    flags = [*FLAGS, *a.flags]
    with tempfile.TemporaryDirectory() as place:
        model = make_demo_model(Path(place) / "model", DemoShape(context=8192))
        async with (
            fleet(model, ["prefill", "decode"], flags) as pair,
            fleet(model, ["agg"], flags, environ=WAITS) as whole,
        ):
            return await measure(whole, pair, a)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=40)
    ap.add_argument("--prompt", type=int, default=1000, help="tokens of a prompt")
    ap.add_argument("--made", type=int, default=16, help="tokens of an answer")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("flags", nargs="*", help="engine flags for all workers, after --")
    return asyncio.run(run(ap.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
