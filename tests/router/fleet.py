"""Workers for a model router: instances with cards, caches and load, in this process."""

import asyncio
from contextlib import asynccontextmanager

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.kv_events import KvEventData, LoadMetrics, Stored, StoredBlock
from dynamo.llm.model_card import CardKey, ModelDeploymentCard, ModelRuntimeConfig
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.router.config import KvRouterConfig, RouterConfig
from dynamo.router.model_router import ModelRouter
from dynamo.router.publisher import KvEventPublisher, WorkerMetricsPublisher
from dynamo.runtime.selection import RouterMode

ENDPOINT = "dynamo.backend.generate"
BLOCK = 16
DEADLINE_S = 10.0


def make_card(block_size=BLOCK, events=True, name="m", **config) -> ModelDeploymentCard:
    settings = {"total_kv_blocks": 1000, "max_num_batched_tokens": 500, **config}
    return ModelDeploymentCard(
        display_name=name,
        slug=name,
        model_type="Chat | Completions",
        kv_cache_block_size=block_size,
        runtime_config=ModelRuntimeConfig(kv_event_publishing_enabled=events, **settings),
    )


def echo(request, response) -> None:
    """A worker that answers with one output for each of its prompt's tokens."""
    import msgspec

    tokens = msgspec.msgpack.decode(request)["token_ids"]
    for token in tokens:
        response.send({"token_ids": [token]})
    response.send({"token_ids": [], "finish_reason": "stop"})
    response.end()


class Worker:
    """One worker as routers see it."""

    def __init__(self, runtime, worker_id: int, card=None, handler=echo, endpoint=ENDPOINT) -> None:
        self.runtime = runtime
        self.endpoint = runtime.endpoint(endpoint)
        self.id = worker_id
        self.card = card or make_card()
        self._handler = handler
        self._caches: dict[int, KvEventPublisher] = {}
        self._load = WorkerMetricsPublisher()

    @property
    def key(self) -> str:
        address = self.endpoint.address
        return str(CardKey(address.namespace, address.component, address.endpoint, self.id))

    async def join(self) -> "Worker":
        await self._load.create_endpoint(self.endpoint, self.id)
        self._served = await self.endpoint.start_push_endpoint(self._handler, instance_id=self.id)
        await self.publish_card()
        return self

    async def publish_card(self, card=None) -> None:
        self.card = card or self.card
        await self.runtime.discovery.put(self.key, self.card.to_json())

    async def leave(self) -> None:
        await self.runtime.discovery.delete(self.key)
        await self._served.stop()
        await self._load.close()
        for cache in self._caches.values():
            await cache.close()

    async def store(self, tokens: list[int], dp_rank=0) -> None:
        """Hold a prompt."""
        cache = self._caches.get(dp_rank)
        if cache is None:
            cache = self._caches[dp_rank] = KvEventPublisher(
                self.endpoint, self.id, BLOCK, dp_rank, enable_local_indexer=True
            )
            await cache.ready()
        local = compute_block_hash_for_seq(tokens, BLOCK)
        blocks = [StoredBlock(*pair) for pair in zip(sequence_hashes(local), local, strict=True)]
        cache.publish([KvEventData(stored=Stored(blocks))])

    def report(self, **numbers) -> None:
        self._load.publish_load(LoadMetrics(self.id, 0, **{"active_decode_blocks": 0, **numbers}))


def prompt(seed: int, blocks: int = 10) -> list[int]:
    return [seed * 1000 + i for i in range(blocks * BLOCK)]


def preprocessed(tokens: list[int], **more) -> PreprocessedRequest:
    return PreprocessedRequest("m", tokens, **more)


@asynccontextmanager
async def routing(runtime, card=None, thresholds=None, affinity=None, mode="hard", **settings):
    """A started router of the model."""
    config = RouterConfig(
        RouterMode.KV,
        KvRouterConfig(**settings),
        session_affinity_ttl_secs=affinity,
        session_affinity_mode=mode,
        **(thresholds or {}),
    )
    router = ModelRouter(runtime, runtime.endpoint(ENDPOINT), card or make_card(), config)
    await router.start()
    try:
        yield router
    finally:
        await router.close()


async def eventually(condition, deadline_s=DEADLINE_S) -> None:
    """Wait until something that happens on sockets has."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Asked:
    """One request's answer from a router."""

    def __init__(self, router: ModelRouter, tokens: list[int], name="r", explain=False, **more) -> None:
        self.decision = self.error = None
        metadata = more.pop("metadata", None)
        request = router.request(name, preprocessed(tokens, **more), metadata)
        self.ticket = router.route(request, self._decided, self._failed, explain=explain)

    def _decided(self, decision) -> None:
        assert self.decision is None
        self.decision = decision

    def _failed(self, error) -> None:
        assert self.error is None
        self.error = error

    @property
    def worker(self) -> int | None:
        return self.decision.worker.worker_id if self.decision is not None else None
