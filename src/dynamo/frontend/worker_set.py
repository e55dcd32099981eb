"""Which workers answer for a model the same way, and which of them gets a request?

A `WorkerSet` is the workers of one endpoint that serve one model. The card of its first worker says what the set
is; a later worker whose card has another checksum is refused, because its answers would not be the set's [R22].
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dynamo.frontend.meeting import new_room
from dynamo.frontend.metrics import FrontendMetrics
from dynamo.llm import kv_lease, topology
from dynamo.llm.kv_lease import Keeping
from dynamo.llm.model_card import CardKey, ModelDeploymentCard, ModelInput, WorkerType
from dynamo.llm.model_files import fetch_files
from dynamo.llm.preprocessor import PreparationTimes, Preprocessor
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.llm.protocols.passthrough import OPENAI_BYTES
from dynamo.llm.topology import Near
from dynamo.router.config import KvRouterConfig, RouterConfig
from dynamo.router.model_router import ModelRouter
from dynamo.router.model_split import ModelSplit
from dynamo.router.split import Always
from dynamo.router.transfer_time import TransferTime
from dynamo.runtime.client import Client
from dynamo.runtime.connection import Call
from dynamo.runtime.context import Context
from dynamo.runtime.distributed import DistributedRuntime
from dynamo.runtime.errors import DynamoException, InvalidArgument, WorkerUnavailable
from dynamo.runtime.instances import Instance
from dynamo.runtime.selection import Chooser, RouterMode
from dynamo.runtime.streams import StreamSink

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.5
SETTLE_S = 2.0  # a router that begins waits so long to hear what is cached; later it learns as it goes
TEXT_BLOCK_TOKENS = 16  # where prompts are text and the worker does not say: any size will do
GIVE_BACK_S = 5.0  # after that the lease is about to end anyway
LAST_RETRY_S = 30.0  # a worker that cannot give its files now may be about to be replaced


class SetKey(NamedTuple):
    """What makes workers one set: where they are and what they serve."""

    namespace: str
    component: str
    endpoint: str
    model: str

    @property
    def path(self) -> str:
        """The endpoint's name."""
        return f"{self.namespace}.{self.component}.{self.endpoint}"


@dataclass(slots=True)
class _Candidate:
    """An instance to choose from, where not every instance of the endpoint may be chosen."""

    instance_id: int
    inflight: int
    device_type: str


