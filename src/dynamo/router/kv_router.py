"""How does a program of one's own route by what workers have cached? [K53][K54]

    router = KvRouter(endpoint, block_size=64, kv_router_config=KvRouterConfig())
    async for output in await router.generate(token_ids, model="m"):
        ...

`generate` does it all. `best_worker` only says where; with a request id it also counts the request there, until `free`.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from dynamo.llm.block_hash import BlockMmInfo
from dynamo.llm.kv_events import KvEvent, RouterEvent
from dynamo.llm.protocols.engine import (
    OutputOptions,
    PreprocessedRequest,
    Routing,
    SamplingOptions,
    StopConditions,
)
from dynamo.router.config import KvRouterConfig, LoadThresholdConfig, RouterConfig, refuse_split
from dynamo.router.constraints import RoutingConstraints
from dynamo.router.model_router import ModelRouter
from dynamo.router.overlap_report import overlap_report
from dynamo.router.route_request import hash_prompt
from dynamo.router.ticket import Ticket
from dynamo.router.types import Decision, RouteRequest, RouterOverride, WorkerKey
from dynamo.runtime.client import Client, ResponseIterator
from dynamo.runtime.component import Endpoint
from dynamo.runtime.context import Context
from dynamo.runtime.errors import CannotConnect, DynamoException, InvalidArgument
from dynamo.runtime.selection import RouterMode

MAX_ATTEMPTS = 3  # workers tried while no connection to them can be made; nothing was sent, so trying is safe

Override = Mapping[str, Any] | RouterOverride | None


class KvRouter:
    """Routes requests to the instances of an endpoint. Needs a running event loop; starts with its first call.

    Args:
        endpoint: the workers'.
        block_size: of their KV cache, in tokens.
        ais_perf_config: a model of prefill times is not in this version: give None.

    Raises:
        InvalidArgument: `block_size` is below 1.
        ValueError: a setting that cannot be meant.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        block_size: int,
        kv_router_config: KvRouterConfig | None = None,
        ais_perf_config: Any = None,
        session_affinity_ttl_secs: int | None = None,
        *,
        load_threshold_config: LoadThresholdConfig | None = None,
        session_affinity_mode: str = "hard",
    ) -> None:
        if ais_perf_config is not None:
            raise ValueError("ais_perf_config: predicted prefill times from a profile are not in this version")
        refuse_split(kv_router_config or KvRouterConfig(), "a KvRouter")
        thresholds = load_threshold_config or LoadThresholdConfig()
        config = RouterConfig(
            RouterMode.KV,
            kv_router_config or KvRouterConfig(),
            thresholds.active_decode_blocks_threshold,
            thresholds.active_prefill_tokens_threshold,
            thresholds.active_prefill_tokens_threshold_frac,
            session_affinity_ttl_secs=session_affinity_ttl_secs,
            session_affinity_mode=session_affinity_mode,
        )
        self.router = ModelRouter(endpoint.runtime, endpoint, None, config, block_size=block_size, keep_contents=True)
        self._endpoint = endpoint
        self._client: Client | None = None
        self._starting: asyncio.Task[Client] | None = None

    # --- begin and end

    async def start(self) -> Client:
        """Meet the workers of now. Every other call does this first. Raises as `ModelRouter.start`."""
        if self._client is None:
            if self._starting is None:
                self._starting = asyncio.get_running_loop().create_task(self._start())
            try:
                self._client = await asyncio.shield(self._starting)
            except DynamoException:
                self._starting = None  # the next call tries again
                raise
        return self._client

    async def _start(self) -> Client:
        await self.router.start()
        if self.router.feed is not None:
            await self.router.feed.settled(timeout_s=2.0)  # first answers by what is cached; late ones come later
        return await self._endpoint.client()

    async def close(self) -> None:
        """Follow nothing any more."""
        await self.router.close()

    # --- asking

    async def best_worker(
        self,
        token_ids: Sequence[int],
        router_config_override: Override = None,
        request_id: str | None = None,
        update_indexer: bool = False,
        block_mm_infos: Sequence[BlockMmInfo | None] | None = None,
        lora_name: str | None = None,
        routing_constraints: RoutingConstraints | None = None,
        strict_priority: int = 0,
        policy_class: str | None = None,
        cache_namespace: str | None = None,
    ) -> tuple[int, int, int]:
        """(worker id, dp rank, blocks it holds of the prompt).

        Changes nothing, unless `request_id` is given: then the request waits for room if it must, and counts at the
        worker until `free`, or for `active_request_expiry_secs`. `update_indexer` lets a router without KV events note
        where the prompt goes.

        Raises:
            WorkerUnavailable, WorkerOverloaded, RouterQueueLimitExceeded: nobody can take it, now or in time.
            InvalidArgument: `request_id` is in use, or the override cannot be meant.
        """
        await self.start()
        request = self._request(
            token_ids,
            router_config_override,
            block_mm_infos,
            lora_name,
            cache_namespace,
            constraints=routing_constraints,
            request_id=request_id,
        )
        request.strict_priority, request.policy_class = strict_priority, policy_class
        if request_id is None:
            decision = self.router.scheduler.select(request, self._now())
            if update_indexer and self.router.guess is not None:
                self.router.guess.routed(decision.worker, request.sequence_hashes, self._now())
        else:
            if self.router.ticket(request_id) is not None:
                raise InvalidArgument(f"request id {request_id!r} is in use: free it first", "request_id")
            _, decision = await self._route(request, expires=True)
        return decision.worker.worker_id, decision.worker.dp_rank, decision.overlap.total

    async def get_potential_loads(
        self,
        token_ids: Sequence[int],
        block_mm_infos: Sequence[BlockMmInfo | None] | None = None,
        lora_name: str | None = None,
        cache_namespace: str | None = None,
    ) -> list[dict[str, Any]]:
        """By worker, what its load would be with this prompt: `potential_prefill_tokens`, `potential_decode_blocks`."""
        await self.start()
        request = self._request(token_ids, None, block_mm_infos, lora_name, cache_namespace)
        return self.router.scheduler.potential_loads(request, self._now())

    async def get_overlap_scores(
        self,
        token_ids: Sequence[int],
        router_config_override: Override = None,
        block_mm_infos: Sequence[BlockMmInfo | None] | None = None,
        lora_name: str | None = None,
        include_shared: bool = True,
        cache_namespace: str | None = None,
    ) -> dict[str, Any]:
        """What each worker holds of a prompt, in blocks by tier: see `overlap_report`.

        `router_config_override` changes no such number; there is no cache shared between workers in this version, so
        `include_shared` changes nothing.
        """
        await self.start()
        request = self._request(token_ids, None, block_mm_infos, lora_name, cache_namespace)
        found = self.router.scheduler.overlaps.find(request.sequence_hashes, self._now())
        return overlap_report(self.router.block_size, len(request.sequence_hashes), found)

    async def dump_events(self) -> str:
        """All that is known of workers' caches, as a JSON list of KV events that would tell it to an empty index."""
        await self.start()
        index = self.router.index
        events = [
            RouterEvent(
                worker.worker_id, KvEvent(number, "cleared" if change.cleared else change, worker.dp_rank), tier
            )
            for worker in (index.workers() if index is not None else ())
            for number, (tier, change) in enumerate(index.dump(worker) if index is not None else ())
        ]
        return msgspec.json.encode(events).decode()

    async def mark_prefill_complete(self, request_id: str) -> None:
        """A request of `best_worker` made its first token. Unknown ids are ignored."""
        ticket = self.router.ticket(request_id)
        if ticket is not None:
            ticket.first_token()

    async def free(self, request_id: str) -> None:
        """A request of `best_worker` ended, however it did. Unknown ids are ignored."""
        ticket = self.router.ticket(request_id)
        if ticket is not None:
            ticket.free()

    # --- generating

    async def generate(
        self,
        token_ids: Sequence[int],
        model: str,
        stop_conditions: Mapping[str, Any] | None = None,
        sampling_options: Mapping[str, Any] | None = None,
        output_options: Mapping[str, Any] | None = None,
        router_config_override: Mapping[str, Any] | None = None,
        worker_id: int | None = None,
        dp_rank: int | None = None,
        extra_args: dict[str, Any] | None = None,
        block_mm_infos: Sequence[BlockMmInfo | None] | None = None,
        multi_modal_data: dict[str, Any] | None = None,
        mm_routing_info: dict[str, Any] | None = None,
        routing_constraints: RoutingConstraints | None = None,
        response_buffer_size: int = 100,
    ) -> AsyncIterator[dict[str, Any]]:
        """Send a prompt to the best worker, or to the one named; the answer's items as they come, as dicts.

        `response_buffer_size` is taken and has no effect: an answer that nobody reads is bounded in bytes.

        Raises InvalidArgument; all else that can go wrong is raised by the iterator, with what `best_worker` raises.
        """
        try:
            request = PreprocessedRequest(
                model,
                list(token_ids),
                msgspec.convert(dict(stop_conditions or {}), StopConditions),
                msgspec.convert(dict(sampling_options or {}), SamplingOptions),
                msgspec.convert(dict(output_options or {}), OutputOptions),
                routing=Routing(backend_instance_id=worker_id, dp_rank=dp_rank),
                router_config_override=dict(router_config_override) if router_config_override else None,
                extra_args=extra_args,
                multi_modal_data=multi_modal_data,
                mm_routing_info=mm_routing_info,
            )
        except msgspec.ValidationError as e:
            raise InvalidArgument(f"generate: {e}") from None
        return await self._generate(request, block_mm_infos, routing_constraints)

    async def generate_from_request(
        self,
        request: Mapping[str, Any] | PreprocessedRequest,
        response_buffer_size: int = 100,
        *,
        context: Context | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """As `generate`, of a request as workers get it. Of a mapping, the worker also gets what is not known here.

        `context` is that of the request that this one serves: its id, its metadata and its end go along.
        """
        if isinstance(request, PreprocessedRequest):
            return await self._generate(request, None, None, context=context)
        try:
            read = msgspec.convert(dict(request), PreprocessedRequest)
        except msgspec.ValidationError as e:
            raise InvalidArgument(f"generate_from_request: {e}") from None
        return await self._generate(read, None, None, sent=dict(request), context=context)

    async def _generate(
        self,
        request: PreprocessedRequest,
        block_mm_infos: Sequence[BlockMmInfo | None] | None,
        constraints: RoutingConstraints | None,
        *,
        sent: dict[str, Any] | None = None,
        context: Context | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        client = await self.start()
        request_id, metadata = (str(uuid4()), None) if context is None else (context.id(), dict(context.metadata))
        wanted = self.router.request(request_id, request, metadata)
        if block_mm_infos is not None:
            routing = request.routing or Routing()
            wanted.sequence_hashes = hash_prompt(
                request.token_ids,
                self.router.block_size,
                block_mm_infos=block_mm_infos,
                lora_name=routing.lora_name,
                cache_namespace=routing.cache_salt,
            )
        _constrain(wanted, constraints)
        send = _Send(client, request, sent, context)
        return self._answer(send, wanted)

    async def _answer(self, send: "_Send", wanted: RouteRequest) -> AsyncGenerator[dict[str, Any], None]:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                async with aclosing(self._attempt(send, wanted)) as items:
                    async for item in items:
                        yield item
            except CannotConnect:
                if attempt == MAX_ATTEMPTS:
                    raise
                await asyncio.sleep(0)  # the request plane first takes the worker out of rotation
            else:
                return

    async def _attempt(self, send: "_Send", wanted: RouteRequest) -> AsyncGenerator[dict[str, Any], None]:
        ticket, decision = await self._route(msgspec.structs.replace(wanted))
        meter = _Meter(ticket, self.router.block_size)
        try:
            stream = await send.to(decision.worker)
            async with aclosing(stream):
                async for item in stream:
                    meter.note(item)
                    yield item
            meter.ended = True
        finally:
            ticket.free(meter.tokens if meter.ended else None)

    async def _route(self, request: RouteRequest, *, expires: bool = False) -> tuple[Ticket, Decision]:
        """Wait until the request may go; bounded by the queue's deadline."""
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

        def decided(decision: Decision) -> None:
            if not answer.done():
                answer.set_result(decision)

        def failed(error: DynamoException) -> None:
            if not answer.done():
                answer.set_exception(error)

        ticket = self.router.route(request, decided, failed, expires=expires)
        try:
            return ticket, await answer
        except BaseException:
            ticket.cancel()
            raise

    # --- helpers

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _request(
        self,
        token_ids: Sequence[int],
        override: Override,
        block_mm_infos: Sequence[BlockMmInfo | None] | None,
        lora_name: str | None,
        cache_namespace: str | None,
        *,
        constraints: RoutingConstraints | None = None,
        request_id: str | None = None,
    ) -> RouteRequest:
        if override is not None and not isinstance(override, RouterOverride):
            override = RouterOverride.parse(override)
        stats = self.router.stats
        request = RouteRequest(
            request_id=request_id or "",
            token_count=len(token_ids),
            sequence_hashes=hash_prompt(
                token_ids,
                self.router.block_size,
                stats if stats.is_timed() else None,
                block_mm_infos=block_mm_infos,
                lora_name=lora_name,
                cache_namespace=cache_namespace,
            ),
            override=override,
        )
        _constrain(request, constraints)
        return request


class _Send(NamedTuple):
    """One request on its way to whatever worker is chosen. `mapping` is what its caller sent, if it was no struct."""

    client: Client
    request: PreprocessedRequest
    mapping: dict[str, Any] | None
    context: Context | None

    async def to(self, worker: WorkerKey) -> ResponseIterator:
        """Raises CannotConnect if the worker is not there."""
        body: object
        if self.mapping is None:
            routing = msgspec.structs.replace(self.request.routing or Routing(), dp_rank=worker.dp_rank)
            body = msgspec.structs.replace(self.request, routing=routing)
        else:
            body = {**self.mapping, "routing": {**(self.mapping.get("routing") or {}), "dp_rank": worker.dp_rank}}
        return await self.client.direct(body, worker.worker_id, annotated=False, context=self.context)


class _Meter:
    """How far one answer is: tells the router of the first token and of full blocks."""

    def __init__(self, ticket: Ticket, block_size: int) -> None:
        self.tokens = 0
        self.ended = False
        self._ticket = ticket
        self._block_size = block_size

    def note(self, item: Any) -> None:
        made = item.get("token_ids") if isinstance(item, Mapping) else getattr(item, "token_ids", None)
        if not made:
            return
        self._ticket.first_token()
        before = self.tokens // self._block_size
        self.tokens += len(made)
        for _ in range(before, self.tokens // self._block_size):
            self._ticket.output_block()


def _constrain(request: RouteRequest, constraints: RoutingConstraints | None) -> None:
    if constraints is not None:
        request.required_taints = constraints.required_taints
        request.preferred_taints = constraints.preferred_taints
