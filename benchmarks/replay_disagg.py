"""When is it worth to compute prompts apart from answers? `python benchmarks/replay_disagg.py`.

Eight simulated workers meet Mooncake's conversation trace, faster than recorded: all doing both, or some computing
prompts and the others answering. Goodput is the number of requests a second with at most 20 ms a token (TPOT: from the
first token to the last, over the tokens after the first) and at most 5 s to the first token. TPOT is counted in two
ways: `client`, from the first token, which the prefill worker makes; and `peer`, as ai-dynamo's replay counts, from the
moment when the decode worker has repeated it. For workers that do both there is no difference.

Goal: the best split reaches 1.3 times the goodput of aggregated workers, as the peer counts. KV is of 128 KiB a token
and travels at 64 GB/s. Results go to benchmarks/data/replay_disagg.json and plots to docs/explanation/images;
`--recorded` only shows them again. About eight minutes on one core.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from dynamo.replay.experiment import Experiment
from dynamo.replay.plots import Axis, Series, plot
from dynamo.replay.pools import Pools
from dynamo.replay.simulate import Record
from dynamo.router.config import KvRouterConfig
from dynamo.router.split import POLICIES

ROOT = Path(__file__).parents[1]
TRACE = ROOT.parent / "shared" / "traces" / "mooncake" / "conversation_trace.jsonl"
RECORDED = ROOT / "benchmarks" / "data" / "replay_disagg.json"
IMAGES = ROOT / "docs" / "explanation" / "images"
WORKERS = 8
TPOT_S, TTFT_S = 0.020, 5.0
GOAL = 1.3
BYTES_PER_TOKEN = 131072  # 32 layers of 8 heads of 128 at two bytes, keys and values
BEST = (3, 5)
SHORT = 3000  # requests of the trace for what is only compared with itself
QUEUE = KvRouterConfig(
    router_queue_threshold=0.5,
    router_queue_policy="wspt",
    conditional_disagg_prefill_busy_threshold=2.0,
)
"""Prompts wait at the router, the shortest first: what makes a prefill pool bearable near its limit."""


class Run(msgspec.Struct, frozen=True):
    """What one run came to. Milliseconds, and requests a second."""

    set: str
    """Which table it is for."""
    prefill: int
    decode: int
    split: str
    speed: float
    queue: bool = True
    """Whether prompts may wait at the router. For aggregated workers it changes next to nothing, so they have none."""
    throughput: float = 0.0
    client: float = 0.0
    peer: float = 0.0
    ttft: float = 0.0
    ttft_p99: float = 0.0
    tpot: float = 0.0
    tpot_p90: float = 0.0
    reuse: float = 0.0
    local: int = 0
    refused: int = 0
    busy: list[float] = []

    @property
    def fleet(self) -> str:
        """As in a table."""
        return f"{self.prefill}P{self.decode}D" if self.prefill else f"{WORKERS} aggregated"


def plans() -> Iterator[Run]:
    """All runs. Workers that do both are written as 0 prefill workers."""
    prefill, decode = BEST
    yield from (Run("whole", 0, WORKERS, "", speed) for speed in (3.2, 3.4, 3.6))
    yield from (Run("whole", prefill, decode, "predicted", speed) for speed in (4.2, 4.8))
    yield from (Run("whole", prefill, decode, "predicted", speed, queue=False) for speed in (4.2, 4.4))
    loads = (2.4, 3.0, 3.6, 4.2, 4.8, 5.4)
    yield from (Run("policy", 0, WORKERS, "", speed) for speed in loads)
    yield from (Run("policy", prefill, decode, split, speed) for split in POLICIES for speed in loads)
    for split in ("always", "predicted"):
        yield from (Run("queue", prefill, decode, split, speed, queue=False) for speed in (3.6, 4.2, 4.8))
    yield from (Run("pools", p, WORKERS - p, "predicted", 4.2) for p in (2, 4, 5))


def run(plan: Run) -> Run:
    """Do it."""
    records: list[Record] = []
    pools = None
    if plan.prefill:
        pools = Pools(prefill_workers=plan.prefill, decode_workers=plan.decode, kv_bytes_per_token=BYTES_PER_TOKEN)
    outcome = Experiment(
        trace_files=[str(TRACE)],
        trace_block_size=512,
        limit=None if plan.set == "whole" else SHORT,
        num_workers=WORKERS,
        pools=pools,
        split=plan.split or None,
        policy="marginal",
        router=QUEUE if plan.prefill and plan.queue else KvRouterConfig(),
        speedup=plan.speed,
    ).run(on_record=records.append)
    summary = outcome.summary
    seconds = summary["duration_ms"] / 1000
    return msgspec.structs.replace(
        plan,
        throughput=summary["request_throughput_rps"],
        client=sum(is_good(r, r.first_token_s) for r in records) / seconds,
        peer=sum(is_good(r, r.first_token_s if r.resumed_s is None else r.resumed_s) for r in records) / seconds,
        ttft=summary["mean_ttft_ms"],
        ttft_p99=summary["p99_ttft_ms"],
        tpot=summary["mean_tpot_ms"],
        tpot_p90=summary["p90_tpot_ms"],
        reuse=summary["prefix_cache_reused_ratio"],
        local=summary.get("local_requests", 0),
        refused=summary["refused_requests"],
        busy=[summary["prefill_busy_ratio"], summary["decode_busy_ratio"]] if pools else [summary["busy_ratio"]],
    )


def is_of(result: Run, plan: Run) -> bool:
    """Whether it is what came of this plan."""
    names = ("set", "prefill", "decode", "split", "speed", "queue")
    return all(getattr(result, name) == getattr(plan, name) for name in names)


def is_good(record: Record, first_s: float) -> bool:
    """Whether a request holds both limits if its first token is counted at `first_s`."""
    if first_s - record.arrived_s > TTFT_S:
        return False
    return record.output_tokens < 2 or (record.last_token_s - first_s) / (record.output_tokens - 1) <= TPOT_S


COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("workers", lambda r: r.fleet),
    ("split", lambda r: r.split or "-"),
    ("queue", lambda r: "yes" if r.prefill and r.queue else "-"),
    ("load", lambda r: f"x{r.speed:g}"),
    ("req/s", lambda r: f"{r.throughput:.2f}"),
    ("good/s, client", lambda r: f"{r.client:.2f}"),
    ("good/s, peer", lambda r: f"{r.peer:.2f}"),
    ("TTFT ms", lambda r: f"{r.ttft:.0f}"),
    ("p99", lambda r: f"{r.ttft_p99:.0f}"),
    ("TPOT ms", lambda r: f"{r.tpot:.1f}"),
    ("p90", lambda r: f"{r.tpot_p90:.1f}"),
    ("reuse %", lambda r: f"{100 * r.reuse:.1f}"),
    ("local", lambda r: f"{r.local}" if r.prefill else ""),
    ("refused", lambda r: f"{r.refused}"),
    ("busy %", lambda r: " / ".join(f"{100 * share:.0f}" for share in r.busy)),
)


def show(runs: list[Run]) -> None:
    """The tables, in Markdown."""
    for name, title in (
        ("whole", "The whole trace"),
        ("policy", f"Which prompts travel (its first {SHORT:,} requests)"),
        ("queue", "The same without a queue at the router"),
        ("pools", "How many prefill workers (the same requests)"),
    ):
        print(f"\n{title}\n")
        print("| " + " | ".join(column for column, _ in COLUMNS) + " |")
        print("|---|---|" + "---:|" * (len(COLUMNS) - 2))
        for r in runs:
            if r.set == name:
                print("| " + " | ".join(cell(r) for _, cell in COLUMNS) + " |")


def draw(runs: list[Run]) -> None:
    """Goodput and latencies over the load."""
    lines: dict[str, list[Run]] = {}
    for r in runs:
        if r.set == "policy":
            lines.setdefault(r.split or "aggregated", []).append(r)
    kinds: tuple[tuple[str, str, Axis, Callable[[Run], float]], ...] = (
        ("goodput", "Requests a second within both limits", Axis("requests a second", low=0), lambda r: r.peer),
        ("ttft", "Mean time to first token", Axis("ms", log=True), lambda r: r.ttft),
        ("tpot", "Time between tokens that nine in ten hold", Axis("ms", low=0), lambda r: r.tpot_p90),
    )
    for name, title, y, value in kinds:
        series = [Series(split, [(r.speed, value(r)) for r in line]) for split, line in lines.items()]
        picture = plot(title, series, Axis("load, times as recorded"), y, standalone=True)
        (IMAGES / f"disagg-{name}.svg").write_text(picture + "\n")


def verdict(runs: list[Run]) -> int:
    """Say whether the goal is met; the status is 1 if not."""
    whole = [r for r in runs if r.set == "whole"]
    together = max((r for r in whole if not r.prefill), key=lambda r: r.peer)
    apart = max((r for r in whole if r.prefill), key=lambda r: r.peer)
    strict = max(r.client for r in whole if r.prefill) / together.client
    ratio = apart.peer / together.peer
    print(
        f"\ngoodput {apart.peer:.2f}/s of {apart.fleet} at x{apart.speed:g} against {together.peer:.2f}/s of "
        f"{together.fleet} at x{together.speed:g}: {ratio:.2f} times (goal {GOAL}), {strict:.2f} as clients count"
    )
    return int(ratio < GOAL)


def main() -> int:
    """Run, show, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("missing", *POLICIES), help="run this split policy again, keep the rest")
    parser.add_argument("--recorded", action="store_true", help="show the last results again")
    args = parser.parse_args()
    if not args.recorded:
        if not TRACE.exists():
            print(f"skipped: needs {TRACE}")
            return 0
        kept = msgspec.json.decode(RECORDED.read_bytes(), type=list[Run]) if args.only else []
        runs = []
        for plan in plans():
            old = next((r for r in kept if is_of(r, plan)), None)
            if old is not None and plan.split != args.only:
                runs.append(old)
                continue
            began = time.perf_counter()
            runs.append(run(plan))
            took = time.perf_counter() - began
            print(f"{plan.set} {plan.fleet} {plan.split} x{plan.speed:g}: {took:.0f} s", file=sys.stderr, flush=True)
        RECORDED.write_bytes(msgspec.json.format(msgspec.json.encode(runs)) + b"\n")
    runs = msgspec.json.decode(RECORDED.read_bytes(), type=list[Run])
    show(runs)
    draw(runs)
    return verdict(runs)


if __name__ == "__main__":
    raise SystemExit(main())
