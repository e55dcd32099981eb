"""What does one more worker, frontend, change or event cost a large deployment, and where does it bend?

usage: python benchmarks/scale.py [--workers 1000] [--frontends 100] [--changes 20] [--parts membership,events]
(parts: membership, events, nats, mesh; all by default)

The project's own discovery, event publishers and subscribers, with real servers of etcd and NATS; there are no engines,
and many workers or frontends share a process, each with connections of its own. CPU is of the whole process, threads
included, by the kernel's count (10 ms steps), so what is measured is done many times. What follows from these numbers:
docs/explanation/scale.md.
"""

import argparse
import asyncio
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from common.children import Child, cpu_s, obey, raise_file_limit, rss_mb
from common.servers import free_port

from dynamo.runtime import DistributedRuntime
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.discovery.etcd.backend import EtcdDiscovery
from dynamo.runtime.errors import DiscoveryError
from dynamo.runtime.events import Event, Listeners, create_publisher, create_subscriber, scope_of
from dynamo.runtime.instances import instance_record
from dynamo.runtime.zmq_channel import zmq_record

ADDRESS = EndpointAddress.parse("scale.backend.generate")
CARD = msgspec.json.encode({"display_name": "m", "runtime_config": {"total_kv_blocks": 1000}, "files": "x" * 2000})
TOPICS = ("kv-events", "kv_metrics")
TTL_S = 600  # so that beats come when they are asked for, and nobody loses a lease where few cores are many machines
BEATS_AT_ONCE = 20
AT_ONCE = 50  # workers that register together
BATCH_S = 0.01  # between bursts of events
BYTES = 300  # of an event's payload: a step's KV events of one worker
BYTES_RECEIVED_AT = 128  # in Linux's struct tcp_info

# --- a process of many workers


