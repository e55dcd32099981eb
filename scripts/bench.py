#!/usr/bin/env python3
"""How does this compare with the peer, and what does each part cost? Writes docs/reference/benchmarks.md.

usage: scripts/bench.py [--rounds 3] [--only peer|peer-kv|kv|own|NAME[,NAME]] [--peer PYTHON] [--render]

Runs ../shared/bench/compare.py, which measures this project's frontend and ai-dynamo's in turn with the same command
lines and load (its environment is made in build/peer the first time): with round robin (`peer`) and routing by KV
caches (`peer-kv`). Then our own frontend alone, each way in turn (`kv`), and the benchmarks of this repository. Raw
results are kept in build/bench; --render writes the page from them without measuring again, and --only measures some of
these, or single files of benchmarks/. What was not measured here stays on the page as it is. Measure on a machine that
does nothing else.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "bench"
RESULTS = ROOT / "build" / "bench"
PEER = ROOT / "build" / "peer"
PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
COMPARE_TIMEOUT_S = 3600.0
OWN_TIMEOUT_S = 1800.0

SCENARIOS = {
    "stream": "500 requests on 64 connections, 200 words in, 200 tokens out",
    "crowd": "1000 requests on 256 connections, 200 words in, 200 tokens out",
    "unary": "4000 requests on 64 connections, 50 words in, 1 token out, no streaming",
    "long": "400 requests on 16 connections, 6000 words in, 4 tokens out",
    "shared": "400 requests on 16 connections, 5800 shared and 200 own words in, 4 tokens out",
    "single": "300 requests, one after the other, 20 words in, 1 token out, no streaming",
}
GOALS = {"stream": 0.30, "crowd": 0.45, "unary": 0.30, "long": 0.75, "shared": 0.30, "single": 0.15}

BESIDE_PEER = "Beside ai-dynamo 1.6.1"
BESIDE_PEER_KV = f"{BESIDE_PEER}, routing by KV caches"
KV_COST = "What does routing by KV caches cost the frontend?"
KV_GOAL = 1.10  # times the CPU of round robin
COMPARED = {"peer": ("compare", "round-robin", BESIDE_PEER), "peer-kv": ("compare_kv", "kv", BESIDE_PEER_KV)}
"""What --only calls it: where results are kept, the router mode, and the heading."""
FIRST = "vllm_worker"  # of our own: what users feel most


def own() -> list[str]:
    """Names of the programs in benchmarks/, in the order of the page."""
    return sorted((p.stem for p in (ROOT / "benchmarks").glob("*.py")), key=lambda name: (name != FIRST, name))


def wanted(words: str) -> list[str]:
    """What --only asks for. Raises ArgumentTypeError naming what there is."""
    names = own() if words == "own" else words.split(",")
    known = [*COMPARED, "kv", *own()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such benchmark: {unknown[0]}; there are own, {', '.join(known)}")
    return names


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--only", type=wanted, default=[*COMPARED, "kv", *own()], help="own, or names of benchmarks")
    ap.add_argument("--peer", type=Path, help="an interpreter that has the peer (default: made in build/peer)")
    ap.add_argument("--render", action="store_true", help="write the page from the last results")
    a = ap.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not a.render:
        for name in a.only:
            if name in COMPARED:
                compare(name, a.rounds, a.peer)
            elif name == "kv":
                compare_modes(a.rounds)
            else:
                run_own(name)
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def compare(name: str, rounds: int, peer: Path | None) -> None:
    """Measure both sides, or say why not."""
    kept, mode, _ = COMPARED[name]
    if not (SHARED / "compare.py").exists():
        print(f"skipped: the comparison with the peer needs {SHARED}, which is not there", flush=True)
        return
    if peer is None and not (PEER / "bin" / "python").exists():
        print("making the peer's environment in build/peer (minutes)", flush=True)
        subprocess.run([SHARED / "setup_peer.sh", PEER], check=True, timeout=COMPARE_TIMEOUT_S)
    started = time.time()
    _run_compare(RESULTS / f"{kept}.json", mode, rounds, "--peer", peer or PEER / "bin" / "python")
    _keep_about(kept, rounds, started)


def compare_modes(rounds: int) -> None:
    """Measure our own frontend with round robin and with KV routing, once each in turn, or say why not."""
    if not (SHARED / "compare.py").exists():
        print(f"skipped: the cost of KV routing needs {SHARED}, which is not there", flush=True)
        return
    started, one = time.time(), RESULTS / "kv_round.json"
    costs: dict[str, dict[str, list[float]]] = {name: {"round-robin": [], "kv": []} for name in SCENARIOS}
    for number in range(rounds):
        for mode in ("round-robin", "kv") if number % 2 == 0 else ("kv", "round-robin"):
            _run_compare(one, mode, 1)
            for name, row in json.loads(one.read_text())["scenarios"].items():
                costs[name][mode].append(row["ours"]["cpu_us"])
    one.unlink(missing_ok=True)
    (RESULTS / "kv.json").write_text(json.dumps(costs))
    _keep_about("kv", rounds, started)


def _run_compare(to: Path, mode: str, rounds: int, *more: str | Path) -> None:
    from dynamo.cli.demo_model import make_demo_model

    model = make_demo_model(ROOT / "build" / "demo-model")
    words: list[str | Path] = [SHARED / "compare.py", "--ours", sys.executable, "--model-path", model, *more]
    words += ["--router-mode", mode, "--rounds", str(rounds), "--json", to]
    subprocess.run([sys.executable, *words], check=True, timeout=COMPARE_TIMEOUT_S)


def _keep_about(name: str, rounds: int, started: float) -> None:
    kept = about() | {"rounds": rounds, "minutes": _minutes(started)}
    (RESULTS / f"{name}.about.json").write_text(json.dumps(kept))


def run_own(name: str) -> None:
    """Run one of our own benchmarks and keep what it prints."""
    program = ROOT / "benchmarks" / f"{name}.py"
    command = f"python benchmarks/{name}.py"
    print(f"\n$ {command}", flush=True)
    try:
        done = subprocess.run(
            [sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=OWN_TIMEOUT_S
        )
        text = done.stdout + (done.stderr[-2000:] if done.returncode else "")
    except subprocess.TimeoutExpired:
        text = f"not finished after {OWN_TIMEOUT_S:.0f} s"
    print(text, flush=True)
    result = {"command": command, "text": text.rstrip(), **about()}
    (RESULTS / f"{name}.json").write_text(json.dumps(result))


def about() -> dict[str, Any]:
    """When and where."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d"),
        "revision": revision.strip(),
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}",
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _minutes(started: float) -> int:
    return round((time.time() - started) / 60)


