"""What can an operator ask this process over HTTP?

Health, metrics, who it is, and what its engine offers. Off unless `DYN_SYSTEM_PORT` is 0 (any port) or more. There is
no authentication, so it binds `DYN_SYSTEM_HOST` = 127.0.0.1; a probe or a Prometheus from outside needs `0.0.0.0`
there, behind a network policy or with `DYN_SYSTEM_TLS_CLIENT_CA_CERT_PATH`. Answers are JSON, but for metrics and
files; errors are `{"error", "message"}`.

`/live` says that the loop turns, always with 200: restarting a process because its engine is busy helps nobody.
"""

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from dynamo import __version__
from dynamo.runtime import metrics
from dynamo.runtime.address import join_host_port
from dynamo.runtime.errors import UNDECODABLE, CannotConnect, DynamoException, HttpError, InvalidArgument
from dynamo.runtime.options import env_number
from dynamo.runtime.tls import system_door

if TYPE_CHECKING:
    from dynamo.runtime.distributed import DistributedRuntime

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 1 << 20  # control requests and adapter names are small
CALL_TIMEOUT_S: Final = 600.0  # waking an engine up or loading an adapter takes minutes; then the caller hears of it
CLOSE_TIMEOUT_S: Final = 2.0  # for answers under way when the process ends


class SystemRequest(msgspec.Struct, frozen=True):
    """One request to a registered route. `body` is the JSON object sent, `{}` without one."""

    method: str
    path: str
    params: dict[str, str]
    """What stood in the places of `{name}` in the route's pattern."""
    query: dict[str, str]
    body: dict[str, Any]


Handler = Callable[[SystemRequest], Awaitable[Any]]
"""Answers with anything that JSON can hold. Raises `HttpError` for a status of its own."""

FileSource = Callable[[str], Awaitable[bytes | None]]
"""Gives the content published under a name, or None. Names come from outside: look them up, open nothing by them."""


class _Route:
    def __init__(self, method: str, pattern: str, handler: Handler) -> None:
        self.method = method
        self.pattern = pattern
        self.handler = handler
        literal = re.split(r"(\{[a-z_]+\})", pattern)
        self._regex = re.compile("".join(f"(?P<{p[1:-1]}>[^/]+)" if p[:1] == "{" else re.escape(p) for p in literal))

    def match(self, path: str) -> dict[str, str] | None:
        found = self._regex.fullmatch(path)
        return found.groupdict() if found else None


class SystemServer:
    """The HTTP server of one runtime. Made by `start_system_server`."""

    def __init__(self, runtime: "DistributedRuntime", health_path: str, live_path: str) -> None:
        self._runtime = runtime
        self._routes: list[_Route] = []
        self._files: FileSource | None = None
        self._runner: web.AppRunner | None = None
        self._scheme = "http"
        self.host = ""
        self.port = 0
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_json])
        app.router.add_get(health_path, self._health)
        app.router.add_get(live_path, self._live)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/metadata", self._metadata)
        app.router.add_get("/v1/metadata/{path:.+}", self._file)
        app.router.add_get("/engine/{route:.*}", self._engine)
        app.router.add_post("/engine/{route:.*}", self._engine)
        app.router.add_route("*", "/{path:.*}", self._registered)
        self._app = app

    @property
    def url(self) -> str:
        """`http://host:port`, or `https://`."""
        return f"{self._scheme}://{join_host_port(self.host, self.port)}"

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes any. Raises CannotConnect naming the variables, ValueError for what TLS cannot use."""
        door = system_door()
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=CLOSE_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=door).start()
        except OSError as e:
            await runner.cleanup()
            raise CannotConnect(
                f"the system server cannot listen on {join_host_port(host, port)} "
                f"(DYN_SYSTEM_HOST, DYN_SYSTEM_PORT): {e.strerror or e}"
            ) from e
        self._runner = runner
        self._scheme = "http" if door is None else "https"
        self.host, self.port = runner.addresses[0][:2]
        log.info("the system server listens on %s", self.url)

    async def close(self) -> None:
        """Stop listening. Safe to call twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    # --- what others add

    def add_route(self, method: str, pattern: str, handler: Handler) -> None:
        """Answer `method` on a pattern such as `/v1/loras/{name}`. Raises ValueError if it is taken."""
        if not pattern.startswith("/"):
            raise ValueError(f"route {pattern!r} must start with /")
        if any(route.method == method and route.pattern == pattern for route in self._routes):
            raise ValueError(f"route {method} {pattern} is already there")
        self._routes.append(_Route(method, pattern, handler))

    def serve_files(self, source: FileSource) -> None:
        """Answer `GET /v1/metadata/{path}` with what `source` gives."""
        self._files = source

    # --- the routes

    def _report(self) -> tuple[bool, bytes]:
        if self._runtime.is_shutting_down():
            self._runtime.health.set_ready(False)
        report = self._runtime.health.snapshot()
        return report.ready, msgspec.json.encode(report)

    async def _health(self, _: web.Request) -> web.Response:
        ready, body = self._report()
        return web.Response(body=body, status=200 if ready else 503, content_type="application/json")

    async def _live(self, _: web.Request) -> web.Response:
        return web.Response(body=self._report()[1], content_type="application/json")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._runtime.metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _metadata(self, _: web.Request) -> web.Response:
        served = [
            {
                "namespace": one.endpoint.namespace,
                "component": one.endpoint.component,
                "endpoint": one.endpoint.name,
                "instance_id": one.instance_id,
            }
            for one in self._runtime.served
        ]
        return _json(
            {
                "version": __version__,
                "instance_id": self._runtime.instance_id,
                "process": self._runtime.process,
                "request_plane": self._runtime.server.host_port,
                "endpoints": served,
                "engine_routes": sorted(self._runtime.engine_routes),
            }
        )

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["path"]
        safe = not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name and "\0" not in name
        content = await _bounded(self._files(name)) if safe and self._files is not None else None
        if content is None:
            return _error(404, "Not found", f"no file {name!r} is published here")
        return web.Response(body=content, content_type="application/octet-stream")

    async def _engine(self, request: web.Request) -> web.Response:
        name = request.match_info["route"].strip("/")
        callback = self._runtime.engine_routes.get(name)
        if callback is None:
            message = f"Route /engine/{name} not found"
            return _error(404, "Route not found", message, routes=sorted(self._runtime.engine_routes))
        return _json(await _bounded(callback(dict(request.query) | await _body(request))))

    async def _registered(self, request: web.Request) -> web.Response:
        allowed = []
        for route in self._routes:
            params = route.match(request.path)
            if params is not None and route.method == request.method:
                call = SystemRequest(request.method, request.path, params, dict(request.query), await _body(request))
                return _json(await _bounded(route.handler(call)))
            if params is not None:
                allowed.append(route.method)
        if allowed:
            return _error(405, "Method not allowed", f"{request.path} takes {', '.join(sorted(allowed))}")
        known = {route.resource.canonical for route in self._app.router.routes() if route.resource is not None}
        known = (known | {route.pattern for route in self._routes}) - {"/{path}"}
        return _error(404, "Route not found", f"Route {request.path} not found", routes=sorted(known))


