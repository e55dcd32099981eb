"""Which routing policy is best? `python benchmarks/replay_policies.py` replays real traces with each of them.

Mooncake's conversation and synthetic traces, 4 and 8 simulated engines (16,384 blocks of 64 tokens, the default timing
curves), three loads each, given as how many times faster than recorded requests come: from light to near the knee of
the linear cost. Then past the knee, where round robin's queue grows without bound. Every number is over all requests
of a trace. The peer's cost is `linear`; ratios are to it, in the same simulator, trace, load and cache.

Results go to benchmarks/data/replay_policies.json as they come; with --keep those that are there are not measured
again, so that an interrupted run goes on. --plots DIR draws the pictures of docs/explanation/routing.md.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

from dynamo.replay.compare import run_all
from dynamo.replay.experiment import Experiment, Outcome
from dynamo.replay.plots import Axis, Series, plot
from dynamo.router.config import DEFAULT_POLICY, KvRouterConfig

ROOT = Path(__file__).parents[1]
TRACES = ROOT.parent / "shared" / "traces" / "mooncake"
RESULTS = ROOT / "benchmarks" / "data" / "replay_policies.json"
LOADS = {4: (1.0, 2.0, 3.0), 8: (2.0, 4.0, 6.0)}
CELLS = [(trace, n, load) for trace in ("conversation", "synthetic") for n, loads in LOADS.items() for load in loads]
PAST_KNEE = [("conversation", 4, 3.4), ("synthetic", 4, 3.5)]
PEER = "linear"
POLICIES = (PEER, "round-robin", "least-loaded", "lmetric", "sticky", "predicted", "marginal")
QUEUED = f"{DEFAULT_POLICY} + queue"
QUEUE = KvRouterConfig(router_queue_threshold=1.0, router_queue_policy="wspt")
KEPT = {
    "ttft": "mean_ttft_ms",
    "p50": "median_ttft_ms",
    "p99": "p99_ttft_ms",
    "tpot": "mean_tpot_ms",
    "e2e": "mean_e2e_latency_ms",
    "reuse": "prefix_cache_reused_ratio",
    "refused": "refused_requests",
    "speed": "realtime_factor",
}
Cell = tuple[str, int, float]


def key(cell: Cell, policy: str) -> str:
    """A run's name among the results."""
    return f"{cell[0]} {cell[1]} workers x{cell[2]:g} {policy}"


def experiment(cell: Cell, policy: str) -> Experiment:
    """What to run."""
    trace, workers, load = cell
    queued = policy == QUEUED
    return Experiment(
        trace_files=[str(TRACES / f"{trace}_trace.jsonl")],
        num_workers=workers,
        speedup=load,
        policy=DEFAULT_POLICY if queued else policy,
        router=QUEUE if queued else KvRouterConfig(),
        seed=1,
    )


def kept(outcome: Outcome) -> dict[str, Any]:
    """What is told of a run, and its curve for a picture."""
    numbers = {name: outcome.summary[long] for name, long in KEPT.items()}
    return numbers | {"ttft_curve": [[round(ms, 2), share] for ms, share in outcome.curves["ttft"][::4]]}


def measure(results: dict[str, Any], cells: list[Cell], policies: tuple[str, ...], jobs: int) -> None:
    """Make all runs that are not among the results."""
    for cell in cells:
        missing = [policy for policy in policies if key(cell, policy) not in results]
        for start in range(0, len(missing), jobs):
            batch = missing[start : start + jobs]
            outcomes = run_all([experiment(cell, policy) for policy in batch], jobs=jobs)
            results |= {key(cell, policy): kept(outcome) for policy, outcome in zip(batch, outcomes, strict=True)}
            RESULTS.write_text(json.dumps(results, indent=0) + "\n")


