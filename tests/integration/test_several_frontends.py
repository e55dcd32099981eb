"""Several frontend processes share a port: do they answer as one, and what do clients see when one of them goes?"""

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from chaos.load import Answer, Client, Load, open_session
from chaos.questions import Question, Questioner

from tests.integration.deployment import Deployment, Process

PROCESSES = 3
CLIENTS = 24
BUSY = "dynamo_frontend_active_requests"
HELD = "dynamo_frontend_worker_active_decode_blocks"
READY_S = 90.0  # a process after the other begins, beside all else that a machine of two cores may do


@dataclass
class Port:
    """A port of several processes, over two simulated workers."""

    deployment: Deployment
    frontend: Process
    questions: list[Question]
    long: list[Question] = field(default_factory=list)
    """Whose answers take some seconds."""

    @property
    def base(self) -> str:
        return self.deployment.base

    def metric(self, name: str) -> dict[int, float]:
        """A metric by process, all of its other labels taken together."""
        found: Counter[int] = Counter()
        for labels, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", self.deployment.text("/metrics"), re.MULTILINE):
            number = re.search(r'http_worker="(\d+)"', labels)
            assert number is not None, labels
            found[int(number[1])] += float(value)
        return dict(found)

    def up(self) -> int:
        return int(sum(self.metric("dynamo_frontend_http_worker_up").values()))

    def pids(self) -> dict[int, int]:
        """The processes that serve, by number; the newest, where one replaces another."""
        found = {}
        for pid in sorted(children_of(self.frontend.pid)):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"dynamo.frontend.http_worker" in words:
                number = re.search(rb'"number":(\d+)', words[words.index(b"dynamo.frontend.http_worker") + 1])
                assert number is not None
                found[int(number[1])] = pid
        return found

    async def until(self, true: Callable[[], bool], what: str) -> float:
        return await asyncio.to_thread(self.deployment.until, true, what, READY_S)

    def load(self, questions: list[Question] | None = None) -> Load:
        return Load({"f": self.base}, questions or self.questions, CLIENTS)


