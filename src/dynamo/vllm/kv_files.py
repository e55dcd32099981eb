"""How does KV pass between vLLM workers of one machine where NIXL does not work? By files in shared memory.

The prefill side copies a prompt's blocks to a file once they are computed, and its own blocks are free again. The
decode side copies them into blocks of its own. A file carries what it is and a checksum; whoever has it open reads
what was written, also when it is removed meanwhile.

    file = magic, u32 length of the header, header (msgpack `Header`), then per layer: blocks, in the prompt's order
"""

import os
import secrets
import stat
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from dynamo.vllm.kv_directory import file_path

logger = init_logger("vllm.dynamo.kv_files")

_MAGIC = b"DYNKV1\0\0"
_LENGTH = struct.Struct("<I")
_FINISHED = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
_MAX_HEADER = 4096  # bytes; a real one has 100


class Header(msgspec.Struct):
    """What a file holds."""

    blocks: int
    layers: int
    block_bytes: int
    checksum: int


@dataclass(slots=True)
class Save:
    """Blocks to copy to a file."""

    file: str
    block_ids: list[int]


@dataclass(slots=True)
class Load:
    """Blocks to fill from a file, whose first `skip` blocks are here already."""

    request_id: str
    file: str
    skip: int
    block_ids: list[int]


@dataclass
class _Work(KVConnectorMetadata):  # type: ignore[misc]
    save: list[Save] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)