async def _bounded(answer: Awaitable[Any]) -> Any:
    async with asyncio.timeout(CALL_TIMEOUT_S):
        return await answer


async def _body(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    if not raw.strip():
        return {}
    try:
        body = msgspec.json.decode(raw)
    except UNDECODABLE as e:
        raise InvalidArgument(f"the body is not valid JSON: {e}", "body") from None
    if not isinstance(body, dict):
        raise InvalidArgument(f"the body must be a JSON object, not {type(body).__name__}", "body")
    return body


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value, enc_hook=str), status=status, content_type="application/json")


def _error(status: int, error: str, message: str, **more: Any) -> web.Response:
    return _json({"error": error, "message": message, **more}, status)


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except HttpError as e:
        return _error(e.code if 400 <= e.code < 600 else 500, type(e).__name__, e.message)
    except InvalidArgument as e:
        return _error(400, type(e).__name__, e.message)
    except TimeoutError:
        return _error(504, "TimeoutError", f"{request.path} did not answer within {CALL_TIMEOUT_S:g} s")
    except web.HTTPException as e:
        return _error(e.status, e.reason, e.text or e.reason)
    except Exception as e:
        log.exception("%s %s failed", request.method, request.path)
        message = e.message if isinstance(e, DynamoException) else str(e)
        return _error(500, type(e).__name__, message)


async def start_system_server(runtime: "DistributedRuntime") -> SystemServer:
    """Start the server that `DYN_SYSTEM_PORT`, `_HOST`, `_HEALTH_PATH` and `_LIVE_PATH` describe; port 0 takes any.

    Raises ValueError for a wrong variable, CannotConnect when the address cannot be bound.
    """
    port = env_number("DYN_SYSTEM_PORT", 0)
    if port != int(port) or not 0 <= port < 65536:
        raise ValueError(f"DYN_SYSTEM_PORT: {port:g} is not a port: use -1 for off, 0 for any, or 1 to 65535")
    health_path, live_path = _path("DYN_SYSTEM_HEALTH_PATH", "/health"), _path("DYN_SYSTEM_LIVE_PATH", "/live")
    if health_path == live_path:
        raise ValueError(f"DYN_SYSTEM_HEALTH_PATH, DYN_SYSTEM_LIVE_PATH: both are {live_path!r}")
    server = SystemServer(runtime, health_path, live_path)
    await server.start(os.environ.get("DYN_SYSTEM_HOST", "").strip().strip("[]") or "127.0.0.1", int(port))
    return server


def _path(variable: str, default: str) -> str:
    path = os.environ.get(variable, "").strip() or default
    if not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise ValueError(f"{variable}: {path!r} is not a path such as {default}")
    if path in ("/metrics", "/metadata") or path.startswith(("/engine/", "/v1/metadata/")):
        raise ValueError(f"{variable}: {path!r} is the path of another route")
    return path
