"""How fast does KV pass between two vLLM workers, beside what NIXL moves for the same blocks?

usage: python benchmarks/disagg_transfer.py [--rounds 16] [-- engine flags]

A prefill and a decode worker behind a frontend; prompts of 1,000 and 4,000 tokens, one after the other. The rate is
what the decode worker reports of its engine's transfers (`dynamo_component_kv_transfer_*`), from the start of a read
until its end is seen. Beside it, in turn with the prompts: bare NIXL in two other processes, one of which reads as many
parts of the same size from the other, without the notification that an engine sends; other memory each time, as the
engine's blocks are others each time. Goal: 80 % of that.

Then whether transfers hold up the prefill worker: all prompts at once, whose KV is fetched (four tokens to make) or not
(one, so that nobody fetches it), and how long it takes until the last has its first token.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common.fleet import Fleet, Timed, completion, connect, fleet
from nixl_transfer import MEMORY, Raw, Target

from dynamo.cli.demo_model import DemoShape, make_demo_model

GOAL = 0.8
LENGTHS = (1000, 4000)
WARM = 2
BLOCK = 128  # tokens; what vLLM takes on a CPU
SHAPE = DemoShape(context=8192)
FLAGS = ["--max-model-len", "8192", "--max-num-seqs", "32", "--enforce-eager", "--block-size", str(BLOCK)]
PART = BLOCK * SHAPE.kv_heads * (SHAPE.hidden // SHAPE.heads) * 2 * 4  # bytes of a block in one layer, float32
CROWD = 6
WARM_READS = 5


@dataclass
class Moved:
    """Transfers of one prompt length."""

    engine_s: list[float] = field(default_factory=list)
    engine_bytes: float = 0.0
    raw_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)

    def row(self, length: int) -> str:
        """A line of the table."""
        cells = "".join(
            f"{1e3 * statistics.median(s):11.2f}{self.engine_bytes / statistics.median(s) / 1e9:7.2f}"
            for s in (self.engine_s, self.raw_s, self.warm_s)
        )
        return f"{length:7}{self.engine_bytes / 1e6:8.2f}{self.engine_bytes / PART:7.0f}{cells}{self.share:8.0%}"

    @property
    def share(self) -> float:
        """The engine's rate over NIXL's."""
        return statistics.median(self.raw_s) / statistics.median(self.engine_s)


class Other:
    """Two processes with bare NIXL: this one and another."""

    def __init__(self) -> None:
        self._memory = np.ones(MEMORY, dtype=np.uint8)
        self._target = Target()
        self._raw = Raw("raw-initiator", self._memory)
        self._at = 0

    async def meet(self) -> None:
        """Exchange addresses."""
        self._theirs = await self._target.ask(do="raw")
        self._raw.agent.loadRemoteMD(bytes.fromhex(self._theirs["metadata"]))

    def read(self, count: int) -> float:
        """Seconds for `count` parts, from where the last read ended."""
        places = MEMORY // PART
        parts = [((self._at + 2 * number) % places * PART, PART) for number in range(count)]
        self._at += 2 * count + 1
        return self._raw.move(self._raw.b.NIXL_READ, "raw-target", self._theirs["address"], parts)

    def end(self) -> None:
        """End the other process."""
        self._target.end()


def series(pair: Fleet, name: str) -> float:
    """Of the decode worker."""
    return pair.workers[1].series(f"dynamo_component_kv_transfer_{name}")


async def rates(pair: Fleet, other: Other, a: argparse.Namespace) -> bool:
    """One prompt, one read of as many bytes by NIXL alone, and so on."""
    rnd = random.Random(a.seed)
    connection = await connect(pair.port)
    print(" tokens      MB  parts  engine ms   GB/s    NIXL ms   GB/s    warm ms   GB/s   share")
    reached = True
    for length in LENGTHS:
        moved = Moved()
        for number in range(WARM + a.rounds):
            before = series(pair, "latency_seconds_sum"), series(pair, "bytes_sum")
            await asyncio.wait_for(connection.ask(completion(prompt(rnd, length), 2)), 120)
            took, size = series(pair, "latency_seconds_sum") - before[0], series(pair, "bytes_sum") - before[1]
            by_nixl = [other.read(round(size / PART)) for _ in range(WARM_READS)]
            if number >= WARM:
                moved.engine_bytes = size
                moved.engine_s.append(took)
                moved.raw_s.append(by_nixl[0])
                moved.warm_s.append(min(by_nixl))
        print(moved.row(length), flush=True)
        reached = reached and moved.share >= GOAL
    print(f"medians of {a.rounds}; warm: the best of {WARM_READS} in a row; goal: {GOAL:.0%}", end="")
    print(" of NIXL's rate at the same moment,", "reached" if reached else "missed")
    return reached


async def overlap(pair: Fleet, a: argparse.Namespace) -> None:
    """How long a crowd of prompts takes with its KV fetched and without."""
    rnd = random.Random(a.seed + 1)
    connections = [await connect(pair.port) for _ in range(CROWD)]
    seconds: dict[int, list[float]] = {1: [], 4: []}
    for _ in range(a.crowds):
        for made, found in seconds.items():
            asked = [c.ask(completion(prompt(rnd, LENGTHS[-1]), made)) for c in connections]
            answers: list[Timed] = await asyncio.wait_for(asyncio.gather(*asked), 300)
            found.append(max(t.at[0] for t in answers) - min(t.sent for t in answers))
    without, with_ = (min(found) for found in seconds.values())
    print(
        f"{CROWD} prompts of {LENGTHS[-1]} tokens at once, until the last has its first token: {with_:.2f} s with "
        f"their KV fetched, {without:.2f} s without ({with_ / without:.2f} x, the best of {a.crowds} each)"
    )


def prompt(rnd: random.Random, length: int) -> list[int]:
    """One that no cache has."""
    return [rnd.randrange(300, 4000) for _ in range(length)]


async def run(a: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as place:
        model = make_demo_model(Path(place) / "model", SHAPE)
        async with fleet(model, ["prefill", "decode"], [*FLAGS, *a.flags]) as pair:
            print("measuring", file=sys.stderr, flush=True)
            other = Other()
            try:
                await other.meet()
                reached = await rates(pair, other, a)
            finally:
                other.end()
            await overlap(pair, a)
    return 0 if reached else 1


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=16, help="prompts of each length")
    ap.add_argument("--crowds", type=int, default=2, help="times that all prompts come at once")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("flags", nargs="*", help="engine flags for both workers, after --")
    return asyncio.run(run(ap.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