def _kept(name: str) -> Any:
    try:
        return json.loads((RESULTS / f"{name}.json").read_text())
    except OSError:
        return None


def page() -> str:
    """The page: what is kept here, and of the page as it is what is not."""
    present = sections(PAGE.read_text() if PAGE.exists() else "")
    parts = [
        "# Benchmarks",
        "",
        "Written by `make bench`; do not edit. A benchmark, its command and its last result stand together.",
        "",
    ]
    for kept, mode, heading in COMPARED.values():
        if (measured := _kept(kept)) is None and heading in present:
            parts += present[heading]
        else:
            parts += peer_part(heading, mode, measured, _kept(f"{kept}.about"))
    if (costs := _kept("kv")) is None:
        parts += present.get(KV_COST, [])
    else:
        parts += kv_part(costs, _kept("kv.about"))
    for name in own():
        question = asked(name)
        if (kept := _kept(name)) is not None:
            parts += [f"## {question}", "", f"`{kept['command']}`, {_where(kept)}:", ""]
            parts += ["```", kept["text"], "```", ""]
        else:
            parts += present.get(question, [])
    return "\n".join(parts).rstrip() + "\n"


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section of a page, its heading included, by its heading."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("## "):
            lines = found[line.removeprefix("## ")] = []
        lines.append(line)
    for section in found.values():
        while section and not section[-1]:
            section.pop()
        section.append("")
    return found


