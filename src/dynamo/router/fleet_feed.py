"""Which workers, and which of their ranks, may a model's requests go to?

Those in discovery as instances of the model's endpoint whose card is of this model. A worker that failed a moment ago,
or is leaving, is known and gets nothing new.
"""

import asyncio
import logging
from collections.abc import Callable

from dynamo.llm.model_card import CardKey, ModelDeploymentCard
from dynamo.llm.topology import taints_of
from dynamo.router.types import WorkerKey, WorkerLimits
from dynamo.runtime.address import EndpointAddress
from dynamo.runtime.client import Client
from dynamo.runtime.discovery import Delete, Discovery
from dynamo.runtime.errors import InvalidArgument

log = logging.getLogger(__name__)

MAX_RANKS = 1024  # of one worker; a card that says more is wrong


def ranks_of(worker_id: int, card: ModelDeploymentCard | None) -> list[WorkerKey]:
    """What of a worker requests can be sent to [K49]."""
    if card is None:
        return [WorkerKey(worker_id)]
    first, count = card.runtime_config.data_parallel_start_rank, card.runtime_config.data_parallel_size
    return [WorkerKey(worker_id, rank) for rank in range(first, first + min(max(1, count), MAX_RANKS))]


def limits_of(card: ModelDeploymentCard | None) -> WorkerLimits:
    """What a worker's card says of each of its ranks."""
    if card is None:
        return WorkerLimits()
    config = card.runtime_config
    return WorkerLimits(config.total_kv_blocks, config.max_num_batched_tokens, config.max_num_seqs, taints_of(config))


class FleetFeed:
    """Follows an endpoint's instances and cards.

    `belongs` says whether a card is of the model; without it, workers need no card. `on_change` is called once for all
    that changed in a turn of the loop.
    """

    def __init__(
        self,
        discovery: Discovery,
        address: EndpointAddress,
        client: Client,
        belongs: Callable[[ModelDeploymentCard], bool] | None,
        on_change: Callable[[], None],
    ) -> None:
        self._cards: dict[CardKey, ModelDeploymentCard] = {}
        self._discovery = discovery
        self._prefix = address.cards_prefix()
        self._client = client
        self._belongs = belongs
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._soon: asyncio.Handle | None = None
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look once, then follow. Raises DiscoveryError."""
        for key, value in (await self._discovery.get_prefix(self._prefix)).items():
            self._put(key, value)
        self._client.on_change(self._changed)
        self._following = self._loop.create_task(self._follow(), name=f"cards {self._prefix}")

    async def close(self) -> None:
        """Follow no more."""
        self._client.off_change(self._changed)
        if self._soon is not None:
            self._soon.cancel()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    @property
    def stale(self) -> bool:
        """Whether something changed that `on_change` was not called for yet."""
        return self._soon is not None

    def cards(self) -> dict[int, ModelDeploymentCard]:
        """By worker: its card of the model. A worker may have others, for adapters."""
        found: dict[int, ModelDeploymentCard] = {}
        for key, card in self._cards.items():
            if key.lora_slug is None or key.instance_id not in found:
                found[key.instance_id] = card
        return found

    def ranks(self) -> dict[WorkerKey, WorkerLimits]:
        """All that requests can be sent to."""
        cards = self.cards()
        workers: dict[WorkerKey, WorkerLimits] = {}
        for worker_id in self._client.instance_ids():
            card = cards.get(worker_id)
            if card is None and self._belongs is not None:
                continue
            limits = limits_of(card)
            for key in ranks_of(worker_id, card):
                workers[key] = limits
        return workers

    def unavailable(self) -> set[int]:
        """Workers that get nothing new."""
        return set(self._client.instance_ids()).difference(self._client.available_ids())

    async def _follow(self) -> None:
        async for change in self._discovery.watch(self._prefix):
            if isinstance(change, Delete):
                self._delete(change.key)
            else:
                self._put(change.key, change.value)
            self._changed()

    def _put(self, key: str, value: bytes) -> None:
        try:
            place = CardKey.parse(key)
            card = ModelDeploymentCard.from_json(value)
        except InvalidArgument as e:
            log.warning("ignoring the model card %s: %s", key, e)
            return
        if self._belongs is None or self._belongs(card):
            self._cards[place] = card
        else:
            self._cards.pop(place, None)

    def _delete(self, key: str) -> None:
        try:
            self._cards.pop(CardKey.parse(key), None)
        except InvalidArgument:
            log.debug("%s is gone, and was no model card", key)

    def _changed(self) -> None:
        if self._soon is None:
            self._soon = self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Call `on_change` now if it is due."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
            self._on_change()
