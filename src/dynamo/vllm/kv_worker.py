"""What can the worker's front process ask of vLLM's workers that vLLM has no call for?

Loaded into them by vLLM's option `worker_extension_cls`; the methods are called by name (`collective_rpc`). Connectors
that can do it are those of `dynamo.vllm.kv_nixl`.
"""

from typing import Any


class KvKeeping:
    """A mixin of vLLM's worker."""

    def dynamo_give_back_kv(self, request_ids: list[str]) -> None:
        """Free the blocks that were kept for decode workers."""
        _ask_connector("give_back", request_ids)

    def dynamo_renew_kv(self, request_ids: list[str]) -> list[float]:
        """Keep blocks for one more lease. For each request the seconds that are left: -1 if it is not kept, 0 if it is
        not known."""
        kept: list[float] | None = _ask_connector("renew", request_ids)
        return [0.0] * len(request_ids) if kept is None else kept

    def dynamo_extend_reads(self, deadlines: list[tuple[str, str, float]]) -> None:
        """Until when other workers keep what this one is to read: (their engine, its request, monotonic time)."""
        _ask_connector("extend_reads", deadlines)


def _ask_connector(method: str, argument: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    call = getattr(get_kv_transfer_group(), method, None) if has_kv_transfer_group() else None
    return None if call is None else call(argument)
