"""How are the decoders fuzzed? usage: python -m fuzz [--seconds 60] [--replay] [TARGET ...]

One process of atheris a target, after the other. What it finds stays in build/fuzz/TARGET; put it into
fuzz/found/TARGET once it is understood, and the tests will try it for ever. --replay runs that and the seeds alone,
without atheris.
"""

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("request_server", "request_client", "zmtp", "http_head", "events", "nats", "kv_events", "records")
START_S = 60.0  # importing all with instruments takes a while


def fuzz(name: str, seconds: int, kept: Path) -> bool:
    """Whether nothing was found. Prints a line."""
    corpus = kept / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(importlib.import_module(f"fuzz.{name}").SEEDS):
        (corpus / f"seed-{i}").write_bytes(seed)
    argv = [sys.executable, "-m", "fuzz.under_atheris", name, f"-max_total_time={seconds}", f"-artifact_prefix={kept}/"]
    argv += ["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", str(corpus)]
    started = time.monotonic()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=seconds + START_S)
    ran = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    count = int(ran[1]) if ran else 0
    print(f"{name:15} {count:>10,} executions in {time.monotonic() - started:.0f} s", flush=True)
    if done.returncode or not count:
        said = [line for line in done.stderr.splitlines() if not line.startswith(("#", "INFO:", "WARNING:", "stat::"))]
        print(done.stdout[-4000:], *said[-30:], sep="\n")
        return False
    return True


def found_before(name: str) -> list[bytes]:
    """Inputs that broke a promise once."""
    return [file.read_bytes() for file in sorted((ROOT / "fuzz" / "found" / name).glob("*"))]


def replay(name: str) -> None:
    """Run the seeds and what was found before. Raises what goes wrong."""
    from fuzz.harness import run

    target = importlib.import_module(f"fuzz.{name}")
    for data in [*target.SEEDS, *found_before(name)]:
        run(target.one, data)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seconds", type=int, default=60, help="for each target")
    ap.add_argument("--replay", action="store_true", help="only seeds, and what was found before")
    ap.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz", help="where inputs are kept")
    ap.add_argument("targets", nargs="*", metavar="TARGET", choices=[[], *TARGETS])
    a = ap.parse_args()
    targets = a.targets or TARGETS
    if a.replay:
        for name in targets:
            replay(name)
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not here: pip install 'ai-dynamo[fuzz]' (Linux, x86-64, Python 3.11 to 3.13)")
        return 2
    found = [name for name in targets if not fuzz(name, a.seconds, a.keep / name)]
    if found:
        print(f"something was found: {', '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
