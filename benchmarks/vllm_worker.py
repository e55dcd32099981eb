"""What does serving vLLM through this project gain over vLLM's own server?

usage: python benchmarks/vllm_worker.py [--streams 64] [--requests 256] [--tokens 128] [--rounds 1] [--cores 1,all]
                                         [-- engine flags]

Serves the demo model (5 million weights, so that what surrounds the engine shows) in turn by
  ours:  python -m dynamo.frontend and python -m dynamo.vllm
  vllm:  python -m vllm.entrypoints.openai.api_server
with the same engine flags on the same cores, and drives each over HTTP with streaming chat requests on `streams`
keep-alive connections, from a process of its own on the other cores, or on those too if there are none. Once for each
of `cores`: held to one core, everything a server does beside the engine is taken from the engine, as on a machine whose
cores are busy; with cores to spare the engine's one worker process is the limit of both. Every round starts the
servers anew, sends `requests` requests to warm up and as many to measure. Printed: output tokens a second, time to the
first event, and CPU by process over the measured requests: the engine (vLLM's core and its worker) and all outside it.
Goals: 1.15 x the tokens a second where cores are short, half of the CPU outside the engine. One round of both takes
about two minutes.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop
from common.servers import START_S, Servers, free_port

from dynamo.cli.demo_model import make_demo_model

ENGINE = ("VLLM::EngineCore", "VLLM::Worker")
FLAGS = ["--max-model-len", "4096", "--max-num-seqs", "128", "--dtype", "float32"]


@dataclass
class Round:
    """One measured load."""

    tokens: int
    seconds: float
    ttft_ms: list[float]
    cpu_s: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def us_a_token(self, engine: bool) -> float:
        """CPU microseconds a token, of the engine or of everything else."""
        return 1e6 * sum(s for name, s in self.cpu_s.items() if (name in ENGINE) == engine) / self.tokens


# --- the load


class Connection(asyncio.Protocol):
    """One keep-alive connection: sends a request, waits for the end of its chunked answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.done: asyncio.Future[int] | None = None

    def ask(self, request: bytes) -> "asyncio.Future[int]":
        """Send; the future gives the number of output tokens."""
        self.done = asyncio.get_running_loop().create_future()
        self.tail, self.started, self.ttft_ms = b"", time.perf_counter(), 0.0
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        if not self.ttft_ms and b"data: " in data:
            self.ttft_ms = 1e3 * (time.perf_counter() - self.started)
        self.tail = (self.tail + data)[-2048:]
        if self.tail.endswith(b"0\r\n\r\n") and self.done is not None and not self.done.done():
            found = re.findall(rb'"completion_tokens": ?(\d+)', self.tail)
            if found:
                self.done.set_result(int(found[-1]))
            else:
                self.done.set_exception(RuntimeError(f"no usage in the answer: {self.tail[-500:]!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server closed the connection"))


def request_bytes(seed: int, words: int, tokens: int) -> bytes:
    """A streaming chat request with a prompt of its own."""
    rnd = random.Random(seed)
    prompt = " ".join(rnd.choice(("import", "return", "value", "self", "class", "print")) for _ in range(words))
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": f"{seed} {prompt}"}]}
    body |= {"max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    text = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


async def load(port: int, args: argparse.Namespace, first_seed: int) -> Round:
    """Send all requests, `streams` at a time."""
    waiting = [request_bytes(first_seed + i, args.words, args.tokens) for i in range(args.requests)]
    tokens, ttft_ms = 0, []

    async def client() -> None:
        nonlocal tokens
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
        while waiting:
            made = await asyncio.wait_for(connection.ask(waiting.pop()), START_S)
            tokens += made
            ttft_ms.append(connection.ttft_ms)
        connection.transport.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(args.streams)))
    return Round(tokens, time.perf_counter() - started, ttft_ms)


# --- the servers


def start_ours(servers: Servers, model: Path, port: int, flags: list[str]) -> None:
    servers.start("dynamo.frontend", "--http-port", str(port))
    servers.start("dynamo.vllm", "--model", str(model), "--served-model-name", "tiny", *flags)


