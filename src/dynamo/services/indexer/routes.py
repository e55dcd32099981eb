"""Which path of the indexer answers what? [L2]"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import InvalidArgument
from dynamo.services.access_log import AccessLog
from dynamo.services.bodies import check_zmq_endpoint, decode, unsigned
from dynamo.services.cache_group import CacheGroup, GroupKey, cached_tokens
from dynamo.services.dump_stream import stream_dump
from dynamo.services.engine_listener import ListenerState
from dynamo.services.indexer.registry import IndexRegistry
from dynamo.services.options import MAX_PEERS, check_url
from dynamo.services.refusals import full, not_found
from dynamo.services.web import MODEL, OK, HttpService, reply

MAX_RANK = 1 << 20


class _Group(msgspec.Struct, kw_only=True):
    model_name: str
    routing_group: str | None = None
    tenant_id: str | None = None
    """The old word for `routing_group`."""

    @property
    def key(self) -> GroupKey:
        return GroupKey(self.model_name, self.routing_group or self.tenant_id or "default")


class RegisterBody(_Group, kw_only=True):
    """`POST /register`: hear one rank. `replay_endpoint` is where its engine tells again what was missed."""

    instance_id: int
    endpoint: str
    block_size: int
    dp_rank: int = 0
    replay_endpoint: str | None = None


class UnregisterBody(_Group, kw_only=True):
    """`POST /unregister`: all ranks of a worker, or one."""

    instance_id: int
    dp_rank: int | None = None


class QueryBody(_Group, kw_only=True):
    """`POST /query`: who holds this prompt?"""

    token_ids: list[int]
    lora_name: str | None = None
    cache_salt: str | None = None
    cache_namespace: str | None = None


class QueryByHashBody(_Group, kw_only=True):
    """`POST /query_by_hash`: the same, by the local hashes of the prompt's blocks; adapter and salt are in those."""

    block_hashes: list[int]
    cache_salt: str | None = None


class PeerBody(msgspec.Struct):
    """`POST /register_peer` and `/deregister_peer`."""

    url: str


