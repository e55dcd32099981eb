"""Does the simulator agree with ai-dynamo's? `python benchmarks/replay_fidelity.py`.

Both replay the same trace with default engines: 16,384 blocks of 64 tokens, 8,192 tokens a step; a trace's blocks are
of 512 tokens. What the peer answered stands in benchmarks/data/replay_peer.json, with its version; `--peer PYTHON`
(an interpreter that has ai-dynamo) asks it again. Goal: mean TTFT, mean TPOT and reuse of round robin within 10 %.
`kv_router` is the peer's cost there and our `linear` here. `4+4` are four prefill and four decode workers, with KV of
128 KiB a token at 64 GB/s between them; there the first token counts when the decode worker repeats it, as the peer
counts it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dynamo.replay import run_trace_replay
from dynamo.router.config import KvRouterConfig

ROOT = Path(__file__).parents[1]
TRACES = ROOT.parent / "shared" / "traces" / "mooncake"
RECORDED = ROOT / "benchmarks" / "data" / "replay_peer.json"
Workers = int | list[int]
"""So many that do both, or [prefill workers, decode workers]."""
CASES: tuple[tuple[str, Workers, str, float], ...] = (
    ("conversation", 4, "round_robin", 1.0),
    ("conversation", 4, "round_robin", 1.5),
    ("conversation", 8, "round_robin", 3.0),
    ("synthetic", 8, "round_robin", 2.0),
    ("conversation", 4, "kv_router", 1.0),
    ("conversation", 8, "kv_router", 3.0),
    ("synthetic", 8, "kv_router", 2.0),
    ("conversation", [4, 4], "round_robin", 1.0),
    ("conversation", [4, 4], "round_robin", 3.0),
    ("conversation", [5, 3], "round_robin", 2.0),
    ("synthetic", [4, 4], "round_robin", 2.0),
    ("conversation", [4, 4], "kv_router", 3.0),
)
BANDWIDTH, BYTES_PER_TOKEN = 64.0, 131072  # GB/s; 32 layers of 8 heads of 128 at two bytes, keys and values
COMPARED = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "mean_e2e_latency_ms", "prefix_cache_reused_ratio")
GOAL = 0.10
ASK = """
import json, sys
from importlib.metadata import version
from dynamo.replay import run_trace_replay
file, fleet, mode, speedup = json.loads(sys.argv[1])
report = run_trace_replay([file], router_mode=mode, arrival_speedup_ratio=speedup, trace_block_size=512, **fleet)
print(json.dumps({"version": version("ai-dynamo"), **report.summary}))
"""


def trace(name: str) -> Path:
    """The file of a trace."""
    return TRACES / f"{name}_trace.jsonl"


def fleet_of(workers: Workers) -> dict[str, Any]:
    """The arguments that say so, here and there."""
    if isinstance(workers, int):
        return {"num_workers": workers}
    way = {"kv_transfer_bandwidth": BANDWIDTH, "kv_transfer_bytes_per_token": BYTES_PER_TOKEN}
    return {
        "num_prefill_workers": workers[0],
        "num_decode_workers": workers[1],
        "prefill_engine_args": {"engine": {"worker_type": "prefill", **way}},
        "decode_engine_args": {"engine": {"worker_type": "decode", **way}},
    }


def name_of(workers: Workers) -> str:
    """As it stands in the table."""
    return str(workers) if isinstance(workers, int) else "+".join(map(str, workers))


def ask(peer: Path) -> dict[str, Any]:
    """The peer's answers to all cases."""
    answers: dict[str, Any] = {}
    for name, workers, mode, speedup in CASES:
        argument = json.dumps([str(trace(name)), fleet_of(workers), mode, speedup])
        done = subprocess.run([peer, "-c", ASK, argument], capture_output=True, text=True, check=True, timeout=600)
        summary = json.loads(done.stdout.splitlines()[-1])
        answers[f"{name} {name_of(workers)} {mode} {speedup:g}"] = {key: summary[key] for key in ("version", *COMPARED)}
    return answers


def ours(name: str, workers: Workers, mode: str, speedup: float) -> dict[str, Any]:
    """Our summary."""
    return run_trace_replay(
        trace(name),
        **fleet_of(workers),
        first_from_decode=not isinstance(workers, int),
        router_mode=mode,
        router_config=KvRouterConfig(router_policy="linear"),
        arrival_speedup_ratio=speedup,
        trace_block_size=512,
    ).summary


def main() -> int:
    """Print a table; the status is 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="an interpreter that has ai-dynamo: ask it anew")
    args = parser.parse_args()
    if not TRACES.exists():
        print(f"skipped: needs the traces in {TRACES}")
        return 0
    if args.peer is not None:
        RECORDED.write_text(json.dumps(ask(args.peer), indent=1) + "\n")
    recorded = json.loads(RECORDED.read_text())
    peer_version = next(iter(recorded.values()))["version"]
    print(f"ours / ai-dynamo {peer_version}, Python {sys.version.split()[0]}")
    print(f"{'trace':<13}{'workers':>8} {'router':<12}{'speed':>6}", end="")
    print("".join(f"{key.replace('_ms', '').replace('prefix_cache_', ''):>26}" for key in COMPARED))
    worst = 0.0
    for name, workers, mode, speedup in CASES:
        theirs = recorded[f"{name} {name_of(workers)} {mode} {speedup:g}"]
        mine = ours(name, workers, mode, speedup)
        print(f"{name:<13}{name_of(workers):>8} {mode:<12}{speedup:>6g}", end="")
        for key in COMPARED:
            off = mine[key] / theirs[key] - 1
            print(f"{mine[key]:>10.4g} /{theirs[key]:>7.4g} {off:>+6.1%}", end="")
            if mode == "round_robin" and key in ("mean_ttft_ms", "mean_tpot_ms", "prefix_cache_reused_ratio"):
                worst = max(worst, abs(off))
        print(flush=True)
    print(f"round robin agrees within {worst:.2%} (goal {GOAL:.0%})")
    return int(worst > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
