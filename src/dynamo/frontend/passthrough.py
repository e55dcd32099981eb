"""What happens to a request whose worker reads OpenAI's language itself?

Nothing is checked, templated or tokenized here: the model's name is looked up, a worker is chosen, and what it answers
goes to the client. The two forms of such workers are those of `dynamo.llm.protocols.passthrough`.
"""

import asyncio
import logging
from time import perf_counter
from typing import Any

import msgspec

from dynamo.frontend import headers
from dynamo.frontend.args import Limits
from dynamo.frontend.engine_stream import MAX_ATTEMPTS
from dynamo.frontend.errors import error_answer
from dynamo.frontend.http1 import HttpConnection, Request, Sent
from dynamo.frontend.metrics import FrontendMetrics, RequestMeter
from dynamo.frontend.passed_answers import BytesForm, EventsForm, Form, OneAnswerForm, Output
from dynamo.frontend.route import Route, wanted_of
from dynamo.frontend.stream_answer import STALLED_CLIENT_S
from dynamo.frontend.text_prompt import Asked, prompt_tokens
from dynamo.frontend.watchdog import Watchdog
from dynamo.frontend.worker_set import WorkerSet
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.llm.protocols.passthrough import Headers, OpenAIRequest
from dynamo.router.types import Decision
from dynamo.runtime.annotated import Annotated
from dynamo.runtime.connection import Call
from dynamo.runtime.context import Context
from dynamo.runtime.errors import (
    UNDECODABLE,
    Cancelled,
    CannotConnect,
    ConnectionTimeout,
    DynamoException,
    HttpError,
    InvalidArgument,
    Unknown,
)

log = logging.getLogger(__name__)

CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"
_NOT_PASSED_ON = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length", "expect", "accept-encoding", "x-request-id"),
    )
)
"""Headers that are about one connection, or that we say ourselves."""

_decode_any = msgspec.msgpack.Decoder().decode


_decode_asked = msgspec.json.Decoder(Asked).decode


def peek(body: bytes) -> Asked | None:
    """The few fields that say where a body goes; None for one that is no request of any form."""
    try:
        return _decode_asked(body)
    except UNDECODABLE:
        return None


class PassThrough:
    """Sends requests on as they are."""

    def __init__(self, metrics: FrontendMetrics, limits: Limits, watchdog: Watchdog) -> None:
        self._metrics = metrics
        self._limits = limits
        self._watchdog = watchdog

    async def answer(
        self, request: Request, received_at: float, body: bytes, asked: Asked, workers: WorkerSet, *, chat: bool
    ) -> Sent:
        """Measure the request from its entry to its end, whatever the end is."""
        series = self._metrics.model(asked.model)
        endpoint = "chat_completions" if chat else "completions"
        meter = RequestMeter(series, endpoint, "stream" if asked.stream else "unary", received_at)
        passing: Passing | None = None
        error_type = "cancelled"  # what it is if nothing below says otherwise: the task was cancelled
        try:
            found = headers.relevant(request.headers, self._limits.metadata_header)
            context = headers.make_context(found, self._limits.metadata_header, self._limits.request_timeout_s)
            connection = request.connection
            connection.request_id = context.id()
            # What a router has to know: where it wants to go, and as much as can be told of its prompt.
            wish = PreprocessedRequest(asked.model, [], routing=headers.routing_pins(found) if found else None)
            if workers.router is not None:
                wish.token_ids = prompt_tokens(asked)
                wish.agent_context = headers.agent_context(found)
            passing = Passing(request, _Parts(self._metrics, self._limits, meter, workers, context), wish, body, asked)
            passing.path = CHAT_PATH if chat else COMPLETIONS_PATH
            sent = await self._run(passing, connection)
            error_type = passing.error_type
        except Exception as e:
            error_type = error_answer(e, self._limits.overload_status).error_type
            raise
        else:
            return sent
        finally:
            meter.finish(error_type)

    async def _run(self, passing: "Passing", connection: HttpConnection) -> Sent:
        connection.listener = passing
        self._watchdog.add(passing, passing.context)
        self._metrics.dispatched.value += 1
        try:
            if connection.transport is None:  # the client left already
                passing.on_gone()
            else:
                passing.dispatch()
            return await passing.done
        finally:
            self._metrics.dispatched.value -= 1
            self._watchdog.remove(passing)
            if connection.listener is passing:
                connection.listener = None
            passing.abandon()


