"""Which path of the slot tracker answers what? [L3]"""

import msgspec
from aiohttp import web

from dynamo.router.types import WorkerKey
from dynamo.runtime.errors import InvalidArgument
from dynamo.services.bodies import decode, unsigned
from dynamo.services.cache_group import GroupKey
from dynamo.services.replica_routes import ReplicaRoutes
from dynamo.services.slots.tracker import SlotTracker
from dynamo.services.web import OK, HttpService, reply


class _Group(msgspec.Struct, kw_only=True):
    model_name: str
    routing_group: str = "default"

    @property
    def key(self) -> GroupKey:
        return GroupKey(self.model_name, self.routing_group)


class RegisterBody(_Group, kw_only=True):
    """`POST /register`."""

    worker_id: int
    block_size: int
    dp_start: int
    dp_size: int


class UnregisterBody(_Group, kw_only=True):
    """`POST /unregister`."""

    worker_id: int


class RequestBody(_Group, kw_only=True):
    """`POST /prefill_complete` and `/free`."""

    request_id: str


class AddBody(RequestBody, kw_only=True):
    """`POST /add`: `new_isl_tokens` are those of the prompt that the worker has to compute."""

    worker_id: int
    dp_rank: int
    sequence_hashes: list[int]
    new_isl_tokens: int = 0


class PotentialBody(_Group, kw_only=True):
    """`POST /potential_loads`."""

    sequence_hashes: list[int]
    new_isl_tokens: int = 0


class SlotRoutes:
    """The paths, on a tracker."""

    def __init__(self, service: HttpService, tracker: SlotTracker) -> None:
        self._tracker = tracker
        ReplicaRoutes(service, tracker.link)
        for method, path, handler in (
            ("GET", "/health", self._health),
            ("GET", "/workers", self._workers),
            ("POST", "/register", self._register),
            ("POST", "/unregister", self._unregister),
            ("POST", "/add", self._add),
            ("POST", "/prefill_complete", self._prefill_complete),
            ("POST", "/free", self._free),
            ("GET", "/loads", self._loads),
            ("POST", "/potential_loads", self._potential_loads),
        ):
            service.route(method, path, handler)
        service.gauge("workers", "Registered workers", lambda: len(tracker.workers()))
        service.gauge("active_requests", "Active requests", lambda: tracker.active)

    async def _health(self, _: web.Request) -> web.Response:
        return reply(OK)

    async def _workers(self, _: web.Request) -> web.Response:
        return reply(self._tracker.workers())

    async def _register(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), RegisterBody)
        self._tracker.register(body.key, body.worker_id, body.block_size, body.dp_start, body.dp_size)
        return reply(OK, 201)

    async def _unregister(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), UnregisterBody)
        self._tracker.unregister(body.key, body.worker_id)
        return reply(OK)

    async def _add(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), AddBody)
        hashes = unsigned("sequence_hashes", body.sequence_hashes)
        worker = WorkerKey(body.worker_id, body.dp_rank)
        self._tracker.add(body.key, body.request_id, worker, hashes, _tokens(body.new_isl_tokens))
        return reply(OK, 201)

    async def _prefill_complete(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), RequestBody)
        self._tracker.prefill_complete(body.key, body.request_id)
        return reply(OK)

    async def _free(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), RequestBody)
        self._tracker.free(body.key, body.request_id)
        return reply(OK)

    async def _loads(self, request: web.Request) -> web.Response:
        query = request.query
        return reply(list(self._tracker.loads(query.get("model_name"), query.get("routing_group"))))

    async def _potential_loads(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), PotentialBody)
        hashes = unsigned("sequence_hashes", body.sequence_hashes)
        return reply(self._tracker.potential_loads(body.key, hashes, _tokens(body.new_isl_tokens)))


def _tokens(count: int) -> int:
    if not 0 <= count < 1 << 40:
        raise InvalidArgument(f"new_isl_tokens: {count} is not a number of tokens", "new_isl_tokens")
    return count