@dataclass
class FileStats(KVConnectorStats):  # type: ignore[misc]
    """Transfers since the last report, under the names that vLLM's NIXL connector uses."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {"transfer_duration": [], "bytes_transferred": [], "num_failed_transfers": []}

    def aggregate(self, other: Any) -> Any:
        for name, values in other.data.items():
            self.data[name].extend(values)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {"transfers": len(self.data["transfer_duration"]), "bytes": sum(self.data["bytes_transferred"])}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class FileConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Both halves: vLLM makes one in its scheduler and one in its worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError("--kv-transport shm: models with several kinds of KV cache need nixl")
        if vllm_config.parallel_config.world_size != 1:
            raise ValueError("--kv-transport shm: is for workers of one device; use nixl")
        self._directory = Path(self._kv_transfer_config.get_from_extra_config("directory", ""))
        self._block_size = vllm_config.cache_config.block_size
        self._num_blocks = kv_cache_config.num_blocks
        self._is_scheduler = role == KVConnectorRole.SCHEDULER
        # the scheduler's
        self._saving: dict[str, tuple[Any, str]] = {}
        self._local_blocks: dict[str, int] = {}
        self._work = _Work()
        # the worker's
        self._layers: list[torch.Tensor] = []
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._stats = FileStats()

    # --- scheduler

    def on_new_request(self, request: Any) -> None:
        params = request.kv_transfer_params
        if params and params.get("do_remote_decode"):
            self._saving[request.request_id] = (request, secrets.token_hex(16))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return 0, False
        self._local_blocks[request.request_id] = num_computed_tokens // self._block_size
        missing = _kept(request) - num_computed_tokens
        return max(0, missing), missing > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return
        params["do_remote_prefill"] = False
        skip = self._local_blocks.pop(request.request_id, 0)
        if num_external_tokens:
            count = -(-_kept(request) // self._block_size)
            ids = blocks.get_block_ids()[0][skip:count]
            self._work.load.append(Load(request.request_id, params["file"], skip, ids))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        work, self._work = self._work, _Work()
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            saving = self._saving.get(request_id)
            if saving is None:
                continue
            request, name = saving
            if request.num_computed_tokens + scheduled >= request.num_prompt_tokens:
                count = -(-request.num_prompt_tokens // self._block_size)
                ids = self._kv_cache_manager.get_block_ids(request_id)[0][:count]
                work.save.append(Save(name, ids))
        return work

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._local_blocks.pop(request.request_id, None)
        saving = self._saving.pop(request.request_id, None)
        if saving is None:
            return False, None
        if request.status not in _FINISHED:
            file_path(self._directory, saving[1]).unlink(missing_ok=True)
            return False, None
        found = {"do_remote_prefill": True, "do_remote_decode": False, "file": saving[1]}
        return False, found | {"remote_num_tokens": request.num_prompt_tokens}

    # --- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        for name, cache in kv_caches.items():
            try:  # never a copy: what is loaded must land in the cache itself
                self._layers.append(cache.view(torch.uint8).view(self._num_blocks, -1))
            except RuntimeError as error:
                raise ValueError(f"--kv-transport shm: cannot use the layout of {name}'s KV cache; use nixl") from error

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().load:
            began = time.perf_counter()
            try:
                size = self._read(load)
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                logger.warning("the KV of request %s cannot be had: %s", load.request_id, error)
                self._failed.add(load.request_id)
                self._stats.data["num_failed_transfers"].append(1)
            else:
                self._stats.data["transfer_duration"].append(time.perf_counter() - began)
                self._stats.data["bytes_transferred"].append(size)
            self._finished.add(load.request_id)

    def _read(self, load: Load) -> int:
        """Fill blocks; returns the bytes copied. Raises OSError, ValueError, MsgspecError."""
        with file_path(self._directory, load.file).open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("the file is not of this kind")
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = msgspec.msgpack.decode(file.read(min(length, _MAX_HEADER)), type=Header)
            row = int(self._layers[0].shape[1])
            if (header.layers, header.block_bytes) != (len(self._layers), row):
                raise ValueError("the file is of another model")
            if header.blocks != load.skip + len(load.block_ids):
                raise ValueError(f"the file has {header.blocks} blocks, not {load.skip + len(load.block_ids)}")
            buffer = torch.empty(header.layers, header.blocks, row, dtype=torch.uint8)
            view = memoryview(buffer.numpy()).cast("B")
            if file.readinto(view) != len(view) or xxhash.xxh3_64_intdigest(view) != header.checksum:
                raise ValueError("the file is cut off or was changed")
        ids = torch.tensor(load.block_ids)
        for layer, blocks in zip(self._layers, buffer, strict=True):
            layer[ids.to(layer.device)] = blocks[load.skip :].to(layer.device)
        return len(load.block_ids) * header.layers * row

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All is loaded before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All is saved after the last layer."""

    def wait_for_save(self) -> None:
        for save in self._get_connector_metadata().save:
            try:
                self._write(save)
            except OSError as error:  # such as a full disk; whoever wants the file will find none
                logger.error("the KV of a prompt cannot be kept in %s: %s", self._directory, error)  # noqa: TRY400
                file_path(self._directory, save.file).unlink(missing_ok=True)

    def _write(self, save: Save) -> None:
        ids = torch.tensor(save.block_ids)
        data = torch.stack([layer[ids.to(layer.device)].cpu() for layer in self._layers])
        view = memoryview(data.numpy()).cast("B")
        layers, blocks, row = data.shape
        header = msgspec.msgpack.encode(Header(blocks, layers, row, xxhash.xxh3_64_intdigest(view)))
        path = file_path(self._directory, save.file)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + _LENGTH.pack(len(header)) + header)
            file.write(view)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        finished, failed = self._finished, self._failed
        self._finished, self._failed = set(), set()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._is_scheduler or self._stats.is_empty():
            return None
        stats, self._stats = self._stats, FileStats()
        return stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return FileStats(data=data) if data is not None else FileStats()

    def take_events(self) -> Iterable[Any]:
        return ()


def _kept(request: Any) -> int:
    """The tokens whose KV must be in the file: the prompt's, less the first token of the answer where it is part of it
    (`dynamo.vllm.following`). A file of any other length is not this prompt's."""
    count: int = request.num_prompt_tokens
    return count - 1 if request.kv_transfer_params.get("remote_num_tokens") == count - 1 else count
