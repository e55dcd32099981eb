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

_ENGINE, _REQUEST = "remote_engine_id", "remote_request_id"  # in vLLM's parameters of a transfer
_CALL_TIMEOUT_S = 60.0  # an engine answers between two steps


class KvUpkeep:
    """Tells vLLM what becomes of the KV that it keeps for decode workers, or is to read from prefill workers."""

    def __init__(self, driver: Driver, transport: Transport) -> None:
        self._transport = transport
        self._give_back = _Calls(driver, "dynamo_give_back_kv")
        self._renew = _Calls(driver, "dynamo_renew_kv")
        self._extend = _Calls(driver, "dynamo_extend_reads")

    @property
    def renewable(self) -> bool:
        """Whether KV can be kept for longer than it was first said to. Of a connector that the user chose we cannot
        tell."""
        return self._transport.is_ours

    def free(self, params: Any, how: str) -> None:
        """See `Ledger.free`."""
        if not isinstance(params, dict):
            return
        if self._transport.directory is not None and "file" in params:
            file_path(self._transport.directory, params["file"]).unlink(missing_ok=True)
        elif how in ("released", "expired") and _REQUEST in params:  # what was read vLLM frees by itself
            self._give_back.add(params[_REQUEST])

    async def renew(self, params: Any) -> float | None:
        """See `Ledger.extend`."""
        if not isinstance(params, dict) or _REQUEST not in params:
            return 0.0
        kept = await self._renew.add(params[_REQUEST])
        left = min(kept, default=0.0)
        return None if left < 0 else left

    def extend_read(self, params: dict[str, Any], deadline: float) -> None:
        """What these parameters say to read may be read until `deadline`."""
        if _REQUEST in params:
            self._extend.add((params[_ENGINE], params[_REQUEST], deadline))


class _Calls:
    """Calls of one method in vLLM's workers. What comes while one is under way goes with the next."""

    def __init__(self, driver: Driver, method: str) -> None:
        self._driver = driver
        self._method = method
        self._waiting: list[tuple[Any, asyncio.Future[list[Any]]]] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, argument: Any) -> "asyncio.Future[list[Any]]":
        """What each worker answers to it; nothing where the call failed, or has no answer."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Any]] = loop.create_future()
        self._waiting.append((argument, answer))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._call(), name=self._method)
        return answer

    async def _call(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            replies: list[Any] = []
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    arguments = [argument for argument, _ in batch]
                    replies = await self._driver.control("collective_rpc", self._method, None, (arguments,))
            except Exception as error:  # noqa: BLE001 - vLLM's own kinds; leases end all the same
                log.warning("vLLM did not do %s for %d prompts: %r", self._method, len(batch), error)
            for i, (_, answer) in enumerate(batch):
                if not answer.done():
                    answer.set_result([reply[i] for reply in replies if reply is not None])


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
