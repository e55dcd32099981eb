"""What breaks when things break?

usage: python -m chaos [--seconds 60] [--seed 1] [--once] [--backend file] [--faults WORDS] [--out build/chaos]
Starts two frontends and four simulated workers on hosts of their own, has clients ask them steadily, and breaks one
thing after the other. Exit status 0: all held, or it cannot be tried here, which it says; 1: something did not hold.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from chaos.backends import BACKENDS
from chaos.faults import FAULTS, ROLLING, SERVER_FAULTS, SHARED_PORT, Fault, Scene
from chaos.fleet import MODEL, Fleet, Kind, Settings
from chaos.load import Load
from chaos.network import Network, remove_leftovers, why_not
from chaos.questions import Questioner
from chaos.report import Report, Window
from dynamo.cli.demo_model import make_demo_model

FRONTENDS, WORKERS = 2, 4
QUESTIONS = 400
DISK_BYTES = 256 << 10  # of the disk that hosts share: enough for all that stands there
FIRST_S = 2.0  # of load before the first fault
BETWEEN_S = 0.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("chaos", description="Break a deployment under load, and hold it to its promises.")
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on breaking things")
    parser.add_argument("--seed", type=int, default=1, help="of all that is left to chance")
    parser.add_argument(
        "--backend", choices=list(BACKENDS), default="file", help="how processes find and reach each other"
    )
    parser.add_argument("--router-mode", default="kv", help="of both frontends")
    parser.add_argument("--http-workers", type=int, default=1, help="processes that share the port of each frontend")
    parser.add_argument("--clients", type=int, default=12, help="that ask at once")
    parser.add_argument("--faults", default="", help="only those with one of these words in their names, by comma")
    parser.add_argument("--once", action="store_true", help="each fault once, however long that takes")
    parser.add_argument("--no-rolling", action="store_true", help="leave out the rolling restarts at the end")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="for the report and the logs")
    return parser.parse_args()


def plan(words: str, draw: random.Random, kinds: set[Kind], *, shared_port: bool = False) -> list[tuple[str, Fault]]:
    """All faults that are wanted, in an order of the seed's. Raises SystemExit where there is none."""
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    there = FAULTS | {name: fault for kind in sorted(kinds) for name, fault in SERVER_FAULTS.get(kind, {}).items()}
    if shared_port:
        there |= SHARED_PORT
    faults = [(name, fault) for name, fault in there.items() if not wanted or any(word in name for word in wanted)]
    if not faults:
        raise SystemExit(f"no fault has any of {wanted} in its name; there are: {', '.join(there)}")
    draw.shuffle(faults)
    return faults


async def break_things(scene: Scene, args: argparse.Namespace, began: float) -> list[Window]:
    """One fault after the other, until the time is over; then the rolling restarts."""
    windows: list[Window] = []

    async def run(name: str, fault: Fault, *, rolling: bool = False) -> None:
        started = time.monotonic() - began
        scene.target = "all in turn"
        await fault(scene)
        mended = time.monotonic() - began
        await scene.fleet.until_whole()
        windows.append(Window(name, scene.target, started, mended, time.monotonic() - began, rolling))
        print(f"{started:6.1f} s  {name} ({scene.target})", flush=True)
        await asyncio.sleep(BETWEEN_S)

    kinds = {member.kind for member in scene.fleet.backends}
    faults = plan(args.faults, scene.random, kinds, shared_port=args.http_workers > 1)
    await asyncio.sleep(FIRST_S)
    while len(windows) < len(faults) if args.once else time.monotonic() - began < args.seconds:
        name, fault = faults[len(windows) % len(faults)]
        await run(name, fault)
    if not args.no_rolling:
        for name, fault in ROLLING.items():
            await run(name, fault, rolling=True)
    return windows


async def run(args: argparse.Namespace, network: Network, settings: Settings) -> Report:
    draw = random.Random(args.seed)
    questioner = Questioner(settings.model, MODEL, args.seed)
    questions = [await questioner.make() for _ in range(QUESTIONS)]
    backend = BACKENDS[args.backend]
    fleet = Fleet(network, settings, backend.members(network, settings.directory))
    try:
        for member in fleet.backends:
            member.start()
        await backend.wait_ready(network)
        await fleet.start()
        load = Load({member.name: fleet.url(member) for member in fleet.frontends}, questions, args.clients)
        began = time.monotonic()
        load.start()
        windows = await break_things(Scene(fleet, load, questioner, draw), args, began)
        await load.stop()
        seconds = time.monotonic() - began
        await fleet.leave()
        left = left_behind(fleet, await backend.keys(network, settings.shared))
        return Report(args.seed, args.backend, seconds, windows, load.answers, began, left)
    finally:
        fleet.kill()


def left_behind(fleet: Fleet, keys: list[str]) -> list[str]:
    """What should be gone now that all have left in order: all processes, and the keys that are still in discovery."""
    ended = [*fleet.frontends, *fleet.workers]
    said = [f"{each.name} ended with status {status}" for each in ended for status in each.exits if status != 0]
    return said + ([f"{len(keys)} keys stayed in discovery: {keys[:3]}"] if keys else [])


@contextlib.contextmanager
def shared_disk(place: Path) -> Iterator[Path]:
    """A small disk of its own, for as long as it is needed."""
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)], check=True)
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
        place.rmdir()


def main() -> int:
    """Run, print and write the report. Returns the exit status."""
    args = arguments()
    if (why := why_not()) is not None:
        print(f"chaos: skipped: it {why}")
        return 0
    remove_leftovers()
    out: Path = args.out.absolute()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    for old in (out / "logs").iterdir():
        if old.is_file():
            old.unlink()
    model = make_demo_model(out / "model", weights=False)
    backend = BACKENDS[args.backend]
    names = [f"f{i}" for i in range(FRONTENDS)] + [f"w{i}" for i in range(WORKERS)] + list(backend.hosts)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # through all that cleans up
    with shared_disk(out / f"disk-{os.getpid()}") as shared, contextlib.closing(Network(names, args.seed)) as network:
        settings = Settings(
            model, out / "logs", shared, FRONTENDS, WORKERS, args.router_mode,
            environ=backend.environ(network), http_workers=args.http_workers,
        )  # fmt: skip
        network.enter()
        report = asyncio.run(run(args, network, settings))
    text = report.as_text()
    (out / "report.txt").write_text(text + "\n")
    (out / "report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print(text)
    return 1 if report.broken() else 0


if __name__ == "__main__":
    sys.exit(main())