class Workers:
    """Workers as discovery knows them: an instance, a card, and two event channels, under one lease."""

    def __init__(self) -> None:
        self._held: dict[int, EtcdDiscovery] = {}
        self._publishers: list[Any] = []
        self._runtime: DistributedRuntime | None = None

    async def join(self, first: int, count: int) -> list[float]:
        """Workers of these numbers come. Gives when each began to."""
        began: list[float] = []
        for at in range(first, first + count, AT_ONCE):
            numbers = range(at, min(at + AT_ONCE, first + count))
            began += await asyncio.gather(*map(self._join, numbers))
        return began

    async def _join(self, number: int) -> float:
        began = time.monotonic()
        mine = self._held[number] = EtcdDiscovery()
        await mine.put(ADDRESS.instance_key(number), instance_record(ADDRESS, number, f"10.0.0.1:{1 + number % 60000}"))
        await mine.put(f"v1/mdc/scale/backend/generate/{number:x}", CARD)
        for i, topic in enumerate(TOPICS):
            scope, publisher = scope_of(str(ADDRESS)), 2 * number + i
            await mine.put(scope.channel_key(topic, publisher), zmq_record(scope, topic, publisher, "tcp://10.0.0.1:1"))
        return began

    async def beat(self) -> None:
        """All renew their leases."""
        held = list(self._held.values())
        for at in range(0, len(held), BEATS_AT_ONCE):
            await asyncio.gather(*(each._owned.beat() for each in held[at : at + BEATS_AT_ONCE]))

    async def leave(self, number: int) -> float:
        """One goes, in order."""
        await self._held.pop(number).close()
        return time.monotonic()

    async def publishers(self, count: int, plane: str) -> int:
        """So many publishers of events."""
        self._runtime = self._runtime or DistributedRuntime(event_plane=plane)
        self._publishers += [await create_publisher(self._runtime, "scale.w.e", "kv-events") for _ in range(count)]
        return os.getpid()

    async def publish(self, events: int, rate: int) -> float:
        """The first of them says so many, at a rate. Gives the seconds that it took."""
        payload, began = msgspec.Raw(msgspec.msgpack.encode(b"x" * BYTES)), time.perf_counter()
        burst = max(1, round(rate * BATCH_S))
        for _ in range(events // burst):
            for _ in range(burst):
                self._publishers[0].publish(payload)
            await asyncio.sleep(BATCH_S)
        return time.perf_counter() - began


# --- a process of many frontends


class Frontends:
    """Frontends as discovery and the event plane know them."""

    def __init__(self) -> None:
        self._runtimes: list[DistributedRuntime] = []
        self._sets: list[Any] = []
        self._subscribers: list[Any] = []
        self._seen: dict[int, list[float]] = {}
        self._heard = 0
        self._asked_again = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def follow(self, count: int) -> float:
        """So many frontends look at who is there, and follow. Gives the seconds that it took."""
        began = time.monotonic()
        for _ in range(count):
            runtime = DistributedRuntime()
            self._runtimes.append(runtime)
            instances = await self._looked(runtime)
            self._sets.append(instances)
            known = set(instances.targets)
            instances.on_change(lambda instances=instances, known=known: self._note(instances, known))
            for prefix in ("v1/mdc/", "v1/event_channels/scale/"):
                self._tasks.append(asyncio.ensure_future(self._drain(runtime.discovery.watch(prefix))))
        return time.monotonic() - began

    async def _looked(self, runtime: DistributedRuntime) -> Any:
        """Who is there; asked again while the server is too busy to tell in time, as a frontend does."""
        while True:
            try:
                return await runtime.instances_of(ADDRESS)
            except (TimeoutError, DiscoveryError):
                self._asked_again += 1
                await asyncio.sleep(0.5)

    async def asked_again(self) -> int:
        """How often that happened."""
        return self._asked_again

    async def _drain(self, changes: Any) -> None:
        async for _ in changes:
            pass

    def _note(self, instances: Any, known: set[int]) -> None:
        now = time.monotonic()
        if len(known) < len(instances.targets):
            for number in instances.targets.keys() - known:
                self._seen.setdefault(number, []).append(now)
        known.clear()
        known.update(instances.targets)

    async def known(self) -> list[int]:
        """How many workers each knows."""
        return [len(each.targets) for each in self._sets]

    async def seen(self) -> dict[int, list[float]]:
        """When who came was seen, by each."""
        return self._seen

    async def received(self) -> int:
        """Bytes that came over all watches so far."""
        total = 0
        for runtime in self._runtimes:
            for responses in runtime.discovery.gateway._streams.values():  # type: ignore[attr-defined]
                for response in responses:
                    sock = response.connection.transport.get_extra_info("socket")
                    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    total += struct.unpack_from("Q", info, BYTES_RECEIVED_AT)[0]
        return total

    async def subscribe(self, count: int, publishers: int, plane: str) -> int:
        """So many subscribers, once each hears all publishers."""

        def on_event(event: Event) -> None:
            self._heard += 1

        for _ in range(count):
            runtime = DistributedRuntime(event_plane=plane)
            subscriber = await create_subscriber(runtime, "scale.w.e", "kv-events", Listeners(on_event=on_event))
            self._runtimes.append(runtime)
            self._subscribers.append(subscriber)
        for subscriber in self._subscribers:
            await subscriber.wait_connected(publishers, 120)
        return os.getpid()

    async def heard(self) -> int:
        """Events that came to any of them."""
        return self._heard


# --- what is measured


@contextmanager
def etcd(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server, whose address stands in the environment."""
    client, peer = free_port(), free_port()
    url, peer_url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
    argv = [Path(sys.executable).with_name("etcd"), "--data-dir", directory / "etcd", "--log-level", "error"]
    argv += ["--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer_url]
    argv += ["--initial-advertise-peer-urls", peer_url, "--initial-cluster", f"default={peer_url}"]
    with running(argv, f"{url}/health", directory / "etcd.log") as process:
        os.environ |= {"ETCD_ENDPOINTS": url, "DYN_DISCOVERY_BACKEND": "etcd", "ETCD_LEASE_TTL": str(TTL_S)}
        yield process


@contextmanager
def nats(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server, whose address stands in the environment."""
    port, http = free_port(), free_port()
    argv = [Path(sys.executable).with_name("nats-server"), "-a", "127.0.0.1", "-p", str(port), "-m", str(http)]
    with running(argv, f"http://127.0.0.1:{http}/healthz", directory / "nats.log") as process:
        os.environ |= {"NATS_SERVER": f"nats://127.0.0.1:{port}", "DYN_NATS_JETSTREAM": "false"}
        yield process


@contextmanager
def running(argv: list[Any], health: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(health, timeout=1).read()
                break
            except OSError:
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


class Cpu:
    """What some processes used since it was made, in seconds, by name."""

    def __init__(self, **processes: list[int]) -> None:
        self._processes = processes
        self._before = self._now()
        self._began = time.monotonic()

    def _now(self) -> dict[str, float]:
        return {name: sum(map(cpu_s, pids)) for name, pids in self._processes.items()}

    def used(self) -> dict[str, float]:
        return {name: now - self._before[name] for name, now in self._now().items()}

    def wall_s(self) -> float:
        return time.monotonic() - self._began


def line(text: str, value: float, unit: str) -> None:
    """One number."""
    print(f"  {text:<66} {value:>10,.4g} {unit}", flush=True)


async def membership(server: int, a: argparse.Namespace) -> None:
    print(f"membership: {a.workers} workers in etcd, {a.frontends} frontends follow")
    workers = [Child(__file__, "workers", {}) for _ in range(2)]
    frontends = [Child(__file__, "frontends", {}) for _ in range(4)]
    everybody = {"etcd": [server], "workers": [w.pid for w in workers], "frontends": [f.pid for f in frontends]}
    try:
        cpu, half = Cpu(**everybody), a.workers // 2
        await asyncio.gather(workers[0].ask("join", first=1, count=half),
                             workers[1].ask("join", first=1 + half, count=a.workers - half))  # fmt: skip
        used = cpu.used()
        line("etcd's CPU for a worker that registers (4 keys, one lease)", used["etcd"] / a.workers * 1e3, "ms")
        line("the worker's", used["workers"] / a.workers * 1e3, "ms")
        cpu = Cpu(**everybody)
        each = a.frontends // len(frontends)
        await asyncio.gather(*(f.ask("follow", count=each) for f in frontends))
        used, count = cpu.used(), each * len(frontends)
        line("a frontend's CPU to learn of all workers", used["frontends"] / count * 1e3, "ms")
        line("etcd's", used["etcd"] / count * 1e3, "ms")
        if again := sum(await asyncio.gather(*(f.ask("asked_again") for f in frontends))):
            print(f"  (asked again {again} times, for the server was too busy to tell in time)")
        known = await asyncio.gather(*(f.ask("known") for f in frontends))
        line("workers that each frontend knows, at least", min(map(min, known)), "")
        await beats(workers, everybody, a)
        await changes(workers[0], frontends, everybody, a, count)
        line("etcd's memory", rss_mb(server), "MB")
        line("a frontend's memory for all workers (of a process, shared)", rss_mb(frontends[0].pid) / each, "MB")
    finally:
        for child in (*workers, *frontends):
            child.kill()


async def beats(workers: list[Child], everybody: dict[str, list[int]], a: argparse.Namespace) -> None:
    """Everybody renews a lease, twice."""
    cpu = Cpu(**everybody)
    for _ in range(2):
        await asyncio.gather(*(w.ask("beat") for w in workers))
    used = cpu.used()
    line("etcd's CPU for a beat", used["etcd"] / a.workers / 2 * 1e3, "ms")
    line("the CPU of who beats", used["workers"] / a.workers / 2 * 1e3, "ms")
    share = used["etcd"] / a.workers / 2 * (a.workers + a.frontends) * 0.3
    line("etcd's share of a core for all beats, with leases of 10 s", share * 100, "%")


async def changes(
    worker: Child,
    frontends: list[Child],
    everybody: dict[str, list[int]],
    a: argparse.Namespace,
    count: int,
) -> None:
    """Workers come and go, one at a time."""
    cpu, began = Cpu(**everybody), {}
    before = sum(await asyncio.gather(*(f.ask("received") for f in frontends)))
    for i in range(a.changes):
        number = 1_000_000 + i
        began[number] = (await worker.ask("join", first=number, count=1))[0]
        await worker.ask("leave", number=number)
    await asyncio.sleep(1.0)
    used = cpu.used()
    after = sum(await asyncio.gather(*(f.ask("received") for f in frontends)))
    own = {name: s / a.changes for name, s in used.items()}
    line("bytes to each frontend for a worker that comes and goes", (after - before) / a.changes / count, "B")
    line("a frontend's CPU for it", own["frontends"] / count * 1e3, "ms")
    line("etcd's", own["etcd"] * 1e3, "ms")
    line("etcd's, for each frontend", own["etcd"] / count * 1e6, "us")
    seen: dict[int, list[float]] = {}
    for answer in await asyncio.gather(*(f.ask("seen") for f in frontends)):
        for number, times in answer.items():
            seen.setdefault(int(number), []).extend(times)
    lags = sorted((t - began[n]) * 1e3 for n, times in seen.items() if n in began for t in times)
    line("until a frontend knows of who came, median", statistics.median(lags), "ms")
    line("99th percentile", lags[len(lags) * 99 // 100], "ms")
    if len(lags) < a.changes * count * 0.99:
        print(f"  (seen {len(lags)} of {a.changes * count} times: who comes and goes at once may be skipped)")


async def events(a: argparse.Namespace, plane: str, server: int | None = None) -> None:
    print(f"events by {plane}: one publisher, {BYTES} bytes, {a.rate} a second")
    for subscribers in a.subscribers:
        worker = Child(__file__, "workers", {})
        frontends = [Child(__file__, "frontends", {}) for _ in range(min(subscribers, 4))]
        try:
            await worker.ask("publishers", count=1, plane=plane)
            each = -(-subscribers // len(frontends))
            await asyncio.gather(*(f.ask("subscribe", count=each, publishers=1, plane=plane) for f in frontends))
            total = each * len(frontends)
            pids = {"publisher": [worker.pid], "subscribers": [f.pid for f in frontends]}
            cpu = Cpu(**pids, **({"server": [server]} if server else {}))
            await worker.ask("publish", events=a.events, rate=a.rate)
            await asyncio.sleep(0.5)
            used = cpu.used()
            heard = sum(await asyncio.gather(*(f.ask("heard") for f in frontends)))
            line(f"{total} subscribers: the publisher's CPU for an event", used["publisher"] / a.events * 1e6, "us")
            line("a subscriber's", used["subscribers"] / heard * 1e6, "us")
            if server:
                line("the server's", used["server"] / a.events * 1e6, "us")
            line("events that came, of those that should", heard / (a.events * total) * 100, "%")
        finally:
            for child in (worker, *frontends):
                child.kill()


async def mesh(a: argparse.Namespace) -> None:
    publishers, subscribers = a.mesh
    print(f"mesh by zmq: {publishers} publishers, {subscribers} subscribers, all connected, nothing said")
    worker, frontend = Child(__file__, "workers", {}), Child(__file__, "frontends", {})
    try:
        await worker.ask("publishers", count=publishers, plane="zmq")
        alone = rss_mb(worker.pid), rss_mb(frontend.pid)
        cpu = Cpu(publishers=[worker.pid], subscribers=[frontend.pid])
        await frontend.ask("subscribe", count=subscribers, publishers=publishers, plane="zmq")
        connections, used = publishers * subscribers, cpu.used()
        line("to connect, the publisher's CPU for each", used["publishers"] / connections * 1e6, "us")
        line("the subscriber's", used["subscribers"] / connections * 1e6, "us")
        cpu = Cpu(publishers=[worker.pid], subscribers=[frontend.pid])
        await asyncio.sleep(a.idle)
        used, seconds = cpu.used(), cpu.wall_s()
        line(
            "to stay connected, the publisher's CPU for each",
            used["publishers"] / connections / seconds * 1e6,
            "us a second",
        )
        line("the subscriber's", used["subscribers"] / connections / seconds * 1e6, "us a second")
        line("memory for each, at the publisher", (rss_mb(worker.pid) - alone[0]) / connections * 1e3, "KB")
        line("at the subscriber", (rss_mb(frontend.pid) - alone[1]) / connections * 1e3, "KB")
    finally:
        worker.kill()
        frontend.kill()


async def controller(a: argparse.Namespace) -> None:
    raise_file_limit()
    with tempfile.TemporaryDirectory() as place:
        if "membership" in a.parts:
            with etcd(Path(place)) as server:
                await membership(server.pid, a)
        os.environ |= {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(Path(place) / "discovery")}
        if "events" in a.parts:
            await events(a, "zmq")
        if "nats" in a.parts:
            with nats(Path(place)) as server:
                await events(a, "nats", server.pid)
        if "mesh" in a.parts:
            await mesh(a)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--role", choices=["workers", "frontends"], help=argparse.SUPPRESS)
    ap.add_argument("--workers", type=int, default=1000)
    ap.add_argument("--frontends", type=int, default=100)
    ap.add_argument("--changes", type=int, default=20)
    ap.add_argument("--idle", type=float, default=10.0, help="seconds for which what costs without events is measured")
    ap.add_argument("--rate", type=int, default=500)
    ap.add_argument("--events", type=int, default=2000)
    ap.add_argument("--subscribers", type=lambda t: [int(n) for n in t.split(",")], default=[1, 10, 100])
    ap.add_argument("--mesh", type=lambda t: tuple(int(n) for n in t.split("x")), default=(400, 5))
    ap.add_argument("--parts", type=lambda t: t.split(","), default=["membership", "events", "nats", "mesh"])
    a = ap.parse_args()
    if a.role is None:
        uvloop.run(controller(a))
        return
    served = Workers() if a.role == "workers" else Frontends()
    uvloop.run(obey({name: getattr(served, name) for name in dir(served) if not name.startswith("_")}))


if __name__ == "__main__":
    main()
