"""What is left of goodput when more is asked than can be answered?

usage: python benchmarks/overload.py [--seconds 30] [--loads 1,2,5] [--json FILE]
Two simulated workers behind a frontend get requests at random times (Poisson), at multiples of what they can do, which
is measured first. Every client waits PATIENCE_S; goodput is answers that were whole by then, a second. Three ways:

    open      no limit and no deadlines: everything is taken, in order of arrival
    deadline  no limit, but requests say how long they are waited for, and are dropped when that is over
    admission deadlines, and workers that let few wait and refuse the rest (--dynamo-request-queue-limit)

Printed for each load: goodput, its share of the way's best, refusals and how soon they came, and the memory of all
three processes. Exit status 1 if admission's goodput at the highest load is under 90 % of its best.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from dynamo.cli.demo_model import make_demo_model

MODEL = "m"
WORKERS = 2
SEQUENCES = 16  # that a worker runs at once
QUEUE = 4  # that may wait at one: so few that what has waited can still be done in time
PATIENCE_S = 15.0
TOKENS = 64
PROMPT_WORDS = 30
SPEEDUP = 0.1  # so slow that the processors of a small machine are not what is overloaded
WARM_S = 15.0  # not counted: the queues fill
READY_S = 60.0

Ways = dict[str, tuple[list[str], bool]]
WAYS: Ways = {
    "open": (["--engine-request-limit", "100000"], False),
    "deadline": (["--engine-request-limit", "100000"], True),
    "admission": (["--dynamo-request-queue-limit", str(QUEUE)], True),
}


@dataclass
class Found:
    """One way under one load."""

    way: str
    load: float
    asked_per_s: float
    goodput_per_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    refused_after_ms: float = 0.0
    """Median."""
    memory_mb: float = 0.0
    processors: dict[str, float] = field(default_factory=dict)
    """How much of one each process used."""


class Service:
    """A frontend and its workers, as processes."""

    def __init__(self, directory: Path, model: Path, flags: list[str]) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        environ = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
        environ |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(directory / "discovery")}
        mocker = ["dynamo.mocker", "--model-path", str(model), "--model-name", MODEL, "--speedup-ratio", str(SPEEDUP)]
        mocker += ["--max-num-seqs", str(SEQUENCES), *flags]
        frontend = ["dynamo.frontend", "--http-port", str(self.port)]
        self._log = (directory / "log").open("ab")
        self.processes = [
            subprocess.Popen([sys.executable, "-m", *words], env=environ, stdout=self._log, stderr=self._log)
            for words in (*[mocker] * WORKERS, frontend)
        ]

    async def ready(self, session: aiohttp.ClientSession) -> None:
        async with asyncio.timeout(READY_S):
            while True:
                try:
                    async with session.get(f"{self.url}/v1/models/{MODEL}/ready") as response:
                        found = (await response.json())["namespaces"].values()
                except (aiohttp.ClientError, KeyError):
                    found = []
                if sum(kind["workers"] for each in found for kind in each["worker_types"].values()) == WORKERS:
                    return
                await asyncio.sleep(0.1)

    def memory_mb(self) -> float:
        """Resident, of all together."""
        pages = (int(Path(f"/proc/{p.pid}/statm").read_text().split()[1]) for p in self.processes)
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_s(self) -> list[float]:
        """Of the workers, and the frontend."""
        stats = (Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split() for p in self.processes)
        return [(int(each[11]) + int(each[12])) / os.sysconf("SC_CLK_TCK") for each in stats]

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(10)
        self._log.close()


@contextmanager
def serving(model: Path, flags: list[str]) -> Iterator[Service]:
    with tempfile.TemporaryDirectory() as place:
        service = Service(Path(place), model, flags)
        try:
            yield service
        finally:
            service.stop()


def body(draw: random.Random) -> dict[str, Any]:
    words = " ".join(str(draw.randint(0, 9999)) for _ in range(PROMPT_WORDS))
    return {"model": MODEL, "messages": [{"role": "user", "content": words}], "max_tokens": TOKENS}


async def ask(session: aiohttp.ClientSession, url: str, what: dict[str, Any], *, deadline: bool) -> tuple[str, float]:
    """How a request ended, and after how long. Clients that said nothing of a deadline leave when they have waited
    long enough: "open" is not even told that."""
    started = time.monotonic()
    headers = {"x-dynamo-request-timeout-ms": str(int(PATIENCE_S * 1000))} if deadline else {}
    try:
        async with session.post(f"{url}/v1/chat/completions", json=what, headers=headers) as response:
            answer = await response.json()
            outcome = str(response.status)
            if response.status == 200 and answer["usage"]["completion_tokens"] != TOKENS:
                outcome = "cut short"
    except aiohttp.ClientError as e:
        outcome = type(e).__name__
    took = time.monotonic() - started
    return ("late" if outcome == "200" and took > PATIENCE_S else outcome), took


async def capacity(model: Path, seconds: float) -> float:
    """Requests a second that the workers do when there is always another one."""
    draw = random.Random(1)
    with serving(model, []) as service:
        async with open_session() as session:
            await service.ready(session)
            ends = time.monotonic() + WARM_S + seconds
            done = 0

            async def client() -> None:
                nonlocal done
                while time.monotonic() < ends:
                    outcome, _ = await ask(session, service.url, body(draw), deadline=False)
                    done += outcome in ("200", "late") and ends - seconds < time.monotonic() < ends

            await asyncio.gather(*(client() for _ in range(WORKERS * (SEQUENCES + 4))))
    return done / seconds


async def measure(model: Path, way: str, load: float, rate: float, seconds: float) -> Found:
    """One way under one load."""
    flags, deadline = WAYS[way]
    draw = random.Random(int(load * 10))
    found = Found(way, load, rate)
    with serving(model, flags) as service:
        async with open_session() as session:
            await service.ready(session)
            began, used, own = time.monotonic(), service.cpu_s(), time.process_time()
            tasks: list[tuple[float, asyncio.Task[tuple[str, float]]]] = []
            at = began
            while at < began + WARM_S + seconds:
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                task = asyncio.create_task(ask(session, service.url, body(draw), deadline=deadline))
                tasks.append((at - began, task))
                at += draw.expovariate(rate)
            found.memory_mb = service.memory_mb()
            took = time.monotonic() - began
            *workers, frontend = ((after - before) / took for after, before in zip(service.cpu_s(), used, strict=True))
            found.processors = {
                "workers": round(sum(workers), 2),
                "frontend": round(frontend, 2),
                "clients": round((time.process_time() - own) / took, 2),
            }
            await asyncio.wait([task for _, task in tasks], timeout=PATIENCE_S + 1)
            ended = [task.result() if task.done() else ("late", 0.0) for asked, task in tasks if asked >= WARM_S]
            for _, task in tasks:
                task.cancel()
            await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)
    found.outcomes = dict(Counter(outcome for outcome, _ in ended).most_common())
    found.goodput_per_s = found.outcomes.get("200", 0) / seconds
    refused = sorted(took for outcome, took in ended if outcome == "529")
    found.refused_after_ms = 1e3 * refused[len(refused) // 2] if refused else 0.0
    return found


def open_session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=120)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)


async def main() -> int:
    parser = argparse.ArgumentParser(description="Goodput at multiples of what the workers can do.")
    parser.add_argument("--seconds", type=float, default=30.0, help="counted, for each load")
    parser.add_argument("--loads", default="1,2,5", help="multiples of the capacity")
    parser.add_argument("--ways", default=",".join(WAYS), help="of " + ", ".join(WAYS))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    loads = [float(word) for word in args.loads.split(",")]
    with tempfile.TemporaryDirectory() as place:
        model = make_demo_model(Path(place) / "model", weights=False)
        most = await capacity(model, args.seconds)
        print(f"{WORKERS} workers of {SEQUENCES} sequences answer {most:.1f} requests a second")
        print(
            f"{'way':10}{'load':>5}{'asked/s':>9}{'good/s':>8}{'of best':>9}{'refused in':>13}{'memory':>9}  outcomes"
        )
        every: list[Found] = []
        for way in args.ways.split(","):
            mine: list[Found] = []
            for load in loads:
                mine.append(await measure(model, way, load, load * most, args.seconds))
                best = max(each.goodput_per_s for each in mine)
                last = mine[-1]
                print(
                    f"{way:10}{load:>5g}{last.asked_per_s:>9.1f}{last.goodput_per_s:>8.1f}"
                    f"{last.goodput_per_s / best if best else 0:>9.0%}{last.refused_after_ms:>10.0f} ms"
                    f"{last.memory_mb:>6.0f} MB  {last.outcomes} {last.processors}",
                    flush=True,
                )
            every += mine
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in every], indent=1) + "\n")
    admitted = [each.goodput_per_s for each in every if each.way == "admission"]
    return 1 if admitted and admitted[-1] < 0.9 * max(admitted) else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
