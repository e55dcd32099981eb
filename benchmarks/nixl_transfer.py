"""What does dynamo.nixl_connect cost over NIXL itself, moving the same memory between the same two processes?

One process offers 256 MB of host memory, the other reads and writes parts of it, in turn by bare calls of NIXL,
spinning until the transfer is done, and by our operations: begin, await, one offer each. The memory is registered
beforehand on both sides. Then: how long until the side that offered knows, and what an agent costs that has nothing to
do.

    python benchmarks/nixl_transfer.py [--tls tcp] [--rounds 40]

Times are the fastest quarter's slowest, as both processes share their cores with whatever else the machine does.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from dynamo.nixl_connect import Connector, Descriptor, RdmaMetadata, bindings

MEMORY = 256 << 20  # bytes
CASES = [(1 << 20, 1), (16 << 20, 1), (16 << 20, 512), (MEMORY, 1)]  # bytes, descriptors
IDLE_S = 3.0
ANSWER_S = 120.0


class Raw:
    """NIXL by its own calls, with its progress thread asleep as ours is."""

    def __init__(self, name: str, memory: np.ndarray) -> None:
        self.b = bindings.load()
        self.agent = bindings.new_agent(self.b, name)
        self.address = memory.ctypes.data
        self.agent.registerMem(self.b.nixlRegDList(self.b.DRAM_SEG, [(self.address, memory.nbytes, 0, "")]), [])

    def move(self, way: Any, peer: str, remote: int, parts: list[tuple[int, int]]) -> float:
        """Seconds for one transfer."""
        began = time.perf_counter()
        here, there = (
            self.b.nixlXferDList(self.b.DRAM_SEG, [(base + offset, size, 0) for offset, size in parts])
            for base in (self.address, remote)
        )
        request = self.agent.createXferReq(way, here, there, peer, b"done", [])
        state = self.agent.postXferReq(request, b"")
        while state == self.b.NIXL_IN_PROG:
            state = self.agent.getXferStatus(request)
        self.agent.releaseXferReq(request)
        return time.perf_counter() - began


def parts_of(size: int, count: int) -> list[tuple[int, int]]:
    """Offsets and sizes: `count` equal parts, every second one, so that NIXL cannot join them."""
    each = size // count
    stride = each * 2 if count > 1 else each
    return [(number * stride, each) for number in range(count)]


def described(memory: np.ndarray, size: int, count: int) -> list[Descriptor]:
    base = memory.ctypes.data
    return [Descriptor((base + offset, each, "cpu", memory)) for offset, each in parts_of(size, count)]


async def target() -> None:
    """The process whose memory is read and written."""
    memory = np.ones(MEMORY, dtype=np.uint8)
    raw, connector = Raw("raw-target", memory), Connector("target")
    first = await connector.create_readable(Descriptor((memory, "cpu")))
    kept: dict[tuple[int, int], list[Descriptor]] = {}
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "raw":
            answer = {"metadata": raw.agent.getLocalMD().hex(), "address": raw.address}
        elif command["do"] == "offer":
            case = (command["size"], command["count"])
            if case not in kept:
                kept[case] = described(memory, *case)
                for descriptor in kept[case]:
                    descriptor.register_with_connector(first.connection)
            create = connector.create_readable if command["kind"] == "READ" else connector.create_writable
            offer = await create(kept[case])
            answer = {"metadata": offer.metadata().model_dump()}
        elif command["do"] == "wait":
            await offer.wait_for_completion()
            answer = {"at": time.monotonic()}
        elif command["do"] == "idle":
            before = time.process_time()
            await asyncio.sleep(IDLE_S)
            answer = {"share": (time.process_time() - before) / IDLE_S}
        print(json.dumps(answer), flush=True)


class Target:
    def __init__(self) -> None:
        command = [sys.executable, __file__, "--target"]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, **command: Any) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(command) + "\n")
        self._popen.stdin.flush()

    async def answer(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self._popen.stdout.readline), ANSWER_S)
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def ask(self, **command: Any) -> dict[str, Any]:
        self.tell(**command)
        return await self.answer()

    def end(self) -> None:
        self._popen.kill()
        self._popen.wait()


async def measure(rounds: int) -> None:
    memory = np.zeros(MEMORY, dtype=np.uint8)
    memory[:] = 2  # touched, or the first transfer would pay for the pages
    other = Target()
    raw, connector = Raw("raw-initiator", memory), Connector("initiator")
    theirs = await other.ask(do="raw")
    raw.agent.loadRemoteMD(bytes.fromhex(theirs["metadata"]))
    first = await connector.create_readable(Descriptor((memory, "cpu")))
    print("        MB parts   NIXL ms   GB/s   ours ms   GB/s  share  heard ms")
    for kind in ("READ", "WRITE"):
        way = raw.b.NIXL_READ if kind == "READ" else raw.b.NIXL_WRITE
        for size, count in CASES:
            mine = described(memory, size, count)
            for descriptor in mine:
                descriptor.register_with_connector(first.connection)
            by_nixl, by_us, heard = [], [], []
            for _ in range(rounds + 1):
                by_nixl.append(raw.move(way, "raw-target", theirs["address"], parts_of(size, count)))
                offer = await other.ask(do="offer", kind=kind, size=size, count=count)
                metadata = RdmaMetadata.model_validate(offer["metadata"])
                other.tell(do="wait")
                began = time.perf_counter()
                reads = kind == "READ"
                operation = await (
                    connector.begin_read(metadata, mine) if reads else connector.begin_write(mine, metadata)
                )
                await operation.wait_for_completion()
                by_us.append(time.perf_counter() - began)
                done = time.monotonic()
                heard.append((await other.answer())["at"] - done)
            print(line(kind, size, count, by_nixl[1:], by_us[1:], heard[1:]), flush=True)
    quiet = await other.ask(do="idle")
    await other.ask(do="offer", kind="READ", size=1 << 20, count=1)
    waiting = await other.ask(do="idle")
    other.end()
    print(
        f"\nidle, of a core: two agents {quiet['share']:.1%}; with an offer outstanding {waiting['share']:.1%};"
        f" one agent as NIXL's Python makes it {spinning():.0%}"
    )


def line(kind: str, size: int, count: int, by_nixl: list[float], by_us: list[float], heard: list[float]) -> str:
    nixl_s, our_s = quartile(by_nixl), quartile(by_us)
    return (
        f"{kind:5} {size >> 20:4d} {count:5d} {nixl_s * 1e3:9.3f} {size / nixl_s / 1e9:6.2f}"
        f" {our_s * 1e3:9.3f} {size / our_s / 1e9:6.2f} {nixl_s / our_s:6.0%} {statistics.median(heard) * 1e3:9.2f}"
    )


def quartile(times: list[float]) -> float:
    return statistics.quantiles(times, n=4)[0]


def spinning() -> float:
    """The share of a core that an agent burns whose progress thread is not told to sleep."""
    module = bindings.load().__name__.replace("_bindings", "_api")
    program = (
        f"import time; from {module} import nixl_agent; agent = nixl_agent('x'); began = time.process_time();"
        f"time.sleep({IDLE_S}); print((time.process_time() - began) / {IDLE_S})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=40)
    ap.add_argument("--tls", help="UCX_TLS for both processes, such as tcp")
    ap.add_argument("--target", action="store_true", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.tls:
        os.environ["UCX_TLS"] = a.tls
    asyncio.run(target() if a.target else measure(a.rounds))


if __name__ == "__main__":
    main()
