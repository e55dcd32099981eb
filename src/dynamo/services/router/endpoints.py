"""What do callers on the request plane ask a stand-alone router? [L1]"""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from dynamo.router.kv_router import KvRouter
from dynamo.runtime.context import Context
from dynamo.runtime.errors import InvalidArgument


class RouterEndpoints:
    """The handlers, on a router."""

    def __init__(self, router: KvRouter) -> None:
        self._router = router

    async def generate(self, request: object, context: Context) -> AsyncIterator[Any]:
        """A request as workers get it, sent to the best of them; its answer as it comes."""
        body = _mapping(request)
        body.setdefault("model", "unknown")
        if body.get("routing") is None and body.get("dp_rank") is not None:
            body["routing"] = {"dp_rank": body["dp_rank"]}  # as older callers say it
        async for item in await self._router.generate_from_request(body, context=context):
            yield item

    async def best_worker_id(self, request: object, context: Context) -> AsyncIterator[int]:
        """Token ids, or `{"token_ids", "router_config_override", "cache_namespace", "lora_name"}`.

        One answer: the id of the worker that `generate` would choose now. Changes nothing.
        """
        body: dict[str, Any] = {"token_ids": request} if isinstance(request, list) else _mapping(request)
        worker_id, _, _ = await self._router.best_worker(
            _tokens(body),
            body.get("router_config_override"),
            lora_name=body.get("lora_name"),
            cache_namespace=body.get("cache_namespace"),
        )
        yield worker_id

    async def get_overlap_scores(self, request: object, context: Context) -> AsyncIterator[dict[str, Any]]:
        """`{"token_ids", "block_mm_infos", "lora_name", "include_shared", "cache_namespace"}`; one answer, what each
        worker holds by tier. Changes nothing."""
        body = _mapping(request)
        yield await self._router.get_overlap_scores(
            _tokens(body),
            body.get("router_config_override"),
            body.get("block_mm_infos"),
            body.get("lora_name"),
            body.get("include_shared", True),
            body.get("cache_namespace"),
        )


def _mapping(request: object) -> dict[str, Any]:
    if not isinstance(request, Mapping):
        raise InvalidArgument(f"the request must be an object, not {type(request).__name__}")
    return dict(request)


def _tokens(body: Mapping[str, Any]) -> list[int]:
    tokens = body.get("token_ids")
    if not isinstance(tokens, list):
        raise InvalidArgument("token_ids: is missing, or no list of numbers", "token_ids")
    return tokens
