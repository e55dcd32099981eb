"""How does a Python program choose workers by itself, without HTTP and without a runtime?

service = SelectionService()
await service.upsert_worker({"worker_id": 1, "endpoint": "http://a:8000", "block_size": 16, ...})
chosen = await service.select_and_reserve({"token_ids": tokens})
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from dynamo.router.config import KvRouterConfig, RouterConfig, refuse_split
from dynamo.runtime.errors import DynamoException, SelectionServiceError
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.selection import RouterMode
from dynamo.services.bodies import convert
from dynamo.services.refusals import as_selection_error, not_ready
from dynamo.services.selection.catalog import WorkerBody
from dynamo.services.selection.core import SelectionCore
from dynamo.services.selection.pending import SelectionCacheConfig
from dynamo.services.selection.prompts import PromptBody, ReservationBody, SelectBody

T = TypeVar("T", bound=msgspec.Struct)
A = TypeVar("A")
Request = Mapping[str, Any]


class SelectionService:
    """The selection service inside a program. Requests and answers are the JSON objects of the HTTP routes.

    It belongs to the event loop of its first asynchronous call. Errors are InvalidArgument for what is wrong with the
    arguments, and SelectionServiceError with the `kind` and `status_code` that HTTP callers would see.

    Args:
        indexer_threads: taken and without effect.
        session_affinity_ttl_secs: from 1 to 31536000; None: sessions are kept nowhere.
        router_config: how to choose, if not by the defaults.

    Raises:
        ValueError: a setting that cannot be meant.
    """

    def __init__(
        self,
        *,
        indexer_threads: int = 4,
        indexer_peers: list[str] | None = None,
        replica_sync_port: int | None = None,
        replica_sync_peers: list[str] | None = None,
        selection_cache: SelectionCacheConfig | None = None,
        session_affinity_ttl_secs: float | None = None,
        router_config: KvRouterConfig | None = None,
    ) -> None:
        if indexer_threads < 1:
            raise ValueError(f"indexer_threads must be at least 1, got {indexer_threads}")
        refuse_split(router_config or KvRouterConfig(), "a SelectionService")
        ttl = session_affinity_ttl_secs
        self._config = RouterConfig(
            RouterMode.KV,
            router_config or KvRouterConfig(),
            session_affinity_ttl_secs=int(ttl) if ttl is not None else None,
        )
        self._indexer_peers = tuple(indexer_peers or ())
        self._port = replica_sync_port
        self._replica_peers = tuple(replica_sync_peers or ())
        self._cache = selection_cache
        self._core: SelectionCore | None = None
        self._over = False

    def _started(self) -> SelectionCore:
        if self._over:
            raise SelectionServiceError("the selection service was shut down", "shut_down", 503)
        if self._core is None:
            self._core = SelectionCore(
                self._config,
                Metrics(0),
                indexer_peers=self._indexer_peers,
                replica_sync_port=self._port,
                replica_sync_peers=self._replica_peers,
                selection_cache=self._cache,
            )
        return self._core

    def _known(self) -> SelectionCore:
        """For calls that are not asynchronous: nothing is known before the first one that is."""
        if self._core is None and not self._over:
            raise not_ready("no worker was told of yet: await upsert_worker first")
        return self._started()

    def shutdown(self) -> None:
        """Hear no events and choose nobody any more; whoever waits is told. May be repeated. `close` waits for it."""
        self._over = True
        core = self._core
        if core is not None:
            core.refuse_waiting()
            core.close_soon()

    async def close(self) -> None:
        """As `shutdown`, and return once it is done."""
        self.shutdown()
        if self._core is not None:
            await self._core.close()

    # --- workers

    async def upsert_worker(self, worker: Request) -> dict[str, Any]:
        """Take what is said of a worker in place of what was; its record, with why it gets nothing if so."""
        return (await self._started().upsert(convert(dict(worker), WorkerBody))).told()

    async def delete_worker(self, worker_id: int) -> dict[str, Any]:
        """A worker is gone; its last record."""
        return (await self._started().delete(worker_id)).told()

    def list_workers(self, *, model_name: str | None = None, routing_group: str | None = None) -> list[dict[str, Any]]:
        """The records of all workers, or of those of a model or group."""
        return self._core.workers(model_name, routing_group) if self._core is not None else []

    def ready(self) -> dict[str, Any]:
        """Whether requests can go anywhere, and all workers."""
        if self._core is None:
            return {"ready": False, "schedulable_workers": 0, "workers": []}
        return self._core.ready()

    # --- asking and choosing

    async def overlap_scores(self, request: Request) -> dict[str, Any]:
        """What each worker holds of a prompt."""
        core, body = self._asked(request, PromptBody)
        return _told(core.overlap_scores, body)

    async def potential_loads(self, request: Request) -> list[dict[str, Any]]:
        """By worker, its load with this prompt."""
        core, body = self._asked(request, PromptBody)
        return _told(core.potential_loads, body)

    async def select(self, request: Request) -> dict[str, Any]:
        """The best worker; nothing is booked."""
        core, body = self._asked(request, SelectBody)
        return _told(core.select, body)

    async def select_and_reserve(self, request: Request) -> dict[str, Any]:
        """The best worker, with the request booked there."""
        core, body = self._asked(request, SelectBody)
        try:
            return await core.select_and_reserve(body)
        except DynamoException as e:
            raise as_selection_error(e) from None

    async def create_reservation(self, request: Request) -> dict[str, Any]:
        """Book what `select` chose under a `selection_id`, or, with a `worker_id` and the prompt, at that worker."""
        core, body = self._asked(request, ReservationBody)
        return _told(core.reserve, body)

    async def prefill_complete(self, selection_id: str) -> None:
        """A reservation's prompt is computed."""
        self._started().prefill_complete(selection_id)

    def add_output_block(self, selection_id: str, *, decay_fraction: float | None = None) -> None:
        """A reservation's request generated one more block; counted if `router_track_output_blocks` is set."""
        self._known().output_block(selection_id, decay_fraction)

    async def free_reservation(self, selection_id: str) -> None:
        """A reservation is over."""
        self._started().free(selection_id)

    def loads(self, *, model_name: str | None = None, routing_group: str | None = None) -> list[dict[str, Any]]:
        """By model and group: every worker's load, and what waits."""
        return self._core.loads(model_name, routing_group) if self._core is not None else []

    def _asked(self, request: Request, body: type[T]) -> tuple[SelectionCore, T]:
        return self._started(), convert(dict(request), body)


def _told(ask: Callable[[T], A], body: T) -> A:
    try:
        return ask(body)
    except DynamoException as e:
        raise as_selection_error(e) from None
