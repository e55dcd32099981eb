"""Which routing policy is best? `python benchmarks/replay_policies.py` replays published traces with each of them.

Mooncake's conversation and synthetic traces, 4 and 8 simulated engines (16,384 blocks of 64 tokens, the default timing
curves), three loads each, given as how many times faster than recorded requests come: from light to near the knee of
the linear cost. Then past the knee of round robin, whose queue grows there for as long as the trace lasts, and past
everybody's. Then a load that is easy to get wrong: all prompts begin with the same 90 %, so that whoever computed the
first has the least to compute for all. Every number is over all requests of a trace. The peer's cost is `linear`;
ratios are to it, in the same simulator, trace, load and cache. Equal seeds give equal results, on any machine.

Results go to benchmarks/data/replay_policies.json as they come. --keep measures only what is missing there, so an
interrupted run goes on; --plots DIR draws the pictures of docs/explanation/routing.md. All of it takes 25 minutes of
one core.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dynamo.replay.compare import run_all
from dynamo.replay.experiment import Experiment, Outcome
from dynamo.replay.plots import Axis, Series, plot
from dynamo.replay.traces import SyntheticWorkload
from dynamo.router.config import DEFAULT_POLICY, KvRouterConfig

ROOT = Path(__file__).parents[1]
TRACES = ROOT.parent / "shared" / "traces" / "mooncake"
RESULTS = ROOT / "benchmarks" / "data" / "replay_policies.json"
LOADS = {4: (1.0, 2.0, 3.0), 8: (2.0, 4.0, 6.0)}
CELLS = [(trace, n, load) for trace in ("conversation", "synthetic") for n, loads in LOADS.items() for load in loads]
PAST_KNEE = [("conversation", 4, 3.4), ("synthetic", 4, 3.2)]
PAST_ALL = [("synthetic", 4, 3.5)]
ONE_PREFIX = [("one prefix", 8, 10.0), ("one prefix", 8, 25.0), ("one prefix", 8, 100.0)]  # requests a second
DRAWN = (8, 4.0)  # workers and load of which the whole distribution is drawn
PEER = "linear"
QUEUED = f"{DEFAULT_POLICY} + queue"
QUEUE = KvRouterConfig(router_queue_threshold=1.0, router_queue_policy="wspt")
POLICIES = ("round-robin", "least-loaded", PEER, "lmetric", "sticky", "predicted", DEFAULT_POLICY)
PAST_POLICIES = ("round-robin", PEER, "lmetric", "sticky", "predicted", DEFAULT_POLICY, QUEUED)
KEPT = {
    "ttft": "mean_ttft_ms",
    "p50": "median_ttft_ms",
    "p99": "p99_ttft_ms",
    "tpot": "mean_tpot_ms",
    "e2e": "mean_e2e_latency_ms",
    "reuse": "prefix_cache_reused_ratio",
    "refused": "refused_requests",
}
RATIOS = ("ttft", "p99", "tpot")
Cell = tuple[str, int, float]
Results = dict[str, dict[str, Any]]


def name(cell: Cell) -> str:
    """What a trace on so many workers at such a load is called."""
    return f"{cell[0]} {cell[1]} workers x{cell[2]:g}"


def key(cell: Cell, policy: str) -> str:
    """A run's name among the results."""
    return f"{name(cell)} {policy}"


def experiment(cell: Cell, policy: str) -> Experiment:
    """What to run."""
    trace, workers, load = cell
    queued = policy == QUEUED
    shared = SyntheticWorkload(
        input_tokens=6000,
        output_tokens=200,
        request_count=2000,
        request_rate=load,
        spread=0.5,
        shared_prefix_ratio=0.9,
        num_prefix_groups=1,
        seed=1,
    )
    return Experiment(
        trace_files=[] if cell in ONE_PREFIX else [str(TRACES / f"{trace}_trace.jsonl")],
        synthetic=shared if cell in ONE_PREFIX else None,
        num_workers=workers,
        speedup=1.0 if cell in ONE_PREFIX else load,
        policy=DEFAULT_POLICY if queued else policy,
        router=QUEUE if queued else KvRouterConfig(),
        seed=1,
    )


