"""What can be broken, and how does it come back?

A fault is a coroutine that breaks something, holds it for a while, and mends it; whoever runs it waits until the
deployment is whole before the next. All that is left to chance comes from the fault's own random numbers.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from chaos import clock
from chaos.fleet import READY_S, Fleet, Kind, Member
from chaos.load import Client, Load, Slow, open_session
from chaos.network import CUT
from chaos.questions import Question, Questioner
from chaos.switch import Shape

SLOW_READERS = 4
SLOW_TOKENS = 1500  # some 350 KB of events: more than sockets hold, so that the frontend has to wait
SLOW_BYTES_PER_S = 60_000.0
JUMP_S = 3600.0
REPLACE_S = 2 * READY_S  # for all processes of a frontend, one after the other
BIT_BY_BIT = 512  # bytes, so that really nothing more fits


@dataclass
class Scene:
    """What faults work on."""

    fleet: Fleet
    load: Load
    questioner: Questioner
    random: Random
    target: str = ""
    """Who it hit, for the report."""

    def one(self, kind: Kind) -> Member:
        """Somebody of a kind."""
        members = [member for member in self.fleet.members if member.kind == kind]
        chosen = self.random.choice(members)
        self.target = chosen.name
        return chosen


Fault = Callable[[Scene], Awaitable[None]]


# --- processes


def killed(kind: Kind) -> Fault:
    """SIGKILL, and a new process a second later."""

    async def fault(scene: Scene) -> None:
        member = scene.one(kind)
        member.kill()
        await asyncio.sleep(1.0)
        member.start()

    return fault


def all_killed(kind: Kind, seconds: float) -> Fault:
    """SIGKILL to all of a kind, and new processes later."""

    async def fault(scene: Scene) -> None:
        members = [member for member in scene.fleet.members if member.kind == kind]
        scene.target = f"{len(members)} of {kind}"
        for member in members:
            member.kill()
        await asyncio.sleep(seconds)
        for member in members:
            member.start()

    return fault


def hung(kind: Kind, seconds: float) -> Fault:
    """SIGSTOP, and SIGCONT later."""

    async def fault(scene: Scene) -> None:
        member = scene.one(kind)
        member.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            member.signal(signal.SIGCONT)

    return fault


def part_of(kind: Kind, number: signal.Signals, seconds: float = 0.0) -> Fault:
    """A signal to one of the processes that a member consists of. A stopped one goes on later."""

    async def fault(scene: Scene) -> None:
        member = scene.one(kind)
        pid = scene.random.choice(member.parts())
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(pid, signal.SIGCONT)

    return fault


async def parts_replaced(scene: Scene) -> None:
    """All processes of a frontend are replaced under load, which none of its clients may notice."""
    member = scene.one("frontend")
    old = member.parts()
    member.signal(signal.SIGUSR2)
    async with asyncio.timeout(REPLACE_S):
        while set(old) & set(member.parts()):
            await asyncio.sleep(0.05)


def left(kind: Kind) -> Fault:
    """SIGTERM, and a new process once it has ended."""

    async def fault(scene: Scene) -> None:
        member = scene.one(kind)
        await member.leave()
        member.start()

    return fault


def rolling(kind: Kind) -> Fault:
    """One after the other ends in order and begins anew. The next one waits until the deployment is whole."""

    async def fault(scene: Scene) -> None:
        for member in [each for each in scene.fleet.members if each.kind == kind]:
            await member.leave()
            member.start()
            await scene.fleet.until_whole()

    return fault


# --- the network


def cut(kind: Kind, seconds: float, *, into: bool = True, out: bool = True) -> Fault:
    """No packet gets into a host, or out of it."""

    async def fault(scene: Scene) -> None:
        host = scene.one(kind).name
        network = scene.fleet.network
        if into:
            network.shape(network.others(host), [host], CUT)
        if out:
            network.shape([host], network.others(host), CUT)
        try:
            await asyncio.sleep(seconds)
        finally:
            network.heal()

    return fault


def apart(one: Kind, other: Kind, seconds: float) -> Fault:
    """No packet gets from a kind to another, or back; both are heard by everybody else."""

    async def fault(scene: Scene) -> None:
        network = scene.fleet.network
        scene.target = f"{one}, {other}"
        ones, others = ([each.name for each in scene.fleet.members if each.kind == kind] for kind in (one, other))
        network.shape(ones, others, CUT)
        network.shape(others, ones, CUT)
        try:
            await asyncio.sleep(seconds)
        finally:
            network.heal()

    return fault


def flapping(kind: Kind, seconds: float) -> Fault:
    """A host is cut off and back again, several times a second or once in some."""

    async def fault(scene: Scene) -> None:
        host = scene.one(kind).name
        network = scene.fleet.network
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        try:
            while loop.time() < ends:
                network.shape([host], network.others(host), CUT)
                network.shape(network.others(host), [host], CUT)
                await asyncio.sleep(scene.random.uniform(0.1, 2.0))
                network.heal()
                await asyncio.sleep(scene.random.uniform(0.1, 1.0))
        finally:
            network.heal()

    return fault


def shaped(shape: Shape, seconds: float) -> Fault:
    """All packets fare so."""

    async def fault(scene: Scene) -> None:
        network = scene.fleet.network
        scene.target = "all hosts"
        network.shape(network.addresses, network.addresses, shape)
        try:
            await asyncio.sleep(seconds)
        finally:
            network.heal()

    return fault


# --- the rest of the world


async def full_disk(scene: Scene) -> None:
    """The disk that all share is full for longer than an entry of discovery lives."""
    scene.target = "the shared disk"
    filler = scene.fleet.settings.shared / "filler"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * BIT_BY_BIT)
        await asyncio.sleep(12.0)
    finally:
        filler.unlink()


async def slow_readers(scene: Scene) -> None:
    """Clients that read more slowly than they are answered. Their answers count as all others."""
    scene.target = f"{SLOW_READERS} clients"
    questions: list[Question] = []
    while len(questions) < SLOW_READERS:
        question = await scene.questioner.make(SLOW_TOKENS)
        question.body.update(stream=True, stream_options={"include_usage": True})
        questions.append(question)
    async with open_session(receive_bytes=8192) as session:
        asked = (
            Client(scene.load.urls, number).ask(session, question, Slow(SLOW_BYTES_PER_S))
            for number, question in enumerate(questions)
        )
        for answer in await asyncio.gather(*asked):
            scene.load.add(answer)


def clock_jump(seconds: float) -> Fault:
    """The wall clock of one host jumps, and jumps back."""

    async def fault(scene: Scene) -> None:
        member = scene.one(scene.random.choice(("worker", "frontend")))
        clock.set_offset(scene.fleet.clock(member.name), seconds)
        try:
            await asyncio.sleep(3.0)
        finally:
            clock.set_offset(scene.fleet.clock(member.name), 0.0)

    return fault


FAULTS: dict[str, Fault] = {
    "worker killed": killed("worker"),
    "worker hung for 10 s": hung("worker", 10.0),
    "worker paused for 2 s": hung("worker", 2.0),
    "worker left": left("worker"),
    "frontend killed": killed("frontend"),
    "frontend hung for 10 s": hung("frontend", 10.0),
    "frontend left": left("frontend"),
    "worker cut off for 10 s": cut("worker", 10.0),
    "worker hears nothing for 10 s": cut("worker", 10.0, out=False),
    "worker is not heard for 10 s": cut("worker", 10.0, into=False),
    "worker cut off for 3 s": cut("worker", 3.0),
    "worker flapping": flapping("worker", 6.0),
    "frontend cut off for 10 s": cut("frontend", 10.0),
    "frontend hears nothing for 10 s": cut("frontend", 10.0, out=False),
    "frontend is not heard for 10 s": cut("frontend", 10.0, into=False),
    "frontend paused for 2 s": hung("frontend", 2.0),
    "frontend flapping": flapping("frontend", 6.0),
    "all frontends cut off from all workers for 3 s": apart("frontend", "worker", 3.0),
    "latency of 50 to 100 ms": shaped(Shape(delay_s=0.05, jitter_s=0.05), 4.0),
    "2 % of packets lost": shaped(Shape(loss=0.02), 4.0),
    "packets reordered": shaped(Shape(delay_s=0.01, jitter_s=0.01, reorder=0.3), 4.0),
    "full disk": full_disk,
    "slow readers": slow_readers,
    "clock one hour ahead": clock_jump(JUMP_S),
    "clock one hour behind": clock_jump(-JUMP_S),
}


def servers_of(kind: Kind) -> dict[str, Fault]:
    """What befalls the servers that a backend needs."""
    return {
        f"{kind} killed": killed(kind),
        f"{kind} hung for 10 s": hung(kind, 10.0),
        f"{kind} left": left(kind),
        f"{kind} cut off for 10 s": cut(kind, 10.0),
        f"{kind} is not heard for 10 s": cut(kind, 10.0, into=False),
        f"{kind} flapping": flapping(kind, 6.0),
        f"all workers cut off from {kind} for 12 s": apart("worker", kind, 12.0),
    }


SERVER_FAULTS: dict[Kind, dict[str, Fault]] = {
    "etcd": {**servers_of("etcd"), "all of etcd gone for 10 s": all_killed("etcd", 10.0)},
    "nats": servers_of("nats"),
}

SHARED_PORT: dict[str, Fault] = {
    "one process of a frontend killed": part_of("frontend", signal.SIGKILL),
    "one process of a frontend hung for 10 s": part_of("frontend", signal.SIGSTOP, 10.0),
    "processes of a frontend replaced": parts_replaced,
}
"""Where each frontend is several processes."""

ROLLING: dict[str, Fault] = {
    "rolling restart of all workers": rolling("worker"),
    "rolling restart of all frontends": rolling("frontend"),
}
