"""Does a prefill worker get all its KV blocks back, however its readers leave?

usage: python benchmarks/disagg_soak.py [--seconds 600] [--engine vllm|mocker] [--streams 6] [--kill-every 20]

A frontend that moves requests, one prefill worker and two decode workers, all on this machine. Streams of prompts of 1
to 2,000 tokens, half of them with one of a few beginnings; a third of the clients hang up at some moment, before the
first token or in mid-answer. Every `kill-every` seconds a decode worker is killed with all its processes, and another
started; once, at half-time, the prefill worker too. At the end, when the longest lease is over: how many handles are
left, and how many KV blocks are in use, at every worker. Exit status 1 if any is, or if an answer was not whole.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

from common.fleet import MODEL, completion, connect
from common.servers import START_S, Server, Servers, descendants, free_port

from dynamo.cli.demo_model import DemoShape, make_demo_model

BLOCKS, BLOCK, CONTEXT = 400, 32, 4096
LONGEST = 2000  # tokens of a prompt
LEASE_S = {"vllm": 6.0, "mocker": 30.0}  # the mocker's is what vLLM's is if nothing is said
SETTLE_S = 60.0  # for the last requests, and the end of leases
ANSWER_S = 120.0
LOOK_S = 0.5
ENGINES = {
    "vllm": ["dynamo.vllm", "--model", "{}", "--served-model-name", MODEL, "--max-model-len", str(CONTEXT),
             "--num-gpu-blocks-override", str(BLOCKS), "--max-num-seqs", "32", "--enforce-eager"],
    "mocker": ["dynamo.mocker", "--model-path", "{}", "--model-name", MODEL, "--num-gpu-blocks-override", str(BLOCKS)],
}  # fmt: skip
HANDLES, USAGE = "dynamo_component_kv_handles", "dynamo_component_gpu_cache_usage_percent"
ENDED = "dynamo_component_kv_handles_ended_total"


class Soaked:
    """The deployment, and what came of the requests."""

    def __init__(self, a: argparse.Namespace, place: Path) -> None:
        self.a = a
        self.random = random.Random(a.seed)
        environ = {"DYN_SYSTEM_PORT": "0", "DYN_LOG": "info", "TORCH_COMPILE_DISABLE": "1"}
        environ |= {"DYN_VLLM_SPIN_LESS": "1"}
        self.servers = Servers(place, environ)
        self.port = free_port()
        self.outcomes: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.roles: dict[Server, str] = {}
        self.most_handles = 0.0
        self.stopping = False

    async def start(self) -> None:
        """The frontend and three workers, ready."""
        self.servers.start("dynamo.frontend", "--http-port", str(self.port), "--migration-limit", "5")
        for role in ("prefill", "decode", "decode"):
            self.start_worker(role)
        await self.whole()

    def start_worker(self, role: str) -> None:
        """One more."""
        model = str(self.servers.directory / "model")
        words = [word.format(model) for word in ENGINES[self.a.engine]]
        lease = ["--kv-lease", str(int(LEASE_S["vllm"]))] if self.a.engine == "vllm" else []
        flags = ["--block-size", str(BLOCK), "--disaggregation-mode", role, *lease]
        self.roles[self.servers.start(*words, *flags)] = role

    async def whole(self) -> None:
        """Wait until the frontend knows them all."""
        deadline = time.monotonic() + 2 * START_S  # they start while others are at work
        while await asyncio.to_thread(self.missing):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not serving:\n{self.servers.logs()}")
            await asyncio.sleep(0.2)

    def missing(self) -> bool:
        """Whether some worker has not come up, or the frontend has heard of none."""
        if not self.servers.alive():
            raise RuntimeError(f"one has ended:\n{self.servers.logs()}")
        if not all(" is ready: " in worker.text() for worker in self.roles):
            return True
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=10) as response:
                return MODEL.encode() not in response.read()
        except OSError:
            return True

    # --- the load

    async def ask(self, beginnings: list[list[int]], number: int) -> None:
        """One stream of requests, until the end."""
        rnd = random.Random(self.a.seed * 1000 + number)
        while not self.stopping:
            length = rnd.randrange(1, rnd.choice((60, LONGEST // 2)))
            prompt = [rnd.randrange(300, 4000) for _ in range(length)]
            if rnd.random() < 0.5:
                prompt = rnd.choice(beginnings) + prompt
            made = rnd.randrange(1, 40)
            body = completion(prompt[:LONGEST], made)
            if rnd.random() < 0.3:
                body |= {"temperature": 0.9}
            connection = await connect(self.port)
            answer = connection.ask(body)
            patience_s = rnd.uniform(0, 1.0) if rnd.random() < 1 / 3 else None
            try:
                found = await asyncio.wait_for(asyncio.shield(answer), patience_s or ANSWER_S)
                self.outcomes["whole" if len(found.at) == made else "of another length"] += 1
            except TimeoutError:
                self.outcomes["hung up" if patience_s is not None else "too late"] += 1
            except (RuntimeError, ConnectionError) as error:
                self.outcomes["failed"] += 1
                print(f"failed: {error}"[:300], file=sys.stderr, flush=True)
            connection.leave()
            with contextlib.suppress(asyncio.CancelledError, RuntimeError, ConnectionError):
                await answer

    async def kill(self, role: str) -> None:
        """A worker dies with all that belongs to it, and another comes."""
        worker = self.random.choice([worker for worker, its in self.roles.items() if its == role])
        for pid in [worker.process.pid, *descendants(worker.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.process.wait(10)
        self.servers.servers.remove(worker)
        del self.roles[worker]
        self.kills[role] += 1
        self.start_worker(role)
        await self.whole()

    async def faults(self) -> None:
        """Kill one after the other until time is over."""
        began = time.monotonic()
        while (passed := time.monotonic() - began) < self.a.seconds:
            print(f"{passed:6.0f} s  {dict(self.outcomes)}", flush=True)
            await asyncio.sleep(min(self.a.kill_every, self.a.seconds - passed + 0.1))
            if time.monotonic() - began < self.a.seconds:
                late = passed > self.a.seconds / 2 and not self.kills["prefill"]
                await self.kill("prefill" if late else "decode")

    async def watch(self) -> None:
        """Look how many handles there are, again and again."""
        while True:
            handles = await asyncio.to_thread(self.total, "prefill", HANDLES)
            self.most_handles = max(self.most_handles, handles)
            await asyncio.sleep(LOOK_S)

    # --- the end

    def total(self, role: str, name: str) -> float:
        """A metric's sum over the workers of a role; they may be on their way out."""
        with contextlib.suppress(OSError, AssertionError):
            return sum(worker.series(name) for worker, its in list(self.roles.items()) if its == role)
        return 0.0

    def blocks(self, worker: Server) -> float:
        """KV blocks in use, as the engine says."""
        return round(worker.series(USAGE) * BLOCKS, 3)

    async def settled(self) -> dict[str, float]:
        """What is left once the longest lease is over: nothing, unless something leaks."""
        await asyncio.sleep(LEASE_S[self.a.engine] + 2)
        deadline = time.monotonic() + SETTLE_S
        while True:
            # An engine tells of its blocks with its steps; those of this prompt are idle at the end of its own.
            for _ in range(4):
                connection = await connect(self.port)
                await asyncio.wait_for(connection.ask(completion([300 + self.random.randrange(900)], 3)), ANSWER_S)
                connection.leave()
            await asyncio.sleep(LEASE_S[self.a.engine] / 4)
            left = {"handles": self.total("prefill", HANDLES)}
            for number, (worker, role) in enumerate(self.roles.items()):
                left[f"{role} {number}'s blocks in use"] = self.blocks(worker)
            if not any(left.values()) or time.monotonic() > deadline:
                return left