class _Parts(msgspec.Struct, frozen=True):
    """What a request in flight works with."""

    metrics: FrontendMetrics
    limits: Limits
    meter: RequestMeter
    workers: WorkerSet
    context: Context


class Passing:
    """One request in flight: the sink of its worker's answer, and the listener of its client's connection."""

    path = CHAT_PATH

    def __init__(self, request: Request, parts: _Parts, wish: PreprocessedRequest, body: bytes, asked: Asked) -> None:
        self._request = request
        self._parts = parts
        self._wish = wish
        self._body = body
        self._asked = asked
        self._attempts = 0
        self._route: Route | None = None
        self._dispatch_at = 0.0
        self._call: Call | None = None
        self._form: Form | None = None
        self._paused_at: float | None = None
        self.done: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        self.closed = False
        self.error_type = ""
        self.active_at = perf_counter()

    @property
    def context(self) -> Context:
        """The request's."""
        return self._parts.context

    # --- to the worker

    def dispatch(self) -> None:
        """Choose a worker and send the request, now or when one has room. Raises what says that it cannot be sent."""
        self._attempts += 1
        self._dispatch_at = perf_counter()
        workers = self._parts.workers
        if workers.router is None:
            self._send(workers.choose(self._wish))
            return
        if self._route is None:
            wanted = wanted_of(workers.router, self._wish, self._parts.context)
            self._route = Route(workers.router, wanted, self._go, self.fail)
        self._route.ask()

    def _go(self, decision: Decision) -> None:
        """The router's answer. A rank is the worker's own business: what it gets says nothing of ranks."""
        try:
            self._send(decision.worker.worker_id)
        except DynamoException as e:
            self.fail(e)

    def _send(self, instance_id: int) -> None:
        workers = self._parts.workers
        self.active_at = now = perf_counter()
        self._parts.metrics.route_seconds.observe(now - self._dispatch_at)
        output = Output(self._request, self._parts.context)
        if workers.takes_bytes(instance_id):
            self._form = BytesForm(output)
            sent_on: object = OpenAIRequest(self.path, self._body, passed_on(self._request))
        else:
            streamed = bool(self._asked.stream)
            self._form = EventsForm(output, self._parts.limits) if streamed else OneAnswerForm(output)
            sent_on = as_map(self._body, streamed=streamed)
        self._call = workers.start_request(instance_id, sent_on, self, self._parts.context)

    def _dispatch_again(self) -> None:
        if not self.closed:
            try:
                self.dispatch()
            except DynamoException as e:
                self.fail(e)

    # --- from the worker

    def on_item(self, item: msgspec.Raw) -> None:
        """See `StreamSink`."""
        if self.closed or self._form is None:
            return
        self.active_at = now = perf_counter()
        try:
            annotated: Annotated[Any] = Annotated.from_wire(_decode_any(item))
            if annotated.is_error():
                self.fail(Unknown("; ".join(annotated.comments()) or "the worker reported an error"))
            elif (data := annotated.data()) is not None:
                self._form.add(data)
                if self._route is not None and self._form.has_begun:
                    self._route.first_token()
                if not self._parts.meter.first_token_at:
                    self._parts.meter.tokens(now, 0.0, 0)  # when it came; how many there are is not ours to read
        except (*UNDECODABLE, TypeError, AttributeError, KeyError, ValueError) as e:
            log.exception("a worker sent what is no answer in OpenAI's form, for request %s", self._parts.context.id())
            self.fail(Unknown(f"the worker sent what is no answer in OpenAI's form: {e}"))

    def flush(self) -> None:
        """See `StreamSink`."""
        if not self.closed and self._form is not None:
            self._form.flush()

    def on_end(self) -> None:
        """See `StreamSink`."""
        if self.closed or self._form is None:
            return
        try:
            sent, status = self._form.finish()
        except DynamoException as e:
            self.fail(e)
            return
        self.closed = True
        if self._route is not None:
            self._route.finish()
        if status >= 400:  # the worker's own words went out; the metrics say what kind they were
            described = error_answer(HttpError(status, ""), self._parts.limits.overload_status)
            self.error_type = described.error_type
            self._parts.metrics.failure(described.failure_class, described.reason)
        self._resolve(sent)

    def on_error(self, error: DynamoException) -> None:
        """See `StreamSink`. Where nothing was sent, another worker may get it."""
        if self.closed:
            return
        if isinstance(error, CannotConnect) and self._attempts < MAX_ATTEMPTS:
            # Not now: the request plane first takes the worker out of rotation.
            asyncio.get_running_loop().call_soon(self._dispatch_again)
            return
        self.fail(error)

    def fail(self, error: DynamoException) -> None:
        """End with an error that did not come from the worker's engine."""
        if self.closed:
            return
        self.closed = True
        self._stop()
        if self._form is None or not self._form.committed:
            self._resolve(error)
            return
        described = error_answer(error, self._parts.limits.overload_status)
        self.error_type = described.error_type
        self._parts.metrics.failure(described.failure_class, described.reason)
        self._resolve(self._form.break_off(described.body))

    # --- the client's connection

    def on_full(self) -> None:
        """See `ConnectionListener`: let the worker wait, so that nothing piles up."""
        self._paused_at = perf_counter()
        if self._call is not None and not self.closed:
            self._call.flow(False)

    def on_writable(self) -> None:
        """See `ConnectionListener`."""
        self._paused_at = None
        self.active_at = perf_counter()
        if self._call is not None and not self.closed:
            self._call.flow(True)

    def on_gone(self) -> None:
        """See `ConnectionListener`."""
        if self.closed:
            return
        self.closed = True
        self.error_type = "cancelled"
        self._parts.metrics.disconnected.value += 1
        self._parts.metrics.failure("Cancelled", "client.disconnected")
        self._stop()
        self._resolve(Cancelled("the client closed the connection"))

    # --- the watchdog

    def check(self, now: float) -> None:
        """See `Watched`."""
        if self._paused_at is not None:
            if now - self._paused_at > STALLED_CLIENT_S and (transport := self._request.transport) is not None:
                transport.abort()  # and the connection tells `on_gone`
            return
        limit_s = self._parts.limits.stream_timeout_s
        if now - self.active_at > limit_s:
            self.fail(
                ConnectionTimeout(f"the worker sent nothing for {limit_s:.0f} s (DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS)")
            )
        elif self._form is not None and not self.closed:
            self._form.keep_alive(now)

    # --- the end

    def abandon(self) -> None:
        """The handler is leaving, for whatever reason: the worker shall not go on for nothing."""
        if not self.closed:
            self.closed = True
            self._stop()
        self._form = self._call = self._route = None  # no cycle for the garbage collector

    def _stop(self) -> None:
        """Nobody wants the rest."""
        self._parts.context.kill()
        if self._route is not None:
            self._route.cancel()

    def _resolve(self, outcome: Sent | DynamoException) -> None:
        if self.done.done():
            return
        if isinstance(outcome, Sent):
            self.done.set_result(outcome)
        else:
            self.done.set_exception(outcome)


def passed_on(request: Request) -> Headers:
    """The client's headers that are meant for the end of the way."""
    return [
        (name, value)
        for name, value in request.headers
        if name.lower() not in _NOT_PASSED_ON and not name.lower().startswith("x-dynamo-")
    ]


def as_map(body: bytes, *, streamed: bool) -> dict[str, Any]:
    """The request as workers of the map form get it: they always stream, and count where one body is wanted.

    Raises:
        InvalidArgument: the body is not a JSON object.
    """
    try:
        request = msgspec.json.decode(body, type=dict[str, Any])
    except UNDECODABLE as e:
        raise InvalidArgument(f"the body is not a JSON object: {e}") from None
    request["stream"] = True
    if not streamed:
        request["stream_options"] = {"include_usage": True}
    return request
