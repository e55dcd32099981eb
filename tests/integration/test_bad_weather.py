"""What do users see when processes die, hang, leave, or find a broken disk?"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.deployment import Deployment, chat_body, free_port

# Decoding takes 20 to 60 ms a step: at a tenth of that, 400 tokens last a second or two.
STEADY = ["--speedup-ratio", "10"]


@dataclass
class Answer:
    """What came of one streaming request."""

    worker: int | None = None
    status: int = 0
    tokens: int = 0
    finished: bool = False
    error: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ended_well(self) -> bool:
        return self.finished and not self.error

    @property
    def ended_with_an_error(self) -> bool:
        return bool(self.error) and not self.finished


async def ask(session: aiohttp.ClientSession, base: str, **fields: Any) -> Answer:
    """Stream one chat to its end, whatever that is."""
    answer = Answer()
    started = time.monotonic()
    with contextlib.suppress(aiohttp.ClientError):
        async with session.post(f"{base}/v1/chat/completions", json=chat_body(**fields)) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = await response.json()
                return answer
            async for raw in response.content:
                line = raw.decode().strip()
                if line == "data: [DONE]":
                    answer.finished = True
                elif line.startswith("data: "):
                    value = json.loads(line[6:])
                    if "error" in value:
                        answer.error = value
                    elif value.get("choices") and value["choices"][0]["delta"].get("content"):
                        answer.tokens += 1
                    if worker := (value.get("nvext") or {}).get("worker_id"):
                        answer.worker = worker.get("decode_worker_id")
    answer.seconds = time.monotonic() - started
    return answer


async def until(true: Any, what: str, timeout_s: float = 10.0) -> float:
    started = time.monotonic()
    while not await asyncio.to_thread(true):
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


def inflight(port: int) -> float:
    """Requests in flight at a worker, by its own metrics."""
    import urllib.request

    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    lines = [li for li in text.splitlines() if li.startswith("dynamo_component_inflight_requests{")]
    return sum(float(li.rsplit(" ", 1)[1]) for li in lines if 'dynamo_endpoint="generate"' in li)


def copy_of(model: Path, place: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(model, place))


async def test_a_worker_killed_under_load_fails_its_own_requests_alone(deployment: Deployment, model_dir: Path) -> None:
    port = {name: free_port() for name in "ab"}
    victim = deployment.mocker(model_dir, *STEADY, env={"DYN_SYSTEM_PORT": str(port["a"])})
    deployment.mocker(model_dir, *STEADY, env={"DYN_SYSTEM_PORT": str(port["b"])})
    deployment.frontend()
    deployment.wait_for(workers=2)
    async with aiohttp.ClientSession() as session:
        running = [asyncio.create_task(ask(session, deployment.base, max_tokens=400)) for _ in range(16)]
        await until(lambda: inflight(port["a"]) == inflight(port["b"]) == 8, "both workers are busy")
        killed = time.monotonic()
        victim.signal(signal.SIGKILL)
        # New requests go to the other worker alone, from the first moment on: none may fail but those that were
        # sent in the instant before the kernel told of the death.
        later = []
        while time.monotonic() - killed < 1.0:
            later.append(asyncio.create_task(ask(session, deployment.base, max_tokens=2)))
            await asyncio.sleep(0.02)
        out_of_rotation = len(deployment.instances()) == 1
        answers = await asyncio.gather(*running)
        after = await asyncio.gather(*later)
    lost = [a for a in answers if a.ended_with_an_error]
    well = [a for a in answers if a.ended_well]
    assert len(lost) == len(well) == 8
    assert all(a.error["error"]["message"] for a in lost)
    assert all(a.seconds < 3 for a in lost)
    assert out_of_rotation
    assert all(a.ended_well for a in after[2:]), [a for a in after if not a.ended_well][:3]


async def test_a_hung_worker_ends_its_requests_in_bounded_time(deployment: Deployment, model_dir: Path) -> None:
    worker = deployment.mocker(model_dir, *STEADY)
    deployment.frontend()
    deployment.wait_for()
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(ask(session, deployment.base, max_tokens=4000))
        await asyncio.sleep(0.5)
        worker.signal(signal.SIGSTOP)
        answer = await asyncio.wait_for(request, 12)
    assert answer.ended_with_an_error
    assert answer.tokens > 0
    worker.signal(signal.SIGCONT)


async def test_a_worker_that_leaves_in_order_fails_nobody(deployment: Deployment, model_dir: Path) -> None:
    leaving = deployment.mocker(model_dir, *STEADY)
    deployment.mocker(model_dir, *STEADY)
    deployment.frontend()
    deployment.wait_for(workers=2)
    async with aiohttp.ClientSession() as session:
        requests = [asyncio.create_task(ask(session, deployment.base, max_tokens=100)) for _ in range(8)]
        await asyncio.sleep(0.2)
        leaving.signal(signal.SIGTERM)
        for _ in range(50):
            requests.append(asyncio.create_task(ask(session, deployment.base, max_tokens=4)))
            await asyncio.sleep(0.02)
        answers = await asyncio.gather(*requests)
    assert [a for a in answers if not a.ended_well] == []
    assert await asyncio.to_thread(leaving.wait, 15) == 0


async def test_a_killed_frontend_frees_its_requests_and_another_takes_over(
    deployment: Deployment, model_dir: Path
) -> None:
    system_port = free_port()
    deployment.mocker(model_dir, "--speedup-ratio", "1", env={"DYN_SYSTEM_PORT": str(system_port)})
    frontend = deployment.frontend()
    deployment.wait_for()
    async with aiohttp.ClientSession() as session:
        requests = [asyncio.create_task(ask(session, deployment.base, max_tokens=4000)) for _ in range(8)]
        await until(lambda: inflight(system_port) == 8, "the worker is busy")
        frontend.kill()
        assert await until(lambda: inflight(system_port) == 0, "the worker has freed them") < 2
        answers = await asyncio.gather(*requests)
        assert not any(a.finished for a in answers)
        await asyncio.to_thread(deployment.frontend)
        await asyncio.to_thread(deployment.wait_for)
        assert (await ask(session, deployment.base, max_tokens=4)).ended_well


async def test_a_client_that_leaves_frees_its_request(deployment: Deployment, model_dir: Path) -> None:
    system_port = free_port()
    deployment.mocker(model_dir, "--speedup-ratio", "1", env={"DYN_SYSTEM_PORT": str(system_port)})
    deployment.frontend()
    deployment.wait_for()
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(ask(session, deployment.base, max_tokens=4000))
        await until(lambda: inflight(system_port) == 1, "the worker is busy")
        request.cancel()
        assert await until(lambda: inflight(system_port) == 0, "the worker has freed it") < 1


async def test_models_come_and_go_without_a_restart(deployment: Deployment, model_dir: Path) -> None:
    deployment.frontend()
    assert deployment.models() == set()
    first = deployment.mocker(model_dir, name="one")
    deployment.wait_for("one")
    second = deployment.mocker(model_dir, name="two")
    deployment.wait_for("two", workers=2)
    assert deployment.models() == {"one", "two"}
    first.signal(signal.SIGTERM)
    deployment.until(lambda: deployment.models() == {"two"}, "one is gone")
    async with aiohttp.ClientSession() as session:
        assert (await ask(session, deployment.base, model="one", max_tokens=4)).status == 404
        assert (await ask(session, deployment.base, model="two", max_tokens=4)).ended_well
    second.kill()
    deployment.until(lambda: deployment.models() == set(), "two is gone")


async def test_no_worker_is_503_or_404_and_at_once(deployment: Deployment, model_dir: Path) -> None:
    deployment.frontend()
    async with aiohttp.ClientSession() as session:
        answer = await ask(session, deployment.base, model="nobody")
    assert answer.status == 404
    assert answer.error["error"]["code"] == "model_not_found"
    assert answer.seconds < 1


async def test_garbage_on_the_request_plane_harms_nobody(deployment: Deployment, model_dir: Path) -> None:
    worker = deployment.mocker(model_dir, *STEADY)
    deployment.frontend()
    deployment.wait_for()
    record = deployment.get("/health")["instances"][0]["transport"]["tcp"]
    host, port = record.partition("/")[0].rsplit(":", 1)
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(ask(session, deployment.base, max_tokens=100))
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, b"DYN1\x01\xff\xff\xff\xff\x02", os.urandom(65536)):
            with socket.create_connection((host, int(port)), 5) as s:
                s.sendall(garbage)
                s.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    while s.recv(65536):  # until it hangs up on us
                        pass
        assert (await request).ended_well
        assert (await ask(session, deployment.base, max_tokens=4)).ended_well
    assert worker.popen.poll() is None


async def test_two_workers_that_claim_one_instance_id_are_told_apart(deployment: Deployment, model_dir: Path) -> None:
    code = """