async def run(a: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        make_demo_model(place / "model", DemoShape(context=CONTEXT))
        soaked = Soaked(a, place)
        try:
            await soaked.start()
            rnd = random.Random(a.seed)
            beginnings = [[rnd.randrange(300, 4000) for _ in range(LONGEST // 2)] for _ in range(4)]
            streams = [asyncio.create_task(soaked.ask(beginnings, number)) for number in range(a.streams)]
            watching, began = asyncio.create_task(soaked.watch()), time.monotonic()
            await soaked.faults()
            seconds = time.monotonic() - began
            watching.cancel()
            soaked.stopping = True
            await asyncio.gather(*streams)
            left = await soaked.settled()
            ended = soaked.total("prefill", ENDED)
        finally:
            soaked.servers.stop()
    wrong = any(left.values()) or sum(soaked.outcomes[name] for name in ("failed", "too late", "of another length"))
    print(f"{seconds:.0f} s with {a.engine} workers, {a.streams} streams: {dict(soaked.outcomes)}")
    print(
        f"killed: {dict(soaked.kills)}; handles: {ended:.0f} of the prefill worker since it began, "
        f"{soaked.most_handles:.0f} at once at most"
    )
    print("left at the end: " + ", ".join(f"{name} {value:g}" for name, value in left.items()))
    return int(bool(wrong))


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seconds", type=float, default=600)
    ap.add_argument("--engine", choices=list(ENGINES), default="vllm")
    ap.add_argument("--streams", type=int, default=6, help="clients at once")
    ap.add_argument("--kill-every", type=float, default=20, help="seconds")
    ap.add_argument("--seed", type=int, default=0)
    return asyncio.run(run(ap.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
