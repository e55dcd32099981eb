"""A receiver of an engine's outputs, a LoRA adapter made on the spot, and what processes leave behind."""

import asyncio
import contextlib
import json
import os
import random
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from dynamo.llm.kv_events import KvEventData, LoadMetrics, StorageTier
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest
from dynamo.vllm import args
from dynamo.vllm.args import VllmOptions

ANSWER_TIMEOUT_S = 60.0
ENGINE_FLAGS = ["--max-model-len", "2048", "--enforce-eager", "--max-num-seqs", "32"]


class Recorder:
    """`EngineCallbacks` that keep all they are told, and wake whoever waits for a change."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[EngineOutput]] = {}
        self.errors: dict[str, Exception] = {}
        self.batches: list[int] = []
        self.kv: list[tuple[StorageTier, KvEventData]] = []
        self.loads: list[LoadMetrics] = []
        self.deaths: list[str] = []
        self._changed = asyncio.Event()

    def on_outputs(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        self.batches.append(len(outputs))
        for request_id, output in outputs:
            self.outputs.setdefault(request_id, []).append(output)
        self._changed.set()

    def on_error(self, request_id: str, error: Exception) -> None:
        self.errors[request_id] = error
        self._changed.set()

    def on_kv_events(self, events: list[KvEventData], dp_rank: int = 0, tier: StorageTier = "device") -> None:
        self.kv.extend((tier, event) for event in events)
        self._changed.set()

    def on_load(self, load: LoadMetrics) -> None:
        self.loads.append(load)
        self._changed.set()

    def on_death(self, reason: str) -> None:
        self.deaths.append(reason)
        self._changed.set()

    async def until(self, condition: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Wait until `condition()` holds after one of the calls above. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def answer(self, request_id: str) -> list[EngineOutput]:
        """All outputs of a request, once it ended; raises its error if it failed."""

        def ended() -> bool:
            outputs = self.outputs.get(request_id, [])
            return request_id in self.errors or bool(outputs and outputs[-1].finish_reason)

        await self.until(ended)
        if request_id in self.errors:
            raise self.errors[request_id]
        return self.outputs[request_id]


def request(token_ids: list[int], model: str = "tiny", **sections: Any) -> PreprocessedRequest:
    """A request from plain dicts."""
    return msgspec.convert(
        {"model": model, "token_ids": token_ids, "eos_token_ids": [1]} | sections, PreprocessedRequest
    )


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def vllm_options(model: Path, *flags: str) -> VllmOptions:
    """Options as the command line would make them, settled for this machine."""
    words = args.parse_ours(["--model", str(model), *ENGINE_FLAGS, *flags])
    args.before_vllm(words)
    options = args.engine_options(words)
    args.settle(options, model)
    return options


def make_lora(directory: Path, model: Path, rank: int = 8) -> Path:
    """A random adapter on the attention's query and value projections, strong enough to change every answer."""
    config = json.loads((model / "config.json").read_bytes())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head = hidden // config["num_attention_heads"]
    sizes = {"q_proj": config["num_attention_heads"] * head, "v_proj": config["num_key_value_heads"] * head}
    rnd = random.Random(3)
    tensors = {}
    for layer in range(layers):
        for module, size in sizes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = ([rank, hidden], [rnd.gauss(0, 0.3) for _ in range(rank * hidden)])
            tensors[f"{name}.lora_B.weight"] = ([size, rank], [rnd.gauss(0, 0.3) for _ in range(size * rank)])
    directory.mkdir(parents=True)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    settings |= {"target_modules": list(sizes), "lora_dropout": 0.0, "base_model_name_or_path": str(model)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def write_safetensors(path: Path, tensors: dict[str, tuple[list[int], list[float]]]) -> None:
    """Float32 tensors, given as shape and values, in the safetensors format."""
    header, blobs, at = {}, [], 0
    for name, (shape, values) in tensors.items():
        blob = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def descendants(pid: int) -> dict[int, str]:
    """The processes below `pid` and their names (Linux)."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = name_of(int(child))
            found |= descendants(int(child))
    return found


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pids: Iterable[int]) -> list[int]:
    """Those of `pids` that still run; a zombie does not."""
    return [pid for pid in pids if state_of(pid) not in ("", "Z")]


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def shared_memory(pids: Iterable[int]) -> set[str]:
    """The segments and semaphores in shared memory that some of `pids` have mapped now."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found |= {line.split(None, 5)[5] for line in maps.splitlines() if "/dev/shm/" in line}
    return {path for path in found if not path.endswith("(deleted)")}


def pid_named(pids: dict[int, str], name: str) -> int:
    """The one of `pids` whose process title has `name` in it."""
    (pid,) = [pid for pid, title in pids.items() if name in title]
    return pid


def still_there(paths: Iterable[str]) -> list[str]:
    """Those of `paths` that exist."""
    return [path for path in paths if os.path.exists(path)]
