"""Where on this machine is the model that a name stands for?"""

import asyncio
import os
import re
from pathlib import Path

from dynamo.runtime.errors import CannotConnect, InvalidArgument
from dynamo.runtime.options import env_bool, env_number

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.onnx_data"]
_OTHER_FORMATS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite", "original/*"]
"""Copies of the weights that no engine here loads."""
DOWNLOAD_LIMIT_S = 4 * 3600.0  # 400 GB at 30 MB/s; DYN_MODEL_DOWNLOAD_TIMEOUT_SECS


async def fetch_model(name: str, ignore_weights: bool = False) -> str:
    """The local directory of a model: an existing directory as it is, else the hub's snapshot of that name.

    A snapshot that is already in the hub's cache is found without network when `HF_HUB_OFFLINE` is set; `HF_HOME`,
    `HF_TOKEN` and `HF_ENDPOINT` count as usual. `ignore_weights` leaves the weights out (a frontend needs none).
    Raises InvalidArgument if the name cannot stand for a model, is a GGUF file, or is not in the cache while offline;
    CannotConnect if the hub gives no answer or refuses.
    """
    local = _local_directory(name)
    if local is not None:
        return local
    limit_s = env_number("DYN_MODEL_DOWNLOAD_TIMEOUT_SECS", DOWNLOAD_LIMIT_S)
    try:
        return await asyncio.wait_for(asyncio.to_thread(_snapshot, name, ignore_weights), limit_s)
    except TimeoutError as e:
        raise CannotConnect(f"{name} was not downloaded within {limit_s:g} s; try again, it goes on from there") from e


def _local_directory(name: str) -> str | None:
    """The directory of that name, None if the name may be one of the hub's."""
    path = Path(name).expanduser()
    _refuse_gguf(name, path)
    if name and path.is_dir():
        return str(path)
    if path.is_file():
        raise InvalidArgument(f"{name} is a file: give the directory that has config.json and the tokenizer", "model")
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise InvalidArgument(f"{name!r} is neither a directory on this machine nor a hub name like org/model", "model")
    return None


def _refuse_gguf(name: str, path: Path) -> None:
    only_gguf = path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))
    if name.lower().endswith(".gguf") or only_gguf:
        raise InvalidArgument(
            f"{name} is GGUF, which this version does not serve: give a model in Hugging Face layout "
            "(config.json, tokenizer.json, *.safetensors)",
            "model",
        )


def _snapshot(name: str, ignore_weights: bool) -> str:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as e:
        raise InvalidArgument(
            f"{name} is not a directory, and huggingface_hub, which would fetch it, is not installed: "
            "give a directory, or pip install huggingface_hub",
            "model",
        ) from e
    offline = env_bool("HF_HUB_OFFLINE", False)
    ignored = [*_OTHER_FORMATS, *(_WEIGHTS if ignore_weights else [])]
    try:
        return str(snapshot_download(name, ignore_patterns=ignored, local_files_only=offline))
    except LocalEntryNotFoundError as e:
        why = "HF_HUB_OFFLINE is set" if offline else f"{_endpoint()} does not answer"
        raise (InvalidArgument if offline else CannotConnect)(_not_here(name, why)) from e
    except RepositoryNotFoundError as e:
        raise InvalidArgument(_not_here(name, f"{_endpoint()} has no such model, or HF_TOKEN may not see it")) from e
    except HFValidationError as e:
        raise InvalidArgument(f"{name!r} is not a hub name: {e}", "model") from e
    except OSError as e:  # every HTTP and connection error of the library, and a full disk
        raise CannotConnect(_not_here(name, f"{type(e).__name__}: {e}")) from e


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _not_here(name: str, why: str) -> str:
    return (
        f"model {name} is not on this machine and cannot be fetched ({why}). "
        f"Either give the path of a directory that holds it, or download it where there is network: hf download {name}"
    )