def asked(name: str) -> str:
    """The question that a benchmark answers: the first sentence of its file."""
    first = (ROOT / "benchmarks" / f"{name}.py").read_text().split('"""', 2)[1].strip().splitlines()[0]
    return first[: first.index("?") + 1] if "?" in first else first


def _where(about: dict[str, Any]) -> str:
    return f"{about['date']}, revision {about['revision']}, {about['machine']}, Python {about['python']}"


def kv_part(costs: dict[str, dict[str, list[float]]], about: dict[str, Any]) -> list[str]:
    """Our frontend's two ways, as a table."""
    head = [
        f"## {KV_COST}",
        "",
        "CPU of our own frontend's process tree, µs by event for streams and by request otherwise, with `--router-mode",
        f"kv` and with round robin, in turn. Medians of {about['rounds']} rounds; {_where(about)}.",
        "",
        "| scenario | round robin | kv | kv / round robin | goal |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = []
    for name, modes in costs.items():
        plain, kv = (statistics.median(modes[mode]) for mode in ("round-robin", "kv"))
        mark = "" if kv <= KV_GOAL * plain else " (missed)"
        rows.append(f"| {name} | {_number(plain)} | {_number(kv)} | **{kv / plain:.2f}**{mark} | ≤ {KV_GOAL:.2f} |")
    return [*head, *rows, ""]


def peer_part(heading: str, mode: str, report: dict[str, Any] | None, about: dict[str, Any] | None) -> list[str]:
    """The comparison, as two tables."""
    head = [f"## {heading}", ""]
    if report is None or about is None:
        return [*head, "Not measured on this machine yet.", ""]
    scenarios = report["scenarios"]
    head += [
        "The same command lines, load generator and machine, in turn, in one run: a frontend with",
        f"`--router-mode {mode}` and 8 mock workers without delays. CPU is that of the frontend's process tree, by",
        f"event for streams and by request otherwise. Medians of {about['rounds']} rounds; {_where(about)},",
        f"uvloop {about['uvloop']}. Times are p50 / p99.",
        "",
        f"The floor, one loopback `send` of 230 bytes on this machine in the same run: {report['floor_us']} µs.",
        "",
        "| scenario | measure | ours | peer | ours / peer | goal |",
        "|---|---|---:|---:|---:|---:|",
    ]
    rows = [_row(name, row) for name, row in scenarios.items()]
    detail = [
        "",
        "| scenario | side | CPU µs | memory MB | requests/s | events/s | TTFT ms | latency ms | errors |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in scenarios.items():
        detail += [_detail(name, side, row[side]) for side in ("ours", "peer") if side in row]
    loads = ["", *(f"- **{name}**: {SCENARIOS[name]}" for name in scenarios), ""]
    return [*head, *rows, *detail, *loads]


def _row(name: str, row: dict[str, Any]) -> str:
    goal = GOALS[name]
    if name == "single":
        measure, key = "latency p50, ms", "lat_p50"
    else:
        measure, key = f"frontend CPU, µs by {row['ours']['unit']}", "cpu_us"
    ours = row["ours"][key]
    if "peer" not in row:
        return f"| {name} | {measure} | {_number(ours)} | | | ≤ {goal:.2f} |"
    peer = row["peer"][key]
    ratio = ours / peer
    mark = "" if ratio <= goal else " (missed)"
    return f"| {name} | {measure} | {_number(ours)} | {_number(peer)} | **{ratio:.2f}**{mark} | ≤ {goal:.2f} |"


def _detail(name: str, side: str, r: dict[str, Any]) -> str:
    return (
        f"| {name} | {side} | {_number(r['cpu_us'])} | {r['frontend_rss_mb']:.0f} | {r['rps']:.0f} | "
        f"{r['events_per_s']:.0f} | {_number(r['ttft_p50'])} / {_number(r['ttft_p99'])} | "
        f"{_number(r['lat_p50'])} / {_number(r['lat_p99'])} | {r['errs']} |"
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