def children_of(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[tuple[Deployment, Process]]:
    deployment = Deployment(tmp_path_factory.mktemp("several"))
    deployment.mocker(model_dir, "--num-workers", "2", "--speedup-ratio", "10")
    words = ["--http-workers", str(PROCESSES), "--router-mode", "kv"]
    frontend = deployment.frontend(*words, env={"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "20"})
    deployment.wait_for(workers=2)
    yield deployment, frontend
    deployment.stop()


@pytest.fixture
async def port(running: tuple[Deployment, Process], model_dir: Path) -> AsyncIterator[Port]:
    questioner = Questioner(model_dir, "m", 3)
    made = Port(*running, [await questioner.make() for _ in range(200)])
    made.long = [await questioner.make(1200) for _ in range(CLIENTS)]
    await made.until(lambda: made.up() == PROCESSES, "all processes answer")
    yield made
    await made.until(lambda: sum(made.metric(HELD).values()) == 0, "no router counts anything as open")


def told(answers: list[Answer]) -> list[tuple[str, str]]:
    """Those that are not right."""
    return [(answer.outcome, answer.detail) for answer in answers if answer.outcome != "right"]


async def test_metrics_count_what_all_processes_did_and_the_load_is_spread(port: Port) -> None:
    before = port.metric("dynamo_frontend_requests_total")
    async with open_session() as session:
        asked = (Client({"f": port.base}).ask(session, question) for question in port.questions)
        answers = await asyncio.gather(*asked)
    assert told(list(answers)) == []
    after = port.metric("dynamo_frontend_requests_total")
    done = {number: count - before.get(number, 0) for number, count in after.items()}
    assert sum(done.values()) == len(port.questions)
    assert all(count >= len(port.questions) / PROCESSES / 4 for count in done.values()), done
    text = port.deployment.text("/metrics")
    families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(families) == len(set(families))


async def test_routers_know_what_the_others_sent(port: Port, model_dir: Path) -> None:
    endless = [await Questioner(model_dir, "m", 4).make(5000) for _ in range(CLIENTS)]

    def alike() -> bool:
        """All of them say the same, of all requests: one block each at least."""
        held = port.metric(HELD).values()
        return len(held) == PROCESSES and len(set(held)) == 1 and min(held) >= CLIENTS

    async with open_session() as session:
        asking = [asyncio.create_task(Client({"f": port.base}).ask(session, question)) for question in endless]
        await port.until(alike, "all know of all")
        for each in asking:
            each.cancel()


async def test_what_is_set_at_one_process_is_set_at_all_and_at_a_new_one(port: Port) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        body = {"model": "m", "active_decode_blocks_threshold": 0.97}
        async with session.post(f"{port.base}/busy_threshold", json=body) as response:
            assert response.status == 200

        async def seen() -> set[Any]:
            found = set()
            for _ in range(5 * PROCESSES):
                async with session.get(f"{port.base}/busy_threshold") as response:
                    found.add((await response.json())["thresholds"][0]["active_decode_blocks_threshold"])
            return found

        assert await seen() == {0.97}
        before = port.pids()
        os.kill(before[0], signal.SIGKILL)
        await port.until(lambda: port.up() == PROCESSES and port.pids()[0] != before[0], "it is replaced")
        assert await seen() == {0.97}


async def test_a_killed_process_costs_its_own_connections_alone(port: Port) -> None:
    load = port.load(port.long)
    load.start()
    busy: dict[int, float] = {}

    def all_are_answered() -> bool:
        busy.update(port.metric(BUSY))
        return sum(busy.values()) == CLIENTS

    await port.until(all_are_answered, "all are answered")
    victim, its_own = max(busy.items(), key=lambda item: item[1])
    os.kill(port.pids()[victim], signal.SIGKILL)
    async with open_session() as session:  # one that tries again, or comes now, is answered by the others
        later = [await Client({"f": port.base}).ask(session, question) for question in port.questions[:20]]
    assert told(later) == []
    assert max(answer.tries for answer in later) == 1
    freed = lambda: sum(port.metric(HELD).values()) == 0  # noqa: E731
    await load.stop()
    assert await port.until(freed, "what the dead process had open is forgotten") < 12.0  # a lease is 10 s
    cut = [answer for answer in load.answers if answer.outcome == "cut" or answer.tries > 1]
    assert told([answer for answer in load.answers if answer not in cut]) == []
    assert len(cut) == its_own


async def test_a_stopped_process_is_given_no_connection(port: Port) -> None:
    stopped = port.pids()[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        async with open_session() as session:
            answers = [await Client({"f": port.base}).ask(session, question) for question in port.questions[:20]]
        assert told(answers) == []
        assert max(answer.tries for answer in answers) == 1
        assert port.metric("dynamo_frontend_http_worker_up") == {0: 1, 1: 0, 2: 1}
    finally:
        os.kill(stopped, signal.SIGCONT)


async def test_all_are_replaced_under_load_and_no_client_notices(port: Port) -> None:
    before = port.pids()
    load = port.load()
    load.start()
    long = port.load(port.long)  # longer than clients are given to ask again
    long.start()
    os.kill(port.frontend.pid, signal.SIGUSR2)
    replaced = lambda: not set(port.pids().values()) & set(before.values())  # noqa: E731
    await port.until(replaced, "all are new")
    await long.stop()
    await load.stop()
    gone = lambda: len(children_of(port.frontend.pid)) == PROCESSES  # noqa: E731
    await port.until(gone, "the old ones have ended")
    answers = load.answers + long.answers
    assert told(answers) == []
    assert max(answer.tries for answer in answers) == 1


async def test_ctrl_c_lets_answers_end_and_leaves_nobody(model_dir: Path, tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    try:
        deployment.mocker(model_dir, "--speedup-ratio", "10")
        frontend = deployment.frontend("--http-workers", "2", env={"DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "20"})
        await asyncio.to_thread(deployment.wait_for)
        question = await Questioner(model_dir, "m", 1).make(300)
        question.body.update(stream=True, stream_options={"include_usage": True})
        children = children_of(frontend.pid)
        async with open_session() as session:
            asked = asyncio.create_task(Client({"f": deployment.base}).ask(session, question))
            busy = lambda: 'active_requests{http_worker="' in deployment.text("/metrics")  # noqa: E731
            await asyncio.to_thread(deployment.until, busy, "it is asked")
            os.killpg(frontend.pid, signal.SIGINT)  # as a terminal does
            assert (await asked).outcome == "right"
        assert await asyncio.to_thread(frontend.wait, 15) == 0
        assert not any(map(exists, children))
    finally:
        deployment.stop()


async def test_processes_end_with_the_one_that_watches_over_them(deployment: Deployment) -> None:
    frontend = deployment.frontend("--http-workers", "2")
    children = children_of(frontend.pid)
    assert len(children) == 2
    os.kill(frontend.pid, signal.SIGKILL)
    gone = lambda: not any(map(exists, children))  # noqa: E731
    await asyncio.to_thread(deployment.until, gone, "they have ended", 10)
