"""What do the tests of the vLLM room share? One answer book of vLLM's own, and one running engine a driver."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dynamo.engine.contract import EngineConfig
from dynamo.vllm.engine import DRIVER_ENV, VllmEngine
from tests.vllm.vllm_helpers import Recorder, descendants, make_lora, vllm_options

ENGINE_TIMEOUT_S = 240  # two cores and seven neighbours


@pytest.fixture(scope="session")
def lora_dir(weights_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter for the model of `weights_dir`."""
    return make_lora(tmp_path_factory.mktemp("lora") / "adapter", weights_dir)


@pytest.fixture(scope="session")
def vllm_answers(weights_dir: Path, lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """vLLM's own answers to the cases, from a process that has ended before any engine of ours starts."""
    out = tmp_path_factory.mktemp("reference") / "answers.json"
    flags = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 32}
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.vllm_reference", weights_dir, lora_dir, json.dumps(flags), out],
        cwd=root, env=environ, capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(out.read_bytes())
    return answers


@pytest.fixture(scope="module", autouse=True)
def environment_restored() -> Iterator[None]:
    """Settling a machine for vLLM, and vLLM itself, set variables that other rooms' tests must not see."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@dataclass
class Running:
    """An engine that serves."""

    driver: str
    engine: VllmEngine
    config: EngineConfig
    seen: Recorder
    processes: dict[int, str]
    """The engine's own, by process id: others of this test run may have engines too."""


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["core", "async"])
async def running(
    request: pytest.FixtureRequest, vllm_answers: dict[str, Any], weights_dir: Path, lora_dir: Path
) -> AsyncIterator[Running]:
    """One engine a driver, shared by a module's tests; vLLM's answers are there before it starts."""
    adapters = ["--enable-lora", "--lora-modules", f"adapter={lora_dir}"] if request.param == "async" else []
    options = vllm_options(weights_dir, *adapters)
    seen, others = Recorder(), descendants(os.getpid())
    engine = VllmEngine(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DRIVER_ENV, request.param)
        config = await engine.start(seen)
    try:
        processes = {pid: name for pid, name in descendants(os.getpid()).items() if pid not in others}
        yield Running(request.param, engine, config, seen, processes)
    finally:
        await engine.stop()
