"""Which handler answers which path, and what does a client see when it fails?"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

from dynamo.frontend import headers
from dynamo.frontend.args import Limits
from dynamo.frontend.errors import RequestRefused, error_answer
from dynamo.frontend.http1 import Request, Sent
from dynamo.frontend.metrics import FrontendMetrics
from dynamo.frontend.routes_admin import AdminRoutes
from dynamo.frontend.routes_models import ModelRoutes
from dynamo.frontend.routes_openai import OpenAIRoutes
from dynamo.frontend.routes_system import SystemRoutes
from dynamo.frontend.server import answer
from dynamo.runtime.errors import DynamoException, WorkerOverloaded

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Sent]]


def paths(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The path of each route, as `DYN_HTTP_SVC_*_PATH` says [A24]. Raises ValueError naming the variable."""
    found = {}
    for name, default in (
        ("CHAT", "/v1/chat/completions"),
        ("CMP", "/v1/completions"),
        ("MODELS", "/v1/models"),
        ("HEALTH", "/health"),
        ("LIVE", "/live"),
        ("METRICS", "/metrics"),
    ):
        variable = f"DYN_HTTP_SVC_{name}_PATH"
        path = environ.get(variable) or default
        if not path.startswith("/") or "?" in path or "#" in path or len(path) < 2:
            raise ValueError(f"{variable}: {path!r} is not a path: it must begin with / and hold no ? or #")
        found[name] = path.rstrip("/")
    if len(set(found.values())) < len(found):
        raise ValueError("two of DYN_HTTP_SVC_*_PATH are the same path")
    return found


class App:
    """The routes of the service."""

    def __init__(
        self,
        openai: OpenAIRoutes,
        models: ModelRoutes,
        system: SystemRoutes,
        admin: AdminRoutes,
        metrics: FrontendMetrics,
        limits: Limits,
        path_of: Mapping[str, str],
    ) -> None:
        self._metrics = metrics
        self._limits = limits
        self._models = models
        self._system = system
        self._model_prefix = path_of["MODELS"] + "/"
        self._inference: dict[str, Handler] = {path_of["CHAT"]: openai.chat, path_of["CMP"]: openai.completions}
        self._pages: dict[str, Handler] = {
            path_of["MODELS"]: models.list_models,
            path_of["HEALTH"]: system.health,
            path_of["LIVE"]: system.live,
            path_of["METRICS"]: system.metrics,
            "/openapi.json": system.openapi,
            "/docs": system.docs,
        }

        self._pages["/status"] = admin.status
        self._settings: dict[str, Handler] = {}
        if limits.admin_api:
            self._settings["/busy_threshold"] = admin.busy_threshold
            self._settings["/conditional_disagg"] = admin.conditional_disagg
        self._in_flight = 0
        self._idle: asyncio.Event | None = None  # only while somebody waits for it

    async def __call__(self, request: Request) -> Sent:
        connection = request.connection
        connection.request_id = None
        self._in_flight += 1
        try:
            if request.refusal is not None:
                raise request.refusal
            return await self._handler(request)(request)
        except DynamoException as e:
            return self._refuse(request, e)
        except Exception as e:
            log.exception("request %s failed", connection.request_id or request.path)
            return self._refuse(request, e)
        finally:
            self._in_flight -= 1
            if self._idle is not None and not self._in_flight:
                self._idle.set()

    async def finished(self, timeout_s: float) -> bool:
        """Wait until no request is being answered; False if some still are after `timeout_s`."""
        self._idle = asyncio.Event()
        if not self._in_flight:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _handler(self, request: Request) -> Handler:
        path = request.path
        handler = self._inference.get(path)
        if handler is not None:
            if request.method != "POST":
                raise self._wrong_method(request, "POST")
            if self._system.draining:
                raise RequestRefused(503, "the server is shutting down", code="server_shutting_down")
            if 0 < self._limits.max_requests < self._in_flight:
                raise WorkerOverloaded(
                    f"this server answers {self._limits.max_requests} requests, as many as it takes at once "
                    "(DYN_HTTP_REQUEST_LIMIT)"
                )
            return handler
        handler = self._settings.get(path)
        if handler is not None:
            if request.method not in ("GET", "HEAD", "POST"):
                raise self._wrong_method(request, "GET, HEAD, POST")
            return handler
        handler = self._pages.get(path) or self._model_handler(path)
        if handler is None:
            raise RequestRefused(404, f"Route not found: {request.method} {path[:200]}", code="route_not_found")
        if request.method not in ("GET", "HEAD"):
            raise self._wrong_method(request, "GET, HEAD")
        return handler

    def _model_handler(self, path: str) -> Handler | None:
        """`/v1/models/{id}` and `/v1/models/{id}/ready`; an id may hold slashes."""
        if not path.startswith(self._model_prefix):
            return None
        model = unquote(path[len(self._model_prefix) :])
        if not model:
            return None

        async def handle(request: Request) -> Sent:
            return await self._models.one(request, model)

        return handle

    def _wrong_method(self, request: Request, allow: str) -> RequestRefused:
        return RequestRefused(
            405, f"Method not allowed: {request.method} {request.path[:200]}; use {allow}", allow=allow
        )

    def _refuse(self, request: Request, error: Exception) -> Sent:
        """The one place where an error becomes an answer."""
        connection = request.connection
        described = error_answer(error, self._limits.overload_status)
        if described.error_type != "cancelled":  # the answer counted the client's leaving when it left
            self._metrics.failure(described.failure_class, described.reason)
        request_id = connection.request_id or headers.request_id(headers.relevant(request.headers))
        return answer(
            request,
            described.status,
            described.body,
            headers=(("x-request-id", request_id), *described.headers),
            close=self._system.draining,
        )
