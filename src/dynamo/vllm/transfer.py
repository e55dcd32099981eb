"""What becomes of KV that was kept, and of what vLLM counts of its transfers?"""

import asyncio
import logging
from typing import Any

import msgspec

from dynamo.engine.handoff import Layout
from dynamo.engine.transfer_metrics import DecodeMetrics
from dynamo.vllm.driver import Driver
from dynamo.vllm.kv_directory import file_path
from dynamo.vllm.transport import Transport

log = logging.getLogger(__name__)

_RELEASE_TIMEOUT_S = 60.0  # an engine answers between two steps


class KvReturn:
    """Gives back what an engine keeps for decode workers. vLLM does so itself once it was read or its lease is over."""

    def __init__(self, driver: Driver, transport: Transport) -> None:
        self._driver = driver
        self._transport = transport
        self._waiting: list[str] = []
        self._task: asyncio.Task[None] | None = None

    def free(self, params: Any, how: str) -> None:
        """See `Ledger.free`."""
        if not isinstance(params, dict):
            return
        if self._transport.directory is not None and "file" in params:
            file_path(self._transport.directory, params["file"]).unlink(missing_ok=True)
        elif how == "released" and "remote_request_id" in params:
            self._waiting.append(params["remote_request_id"])
            if self._task is None or self._task.done():
                self._task = asyncio.get_running_loop().create_task(self._release(), name="vllm-kv-release")

    async def _release(self) -> None:
        while self._waiting:
            request_ids, self._waiting = self._waiting, []
            try:
                async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                    await self._driver.control("collective_rpc", "dynamo_give_back_kv", None, (request_ids,))
            except Exception as error:  # noqa: BLE001 - vLLM's own kinds; the lease frees it all the same
                log.warning("the KV of %d prompts stays until its lease ends: %r", len(request_ids), error)


def count_transfers(counted: dict[str, Any], metrics: DecodeMetrics) -> None:
    """Add what vLLM's connector counted since it was asked last. Other connectors than ours may count nothing."""
    for size, seconds in zip(counted.get("bytes_transferred", ()), counted.get("transfer_duration", ()), strict=False):
        metrics.transferred(size, seconds)
        log.info("transfer: %.2f MB of KV in %.2f ms", size / 1e6, seconds * 1e3)
    failed = sum(len(counted.get(name, ())) for name in ("num_failed_transfers", "num_failed_handshakes"))
    if failed:
        metrics.failed(failed)


def describe(transport: Transport | None, layout: Layout | None) -> dict[str, Any]:
    """What a model card says of a worker's transfers, so that routers can pair workers that fit."""
    if transport is None or layout is None:
        return {}
    return {"kv_transfer": {"transport": transport.name, "layout": msgspec.to_builtins(layout)}}
