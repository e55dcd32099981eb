"""What happens to a chat or completion request?

Read the body, decode and check it, find the model, make tokens, send them to a worker, and wait for the answer to be
written. Everything that can go wrong before the first byte of an answer is raised here, and answered in `app`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from time import perf_counter

import msgspec

from dynamo.frontend import headers
from dynamo.frontend.answer import Answer, AnswerPlan
from dynamo.frontend.args import Limits
from dynamo.frontend.engine_stream import EngineStream
from dynamo.frontend.errors import RequestRefused, error_answer
from dynamo.frontend.http1 import Request, Sent
from dynamo.frontend.metrics import UNKNOWN_MODEL, FrontendMetrics, RequestMeter
from dynamo.frontend.migration import Migration, MigrationRules, may_ever_move
from dynamo.frontend.models import ModelRegistry
from dynamo.frontend.passthrough import PassThrough, peek
from dynamo.frontend.query_only import answer_query, only_asks
from dynamo.frontend.stream_answer import StreamAnswer
from dynamo.frontend.unary_answer import UnaryAnswer
from dynamo.frontend.watchdog import Watchdog
from dynamo.frontend.worker_set import WorkerSet
from dynamo.llm.model_card import ModelType
from dynamo.llm.preprocessor import Prepared
from dynamo.llm.protocols.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    RequestDefaults,
    decode_chat,
    decode_completion,
)
from dynamo.runtime.context import Context, new_request_id
from dynamo.runtime.errors import DynamoException, InvalidArgument
from dynamo.runtime.tracing import SpanProxy, configure_tracing

Decode = Callable[[bytes, RequestDefaults | None], ChatCompletionRequest | CompletionRequest]

_NOTHING: frozenset[str] = frozenset()

ANNOTATIONS = ("formatted_prompt", "token_ids", "request_id")


class OpenAIRoutes:
    """The handlers of `/v1/chat/completions` and `/v1/completions`."""

    def __init__(
        self,
        models: ModelRegistry,
        metrics: FrontendMetrics,
        limits: Limits,
        watchdog: Watchdog,
        defaults: RequestDefaults | None = None,
        migration: MigrationRules | None = None,
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._limits = limits
        self._watchdog = watchdog
        self._defaults = defaults
        self._migration = migration or MigrationRules()
        self._passthrough = PassThrough(metrics, limits, watchdog)
        self._records_spans = configure_tracing()

    async def chat(self, request: Request) -> Sent:
        """POST /v1/chat/completions."""
        return await self._handle(request, ModelType.Chat, decode_chat)

    async def completions(self, request: Request) -> Sent:
        """POST /v1/completions."""
        return await self._handle(request, ModelType.Completions, decode_completion)

    async def _handle(self, request: Request, kind: ModelType, decode: Decode) -> Sent:
        received_at = perf_counter()
        check_json_type(request)
        body = request.body
        workers = None
        if self._models.any_takes_text and (asked := peek(body)) is not None:
            workers = self._ready_workers(asked.model, kind)
            if workers is not None and workers.takes_text:
                chat = kind is ModelType.Chat
                return await self._passthrough.answer(request, received_at, body, asked, workers, chat=chat)
        return await self._answer(request, received_at, decode(body, self._defaults), workers)

    def _ready_workers(self, name: str, kind: ModelType) -> WorkerSet | None:
        """Who would answer, as far as it can be told before the body is decoded. What is wrong is said after that."""
        model = self._models.get(name)
        try:
            return None if model is None else model.choose(kind)
        except DynamoException:
            return None

    async def _answer(
        self,
        request: Request,
        received_at: float,
        body: ChatCompletionRequest | CompletionRequest,
        workers: WorkerSet | None = None,
    ) -> Sent:
        """Measure the request from its entry to its end, whatever the end is."""
        is_chat = isinstance(body, ChatCompletionRequest)
        model = self._models.get(body.model)
        series = self._metrics.model(UNKNOWN_MODEL if model is None else body.model)
        endpoint = "chat_completions" if is_chat else "completions"
        meter = RequestMeter(series, endpoint, "stream" if body.stream else "unary", received_at)
        answer: Answer | None = None
        span: SpanProxy | None = None
        error_type = "cancelled"  # what it is if nothing below says otherwise: the task was cancelled
        try:
            if model is None:
                raise self._models.unknown(body.model)
            if workers is None:
                workers = model.choose(ModelType.Chat if is_chat else ModelType.Completions)
            found = headers.relevant(request.headers, self._limits.metadata_header)
            context = headers.make_context(found, self._limits.metadata_header, self._limits.request_timeout_s)
            request.connection.request_id = context.id()
            if self._records_spans:
                span = context.record_span("http-request")
                span.set_attribute("model", body.model)
                span.set_attribute("endpoint", endpoint)
            prepared = await self._prepare(workers, body, found, context)
            plan = self._plan(body, prepared, context, named_by_client="x-request-id" in found)
            if body.annotations and only_asks(body.annotations):
                sent = answer_query(request, plan, workers, prepared, context, stream=bool(body.stream))
                error_type = ""
                return sent
            answer = (StreamAnswer if body.stream else UnaryAnswer)(request, plan, meter, self._metrics, self._limits)
            sent = await self._run(answer, workers, prepared, context)
            error_type = answer.error_type
        except Exception as e:
            error_type = error_answer(e, self._limits.overload_status).error_type
            raise
        else:
            return sent
        finally:
            meter.finish(error_type, None if answer is None else answer.cached_tokens)
            if answer is not None:
                answer.release()
            if span is not None:
                span.set_status("error" if error_type else "ok", error_type or None)
                span.close()

    async def _prepare(
        self,
        workers: WorkerSet,
        body: ChatCompletionRequest | CompletionRequest,
        found: dict[str, str],
        context: Context,
    ) -> list[Prepared]:
        """Template and tokenize: one entry a prompt."""
        metrics = self._metrics
        preprocessor = workers.preprocessor
        assert preprocessor is not None
        pins = headers.routing_pins(found) if found else None
        span = context.start_span("preprocess") if self._records_spans else None
        start = perf_counter()
        metrics.preprocessing.value += 1
        try:
            if isinstance(body, ChatCompletionRequest):
                prepared = [await preprocessor.chat(body)]
            else:
                prepared = await preprocessor.completion(body)
        finally:
            metrics.preprocessing.value -= 1
            if span is not None:
                span.close()
        metrics.preprocess_seconds.observe(perf_counter() - start)
        if found:
            agent = headers.agent_context(found)
            for one in prepared:
                if pins is not None:
                    headers.apply_pins(pins, one.request)
                one.request.agent_context = agent
        return prepared

    def _plan(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        prepared: Sequence[Prepared],
        context: Context,
        *,
        named_by_client: bool,
    ) -> AnswerPlan:
        chat = isinstance(body, ChatCompletionRequest)
        choices = body.choices * len(prepared)
        ext, options = body.nvext, body.stream_options
        extra = _NOTHING if ext is None else self._extra_fields(ext.extra_fields, choices)
        wanted = ext.annotations if ext is not None and body.stream else None
        own_id = new_request_id() if named_by_client else context.id()
        return AnswerPlan(
            chat=chat,
            response_id=f"{'chatcmpl' if chat else 'cmpl'}-{own_id}",
            model=body.model,
            created=int(time.time()),
            choices=choices,
            usage=self._limits.force_include_usage or bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            extra_fields=extra,
            annotations=_annotations(wanted, prepared, context) if wanted else (),
            headers=(("x-request-id", context.id()),),
            explains_routing="routing" in extra,
        )

    def _extra_fields(self, wanted: Sequence[str] | None, choices: int) -> frozenset[str]:
        """What the answer's nvext shall hold. Raises InvalidArgument for what only one choice can have."""
        extra = frozenset(wanted or ())
        if "completion_token_ids" in extra and choices != 1:
            raise InvalidArgument(
                'Validation: nvext.extra_fields: "completion_token_ids" needs exactly one choice', "nvext.extra_fields"
            )
        return extra

    async def _run(self, answer: Answer, workers: WorkerSet, prepared: Sequence[Prepared], context: Context) -> Sent:
        """Send every prompt, and wait until the answer is written or has failed."""
        connection = answer.connection
        for number, one in enumerate(prepared):
            own = context if number == 0 else context.detached(f"{context.id()}-{number}")
            choices = one.request.sampling_options.n or 1
            decoders = [one.decoder_for(i) for i in range(choices)]
            moves = None
            if may_ever_move(self._migration, one.request):
                moves = Migration(self._migration, one.request, self._metrics, answer.plan.model)
            stream = EngineStream(answer, workers, one.request, decoders, one.first_index, own, moves)
            answer.streams.append(stream)
            answer.meter.prompt(len(one.request.token_ids))
        answer.unfinished = len(prepared)
        connection.listener = answer
        self._watchdog.add(answer, context)
        self._metrics.dispatched.value += 1
        try:
            if connection.transport is None:  # the client left while its prompt was being tokenized
                answer.on_gone()
            else:
                for stream in answer.streams:
                    if not answer.closed:
                        stream.dispatch()
                self._peek(answer)
            return await answer.done
        finally:
            self._metrics.dispatched.value -= 1
            self._watchdog.remove(answer)
            if connection.listener is answer:
                connection.listener = None
            answer.abandon()

    def _peek(self, answer: Answer) -> None:
        """Hold the status of a stream back for so long at most, if the operator set a limit [A34]."""
        peek_ms = self._limits.error_peek_ms
        if peek_ms is not None and isinstance(answer, StreamAnswer):
            asyncio.get_running_loop().call_later(peek_ms / 1e3, answer.commit)


def _annotations(
    wanted: Sequence[str], prepared: Sequence[Prepared], context: Context
) -> tuple[tuple[str, object], ...]:
    """The facts about a request that its stream begins with [A33][N4]; names that mean nothing here are left out."""
    facts: list[tuple[str, object]] = []
    for name in ANNOTATIONS:
        if name not in wanted:
            continue
        if name == "request_id":
            facts.append((name, context.id()))
            continue
        for one in prepared:
            value = one.request.token_ids if name == "token_ids" else one.formatted_prompt
            if value is not None:
                facts.append((name, value))
    return tuple(facts)


def check_json_type(request: Request) -> None:
    """Refuse a body that says it is something else than JSON. Raises RequestRefused with 415."""
    kind = request.header("content-type")
    if kind is None:
        return
    kind = kind.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise RequestRefused(415, "Expected request with Content-Type application/json", code="unsupported_media_type")


class _Template(RequestDefaults, frozen=True, forbid_unknown_fields=True):
    """The file of `--request-template` [A27]."""


def load_template(path: str) -> RequestDefaults:
    """Read a request template. Raises ValueError naming the file and the field."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=_Template)
    except (OSError, msgspec.DecodeError) as e:
        raise ValueError(f"--request-template {path}: {e}") from None
