"""What can the worker's front process ask of vLLM's workers that vLLM has no call for?

Loaded into them by vLLM's option `worker_extension_cls`; the methods are called by name (`collective_rpc`).
"""


class KvRelease:
    """A mixin of vLLM's worker."""

    def dynamo_give_back_kv(self, request_ids: list[str]) -> None:
        """Free the blocks that were kept for decode workers, where the connector can (`dynamo.vllm.kv_nixl`)."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if has_kv_transfer_group() and (give_back := getattr(get_kv_transfer_group(), "give_back", None)):
            give_back(request_ids)