class IndexerRoutes:
    """The paths. `min_workers` must have joined before `/health` says 200."""

    def __init__(
        self, service: HttpService, registry: IndexRegistry, min_workers: int = 0, access_log: AccessLog | None = None
    ) -> None:
        self._registry = registry
        self._min_workers = min_workers
        self._access_log = access_log
        for method, path, handler in (
            ("GET", "/health", self._health),
            ("GET", "/workers", self._workers),
            ("POST", "/register", self._register),
            ("POST", "/unregister", self._unregister),
            ("POST", "/query", self._query),
            ("POST", "/query_by_hash", self._query_by_hash),
            ("GET", "/dump", self._dump),
            ("GET", "/peers", self._peers),
            ("POST", "/register_peer", self._register_peer),
            ("POST", "/deregister_peer", self._deregister_peer),
            ("POST", "/reopen_logs", self._reopen_logs),
        ):
            service.route(method, path, handler)
        service.gauge("models", "Pairs of model and routing group", lambda: len(registry.groups))
        service.gauge("workers", "Registered workers", lambda: registry.workers)
        service.gauge(
            "blocks", "Different KV blocks that are known", lambda: sum(len(g.index) for g in registry.groups.values())
        )
        for state in ListenerState:
            service.gauge(
                "listeners", "Ranks that are heard, by state", partial(_in_state, registry, state), status=state.value
            )

    # --- what is known

    async def _query(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), QueryBody)
        request[MODEL] = body.model_name
        group = self._registry.group(body.key)
        return reply(_found(group, prompt_hashes(group, body)))

    async def _query_by_hash(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), QueryByHashBody)
        request[MODEL] = body.model_name
        return reply(_found(self._registry.group(body.key), unsigned("block_hashes", body.block_hashes)))

    async def _dump(self, request: web.Request) -> web.StreamResponse:
        return await stream_dump(request, self._registry.groups.values())

    async def _health(self, _: web.Request) -> web.Response:
        joined, busy = self._registry.joined, self._registry.recovery.busy
        ready = joined >= self._min_workers and not busy
        status = "ok" if ready else "asking peers" if busy else "waiting for workers"
        return reply({"status": status, "workers": joined}, 200 if ready else 503)

    # --- who is heard

    async def _register(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), RegisterBody)
        request[MODEL] = body.model_name
        if not 0 <= body.instance_id < 1 << 64:
            raise InvalidArgument("instance_id: is an unsigned 64-bit number", "instance_id")
        if not 0 <= body.dp_rank < MAX_RANK:
            raise InvalidArgument(f"dp_rank: is a number from 0 to {MAX_RANK - 1}", "dp_rank")
        check_zmq_endpoint("endpoint", body.endpoint)
        if body.replay_endpoint is not None:
            check_zmq_endpoint("replay_endpoint", body.replay_endpoint)
        worker = WorkerKey(body.instance_id, body.dp_rank)
        self._registry.register(body.key, worker, body.endpoint, body.replay_endpoint, body.block_size)
        return reply(OK, 201)

    async def _unregister(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), UnregisterBody)
        request[MODEL] = body.model_name
        await self._registry.unregister(body.key, body.instance_id, body.dp_rank)
        return reply(OK)

    async def _workers(self, _: web.Request) -> web.Response:
        return reply([line for group in self._registry.groups.values() for line in _worker_lines(group)])

    # --- other indexers

    async def _peers(self, _: web.Request) -> web.Response:
        return reply(self._registry.recovery.peers)

    async def _register_peer(self, request: web.Request) -> web.Response:
        url = check_url("url", decode(await request.read(), PeerBody).url)
        peers = self._registry.recovery.peers
        if url not in peers:
            if len(peers) >= MAX_PEERS:
                raise full(f"{MAX_PEERS} peers are known already")
            peers.append(url)
        return reply(OK, 201)

    async def _deregister_peer(self, request: web.Request) -> web.Response:
        url = check_url("url", decode(await request.read(), PeerBody).url)
        if url not in self._registry.recovery.peers:
            raise not_found(f"{url} is not a peer")
        self._registry.recovery.peers.remove(url)
        return reply(OK)

    async def _reopen_logs(self, _: web.Request) -> web.Response:
        if self._access_log is not None:
            self._access_log.reopen()
        return reply(OK)


def _in_state(registry: IndexRegistry, state: ListenerState) -> int:
    return registry.states()[state]


def prompt_hashes(group: CacheGroup, body: QueryBody) -> list[int]:
    """The local hashes of a prompt's full blocks. Raises InvalidArgument."""
    try:
        return compute_block_hash_for_seq(
            body.token_ids,
            group.block_size,
            lora_name=body.lora_name,
            cache_namespace=body.cache_namespace or body.cache_salt,
        )
    except InvalidArgument as e:
        raise InvalidArgument(f"token_ids: {e.message}", "token_ids") from None


def _found(group: CacheGroup, block_hashes: Sequence[int]) -> dict[str, Any]:
    return cached_tokens(group, group.find(sequence_hashes(block_hashes)))


def _worker_lines(group: CacheGroup) -> list[dict[str, Any]]:
    lines: dict[int, dict[str, Any]] = {}
    for worker, listener in group.listeners.items():
        line = lines.setdefault(
            worker.worker_id,
            {
                "instance_id": worker.worker_id,
                "source": "zmq",
                "status": "active",
                "model_name": group.key.model_name,
                "routing_group": group.key.routing_group,
                "block_size": group.block_size,
                "endpoints": {},
                "listeners": {},
            },
        )
        rank = str(worker.dp_rank)
        line["endpoints"][rank] = listener.endpoint
        line["listeners"][rank] = {
            "endpoint": listener.endpoint,
            "status": listener.state.value,
            "batches": listener.batches,
            "blocks": group.index.blocks(worker),
            "reason": listener.reason,
        }
        if listener.state is not ListenerState.ACTIVE:
            line["status"] = listener.state.value
    return list(lines.values())
