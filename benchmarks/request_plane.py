"""What does the request plane cost for one item of a stream, at each end?

Two processes, one connection, N streams. The worker pushes one item a stream every step, as an engine does. CPU is
each process's own (`time.process_time`) from the first item to the last, divided by the items.

    python benchmarks/request_plane.py --streams 64 --steps 2000 --step-ms 4
    python benchmarks/request_plane.py --face request --streams 1 --steps 5000

With `--face request`, `--steps` requests are sent, `--streams` at a time.

Last result, us of CPU a item or request at caller / worker (2 cores that others used as well, load 2 to 3; Python
3.11, uvloop 0.23; a step every 4 ms):

    1 stream 44 / 69      8 streams 7.4 / 10      64 streams 1.6 / 1.8      512 streams 1.0 / 1.1
    64 streams, decoding each item: 2.4 / 2.4     64 streams by iterator: 7.9 / 2.5
    requests of one answer: 79 / 73 one at a time, 21 / 13 with 64 at a time
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import msgspec
import uvloop

from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime import Context, DistributedRuntime
from dynamo.runtime.errors import DynamoException
from dynamo.runtime.streams import PushHandler, ResponseStream

ENDPOINT = "bench.worker.generate"


class Steps:
    """The worker: every step, one item for each stream that still wants some."""

    def __init__(self, steps: int, step_s: float) -> None:
        self._steps = steps
        self._step_s = step_s
        self._left: dict[ResponseStream, int] = {}
        self._cpu_s = 0.0
        self._items = 0

    def on_request(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        self._left[stream] = self._steps
        if len(self._left) == msgspec.msgpack.decode(payload)["streams"]:
            self._cpu_s, self._items = time.process_time(), 0
            asyncio.get_running_loop().call_later(self._step_s, self._step)

    def _step(self) -> None:
        for stream, left in tuple(self._left.items()):
            stream.send(EngineOutput([left + 1000]))
            self._items += 1
            if left > 1:
                self._left[stream] = left - 1
            else:
                stream.end()
                del self._left[stream]
        if self._left:
            asyncio.get_running_loop().call_later(self._step_s, self._step)
        else:
            asyncio.get_running_loop().call_later(0.2, self._report)

    def _report(self) -> None:
        cpu_s = time.process_time() - self._cpu_s
        print(json.dumps({"us_per_item": cpu_s / self._items * 1e6, "items": self._items}), flush=True)


async def worker(handler: PushHandler) -> None:
    runtime = DistributedRuntime(None, "file")
    await runtime.endpoint(ENDPOINT).start_push_endpoint(handler)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runtime.close()


class Echo:
    """The worker of `--face request`: one item and the end, at once."""

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._seen = 0
        self._cpu_s = 0.0

    def on_request(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        if self._seen == 0:
            self._cpu_s = time.process_time()
        self._seen += 1
        stream.send(EngineOutput([1000]))
        stream.end()
        if self._seen == self._requests:
            asyncio.get_running_loop().call_later(0.2, self._report)

    def _report(self) -> None:
        cpu_s = time.process_time() - self._cpu_s
        print(json.dumps({"us_per_item": cpu_s / self._seen * 1e6, "items": self._seen}), flush=True)


class Count:
    """The caller's sink: does next to nothing, so that what is measured is the plane."""

    items = 0
    flushes = 0
    open = 0
    done: "asyncio.Event"

    def __init__(self, decode: bool) -> None:
        self._decode = msgspec.msgpack.Decoder(EngineOutput).decode if decode else None

    def on_item(self, item: msgspec.Raw) -> None:
        Count.items += 1
        if self._decode is not None:
            self._decode(item)

    def on_end(self) -> None:
        Count.open -= 1
        if Count.open == 0:
            Count.done.set()

    def on_error(self, error: DynamoException) -> None:
        raise SystemExit(f"stream failed: {error!r}")

    def flush(self) -> None:
        Count.flushes += 1


async def caller(streams: int, decode: bool) -> dict[str, float]:
    runtime = DistributedRuntime(None, "file")
    client = await runtime.endpoint(ENDPOINT).client()
    instance_id = (await client.wait_for_instances(10))[0]
    Count.done = asyncio.Event()
    Count.open = streams
    start_s = time.process_time()
    for _ in range(streams):
        client.start(instance_id, {"streams": streams}, Count(decode), Context())
    await Count.done.wait()
    cpu_s = time.process_time() - start_s
    await runtime.close()
    return {"us_per_item": cpu_s / Count.items * 1e6, "items": Count.items, "flushes": Count.flushes}


async def ask(requests: int, concurrency: int) -> dict[str, float]:
    """Requests of one answer, `concurrency` at a time, with a prompt of 256 tokens."""
    runtime = DistributedRuntime(None, "file")
    client = await runtime.endpoint(ENDPOINT).client()
    await client.wait_for_instances(10)
    prompt = {"model": "m", "token_ids": list(range(1000, 1256)), "stop_conditions": {"max_tokens": 16}}
    done = asyncio.Event()
    left = requests

    class One(Count):
        def on_end(self) -> None:
            nonlocal left
            left -= 1
            if left >= concurrency:
                client.start(client.pick(), prompt, One(False), Context())
            elif left == 0:
                done.set()

    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    for _ in range(concurrency):
        client.start(client.pick(), prompt, One(False), Context())
    await done.wait()
    cpu_s, wall_s = time.process_time() - cpu_start_s, time.perf_counter() - start_s
    await runtime.close()
    return {
        "us_per_item": cpu_s / requests * 1e6,
        "items": requests,
        "latency_us": wall_s / requests * concurrency * 1e6,
    }


async def iterate(streams: int) -> dict[str, float]:
    """The same through the async iterator that user code sees."""
    runtime = DistributedRuntime(None, "file")
    client = await runtime.endpoint(ENDPOINT).client()
    await client.wait_for_instances(10)

    async def one() -> int:
        return len([item async for item in await client.round_robin({"streams": streams})])

    start_s = time.process_time()
    items = sum(await asyncio.gather(*(one() for _ in range(streams))))
    cpu_s = time.process_time() - start_s
    await runtime.close()
    return {"us_per_item": cpu_s / items * 1e6, "items": items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--step-ms", type=float, default=4.0)
    parser.add_argument("--face", choices=["push", "push+decode", "iterator", "request"], default="push")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        handler = Echo(options.steps) if options.face == "request" else Steps(options.steps, options.step_ms / 1e3)
        uvloop.run(worker(handler.on_request))
        return
    with tempfile.TemporaryDirectory() as directory:
        os.environ["DYN_FILE_KV"] = directory
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *sys.argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        if options.face == "request":
            ours = uvloop.run(ask(options.steps, options.streams))
        elif options.face == "iterator":
            ours = uvloop.run(iterate(options.streams))
        else:
            ours = uvloop.run(caller(options.streams, options.face == "push+decode"))
        theirs = json.loads(process.stdout.readline())
        process.stdin.close()
        process.wait(20)
    if options.face == "request":
        print(
            f"{ours['items']:.0f} requests of one answer, {options.streams} at a time: caller "
            f"{ours['us_per_item']:.0f} us/request, worker {theirs['us_per_item']:.0f} us/request, "
            f"{ours['latency_us']:.0f} us from call to end"
        )
        return
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{options.streams} streams, a step every {options.step_ms:g} ms, {ours['items']:.0f} items, {options.face}: "
        f"caller {ours['us_per_item']:.2f} us/item, worker {theirs['us_per_item']:.2f} us/item, "
        f"caller RSS {rss_mb:.0f} MB"
    )


if __name__ == "__main__":
    main()
