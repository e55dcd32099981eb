"""What makes a process ready, and what a canary finds out."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynamo.health_check import HealthCheckPayload
from dynamo.runtime import Context, DistributedRuntime
from dynamo.runtime.health import (
    HEALTH_CHECK_KEY,
    Canary,
    CanaryOptions,
    Health,
    Say,
    canary_options,
    load_health_check_from_env,
)
from dynamo.runtime.metrics import Metrics

# --- the report


def test_a_process_is_ready_when_all_its_endpoints_are() -> None:
    health = Health()
    assert health.snapshot().status == "notready"
    health.set_endpoint("generate", True)
    health.set_endpoint("files", False)
    report = health.snapshot()
    assert (report.status, report.endpoints) == ("notready", {"files": "notready", "generate": "ready"})
    health.set_endpoint("files", True)
    assert health.snapshot().status == "ready"


def test_an_endpoint_is_ready_when_all_its_instances_are() -> None:
    health = Health()
    health.set_endpoint("generate", True, 1)
    health.set_endpoint("generate", False, 2)
    assert not health.endpoint_ready("generate")
    health.remove_endpoint("generate", 2)
    assert health.ready
    health.remove_endpoint("generate", 1)
    assert health.snapshot().endpoints == {}
    assert not health.ready


def test_what_the_program_says_of_itself_counts() -> None:
    health = Health()
    health.set_ready(True)
    assert health.ready
    health.set_endpoint("generate", False)
    assert not health.ready
    health.set_endpoint("generate", True)
    health.set_ready(False)
    assert not health.ready


def test_uptime_is_whole_seconds_and_nanoseconds() -> None:
    uptime = Health().snapshot().uptime
    assert uptime.secs == 0
    assert 0 < uptime.nanos < 1_000_000_000


def test_the_starting_status_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_SYSTEM_STARTING_HEALTH_STATUS", "ready")
    assert Health().ready
    monkeypatch.setenv("DYN_SYSTEM_STARTING_HEALTH_STATUS", "perhaps")
    with pytest.raises(ValueError, match="DYN_SYSTEM_STARTING_HEALTH_STATUS"):
        Health()


# --- the variables of the canary


def test_canaries_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert canary_options() == CanaryOptions(enabled=False, wait_s=10.0, timeout_s=3.0)
    monkeypatch.setenv("DYN_HEALTH_CHECK_ENABLED", "true")
    monkeypatch.setenv("DYN_CANARY_WAIT_TIME", "1.5")
    monkeypatch.setenv("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "7")
    assert canary_options() == CanaryOptions(enabled=True, wait_s=1.5, timeout_s=7.0)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DYN_HEALTH_CHECK_ENABLED", "perhaps"),
        ("DYN_CANARY_WAIT_TIME", "0"),
        ("DYN_CANARY_WAIT_TIME", "soon"),
        ("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "-1"),
        ("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "nan"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, text: str) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=variable):
        canary_options()


def test_the_payload_is_json_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_health_check_from_env() is None
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", '{"token_ids": [1]}')
    assert load_health_check_from_env() == {"token_ids": [1]}
    file = tmp_path / "payload.json"
    file.write_text('{"token_ids": [2]}')
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", f"@{file}")
    assert load_health_check_from_env() == {"token_ids": [2]}


@pytest.mark.parametrize("text", ["{", "[1]", "@/nowhere.json"])
def test_a_wrong_payload_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", text)
    with pytest.raises(ValueError, match="DYN_HEALTH_CHECK_PAYLOAD"):
        load_health_check_from_env()


def test_an_engines_default_payload_gives_way_to_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Payload(HealthCheckPayload):
        def __init__(self) -> None:
            self.default_payload = {"token_ids": [1]}
            super().__init__()

    assert Payload().to_dict() == {"token_ids": [1]}
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", '{"token_ids": [9]}')
    assert Payload().to_dict() == {"token_ids": [9]}
    with pytest.raises(NotImplementedError, match="default_payload"):
        HealthCheckPayload()


# --- the canary

FAST = CanaryOptions(enabled=True, wait_s=0.04, timeout_s=0.2)


class Engine:
    """What a canary asks: answers, fails or hangs, as `mode` says."""

    def __init__(self) -> None:
        self.mode = "answer"
        self.asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.answers = 0

    async def probe(self, payload: dict[str, Any]) -> None:
        self.asked.put_nowait(payload)
        if self.mode == "hang":
            await asyncio.Event().wait()
        if self.mode == "fail":
            raise RuntimeError("broken")
        self.answers += 1


def saying(health: Health) -> Say:
    """What a canary says, told to `health`."""

    async def say(is_well: bool) -> None:
        health.set_endpoint("generate", is_well)

    return say


@pytest.fixture
async def watched() -> AsyncIterator[tuple[Health, Engine, Metrics]]:
    health, engine, metrics = Health(), Engine(), Metrics(1)
    health.set_endpoint("generate", True)
    canary = Canary(saying(health), "generate", engine.probe, {"n": 1}, FAST, lambda: engine.answers, metrics=metrics)
    canary.start()
    yield health, engine, metrics
    await canary.stop()


async def until(health: Health, ready: bool) -> None:
    async with asyncio.timeout(10):
        while health.ready != ready:  # noqa: ASYNC110 - health is asked, it does not tell
            await asyncio.sleep(0.005)


async def test_an_idle_endpoint_is_asked_with_the_marked_payload(watched: tuple[Health, Engine, Metrics]) -> None:
    health, engine, _ = watched
    assert await asyncio.wait_for(engine.asked.get(), 10) == {"n": 1, HEALTH_CHECK_KEY: True}
    assert health.ready


async def test_a_busy_endpoint_is_not_asked() -> None:
    health, engine, looks = Health(), Engine(), 0
    enough = asyncio.Event()

    def always_another_answer() -> int:
        nonlocal looks
        looks += 1
        if looks == 20:
            enough.set()
        return looks

    canary = Canary(saying(health), "generate", engine.probe, {}, FAST, always_another_answer)
    canary.start()
    await asyncio.wait_for(enough.wait(), 10)
    await canary.stop()
    assert engine.asked.empty()


@pytest.mark.parametrize("mode", ["hang", "fail"])
async def test_no_answer_is_notready_until_there_is_one(watched: tuple[Health, Engine, Metrics], mode: str) -> None:
    health, engine, metrics = watched
    engine.mode = mode
    await until(health, ready=False)
    engine.mode = "answer"
    await until(health, ready=True)
    text = metrics.render().decode()
    assert 'canary_total{dynamo_endpoint="generate",outcome="failure"' in text
    assert 'canary_total{dynamo_endpoint="generate",outcome="success"' in text


async def test_an_answer_to_anybody_is_as_good_as_the_canarys(watched: tuple[Health, Engine, Metrics]) -> None:
    health, engine, _ = watched
    engine.mode = "hang"
    await until(health, ready=False)
    engine.answers += 1
    await until(health, ready=True)


async def test_a_canary_goes_the_way_of_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HEALTH_CHECK_ENABLED", "1")
    monkeypatch.setenv("DYN_CANARY_WAIT_TIME", "0.04")
    monkeypatch.setenv("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "0.2")
    runtime = DistributedRuntime(discovery_backend="mem")
    asked: asyncio.Queue[Any] = asyncio.Queue()
    stopped = asyncio.Event()
    hang = False

    async def handler(request: Any, context: Context) -> AsyncIterator[dict[str, Any]]:
        asked.put_nowait(request)
        if hang:
            try:
                await context.async_killed_or_stopped()
            finally:
                stopped.set()
        yield {"ok": True}

    await runtime.endpoint("ns.worker.generate").start_endpoint(handler, health_check_payload={"prompt": "hi"})
    assert await asyncio.wait_for(asked.get(), 10) == {"prompt": "hi", HEALTH_CHECK_KEY: True}
    assert runtime.health.snapshot().endpoints == {"generate": "ready"}
    hang = True
    await until(runtime.health, ready=False)
    await asyncio.wait_for(stopped.wait(), 10)  # a canary that gave up does not leave its request behind
    hang = False
    await until(runtime.health, ready=True)
    await runtime.close()


async def test_the_operators_payload_wins_over_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_HEALTH_CHECK_ENABLED", "1")
    monkeypatch.setenv("DYN_CANARY_WAIT_TIME", "0.04")
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", json.dumps({"from": "operator"}))
    runtime = DistributedRuntime(discovery_backend="mem")
    asked: asyncio.Queue[Any] = asyncio.Queue()

    async def handler(request: Any) -> AsyncIterator[int]:
        asked.put_nowait(request)
        yield 1

    await runtime.endpoint("ns.worker.generate").start_endpoint(handler, health_check_payload={"from": "program"})
    assert (await asyncio.wait_for(asked.get(), 10))["from"] == "operator"
    await runtime.close()
