"""By which way does KV pass between this worker and others, and how is vLLM told?"""

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from dynamo.engine.handoff import Layout
from dynamo.engine.worker_args import WorkerOptions
from dynamo.vllm.kv_directory import default_directory, open_directory

log = logging.getLogger(__name__)

TransportName = Literal["auto", "nixl", "shm"]
TRANSPORTS = ("auto", "nixl", "shm")
_HOST_ENV = "VLLM_NIXL_SIDE_CHANNEL_HOST"
_PROBE_TIMEOUT_S = 60.0  # an agent is made in half a second; two cores that load a model are slower
_PROCESSOR = "dynamo.vllm.first_token:FirstToken"
_PROBE = (
    "from nixl._api import nixl_agent, nixl_agent_config as c\n"
    "nixl_agent('probe', c(enable_prog_thread=False, num_threads=0))\n"
)


@dataclass(frozen=True)
class TransferOptions:
    """What the command line says of transfers. `host` is where other workers reach this one."""

    transport: TransportName = "auto"
    host: str = "127.0.0.1"
    directory: Path | None = None
    lease_s: int = 30


@dataclass(frozen=True)
class Transport:
    """The way that was chosen. `directory` is set where files carry the KV."""

    name: str
    why: str
    directory: Path | None = None

    @property
    def is_ours(self) -> bool:
        """Whether a connector of ours carries the KV, and not one that the user named."""
        return self.directory is not None or self.name == "nixl"


def choose(options: TransferOptions, given: Any) -> Transport:
    """Which way, and why. `given` is the `KVTransferConfig` that the user typed, or None.

    Raises:
        ValueError: what was asked for cannot be had; names the flag.
    """
    if given is not None:
        return Transport(
            str(given.kv_connector), "--kv-transfer-config says so; what is read late is not noticed there"
        )
    if options.transport == "shm":
        return _files(options, "--kv-transport shm")
    missing = _why_not_nixl()
    if missing is None:
        return Transport("nixl", "it works here" if options.transport == "auto" else "--kv-transport nixl")
    if options.transport == "nixl":
        raise ValueError(f"--kv-transport nixl: {missing}; install it (make vllm), or use --kv-transport shm")
    return _files(options, f"{missing}; this reaches workers of this machine alone")


def _files(options: TransferOptions, why: str) -> Transport:
    directory = options.directory or default_directory()
    open_directory(directory)
    return Transport("shm", why, directory)


def _why_not_nixl() -> str | None:
    """None if an agent can be made. Tried in a process of its own: UCX stays in a process that loaded it."""
    if importlib.util.find_spec("nixl") is None:
        return "NIXL is not installed"
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and words
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"NIXL made no agent within {_PROBE_TIMEOUT_S:g} s"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else f"NIXL does not work here ({lines[-1] if lines else done.returncode})"


def configure(args: Any, worker: WorkerOptions, options: TransferOptions) -> Transport:
    """Set what vLLM needs for this role in its engine arguments and in this process's environment, and say it.

    Raises ValueError as `choose`.
    """
    from vllm.config import KVTransferConfig

    chosen = choose(options, args.kv_transfer_config)
    if args.kv_transfer_config is None:
        extra: dict[str, Any] = {"kv_lease_duration": options.lease_s}
        if chosen.directory is not None:
            extra["directory"] = str(chosen.directory)
        args.kv_transfer_config = KVTransferConfig(
            kv_connector="HeldNixlConnector" if chosen.name == "nixl" else "FileConnector",
            kv_connector_module_path="dynamo.vllm.kv_nixl" if chosen.name == "nixl" else "dynamo.vllm.kv_files",
            kv_role="kv_both",  # so that it can change its role
            kv_load_failure_policy="fail" if worker.on_lost_kv == "error" else "recompute",
            kv_connector_extra_config=extra,
        )
    os.environ.setdefault(_HOST_ENV, options.host)
    if args.speculative_config is None:  # vLLM takes no processor beside speculation
        args.logits_processors = [*(args.logits_processors or ()), _PROCESSOR]
    log.warning("KV passes by %s: %s", chosen.name, chosen.why)
    return chosen


def why_no_change(config: Any, chosen: Transport | None) -> str | None:
    """Why an engine with this `VllmConfig` cannot take another role while it serves; None if it can."""
    if chosen is None:
        return (
            "this worker was started to do whole requests and has no way for KV; start it with --kv-transport nixl "
            "or shm, or as one half of a pair"
        )
    role = config.kv_transfer_config.kv_role
    if role != "kv_both":
        return f"this worker's --kv-transfer-config says kv_role {role}; with kv_both it could"
    return None


def layout_of(config: Any, transport: Transport, version: str) -> Layout:
    """What the other side's KV must be like for this engine to take it. `config` is vLLM's `VllmConfig`."""
    model = config.model_config
    facts = (
        version,
        str(model.model),
        str(model.dtype),
        str(config.cache_config.cache_dtype),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        model.get_total_num_hidden_layers(),
    )
    digest = hashlib.blake2b(msgspec.msgpack.encode(facts), digest_size=8).hexdigest()
    name = transport.name if transport.directory is None else f"{transport.name}:{transport.directory}"
    return Layout(name, digest, config.cache_config.block_size)


def kv_bytes_per_token(config: Any) -> int:
    """Bytes of KV for one token, over all layers and devices; an estimate for models with several kinds of layers."""
    import torch
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    model, cache = config.model_config, config.cache_config.cache_dtype
    dtype: torch.dtype = model.dtype if cache == "auto" else STR_DTYPE_TO_TORCH_DTYPE.get(cache, model.dtype)
    size = model.get_total_num_kv_heads() * model.get_head_size() * model.get_total_num_hidden_layers()
    return int(2 * size * dtype.itemsize)
