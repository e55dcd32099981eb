"""One prefill worker and two decode workers as processes, and a caller that does with them what a frontend does."""

import asyncio
import os
import re
import signal
import sys
import time
import urllib.request
from asyncio.subprocess import Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.client import Client
from tests.vllm.vllm_helpers import alive, descendants, pid_named

START_S = 240.0  # two cores and seven neighbours
ANSWER_S = 60.0
LEASE_S = 6
BLOCK, BLOCKS, SEQUENCES = 32, 200, 16
ENGINE = ["--max-model-len", "4096", "--enforce-eager", "--block-size", str(BLOCK)]
ENGINE += ["--max-num-seqs", str(SEQUENCES), "--num-gpu-blocks-override", str(BLOCKS)]
Answer = list[dict[str, Any]]


@dataclass
class Worker:
    """One `python -m dynamo.vllm`, in a session of its own."""

    process: Process
    log_file: Path
    client: Client | None = None
    instance_id: int = 0

    @classmethod
    async def start(cls, model: Path, log_file: Path, environ: Mapping[str, str], *flags: str) -> "Worker":
        with log_file.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dynamo.vllm", "--model", str(model), "--served-model-name", "tiny",
                *ENGINE, *flags, stdout=out, stderr=out, env=environ, start_new_session=True,
            )  # fmt: skip
        return cls(process, log_file)

    async def ready(self, runtime: DistributedRuntime) -> None:
        """Wait until it serves; fails with its log."""
        await until(lambda: "vllm is ready" in self.log(), START_S, self)
        found = re.search(r"vllm is ready: \S+ by 1 worker at dyn://(\S+)", self.log())
        assert found
        self.client = client = await runtime.endpoint(found.group(1)).client()
        (told,) = msgspec.json.decode(await asyncio.to_thread(_get, f"{self.system_url()}/engine/role"))["workers"]
        self.instance_id = told["worker_id"]
        await until(lambda: self.instance_id in client.instance_ids(), 10, self)

    async def become(self, runtime: DistributedRuntime, role: str) -> None:
        """Tell it to change its role, and find it at its new place."""
        (told,) = (await asyncio.to_thread(_post, f"{self.system_url()}/engine/role", {"role": role}))["workers"]
        assert (told["role"], told["worker_id"]) == (role, self.instance_id)
        self.client = client = await runtime.endpoint(told["endpoint"]).client()
        await until(lambda: self.instance_id in client.instance_ids(), 10, self)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def system_url(self) -> str:
        """Where its system server is."""
        found = re.search(r"listens on (http://\S+)", self.log())
        assert found
        return found.group(1)

    async def metrics(self) -> dict[str, float]:
        """All series by name and labels."""
        text = await asyncio.to_thread(_get, self.system_url() + "/metrics")
        return {
            series: float(value)
            for series, _, value in (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        }

    async def metric(self, name: str, **labels: str) -> float:
        """See `total`."""
        return total(await self.metrics(), name, **labels)

    async def held(self) -> tuple[float, float]:
        """How many handles wait, and how many have a reader."""
        name = "dynamo_component_kv_handles"
        return await self.metric(name, state="issued"), await self.metric(name, state="claimed")

    def core(self) -> int:
        """The process id of vLLM's engine core."""
        return pid_named(descendants(self.process.pid), "VLLM::EngineCore")

    async def kill(self) -> None:
        """End the front process at once; vLLM's processes end with it."""
        below = descendants(self.process.pid) if self.process.returncode is None else {}
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        for pid in alive(below):
            try:
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def total(series: Mapping[str, float], name: str, **labels: str) -> float:
    """The sum of the series of a name that have these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(v for k, v in series.items() if k.split("{")[0] == name and all(label in k for label in wanted))


async def until(condition: Callable[[], Any], timeout_s: float, *workers: Worker) -> Any:
    """Wait for something outside this process; fails with the workers' logs."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        logs = "\n".join(worker.log()[-3000:] for worker in workers)
        assert time.monotonic() < deadline, logs
        assert all(worker.process.returncode is None for worker in workers), logs
        await asyncio.sleep(0.05)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as response:
        body: bytes = response.read()
    return body.decode()


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, msgspec.json.encode(body), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return dict(msgspec.json.decode(response.read()))


async def ask(worker: Worker, wanted: PreprocessedRequest) -> Answer:
    """All items of an answer. Raises what the worker raised."""
    assert worker.client is not None
    async with asyncio.timeout(ANSWER_S):
        body = msgspec.to_builtins(wanted)
        return [item async for item in await worker.client.direct(body, worker.instance_id, annotated=False)]


def tokens(items: Answer, index: int = 0) -> list[int]:
    return [token for item in items if item.get("index", 0) == index for token in item.get("token_ids", [])]


async def prefill(worker: Worker, wanted: PreprocessedRequest) -> dict[str, Any]:
    """What a frontend puts into `prefill_result`: the first token, and the handle (None if that was all)."""
    (item,) = await ask(worker, wanted)
    return {"token_ids": item["token_ids"], "disaggregated_params": item.get("disaggregated_params"), "item": item}


def resumed(wanted: PreprocessedRequest, first: dict[str, Any]) -> PreprocessedRequest:
    """The request for the decode worker."""
    result = {key: first[key] for key in ("token_ids", "disaggregated_params")}
    return msgspec.structs.replace(wanted, prefill_result=result)


async def split(prefiller: Worker, decoder: Worker, wanted: PreprocessedRequest) -> list[int]:
    """The tokens of a whole answer, made by two workers."""
    first = await prefill(prefiller, wanted)
    if first["disaggregated_params"] is None:
        return list(first["token_ids"])
    return [*first["token_ids"], *tokens(await ask(decoder, resumed(wanted, first)))]