class WorkerSet:
    """One endpoint's workers of one model. Owned by the model registry.

    `on_change` is called when the set's readiness may differ. Before it has had `min_workers` at once it is not ready.
    In the mode `kv` its requests go by its `router`; in the others by `choose`.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        key: SetKey,
        card: ModelDeploymentCard,
        routing: RouterConfig,
        min_workers: int,
        on_change: Callable[[], None],
        times: PreparationTimes | None = None,
    ) -> None:
        self.key = key
        self.card = card
        self.checksum = card.checksum
        self.workers: dict[int, ModelDeploymentCard] = {}
        self.taints: dict[int, frozenset[str]] = {}
        self.refused: dict[int, ModelDeploymentCard] = {}
        self.preprocessor: Preprocessor | None = None
        self.router: ModelRouter | None = None
        """Where each prompt goes, in the mode `kv`; None in the others."""
        self.prefill: WorkerSet | None = None
        """Who computes prompts for these workers; None while they do it themselves."""
        self.split: ModelSplit | None = None
        """Who says which prompts those are, in the mode `kv`; None in the others, where it is all."""
        self.transfer = TransferTime()
        self._split_config = routing.config or KvRouterConfig()
        self.trouble = ""
        """Why the set cannot be used, if it was tried and failed."""
        self._runtime = runtime
        self._times = times
        self._routing = routing
        self._mode = routing.mode
        self._min_workers = min_workers
        self._on_change = on_change
        self._client: Client | None = None
        self._chooser = Chooser()
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._giving_back: set[asyncio.Task[None]] = set()
        self._had_enough = False
        self._whole_endpoint = False  # whether every instance of the endpoint is ours to choose from
        self._cache_counted: tuple[int, ...] = (0, 0, 0, 0)
        self.worker_count = 0
        """Workers that are admitted and alive, as of the last `refresh`."""

    # --- who belongs to it

    def put(self, instance_id: int, card: ModelDeploymentCard) -> None:
        """A worker published a card, or published it again."""
        checksum = card.checksum
        if checksum == self.checksum:
            self.refused.pop(instance_id, None)
            self.workers[instance_id] = card
            self.taints[instance_id] = topology.taints_of(card.runtime_config)
            self._had_enough = self._had_enough or len(self.workers) >= self._min_workers
            return
        self.workers.pop(instance_id, None)
        self.taints.pop(instance_id, None)
        known = self.refused.get(instance_id)
        if known is None or known.checksum != checksum:
            log.warning(
                "worker %x of %s is refused: its card of model %r has checksum %s, the workers already there have %s",
                instance_id,
                self.key.path,
                self.key.model,
                checksum[:16],
                self.checksum[:16],
            )
        self.refused[instance_id] = card

    def remove(self, instance_id: int) -> None:
        """A worker left."""
        self.workers.pop(instance_id, None)
        self.taints.pop(instance_id, None)
        self.refused.pop(instance_id, None)

    def start(self) -> None:
        """Begin to fetch the model's files and to follow the endpoint's instances."""
        self._starting = asyncio.get_running_loop().create_task(self._start(), name=f"model {self.key.model}")

    def close(self) -> None:
        """Stop trying, and routing."""
        if self._starting is not None:
            self._starting.cancel()
        if self.router is not None:
            self._closing = asyncio.get_running_loop().create_task(self.router.close(), name=f"close {self.key.model}")

    async def closed(self) -> None:
        """Wait until all that `close` began is done."""
        tasks = [task for task in (self._starting, self._closing) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self) -> None:
        delay_s = FIRST_RETRY_S
        while True:
            try:
                client = await self._runtime.endpoint(self.key.path).client(self._mode)
                if self._mode is RouterMode.KV and self.router is None:
                    self.router = await self._start_router()
                if self.serves and not self.takes_text:
                    directory: Path = await fetch_files(self._runtime, self.card)
                    self.preprocessor = await asyncio.to_thread(Preprocessor, self.card, directory, self._times)
                break
            except (DynamoException, OSError, ValueError) as e:
                level = logging.ERROR if isinstance(e, InvalidArgument) else logging.WARNING
                if self.trouble:
                    level = logging.DEBUG
                self.trouble = str(e)
                log.log(level, "model %r of %s is not usable yet, trying on: %s", self.key.model, self.key.path, e)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, LAST_RETRY_S)
        self.trouble = ""
        self._client = client
        client.on_change(self._on_change)
        self._on_change()

    async def _start_router(self) -> ModelRouter:
        """The router, once it has heard what is cached, or has waited long enough for it.

        Raises InvalidArgument if there can be none; else as `ModelRouter.start`.
        """
        size = self.card.kv_cache_block_size or (TEXT_BLOCK_TOKENS if self.takes_text else None)
        endpoint = self._runtime.endpoint(self.key.path)
        router = ModelRouter(self._runtime, endpoint, self.card, self._routing, block_size=size)
        await router.start()
        try:
            if router.feed is not None:
                await router.feed.settled(SETTLE_S)
        except BaseException:
            await router.close()
            raise
        log.info(
            "KV routing of %r: policy %s, blocks of %d tokens, caches known by %s",
            self.key.model,
            router.scheduler.policy.name,
            router.block_size,
            "what is sent" if router.index is None else "KV events",
        )
        return router

    @property
    def names(self) -> set[str]:
        """Every name that an admitted worker has for the model."""
        return {name for card in self.workers.values() for name in card.names}

    # --- whether it can answer

    def refresh(self) -> None:
        """Look anew at who is alive. Called by the registry whenever cards or instances have changed."""
        alive = set(self._client.instance_ids()) if self._client is not None else set()
        self.worker_count = len(self.workers.keys() & alive)
        self._whole_endpoint = alive <= self.workers.keys()

    def instances(self) -> list[Instance]:
        """The live instances of the endpoint, as discovery has them."""
        return self._client.instances() if self._client is not None else []

    @property
    def ready(self) -> bool:
        """Whether a request can be prepared and sent."""
        prepares = self.preprocessor is not None or self.takes_text
        return prepares and self._had_enough and self.worker_count > 0

    @property
    def can_prefill(self) -> bool:
        """Whether prompts can be sent here for their first token."""
        return self.card.worker_type is WorkerType.Prefill and self._client is not None and self.worker_count > 0

    def pair(self, prefill: "WorkerSet | None") -> None:
        """From now on those compute prompts for these; if None, nobody does."""
        self.prefill = prefill
        theirs = prefill.router if prefill is not None else None
        if theirs is None or self.router is None:
            self.split = None
        elif self.split is None or self.split.prefill is not theirs:
            self.split = ModelSplit(theirs, self.router, self._split_config, self.transfer.seconds)
            self._tell_split(self.split)

    def set_split(self, config: KvRouterConfig) -> None:
        """Which prompts go to prefill workers, now and for those that come later."""
        self._split_config = config
        if self.split is not None:
            self.split.configure(config)
            self._tell_split(self.split)

    def _tell_split(self, split: ModelSplit) -> None:
        log.info("prompts of %r go to prefill workers by the split policy %s", self.key.model, split.policy)
        for line in split.warnings():
            log.warning("splitting prompts of %r: %s", self.key.model, line)

    def split_status(self) -> dict[str, Any] | None:
        """Whether prompts for these workers are computed by others, and which. None where nobody would ask."""
        if not self.serves or (self.prefill is None and not self._split_config.conditional_disagg_enabled):
            return None
        if self.split is not None:
            return {"in_effect": True, **self.split.facts(), "transfer": self.transfer.facts()}
        if self.prefill is not None:
            return {"in_effect": True, "policy": Always.name}
        return {"in_effect": False, "why": "there is no prefill worker"}

    def takes_over_from(self, other: "WorkerSet") -> bool:
        """Whether these workers can go on where those of the other set end: one model, files and blocks alike."""
        return (
            self.is_half_of(other)
            and msgspec.structs.replace(other.card, worker_type=self.card.worker_type).checksum == self.checksum
        )

    def is_half_of(self, other: "WorkerSet") -> bool:
        """Whether these are decode workers, and the others prefill workers, of one model in one namespace."""
        kinds = (self.card.worker_type, other.card.worker_type)
        same = (self.key.namespace, self.key.model) == (other.key.namespace, other.key.model)
        return same and kinds == (WorkerType.Decode, WorkerType.Prefill)

    @property
    def serves(self) -> bool:
        """Whether requests of clients go to workers of this kind: not those that do one part of the work only."""
        return self.card.worker_type in (WorkerType.Aggregated, WorkerType.Decode)

    @property
    def takes_text(self) -> bool:
        """Whether the workers read requests themselves (`dynamo.frontend.passthrough`)."""
        return self.card.model_input is ModelInput.Text

    def takes_bytes(self, instance_id: int) -> bool:
        """Whether a worker that reads requests itself wants them byte for byte."""
        card = self.workers.get(instance_id, self.card)
        return bool(card.runtime_config.runtime_data.get(OPENAI_BYTES))

    def count_cache(self, metrics: FrontendMetrics) -> None:
        """Add what the tokenizer's cache did since the last call. Called when somebody asks for metrics."""
        counts = self.preprocessor.tokenizer.cache_counts if self.preprocessor is not None else None
        if counts is None:
            return
        now = (counts.hits, counts.misses, counts.cached_tokens, counts.uncached_tokens)
        series = (
            metrics.cache_hits,
            metrics.cache_misses,
            metrics.cache_known.labels(self.key.model),
            metrics.cache_new.labels(self.key.model),
        )
        for counter, count, before in zip(series, now, self._cache_counted, strict=True):
            counter.value += count - before
        self._cache_counted = now

    # --- sending

    def choose(self, request: PreprocessedRequest, near: Near | None = None) -> int:
        """The instance for this request: the one it is pinned to, else one by the router mode, which is not `kv`.

        Raises:
            WorkerUnavailable: nobody is there, or not the one that was asked for, or nobody who is `near`.
            InvalidArgument: direct mode, and the request names no instance; or what only `kv` can do is asked for.
        """
        client = self._client
        assert client is not None
        routing = request.routing
        if routing is not None:
            if request.router_config_override or routing.required_taints or routing.preferred_taints:
                name = "router_config_override" if request.router_config_override else "routing_constraints"
                raise InvalidArgument(
                    f"nvext.{name} needs --router-mode kv; this server routes by {self._mode.value}", f"nvext.{name}"
                )
            pin = routing.backend_instance_id if routing.backend_instance_id is not None else routing.decode_worker_id
            if pin is not None:
                return self._pinned(client, pin, near)
        if self._mode is RouterMode.Direct:
            raise InvalidArgument(
                "this server routes to the worker a request names: set the header x-dynamo-worker-instance-id "
                "or nvext.backend_instance_id",
                "nvext.backend_instance_id",
            )
        if self._whole_endpoint and near is None:
            return client.pick(self._mode)
        available = self.workers.keys() & set(client.available_ids())
        if near is not None:
            available = near_ones(near, available, self.taints)
        candidates = [
            _Candidate(instance.instance_id, client.inflight(instance.instance_id), instance.device_type)
            for instance in client.instances()
            if instance.instance_id in available
        ]
        if not candidates:
            where = f" with the taint {near.taint}" if near is not None else ""
            raise WorkerUnavailable(f"no worker of {self.key.path}{where} serves {self.key.model!r} now")
        return self._chooser.choose(self._mode, candidates).instance_id

    def _pinned(self, client: Client, instance_id: int, near: Near | None) -> int:
        if instance_id not in self.workers or instance_id not in client.instance_ids():
            raise WorkerUnavailable(f"worker {instance_id} was asked for, but does not serve {self.key.model!r}")
        if near is not None and near.weight is None and near.taint not in self.taints[instance_id]:
            raise WorkerUnavailable(f"worker {instance_id} was asked for, but has not the taint {near.taint}")
        return instance_id

    def near(self, instance_id: int) -> Near | None:
        """Where the KV of this prefill worker may, or should, go."""
        card = self.workers.get(instance_id)
        return topology.near(card.runtime_config) if card is not None else None

    def places(self, instance_id: int) -> frozenset[str]:
        """Where a worker is, as taints."""
        card = self.workers.get(instance_id)
        return topology.places_of(card.runtime_config) if card is not None else frozenset()

    def meeting(self, instance_id: int, dp_rank: int | None) -> dict[str, Any] | None:
        """Where a decode worker meets this prefill worker, for one prompt: its bootstrap port, and a new room."""
        card = self.workers.get(instance_id)
        return new_room(card.runtime_config, dp_rank) if card is not None else None

    def pairs(self, near: Near) -> bool:
        """Whether some worker here may have the KV of a prefill worker."""
        if near.weight is not None or self._client is None:
            return True
        return any(near.taint in self.taints.get(instance_id, ()) for instance_id in self._client.instance_ids())

    def see_transfer(self, engine_data: dict[str, Any], instance_id: int, places: frozenset[str]) -> None:
        """Learn from what a worker here said with an output, whose KV may have come from these places."""
        self.transfer.see(engine_data, len(places & self.taints.get(instance_id, frozenset())))

    def start_request(self, instance_id: int, request: object, sink: StreamSink, context: Context) -> Call | None:
        """Send it; errors go to the sink."""
        assert self._client is not None
        return self._client.start(instance_id, request, sink, context)

    def avoid(self, instance_id: int) -> None:
        """Leave an instance out of choices for a while: it has lost a request."""
        if self._client is not None:
            self._client.report_failure(instance_id)

    def keep(self, handle: dict[str, Any]) -> Keeping | None:
        """Let what a prefill worker keeps not expire while the request for it waits. None where that cannot be."""
        return kv_lease.keep(handle, lambda endpoint: self._runtime.endpoint(endpoint).client())

    def give_back(self, handle: dict[str, Any]) -> None:
        """Tell a prefill worker that nobody will fetch what it keeps: it need not wait for the end of a lease."""
        task = asyncio.get_running_loop().create_task(self._give_back(handle), name="give KV back")
        self._giving_back.add(task)
        task.add_done_callback(self._giving_back.discard)

    async def _give_back(self, handle: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(GIVE_BACK_S):
                client = await self._runtime.endpoint(handle["endpoint"]).client()
                await client.wait_for_instances(GIVE_BACK_S)
                release = {"verb": "release", "id": handle["id"], "incarnation": handle["incarnation"]}
                async for _ in await client.direct(release, handle["instance_id"], annotated=False):
                    pass
        except (DynamoException, TimeoutError, KeyError) as e:
            log.info("KV of a prefill worker could not be given back and stays for its lease: %r", e)


def set_key(key: CardKey, card: ModelDeploymentCard) -> SetKey:
    """The set a card belongs to."""
    return SetKey(key.namespace, key.component, key.endpoint, card.display_name)


def near_ones(near: Near, ids: set[int], taints: Mapping[int, frozenset[str]]) -> set[int]:
    """Of these workers those to choose from. What is preferred is chosen from as often as it would be cheaper: the
    routers that weigh costs make it 1 - tanh(weight) times as dear [K47]."""
    found = {instance_id for instance_id in ids if near.taint in taints.get(instance_id, ())}
    if near.weight is None:
        return found
    return found if found and random.random() < math.tanh(near.weight) else ids
