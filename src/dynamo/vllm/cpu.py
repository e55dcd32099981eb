"""What must be set for vLLM to run well without a GPU?

vLLM's defaults are made for GPUs and for large models. Everything here gives way to what the user set.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

KV_CACHE_GIB = 1  # vLLM would take nine tenths of the machine's memory
SMALL_MODEL_BYTES = 256 * 2**20
"""Below this a model's matrices are too small to share among threads: a 13 MB model made 2,564 tokens/s with one
thread, unbound, and 1,866 with two bound ones (64 streams, two cores of an AVX2 machine)."""


class Setting(NamedTuple):
    """One environment variable, and why."""

    name: str
    value: str
    why: str


def environment(weights_bytes: int, cores: int, workers: int, environ: Mapping[str, str]) -> list[Setting]:
    """Variables to set for vLLM on a CPU, those that the user has set left out.

    Args:
        weights_bytes: size of the model's weights on disk.
        cores: how many this process may use.
        workers: vLLM worker processes that share them.
        environ: the environment as it is.
    """
    settings = []
    if "VLLM_CPU_KVCACHE_SPACE" not in environ:
        settings.append(Setting("VLLM_CPU_KVCACHE_SPACE", str(KV_CACHE_GIB), "GiB of KV cache"))
    if "OMP_NUM_THREADS" not in environ and "VLLM_CPU_OMP_THREADS_BIND" not in environ:
        small = weights_bytes < SMALL_MODEL_BYTES
        threads = 1 if small else max(1, (cores - 1) // workers)
        why = "so small a model gains nothing from more" if small else "one core is left to the rest"
        settings.append(Setting("OMP_NUM_THREADS", str(threads), why))
    if "VLLM_CPU_OMP_THREADS_BIND" not in environ:
        settings.append(Setting("VLLM_CPU_OMP_THREADS_BIND", "nobind", "pinned threads fight with neighbours"))
    return settings


def has_compiler(environ: Mapping[str, str]) -> bool:
    """Whether torch can compile the model: on a CPU it needs a C++ compiler at run time."""
    return any(shutil.which(name) for name in (environ.get("CXX", ""), "g++", "clang++") if name)


def weights_bytes(directory: Path) -> int:
    """Size of the weights in a model directory; 0 where there are none to see."""
    return sum(
        os.path.getsize(path) for suffix in ("safetensors", "bin", "gguf") for path in directory.glob(f"*.{suffix}")
    )


def is_float32(directory: Path) -> bool:
    """Whether a checkpoint says that its weights are float32. vLLM's `auto` would make them bfloat16, which on a
    CPU without bfloat16 units is three to four times slower, and another model's answers besides."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    texts = [config, config.get("text_config") or {}]
    return any(
        str(text.get(key)).removeprefix("torch.") == "float32" for text in texts for key in ("dtype", "torch_dtype")
    )
