"""Which path of the selection service answers what? [L4]"""

from aiohttp import web

from dynamo.runtime.errors import InvalidArgument
from dynamo.services.bodies import decode
from dynamo.services.dump_stream import stream_dump
from dynamo.services.replica_routes import ReplicaRoutes
from dynamo.services.selection.catalog import WorkerBody, WorkerPatch
from dynamo.services.selection.core import SelectionCore
from dynamo.services.selection.prompts import FreeBody, OutputBlockBody, PromptBody, ReservationBody, SelectBody
from dynamo.services.web import MODEL, OK, HttpService, reply


class SelectionRoutes:
    """The paths, on a core."""

    def __init__(self, service: HttpService, core: SelectionCore) -> None:
        self._core = core
        ReplicaRoutes(service, core.link)
        for method, path, handler in (
            ("GET", "/health", self._health),
            ("GET", "/ready", self._ready),
            ("GET", "/workers", self._workers),
            ("POST", "/workers", self._upsert),
            ("PATCH", "/workers/{worker_id}", self._patch),
            ("DELETE", "/workers/{worker_id}", self._delete),
            ("POST", "/select", self._select),
            ("POST", "/select_and_reserve", self._select_and_reserve),
            ("POST", "/overlap_scores", self._overlap_scores),
            ("POST", "/potential_loads", self._potential_loads),
            ("GET", "/loads", self._loads),
            ("POST", "/reservations", self._reserve),
            ("POST", "/reservations/{selection_id}/prefill_complete", self._prefill_complete),
            ("POST", "/reservations/{selection_id}/output_block", self._output_block),
            ("DELETE", "/reservations/{selection_id}", self._free),
            ("GET", "/dump", self._dump),
        ):
            service.route(method, path, handler)
        service.gauge("workers", "Workers in the catalog", lambda: len(core.catalog))
        service.gauge(
            "schedulable_workers",
            "Workers that requests may go to",
            lambda: sum(record.lifecycle == "schedulable" for record in core.catalog.values()),
        )
        service.gauge("reservations", "Reservations that are open", lambda: len(core.reservations))
        service.gauge("pending_selections", "Selections that may be reserved yet", lambda: len(core.pending))
        service.gauge("pending_selection_bytes", "About what those take", lambda: core.pending.bytes)
        service.gauge(
            "queued_requests",
            "Requests that wait for a worker to have room",
            lambda: sum(selector.queue.pending for selector in core.selectors.values()),
        )
        service.gauge(
            "blocks", "Different KV blocks that are known", lambda: sum(len(c.index) for c in core.caches.values())
        )

    # --- how it is

    async def _health(self, _: web.Request) -> web.Response:
        return reply(OK)

    async def _ready(self, _: web.Request) -> web.Response:
        ready = self._core.ready()
        return reply(ready, 200 if ready["ready"] else 503)

    async def _dump(self, request: web.Request) -> web.StreamResponse:
        return await stream_dump(request, self._core.caches.values())

    async def _loads(self, request: web.Request) -> web.Response:
        query = request.query
        return reply(self._core.loads(query.get("model_name"), query.get("routing_group")))

    # --- workers

    async def _workers(self, request: web.Request) -> web.Response:
        query = request.query
        return reply(self._core.workers(query.get("model_name"), query.get("routing_group")))

    async def _upsert(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), WorkerBody)
        request[MODEL] = body.model_name
        return reply((await self._core.upsert(body)).told(), 201)

    async def _patch(self, request: web.Request) -> web.Response:
        patch = decode(await request.read(), WorkerPatch)
        return reply((await self._core.patch(_worker_id(request), patch)).told())

    async def _delete(self, request: web.Request) -> web.Response:
        return reply((await self._core.delete(_worker_id(request))).told())

    # --- choosing

    async def _select(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), SelectBody)
        request[MODEL] = body.model_name
        return reply(self._core.select(body))

    async def _select_and_reserve(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), SelectBody)
        request[MODEL] = body.model_name
        return reply(await self._core.select_and_reserve(body))

    async def _overlap_scores(self, request: web.Request) -> web.Response:
        return reply(self._core.overlap_scores(decode(await request.read(), PromptBody)))

    async def _potential_loads(self, request: web.Request) -> web.Response:
        return reply(self._core.potential_loads(decode(await request.read(), PromptBody)))

    # --- reservations

    async def _reserve(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), ReservationBody)
        request[MODEL] = body.model_name
        return reply(self._core.reserve(body), 201)

    async def _prefill_complete(self, request: web.Request) -> web.Response:
        self._core.prefill_complete(request.match_info["selection_id"])
        return reply(OK)

    async def _output_block(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), OutputBlockBody)
        counted = self._core.output_block(request.match_info["selection_id"], body.decay_fraction)
        return reply({**OK, "counted": counted})

    async def _free(self, request: web.Request) -> web.Response:
        body = decode(await request.read(), FreeBody)
        self._core.free(request.match_info["selection_id"], body.output_tokens)
        return reply(OK)


def _worker_id(request: web.Request) -> int:
    text = request.match_info["worker_id"]
    if not text.isdecimal() or int(text) >= 1 << 64:
        raise InvalidArgument(f"worker_id: {text[:100]!r} in the path is not an unsigned 64-bit number", "worker_id")
    return int(text)
