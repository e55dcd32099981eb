"""How do requests from the wire become choices in an engine, and its outputs streams again?

One request with `n` choices becomes `n` submissions, numbered and seeded apart. Where a prefill worker computed the
prompt, or does now, the first choice fetches its KV and the others follow when it is here. All that an engine puts out
in one step goes to its streams in one call of `on_outputs`, so that it leaves in one frame for each caller.
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from dynamo.engine.admission import Admission
from dynamo.engine.contract import LLMEngine, Submit
from dynamo.llm.kv_lease import Keeping
from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PreprocessedRequest
from dynamo.runtime.errors import DynamoException, EngineShutdown, InvalidArgument
from dynamo.runtime.streams import PushHandler, ResponseStream

log = logging.getLogger(__name__)

MAX_CHOICES = 128  # the limit of the interface that clients know; each choice costs an engine a sequence

Keep = Callable[[PreprocessedRequest], Keeping | None]


@dataclass(frozen=True, slots=True)
class Way:
    """How requests of one role enter the engine. `one_choice`: whatever `n` a request has, it is for others to make the
    rest (a prefill worker). `keep` lets a prefill worker's KV not expire while the request for it waits outside the
    engine (a decode worker)."""

    submit: Submit
    one_choice: bool = False
    keep: Keep | None = None


_decode = msgspec.msgpack.Decoder(PreprocessedRequest).decode


class _Choice:
    """One choice in the engine."""

    __slots__ = ("index", "request")

    def __init__(self, request: "_Request", index: int) -> None:
        self.request = request
        self.index = index


class _Request:
    """One stream, and its choices that have not ended yet, by engine id."""

    __slots__ = ("_server", "choices", "followers", "inside", "keeping", "payload", "stream", "usage", "way")

    def __init__(self, server: "Dispatcher", payload: PreprocessedRequest, stream: ResponseStream, way: Way) -> None:
        self._server = server
        self.way = way
        self.payload = payload
        self.stream = stream
        self.inside = False
        self.choices: dict[str, int] = {}
        self.followers: list[str] = []
        self.usage: CompletionUsage | None = None
        self.keeping: Keeping | None = None

    def stop_keeping(self) -> None:
        if self.keeping is not None:
            self.keeping.stop()
            self.keeping = None

    def start(self) -> None:
        self.stop_keeping()
        self._server.submit(self)


class Dispatcher:
    """The push handlers of an engine's endpoints, and the receiver of its outputs. Owns the requests in flight."""

    def __init__(self, engine: LLMEngine, admission: Admission) -> None:
        self._cached_tokens = 0
        self._prompt_tokens = 0
        self._engine = engine
        self._admission = admission
        self._choices: dict[str, _Choice] = {}
        self._requests: set[_Request] = set()
        self._closed: str | None = None
        self._collisions = itertools.count(2)

    @property
    def num_requests(self) -> int:
        """Requests in the engine or waiting for it."""
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        """Requests waiting for the engine."""
        return self._admission.num_queued

    def callers_are_behind(self) -> bool:
        """Whether no caller in flight keeps up with what it is sent (its socket's buffer is full)."""
        return bool(self._requests) and all(getattr(request.stream, "congested", False) for request in self._requests)

    def hit_rate(self) -> float:
        """Share of the prompt tokens of all finished requests that were found in the engine's cache."""
        return self._cached_tokens / self._prompt_tokens if self._prompt_tokens else 0.0

    # --- from the wire

    def handler(self, way: Way) -> PushHandler:
        """The push handler of an endpoint whose requests go in this way."""
        return lambda payload, stream: self._handle(payload, stream, way)

    def _handle(self, payload: msgspec.Raw, stream: ResponseStream, way: Way) -> None:
        """Take one request. Whatever is wrong with it ends its stream with a typed error."""
        if self._closed is not None:
            stream.fail(EngineShutdown(self._closed))
            return
        try:
            request = _Request(self, _decode(payload), stream, way)
        except msgspec.ValidationError as e:
            stream.fail(InvalidArgument(f"not a preprocessed request: {e}"))
            return
        except msgspec.DecodeError as e:
            stream.fail(InvalidArgument(f"the request is not msgpack: {e}"))
            return
        self._requests.add(request)
        try:
            self._admission.enter(request)
        except DynamoException as e:
            self._requests.discard(request)
            stream.fail(e)
            return
        if request in self._requests:  # it may have ended already
            if way.keep is not None and not request.inside and request.payload.prefill_result is not None:
                request.keeping = way.keep(request.payload)
            stream.context.on_stop(lambda: self._cancel(request))

    def submit(self, request: _Request) -> None:
        """Give all choices of an admitted request to the engine."""
        try:
            count = 1 if request.way.one_choice else _num_choices(request.payload)
            computed_elsewhere = (request.payload.prefill_result, request.payload.bootstrap_info) != (None, None)
            for index in range(count):
                engine_id = self._unused_id(request.stream.context.id(), index, count)
                request.choices[engine_id] = index
                self._choices[engine_id] = _Choice(request, index)
                if index and computed_elsewhere:
                    request.followers.append(engine_id)
                else:
                    payload = request.payload if count == 1 else _choice_of(request.payload, index)
                    request.way.submit(engine_id, payload)
        except DynamoException as e:
            self._fail(request, e)
        except Exception as e:
            log.exception("the engine did not take request %s", request.stream.context.id())
            self._fail(request, e)

    def _submit_followers(self, request: _Request) -> None:
        """The first choice has its first token, so the prompt's KV is here: the others find it in the cache."""
        followers, request.followers = request.followers, []
        try:
            for engine_id in followers:
                request.way.submit(engine_id, _choice_of(request.payload, request.choices[engine_id]))
        except Exception as e:
            if not isinstance(e, DynamoException):
                log.exception("the engine did not take request %s", request.stream.context.id())
            self._fail(request, e)

    def _unused_id(self, request_id: str, index: int, count: int) -> str:
        """Callers name requests, and two may choose the same name; an engine must not mix them up."""
        engine_id = request_id if count == 1 else f"{request_id}#{index}"
        while engine_id in self._choices:
            engine_id = f"{engine_id}~{next(self._collisions)}"
        return engine_id

    def _cancel(self, request: _Request) -> None:
        """The caller wants no more: the engine stops within a step."""
        if request not in self._requests:
            return
        if not request.stream.context.is_killed():
            for index in request.choices.values() or (0,):
                request.stream.send(EngineOutput(index=index, finish_reason="cancelled"))
        self._abort_choices(request)
        self._end(request)

    # --- from the engine

    def on_outputs(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        """See `EngineCallbacks.on_outputs`."""
        choices = self._choices
        for engine_id, output in outputs:
            choice = choices.get(engine_id)
            if choice is None:
                continue  # cancelled while the step was under way
            request = choice.request
            if request.followers:
                self._submit_followers(request)
                if engine_id not in choices:
                    continue  # that failed the request
            if choice.index:
                output.index = choice.index
            if output.finish_reason is None:
                request.stream.send(output)
                continue
            del choices[engine_id]
            del request.choices[engine_id]
            self._add_usage(request, output)
            request.stream.send(output)
            if not request.choices:
                self._end(request)

    def _add_usage(self, request: _Request, output: EngineOutput) -> None:
        """Usage is that of the whole request: the last choice to end carries the sum."""
        usage = output.completion_usage
        if usage is None:
            return
        if request.usage is not None:
            usage.completion_tokens += request.usage.completion_tokens
            usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
            usage.prompt_tokens_details = request.usage.prompt_tokens_details
        if request.choices:
            request.usage, output.completion_usage = usage, None
            return
        self._prompt_tokens += usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            self._cached_tokens += usage.prompt_tokens_details.cached_tokens or 0

    def on_error(self, engine_id: str, error: Exception) -> None:
        """See `EngineCallbacks.on_error`. The other choices of the request end with it."""
        choice = self._choices.get(engine_id)
        if choice is not None:
            self._fail(choice.request, error)

    def close(self, reason: str) -> None:
        """Fail everything in flight, and all that comes later, with EngineShutdown."""
        self._closed = reason
        for request in tuple(self._requests):
            self._fail(request, EngineShutdown(reason))

    # --- ends

    def _fail(self, request: _Request, error: BaseException) -> None:
        request.stream.fail(error)
        self._abort_choices(request)
        self._end(request)

    def _abort_choices(self, request: _Request) -> None:
        for engine_id in request.choices:
            del self._choices[engine_id]
            self._engine.abort(engine_id)
        request.choices.clear()

    def _end(self, request: _Request) -> None:
        self._requests.discard(request)
        request.stop_keeping()
        request.stream.end()
        self._admission.leave(request)


def _num_choices(request: PreprocessedRequest) -> int:
    """How many choices to make. Raises InvalidArgument for a number that is impossible or not in this version."""
    sampling = request.sampling_options
    count = 1 if sampling.n is None else sampling.n
    if not 1 <= count <= MAX_CHOICES:
        raise InvalidArgument(f"n: must be from 1 to {MAX_CHOICES}, not {count}", "n")
    if sampling.best_of is not None and sampling.best_of != count:
        raise InvalidArgument(f"best_of: is not in this version; it must equal n, which is {count}", "best_of")
    return count


def _choice_of(request: PreprocessedRequest, index: int) -> PreprocessedRequest:
    """The request for one of its choices: the same, but for the seed, which would make all choices equal, and for
    what a prefill worker made, which is the first choice's."""
    sampling = request.sampling_options
    seed = None if sampling.seed is None else sampling.seed + index
    changed = msgspec.structs.replace(request, sampling_options=msgspec.structs.replace(sampling, n=1, seed=seed))
    if index:
        changed.prefill_result = changed.bootstrap_info = None
    return changed
