"""How does a service listen, and what does it do with every request beside answering it?

aiohttp's server, with bounds on what comes in, one JSON form for errors, and counters and an access log for all.
There is no authentication, so it binds loopback unless it is told otherwise.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from aiohttp import web

from dynamo.runtime.address import join_host_port
from dynamo.runtime.errors import CannotConnect
from dynamo.runtime.metrics import CONTENT_TYPE, Metrics
from dynamo.services.access_log import AccessLog
from dynamo.services.refusals import error_answer

MAX_BODY_BYTES: Final = 32 << 20  # four million token ids, more than any model's context
CLOSE_TIMEOUT_S: Final = 5.0  # for answers under way when the program ends
MODEL: Final = web.RequestKey("model", str)  # what the access log shows
_DURATION_S: Final = tuple(0.0001 * 2**i for i in range(14))  # to 0.8 s; a look takes 0.1 ms
_ENCODER: Final = msgspec.json.Encoder()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reply(value: Any, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=_ENCODER.encode(value), status=status, content_type="application/json")


OK: Final = {"status": "ok"}


class HttpService:
    """One service's HTTP side. `prefix` begins the names of its metrics."""

    def __init__(
        self, prefix: str, *, access_log: AccessLog | None = None, trace_id_header: str = "x-trace-id"
    ) -> None:
        self.metrics = Metrics(0)
        self.prefix = prefix
        self._access_log = access_log
        self._trace_id_header = trace_id_header
        counter, histogram = self.metrics.counter, self.metrics.histogram
        self._requests = counter("requests_total", "HTTP requests", ["endpoint", "method"], prefix=prefix, base=())
        self._errors = counter(
            "errors_total", "HTTP answers of 400 and above", ["endpoint", "status_class"], prefix=prefix, base=()
        )
        self._duration = histogram(
            "request_duration_seconds",
            "Time from a request's head to its answer",
            ["endpoint"],
            bounds=_DURATION_S,
            prefix=prefix,
            base=(),
        )
        self._app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._around])
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.route("GET", "/metrics", self._render)

    def route(self, method: str, path: str, handler: Handler) -> None:
        """Answer `method` on `path`, which may hold `{name}`."""
        if method == "GET":
            self._app.router.add_get(path, handler)  # and HEAD
        else:
            self._app.router.add_route(method, path, handler)

    def gauge(self, name: str, text: str, read: Callable[[], float], **labels: str) -> None:
        """Show a number that is read at each scrape."""
        family = self.metrics.gauge(name, text, list(labels), prefix=self.prefix, base=())
        family.labels(*labels.values()).set_function(read)

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes any free one. Raises CannotConnect."""
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=CLOSE_TIMEOUT_S, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as e:
            await runner.cleanup()
            raise CannotConnect(f"cannot listen on {join_host_port(host, port)}: {e.strerror or e}") from e
        self._runner = runner
        self.url = f"http://{join_host_port(*runner.addresses[0][:2])}"

    async def close(self) -> None:
        """Take nothing new, and wait a little for what is being answered. Safe to call twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
        if self._access_log is not None:
            self._access_log.close()

    async def _render(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        start = time.perf_counter()
        try:
            response = await handler(request)
        except web.HTTPException as e:
            response = self._http_error(request, e)
        except asyncio.CancelledError:  # the client has gone
            self._note(request, 499, start)
            raise
        except Exception as e:  # noqa: BLE001 - it becomes an answer, and a line in the log
            answer = error_answer(e)
            response = reply(answer.body, answer.status)
            response.headers.update(answer.headers)
        self._note(request, response.status, start)
        return response

    def _http_error(self, request: web.Request, error: web.HTTPException) -> web.Response:
        body: dict[str, Any] = {"error": error.text or error.reason, "kind": "http"}
        headers = {}
        if isinstance(error, web.HTTPMethodNotAllowed):
            allowed = sorted(error.allowed_methods)
            body = {"error": f"{request.path} takes {', '.join(allowed)}, not {request.method}", "kind": "http"}
            headers["Allow"] = ",".join(allowed)
        elif isinstance(error, web.HTTPNotFound):
            known = sorted({r.resource.canonical for r in self._app.router.routes() if r.resource is not None})
            body = {"error": f"there is no route {request.path[:200]}", "kind": "http", "routes": known}
        elif isinstance(error, web.HTTPRequestEntityTooLarge):
            body = {"error": f"the body has more than {MAX_BODY_BYTES} bytes", "kind": "too_large"}
        response = reply(body, error.status)
        response.headers.update(headers)
        return response

    def _note(self, request: web.Request, status: int, start: float) -> None:
        took = time.perf_counter() - start
        resource = request.match_info.route.resource
        endpoint = resource.canonical if resource is not None else "unknown"  # no label for each wrong path
        self._requests.labels(endpoint, request.method if resource is not None else "any").inc()
        self._duration.labels(endpoint).observe(took)
        if status >= 400:
            self._errors.labels(endpoint, f"{status // 100}xx").inc()
        if self._access_log is not None:
            trace_id = request.headers.get(self._trace_id_header, "-")[:200]
            model = request.get(MODEL, "-")
            self._access_log.write(trace_id, request.method, request.path, model, status, took)