def start_vllm(servers: Servers, model: Path, port: int, flags: list[str]) -> None:
    words = ["--model", str(model), "--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1"]
    servers.start("vllm.entrypoints.openai.api_server", *words, "--disable-uvicorn-access-log", *flags)


SIDES = {"ours": start_ours, "vllm": start_vllm}


async def until_serving(servers: Servers, port: int) -> None:
    """Until a request is answered. Raises RuntimeError with the end of the log."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and servers.alive():
        await asyncio.sleep(0.5)
        with contextlib.suppress(OSError, RuntimeError):
            _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
            async with asyncio.timeout(10):
                await connection.ask(request_bytes(0, 3, 2))
            connection.transport.close()
            return
        # A frontend that has no worker yet answers with an error, which is not chunked: the time limit ends that wait.
    raise RuntimeError(f"not serving:\n{servers.logs()}")


async def measure(side: str, model: Path, args: argparse.Namespace, seed: int) -> Round:
    """One round of one side, from a cold start."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "model").symlink_to(model)
        servers = Servers(Path(directory), cores=args.served_by)
        try:
            SIDES[side](servers, model, port, [*FLAGS, *args.flags])
            await until_serving(servers, port)
            await load(port, args, seed)
            before = servers.cpu_s()
            measured = await load(port, args, seed + args.requests)
            after = servers.cpu_s()
        finally:
            servers.stop()
    measured.cpu_s = {name: after[name] - before.get(name, 0.0) for name in after}
    return measured


def main() -> None:
    """Measure on each number of cores."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--streams", type=int, default=64)
    ap.add_argument("--requests", type=int, default=256)
    ap.add_argument("--words", type=int, default=50, help="prompt length")
    ap.add_argument("--tokens", type=int, default=128, help="output tokens a request")
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--cores", default="1,all", help="hold the servers to so many cores; several, one after another")
    ap.add_argument("--only", choices=SIDES)
    ap.add_argument("flags", nargs="*", help="engine flags for both sides, after --")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_demo_model(Path(directory) / "model")
        everywhere = os.sched_getaffinity(0)
        for cores in args.cores.split(","):
            args.served_by = everywhere if cores == "all" else set(sorted(everywhere)[: int(cores)])
            os.sched_setaffinity(0, everywhere - args.served_by or everywhere)
            print(f"\n--- servers on {len(args.served_by)} of {len(everywhere)} cores", flush=True)
            compare(model, args)
            os.sched_setaffinity(0, everywhere)


def compare(model: Path, args: argparse.Namespace) -> None:
    """Measure both sides in turn, and print a line for each round and what they come to."""
    rounds: dict[str, list[Round]] = {side: [] for side in SIDES if args.only in (None, side)}
    for number in range(args.rounds):
        for side, results in rounds.items():
            result = uvloop.run(measure(side, model, args, 1000 * number))
            results.append(result)
            shares = ", ".join(f"{name} {s:.2f} s" for name, s in sorted(result.cpu_s.items()) if s >= 0.01)
            print(f"{side}: {result.rate:.0f} tokens/s in {result.seconds:.1f} s; CPU: {shares}", flush=True)
    print(f"\n{'':6}{'tokens/s':>10}{'first event, ms':>17}{'CPU outside, us/token':>23}{'CPU engine, us/token':>22}")
    for side, results in rounds.items():
        rate = statistics.median(r.rate for r in results)
        ttft = statistics.median(t for r in results for t in r.ttft_ms)
        outside, engine = (statistics.median(r.us_a_token(of_engine) for r in results) for of_engine in (False, True))
        print(f"{side:6}{rate:10.0f}{ttft:17.1f}{outside:23.1f}{engine:22.1f}")
    if len(rounds) == 2:
        speed = statistics.median(r.rate for r in rounds["ours"]) / statistics.median(r.rate for r in rounds["vllm"])
        outside = statistics.median(r.us_a_token(engine=False) for r in rounds["ours"]) / statistics.median(
            r.us_a_token(engine=False) for r in rounds["vllm"]
        )
        print(f"\nours / vllm: {speed:.2f} x tokens/s, {outside:.2f} x CPU outside the engine")


if __name__ == "__main__":
    main()