def table(results: dict[str, Any], cells: list[Cell], policies: tuple[str, ...], peer: str) -> None:
    """A block a policy: its numbers, and their ratios to the peer's."""
    for policy in policies:
        print(f"\n{policy}")
        print(
            f"  {'':<28}{'TTFT ms':>9}{'ratio':>7}{'p99':>8}{'ratio':>7}{'TPOT':>8}{'ratio':>7}{'E2E':>8}{'reuse':>7}"
        )
        ratios = []
        for cell in cells:
            run, base = results[key(cell, policy)], results[key(cell, peer)]
            ratio = [run[name] / base[name] for name in ("ttft", "p99", "tpot")]
            ratios.append(ratio)
            print(
                f"  {cell[0]:<13}{cell[1]} workers x{cell[2]:<5g}{run['ttft']:>9.0f}{ratio[0]:>7.3f}{run['p99']:>8.0f}"
                f"{ratio[1]:>7.3f}{run['tpot']:>8.2f}{ratio[2]:>7.3f}{run['e2e']:>8.0f}{run['reuse']:>7.3f}"
                + (f"  {run['refused']} refused" if run["refused"] else "")
            )
        columns = list(zip(*ratios, strict=True))
        print(
            f"  mean of ratios: TTFT {mean(columns[0]):.3f}, p99 {mean(columns[1]):.3f}, TPOT {mean(columns[2]):.3f};",
            end="",
        )
        print(f" worst: TTFT {max(columns[0]):.3f}, p99 {max(columns[1]):.3f}, TPOT {max(columns[2]):.3f}")


def goals(results: dict[str, Any], cells: list[Cell]) -> bool:
    """Say how the default does against what is asked of it."""
    ratios = [
        [results[key(cell, DEFAULT_POLICY)][name] / results[key(cell, PEER)][name] for name in ("ttft", "p99", "tpot")]
        for cell in cells
    ]
    ttft, p99, tpot = zip(*ratios, strict=True)
    past = [
        results[key(cell, "round-robin")]["ttft"] / results[key(cell, DEFAULT_POLICY)]["ttft"] for cell in PAST_KNEE
    ]
    checks = (
        ("mean TTFT / linear, mean of cells", mean(ttft), "<=", 0.80),
        ("mean TTFT / linear, worst cell", max(ttft), "<=", 1.0),
        ("p99 TTFT / linear, worst cell", max(p99), "<=", 1.05),
        ("mean TPOT / linear, worst cell", max(tpot), "<=", 1.05),
        ("past the knee: round robin / default, mean TTFT, worst", min(past), ">=", 10.0),
    )
    print(f"\nthe default, {DEFAULT_POLICY}:")
    held = True
    for what, value, sign, goal in checks:
        met = value <= goal if sign == "<=" else value >= goal
        held = held and met
        print(f"  {what:<56}{value:>7.3f}  (goal {sign} {goal:g}{'' if met else ', missed'})")
    return held


def draw(results: dict[str, Any], where: Path) -> None:
    """The pictures of the documentation."""
    where.mkdir(parents=True, exist_ok=True)
    shown = ("round-robin", PEER, "lmetric", "sticky", "predicted", DEFAULT_POLICY)
    for trace in ("conversation", "synthetic"):
        cells = [cell for cell in (*CELLS, *PAST_KNEE) if cell[:2] == (trace, 4)]
        lines = [
            Series(policy, [(cell[2], results[key(cell, policy)]["ttft"]) for cell in sorted(cells)])
            for policy in (*shown, QUEUED)
            if all(key(cell, policy) in results for cell in cells)
        ]
        title = f"Mean time to first token: {trace} trace, 4 workers"
        picture = plot(title, lines, Axis("times as fast as recorded"), Axis("milliseconds", log=True), standalone=True)
        (where / f"routing-load-{trace}.svg").write_text(picture + "\n")
        cell = (trace, 8, 4.0)
        lines = [Series(policy, results[key(cell, policy)]["ttft_curve"]) for policy in shown]
        title = f"Time to first token: {trace} trace, 8 workers, 4 times as fast"
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
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if args.keep and RESULTS.exists() else {}
    past = ("round-robin", PEER, "lmetric", "sticky", "predicted", DEFAULT_POLICY, QUEUED)
    measure(results, CELLS, POLICIES, args.jobs)
    measure(results, PAST_KNEE, past, args.jobs)
    light = [cell for cell in CELLS if cell[1] == 4]
    measure(results, light, (QUEUED,), args.jobs)
    print("ratios are to the peer's linear cost")
    table(results, CELLS, POLICIES, PEER)
    print("\n\npast the knee; ratios are to round robin")
    table(results, PAST_KNEE, past, "round-robin")
    if args.plots is not None:
        draw(results, args.plots)
    return 0 if goals(results, CELLS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
