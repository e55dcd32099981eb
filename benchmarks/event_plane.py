"""What does one event cost, at the publisher and at the subscriber?

Two processes, one publisher, one subscriber, `--rate` events a second (0: as fast as it goes). CPU is each process's
own, ZeroMQ's thread included, over the events; `thread` is the event loop's thread alone. The subscriber is measured
three ways: ours with a plain listener, ours as an iterator, and `zmq.asyncio` reading the same frames and decoding the
same envelope, which is what our sockets in callbacks replace.

    python benchmarks/event_plane.py --events 100000 --bytes 300
    python benchmarks/event_plane.py --plane nats                            # KV events: kept by JetStream
    DYN_NATS_JETSTREAM=false python benchmarks/event_plane.py --plane nats

Last result (2 shared cores, Python 3.11, pyzmq 27.3, uvloop 0.23): see docs/explanation/event-plane.md.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import uvloop
import zmq
import zmq.asyncio

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.events import Event, Listeners, create_publisher, create_subscriber
from dynamo.runtime.zmq_channel import reached_in

SCOPE = "bench.worker.generate"
TOPIC = "kv-events"
LAST = b"last"
BATCH_S = 0.002  # events are published in bursts this far apart, as an engine's steps do


class Clock:
    """CPU of this process and of this thread, and the wall's time, since `start`."""

    def __init__(self) -> None:
        self._process, self._thread, self._wall = time.process_time(), time.thread_time(), time.perf_counter()

    def per_event(self, events: int) -> dict[str, float]:
        """Microseconds an event."""
        return {
            "cpu_us": round((time.process_time() - self._process) / events * 1e6, 2),
            "thread_us": round((time.thread_time() - self._thread) / events * 1e6, 2),
            "events_per_s": round(events / (time.perf_counter() - self._wall)),
        }


async def publish(options: argparse.Namespace) -> None:
    """The publisher's process: begins when its standard input says so."""
    runtime = DistributedRuntime(discovery_backend="file")
    publisher = await create_publisher(runtime, SCOPE, TOPIC)
    await asyncio.to_thread(sys.stdin.readline)
    payload = msgspec.Raw(msgspec.msgpack.encode(b"x" * options.bytes))
    burst = max(1, round(options.rate * BATCH_S)) if options.rate else 100
    clock, left = Clock(), options.events
    while left:
        for _ in range(min(burst, left)):
            publisher.publish(payload)
        left -= min(burst, left)
        await asyncio.sleep(BATCH_S if options.rate else 0)
    print(json.dumps({"publisher": clock.per_event(options.events)}), flush=True)
    for _ in range(20):
        publisher.publish(LAST)
        await asyncio.sleep(0.05)


class Tally:
    """Counts events; the clock starts at the first and stops at the last."""

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self.events = 0
        self.done: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()

    def note(self, payload: bytes) -> None:
        if self._clock is None:
            self._clock = Clock()
        self.events += 1
        if payload.endswith(LAST) and not self.done.done():
            self.done.set_result(self._clock.per_event(self.events))


async def listen(runtime: DistributedRuntime, tally: Tally) -> None:
    """Ours, with a plain listener."""

    def on_event(event: Event) -> None:
        tally.note(event.payload)

    subscriber = await create_subscriber(runtime, SCOPE, TOPIC, Listeners(on_event=on_event))
    await subscriber.wait_connected()


async def iterate(runtime: DistributedRuntime, tally: Tally) -> None:
    """Ours, as an iterator."""
    subscriber = await create_subscriber(runtime, SCOPE, TOPIC)
    await subscriber.wait_connected()

    async def read() -> None:
        async for event in subscriber:
            tally.note(event.payload)

    tasks.append(asyncio.ensure_future(read()))


async def zmq_asyncio(runtime: DistributedRuntime, tally: Tally) -> None:
    """The same frames through `zmq.asyncio`."""
    found: dict[str, Any] = {}
    while not found:
        found = await runtime.discovery.get_prefix("v1/event_channels/")
        await asyncio.sleep(0.01)
    ((key, value),) = found.items()
    socket = zmq.asyncio.Context().socket(zmq.SUB)
    socket.set(zmq.RCVHWM, 10_000)
    socket.subscribe(TOPIC.encode())
    socket.connect(reached_in(value, int(key.rpartition("/")[2], 16)).endpoint)
    decoder = msgspec.msgpack.Decoder(Event)

    async def read() -> None:
        while True:
            frames = await socket.recv_multipart()
            tally.note(decoder.decode(memoryview(frames[3])[5:]).payload)

    tasks.append(asyncio.ensure_future(read()))
    await asyncio.sleep(0.5)


tasks: list[asyncio.Task[None]] = []
READERS: dict[str, Callable[[DistributedRuntime, Tally], Awaitable[None]]] = {
    "listener": listen,
    "iterator": iterate,
    "zmq.asyncio": zmq_asyncio,
}


async def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One reader against a publisher in a process of its own."""
    runtime = DistributedRuntime(discovery_backend="file")
    words = ["--publish", "--events", str(options.events), "--bytes", str(options.bytes), "--rate", str(options.rate)]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, __file__, *words, stdin=pipe, stdout=pipe)
    assert child.stdin is not None
    assert child.stdout is not None
    tally = Tally()
    await READERS[name](runtime, tally)
    await asyncio.sleep(0.3)  # the subscription travels to the publisher
    child.stdin.write(b"go\n")
    result = await asyncio.wait_for(tally.done, 120)
    published = json.loads(await child.stdout.readline())
    child.kill()
    await child.wait()
    return {"reader": name, "received": tally.events, "subscriber": result, **published}


def main() -> None:
    """Run every reader in a process of its own, so that none inherits another's work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=300, help="payload of an event; a few stored blocks")
    parser.add_argument("--rate", type=int, default=10_000, help="events a second; 0: as fast as it goes")
    parser.add_argument("--plane", choices=["zmq", "nats"], default="zmq", help="nats: by NATS_SERVER, a running one")
    parser.add_argument("--publish", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        uvloop.run(publish(options))
    elif options.reader:
        print(json.dumps(uvloop.run(measure(options.reader, options))), flush=True)
    else:
        for reader in READERS if options.plane == "zmq" else ("listener", "iterator"):
            with tempfile.TemporaryDirectory() as directory:
                env = os.environ | {"DYN_FILE_KV": directory, "DYN_EVENT_PLANE": options.plane}
                words = [__file__, *sys.argv[1:], "--reader", reader]
                subprocess.run([sys.executable, *words], check=True, env=env)


if __name__ == "__main__":
    main()
