"""Does anybody notice when workers change their roles while they serve?"""

import asyncio
import itertools
import logging
from typing import Any

import aiohttp
import pytest

from dynamo.frontend.service import FrontendService
from tests.frontend.front_door import CHAT, StartFrontend, ask, changed, chat, fetch, model_ready
from tests.frontend.kv_fleet import Mocker, StartMocker, eventually, series

PROMPTS = [f"Tell me of {what} and {other}. " * 8 for what in ("rain", "sun", "wind") for other in ("cats", "dogs")]
CLIENTS = 8
FLAGS = ("--speedup-ratio", "2", "--num-gpu-blocks-override", "4000")


async def tell(mocker: Mocker, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """POST /engine/role."""
    assert mocker.runtime.system_server is not None
    url = f"{mocker.runtime.system_server.url}/engine/role"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json()


def roles(service: FrontendService) -> dict[str, int]:
    """How many workers the frontend knows of each kind."""
    found: dict[str, int] = {}
    for worker_set in service.models.sets():
        kind = worker_set.card.worker_type.value
        found[kind] = found.get(kind, 0) + worker_set.worker_count
    return {kind: count for kind, count in found.items() if count}


def held(mocker: Mocker) -> float:
    """Handles that a worker keeps KV for."""
    lines = mocker.runtime.metrics.render().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("dynamo_component_kv_handles{"))


class Load:
    """Clients that ask one after the other, and what was amiss."""

    def __init__(self, service: FrontendService) -> None:
        self._service = service
        self.wrong: list[Any] = []
        self.right = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.expected: dict[str, str] = {}

    async def answer(self, prompt: str, **fields: Any) -> str:
        body = chat(prompt, max_tokens=30, temperature=0, ignore_eos=True, **fields)
        answer = await ask(self._service.port, CHAT, body)
        assert answer.status == 200, answer.body
        return str(answer.json()["choices"][0]["message"]["content"])

    async def begin(self) -> None:
        for prompt in PROMPTS:
            self.expected[prompt] = await self.answer(prompt)
        assert len(set(self.expected.values())) == len(PROMPTS)
        self._tasks = [asyncio.create_task(self._client(i)) for i in range(CLIENTS)]

    async def _client(self, number: int) -> None:
        for prompt in itertools.islice(itertools.cycle(PROMPTS), number, None):
            try:
                text = await self.answer(prompt)
            except (AssertionError, OSError) as e:
                self.wrong.append(e)
            else:
                if text == self.expected[prompt]:
                    self.right += 1
                else:
                    self.wrong.append((prompt, text))

    async def some(self, more: int = 20) -> None:
        """Wait for so many more answers."""
        enough = self.right + more
        await eventually(lambda: self.right >= enough or self.wrong)
        assert not self.wrong

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.mark.parametrize("mode", ["round-robin", "kv"])
async def test_under_load_every_answer_is_right_while_one_of_three_workers_goes_through_all_roles(
    start_frontend: StartFrontend, start_mocker: StartMocker, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    service = await start_frontend(router_mode=mode)
    decode = ["--disaggregation-mode", "decode"]
    others = [await start_mocker(*FLAGS, *decode), await start_mocker(*FLAGS, "--disaggregation-mode", "prefill")]
    mover = await start_mocker(*FLAGS, *decode)
    await model_ready(service, "tiny", workers=3)
    load = Load(service)
    await load.begin()
    try:
        await load.some()
        for role in ("prefill", "decode", "agg", "prefill", "agg", "decode", "prefill", "decode"):
            status, told = await tell(mover, {"role": role})
            assert (status, told["workers"][0]["role"]) == (200, role)
            wanted = {"prefill": 1, "decode": 1}
            kind = "aggregated" if role == "agg" else role
            wanted[kind] = wanted.get(kind, 0) + 1
            await changed(service, lambda wanted=wanted: roles(service) == wanted)
            await load.some()
    finally:
        await load.end()
    assert load.right > 100
    prefills = await series(service, "dynamo_frontend_remote_prefills_total")
    assert prefills.get('outcome="lost"', 0) == 0
    await eventually(lambda: not any(map(held, (*others, mover))))


async def test_a_worker_does_its_new_part(
    start_frontend: StartFrontend, start_mocker: StartMocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    service = await start_frontend()
    first = await start_mocker(*FLAGS, "--disaggregation-mode", "decode")
    second = await start_mocker(*FLAGS, "--disaggregation-mode", "decode")
    await model_ready(service, "tiny", workers=2)
    await tell(second, {"role": "prefill"})
    await changed(service, lambda: any(s.prefill is not None for s in service.models.sets()))
    answer = await ask(service.port, CHAT, chat("Hello", max_tokens=4, nvext={"extra_fields": ["worker_id"]}))
    ids = answer.json()["nvext"]["worker_id"]
    assert ids["prefill_worker_id"] == second.instance_id
    assert ids["decode_worker_id"] == first.instance_id
    readiness = (await fetch(service.port, "/v1/models/tiny/ready")).json()
    assert readiness["ready"]


async def test_what_is_in_flight_ends_as_it_began(
    start_frontend: StartFrontend,
    start_mocker: StartMocker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    service = await start_frontend()
    mover = await start_mocker("--speedup-ratio", "1", "--disaggregation-mode", "decode")
    await model_ready(service, "tiny", workers=1)
    load = Load(service)
    text = await load.answer(PROMPTS[0])
    asking = asyncio.create_task(ask(service.port, CHAT, chat(PROMPTS[0], max_tokens=200, temperature=0)))
    used = mover.runtime.metrics.admission.engine_requests
    await eventually(lambda: used.value == 1)
    status, told = await tell(mover, {"role": "agg"})
    assert status == 200
    assert told["workers"][0]["endpoint"] == "dynamo.aggregated.generate"
    assert used.value == 1
    assert "nothing is left of this worker's time at dynamo.backend.generate" not in caplog.text
    assert (await asking).json()["choices"][0]["message"]["content"].startswith(text)
    await eventually(lambda: "nothing is left of this worker's time at dynamo.backend.generate" in caplog.text)
    await changed(service, lambda: roles(service) == {"aggregated": 1})
    assert await load.answer(PROMPTS[0]) == text
    assert mover.runtime.health.snapshot().status == "ready"


async def test_what_makes_no_sense_is_refused_and_changes_nothing(
    start_mocker: StartMocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_SYSTEM_PORT", "0")
    mover = await start_mocker(*FLAGS)
    await eventually(lambda: "role" in mover.runtime.engine_routes)
    status, told = await tell(mover, {"role": "chef"})
    assert (status, told["message"]) == (400, "role: 'chef' is not one of agg, prefill, decode")
    status, told = await tell(mover, {"role": "prefill", "worker_id": 5})
    assert (status, told["message"]) == (400, "worker_id: no worker 5 in this process")
    status, told = await tell(mover, {})
    assert (status, told["workers"][0]["role"]) == (200, "agg")