def kept(cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """What is told of a run, and its curve where one is drawn."""
    numbers: dict[str, Any] = {short: round(outcome.summary[long], 4) for short, long in KEPT.items()}
    if cell[1:] == DRAWN:
        numbers["ttft_curve"] = [[round(ms, 1), share] for ms, share in outcome.curves["ttft"][::4]]
    if cell in (*PAST_KNEE, *PAST_ALL):
        waiting = [sum(sample.waiting) for sample in outcome.samples]
        fifth = len(waiting) // 5
        numbers["waiting"] = [round(mean(waiting[i * fifth : (i + 1) * fifth])) for i in range(5)]
    return numbers


def save(results: Results) -> None:
    """A line a run, in the order of their names."""
    lines = ",\n".join(f"{json.dumps(run)}: {json.dumps(results[run])}" for run in sorted(results))
    RESULTS.write_text(f"{{\n{lines}\n}}\n")


def measure(results: Results, cells: Sequence[Cell], policies: Sequence[str], jobs: int) -> None:
    """Make all runs that are not among the results."""
    for cell in cells:
        missing = [policy for policy in policies if key(cell, policy) not in results]
        for start in range(0, len(missing), jobs):
            batch = missing[start : start + jobs]
            outcomes = run_all([experiment(cell, policy) for policy in batch], jobs=jobs)
            for policy, outcome in zip(batch, outcomes, strict=True):
                results[key(cell, policy)] = kept(cell, outcome)
            save(results)


def ratios(results: Results, cell: Cell, policy: str, base: str = PEER) -> list[float]:
    """Mean TTFT, its p99 and mean TPOT, by those of `base`."""
    ours, theirs = results[key(cell, policy)], results[key(cell, base)]
    return [ours[which] / theirs[which] for which in RATIOS]


def matrix(results: Results, cells: Sequence[Cell], policies: Sequence[str], which: str, form: str) -> None:
    """One number: a row a load, a column a policy."""
    print(f"{'':<30}" + "".join(f"{policy:>18}" for policy in policies))
    for cell in cells:
        runs = [results[key(cell, policy)] for policy in policies]
        print(f"{name(cell):<30}" + "".join(f"{run[which]:>18{form}}" for run in runs))


def queues(results: Results, cells: Sequence[Cell]) -> None:
    """How many requests wait in each fifth of a run: where that only rises, the queue has no bound."""
    for cell in cells:
        for policy in ("round-robin", PEER, DEFAULT_POLICY):
            fifths = "".join(f"{count:>7}" for count in results[key(cell, policy)]["waiting"])
            print(f"{key(cell, policy):<48}{fifths}")


def beside_peer(results: Results, cells: Sequence[Cell]) -> None:
    """The default and the peer's cost, number by number."""
    print(f"{'':<30}{'TTFT ms':>14}{'ratio':>7}{'p99 ms':>14}{'ratio':>7}{'TPOT ms':>14}{'ratio':>7}{'reuse':>16}")
    for cell in cells:
        ours, theirs = results[key(cell, DEFAULT_POLICY)], results[key(cell, PEER)]
        ratio = iter(ratios(results, cell, DEFAULT_POLICY))
        row = f"{name(cell):<30}"
        for which, form in zip(RATIOS, (".0f", ".0f", ".2f"), strict=True):
            row += f"{ours[which]:>7{form}}/{theirs[which]:<6{form}}{next(ratio):>7.3f}"
        print(f"{row}{ours['reuse']:>9.3f}/{theirs['reuse']:<6.3f}")


def summaries(results: Results, cells: Sequence[Cell], policies: Sequence[str]) -> None:
    """A row a policy: ratios to the peer's cost, their mean and the worst."""
    print(f"{'':<16}{'TTFT':>8}{'worst':>8}{'p99':>10}{'worst':>8}{'TPOT':>10}{'worst':>8}")
    for policy in policies:
        columns = zip(*(ratios(results, cell, policy) for cell in cells), strict=True)
        print(f"{policy:<16}" + "  ".join(f"{mean(column):>8.3f}{max(column):>8.3f}" for column in columns))


def goals(results: Results) -> bool:
    """Say how the default does against what is asked of it."""
    ttft, p99, tpot = zip(*(ratios(results, cell, DEFAULT_POLICY) for cell in CELLS), strict=True)
    past = [1 / ratios(results, cell, DEFAULT_POLICY, "round-robin")[0] for cell in PAST_KNEE]
    checks = (
        ("mean TTFT / linear, mean over the loads", mean(ttft), "<=", 0.80),
        ("mean TTFT / linear, worst load", max(ttft), "<=", 1.0),
        ("p99 TTFT / linear, worst load", max(p99), "<=", 1.05),
        ("mean TPOT / linear, worst load", max(tpot), "<=", 1.05),
        ("past the knee: mean TTFT of round robin / of the default, worst", min(past), ">=", 10.0),
    )
    held = True
    for what, value, sign, goal in checks:
        met = value <= goal if sign == "<=" else value >= goal
        held = held and met
        print(f"{what:<66}{value:>7.3f}  (goal {sign} {goal:g}{'' if met else ', missed'})")
    return held


def draw(results: Results, where: Path) -> None:
    """The pictures of the documentation."""
    where.mkdir(parents=True, exist_ok=True)
    shown = ("round-robin", PEER, "lmetric", "sticky", "predicted", DEFAULT_POLICY)
    for trace in ("conversation", "synthetic"):
        cells = sorted(cell for cell in (*CELLS, *PAST_KNEE, *PAST_ALL) if cell[:2] == (trace, 4))
        lines = [
            Series(policy, [(cell[2], results[key(cell, policy)]["ttft"]) for cell in cells])
            for policy in (*shown, QUEUED)
        ]
        title = f"Mean time to first token: {trace} trace, 4 workers"
        picture = plot(title, lines, Axis("times as fast as recorded"), Axis("milliseconds", log=True), standalone=True)
        (where / f"routing-load-{trace}.svg").write_text(picture + "\n")
        cell = (trace, *DRAWN)
        lines = [Series(policy, results[key(cell, policy)]["ttft_curve"]) for policy in shown]
        title = f"Time to first token: {trace} trace, {DRAWN[0]} workers, {DRAWN[1]:g} times as fast"
        axes = Axis("milliseconds", log=True), Axis("share of requests", low=0.0, high=1.0)
        (where / f"routing-ttft-{trace}.svg").write_text(plot(title, lines, *axes, standalone=True) + "\n")


def main() -> int:
    """Measure, print, and say whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="do not measure again what is among the results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--plots", type=Path, help="draw pictures into this directory")
    args = parser.parse_args()
    if not TRACES.exists():
        print(f"skipped: needs the traces in {TRACES}")
        return 0
    results: Results = json.loads(RESULTS.read_text()) if args.keep and RESULTS.exists() else {}
    measure(results, CELLS, POLICIES, args.jobs)
    measure(results, ONE_PREFIX, POLICIES, args.jobs)
    measure(results, (*PAST_KNEE, *PAST_ALL), PAST_POLICIES, args.jobs)
    measure(results, [cell for cell in CELLS if cell[1] == 4], (QUEUED,), args.jobs)
    print("Mean time to first token, ms")
    matrix(results, CELLS, POLICIES, "ttft", ".0f")
    print("\nPast round robin's knee, and past everybody's: mean time to first token, ms")
    matrix(results, (*PAST_KNEE, *PAST_ALL), PAST_POLICIES, "ttft", ".0f")
    print("p99, ms")
    matrix(results, (*PAST_KNEE, *PAST_ALL), PAST_POLICIES, "p99", ".0f")
    print("Requests that wait, by fifths of the run")
    queues(results, (*PAST_KNEE, *PAST_ALL))
    print("\nOne prefix of all, x requests a second: mean time to first token, ms")
    matrix(results, ONE_PREFIX, POLICIES, "ttft", ".0f")
    print("mean time per output token, ms")
    matrix(results, ONE_PREFIX, POLICIES, "tpot", ".2f")
    print(f"\nRatios to {PEER}: mean over the loads, and the worst")
    summaries(results, CELLS, POLICIES)
    print(f"\nThe default, {DEFAULT_POLICY}, beside {PEER}")
    beside_peer(results, CELLS)
    print()
    if args.plots is not None:
        draw(results, args.plots)
    return 0 if goals(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