import asyncio, sys
from dynamo.runtime import dynamo_worker
async def handler(payload, stream=None): ...
@dynamo_worker()
async def worker(runtime):
    def handle(payload, stream):
        stream.send(sys.argv[1]); stream.end()
    served = await runtime.endpoint("ns.comp.ep").start_push_endpoint(handle, instance_id=77)
    print("serving", flush=True)
    await served.finished()
asyncio.run(worker())
"""
    first = deployment.start("-c", code, "first")
    deployment.until(lambda: "serving" in first.log(), "the first serves")
    second = deployment.start("-c", code, "second")
    assert await asyncio.to_thread(second.wait) != 0
    assert "77" in second.log() or f"{77:x}" in second.log()
    assert "DiscoveryError" in second.log()
    assert first.popen.poll() is None
    first.kill()  # not even a crash keeps the id taken
    third = deployment.start("-c", code, "third")
    deployment.until(lambda: "serving" in third.log(), "the third serves", 15)


async def test_a_discovery_directory_that_breaks_stops_nothing_that_runs(
    deployment: Deployment, model_dir: Path
) -> None:
    deployment.mocker(model_dir, *STEADY)
    deployment.frontend()
    deployment.wait_for()
    hidden = deployment.discovery.with_name("hidden")
    deployment.discovery.rename(hidden)
    deployment.discovery.write_text("not a directory")
    async with aiohttp.ClientSession() as session:
        ended = time.monotonic() + 4
        while time.monotonic() < ended:
            assert (await ask(session, deployment.base, max_tokens=4)).ended_well
            await asyncio.sleep(0.1)
        late = deployment.mocker(model_dir, *STEADY, name="late")
        assert await asyncio.to_thread(late.wait) == 1
        assert str(deployment.discovery) in late.log()
        assert "Traceback" not in late.log()
        deployment.discovery.unlink()
        hidden.rename(deployment.discovery)
        deployment.mocker(model_dir, *STEADY, name="later")
        await asyncio.to_thread(deployment.wait_for, "later", 2)
        assert (await ask(session, deployment.base, max_tokens=4)).ended_well


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for almost nothing."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no right to mount: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_a_full_disk_stops_nothing_that_runs_and_is_said_to_who_comes(
    deployment: Deployment, model_dir: Path, small_disk: Path
) -> None:
    deployment.discovery = small_disk / "discovery"
    deployment.mocker(model_dir, *STEADY)
    deployment.frontend()
    deployment.wait_for()
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as f:
        while True:
            f.write(b"x" * 512)
    late = deployment.mocker(model_dir, *STEADY, name="late")
    assert await asyncio.to_thread(late.wait) == 1
    assert "No space left" in late.log()
    assert "Traceback" not in late.log()
    async with aiohttp.ClientSession() as session:
        ended = time.monotonic() + 12  # longer than a lease: heartbeats must not need room
        while time.monotonic() < ended:
            assert (await ask(session, deployment.base, max_tokens=4)).ended_well
            await asyncio.sleep(0.25)


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{"), ("config.json", "not json"), ("config.json", None), ("tokenizer.json", None)],
)
def test_a_corrupt_model_directory_is_one_line_and_a_status(
    deployment: Deployment, model_dir: Path, tmp_path: Path, file: str, content: str | None
) -> None:
    model = copy_of(model_dir, tmp_path / "model")
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    worker = deployment.mocker(model)
    assert worker.wait() in (1, 2)
    assert file.split(".")[0] in worker.log()
    assert "Traceback" not in worker.log()


async def test_a_worker_that_disagrees_on_a_model_gets_no_requests(
    deployment: Deployment, model_dir: Path, tmp_path: Path
) -> None:
    other = copy_of(model_dir, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages }}"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    frontend = deployment.frontend()
    deployment.mocker(model_dir)
    deployment.wait_for()
    (first,) = deployment.instances()
    deployment.mocker(other)
    await asyncio.to_thread(deployment.until, lambda: "checksum" in frontend.log(), "the disagreement is logged")
    async with aiohttp.ClientSession() as session:
        wanted = {"max_tokens": 2, "nvext": {"extra_fields": ["worker_id"]}}
        answers = [await ask(session, deployment.base, **wanted) for _ in range(6)]
    assert {a.worker for a in answers} == {first}
