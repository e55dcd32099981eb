"""Who answers a client, from the first output of its workers to the last byte?

An `Answer` belongs to one HTTP request. Its prompts' streams (`dynamo.frontend.engine_stream`) push text into it; the
client's connection tells it of slowness and departure; the watchdog tells it the time. It ends exactly once, by
resolving `done`: the one future of the request.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from dynamo.frontend.args import Limits
from dynamo.frontend.bodies import CachedTokens, Usage
from dynamo.frontend.errors import error_answer
from dynamo.frontend.http1 import Request, Sent
from dynamo.frontend.metrics import FrontendMetrics, RequestMeter
from dynamo.frontend.stream_facts import explain
from dynamo.llm.output import TextDelta
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime.errors import Cancelled, ConnectionTimeout, DynamoException

if TYPE_CHECKING:
    from dynamo.frontend.engine_stream import EngineStream


class AnswerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the client wants to see. `choices` counts those of all prompts together."""

    chat: bool
    response_id: str
    model: str
    created: int
    choices: int
    usage: bool = False
    continuous_usage: bool = False
    extra_fields: frozenset[str] = frozenset()
    annotations: tuple[tuple[str, object], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    explains_routing: bool = False


class Answer(ABC):
    """What the two kinds of answer have in common: streams, times, counts, and one end."""

    def __init__(
        self,
        request: Request,
        plan: AnswerPlan,
        meter: RequestMeter,
        metrics: FrontendMetrics,
        limits: Limits,
    ) -> None:
        self.request = request
        self.connection = request.connection
        self.plan = plan
        self.meter = meter
        self.metrics = metrics
        self.limits = limits
        self.streams: list[EngineStream] = []
        self.unfinished = 0
        """Streams that have not ended."""
        self.done: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        self.closed = False
        """Nothing more will be written: the answer ended, failed, or lost its client."""
        self.error_type = ""
        self.active_at = perf_counter()
        """When a worker last gave a sign of life."""
        self.dispatched_at = 0.0

    # --- what a worker's stream calls

    @abstractmethod
    def add(self, number: int, delta: TextDelta, output: EngineOutput) -> None:
        """Choice `number` grew. Called for every output."""

    @abstractmethod
    def flush(self) -> None:
        """All that came with one read of a worker's socket was added."""

    def stream_ended(self) -> None:
        """One prompt is answered."""
        self.unfinished -= 1
        if not self.unfinished and not self.closed:
            self.complete()

    def fail(self, error: DynamoException) -> None:
        """One prompt cannot be answered, so none is."""
        if self.closed:
            return
        self.closed = True
        self._stop_workers()
        answer = error_answer(error, self.limits.overload_status)
        self.error_type = answer.error_type
        self.write_error(error, answer.body)

    @abstractmethod
    def complete(self) -> None:
        """Every prompt is answered: write what is left and resolve `done`."""

    @abstractmethod
    def write_error(self, error: DynamoException, body: bytes) -> None:
        """Tell the client as well as is still possible, and resolve `done`."""

    # --- what the connection calls

    @abstractmethod
    def on_full(self) -> None:
        """See `ConnectionListener`."""

    @abstractmethod
    def on_writable(self) -> None:
        """See `ConnectionListener`."""

    def on_gone(self) -> None:
        """The client left: so do we, at once, and free the workers."""
        if self.closed:
            return
        self.closed = True
        self.error_type = "cancelled"
        self.metrics.disconnected.value += 1
        self.metrics.failure("Cancelled", "client.disconnected")
        self._stop_workers()
        self.resolve(Cancelled("the client closed the connection"))

    # --- what the watchdog calls

    def check(self, now: float) -> None:
        """Notice workers that have been silent for too long. Called about once a second."""
        silent_s = now - self.active_at
        if silent_s > self.limits.stream_timeout_s and not self.closed:
            error = ConnectionTimeout(
                f"the worker sent nothing for {silent_s:.0f} s (DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS)"
            )
            if not all(stream.ended or stream.move(error) for stream in self.streams):
                self.fail(error)

    # --- the end

    def resolve(self, outcome: Sent | DynamoException) -> None:
        """Let the handler go on."""
        if self.done.done():
            return
        if isinstance(outcome, Sent):
            self.done.set_result(outcome)
        else:
            self.done.set_exception(outcome)

    def abandon(self) -> None:
        """The handler is leaving, for whatever reason: no worker shall go on for nothing."""
        self.closed = True
        self._stop_workers()

    def release(self) -> None:
        """Forget the streams, which know the answer: a request must leave no cycle for the garbage collector."""
        for stream in self.streams:
            stream.route = stream.remote = None
        self.streams.clear()

    def _stop_workers(self) -> None:
        for stream in self.streams:
            stream.cancel()

    # --- facts about the whole answer

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens found in prefix caches, None if no engine told."""
        total = None
        for stream in self.streams:
            if (count := stream.cached_tokens) is not None:
                total = (total or 0) + count
        return total

    def usage(self) -> Usage:
        """Token counts so far; the cached part is there when an engine told it."""
        prompt = completion = 0
        for stream in self.streams:
            prompt += stream.prompt_tokens
            completion += stream.completion_tokens
        cached = self.cached_tokens
        return Usage(prompt, completion, prompt + completion, UNSET if cached is None else CachedTokens(cached))

    def worker_fields(self) -> dict[str, Any]:
        """The `worker_id` object of nvext [N12]: which worker did the prefill, which the decode."""
        stream = self.streams[0]
        prefill = stream.remote if stream.remote is not None and stream.remote.serves else stream
        fields: dict[str, Any] = {
            "prefill_worker_id": prefill.instance_id,
            "decode_worker_id": stream.instance_id,
        }
        if prefill.dp_rank is not None:
            fields["prefill_dp_rank"] = prefill.dp_rank
        if stream.dp_rank is not None:
            fields["decode_dp_rank"] = stream.dp_rank
        return fields

    def timing(self) -> dict[str, float]:
        """The `timing` object of nvext [N12], in milliseconds since the handler was entered."""
        start = self.meter.received_at
        now = perf_counter()
        fields: dict[str, float] = {"request_received_ms": int((time.time() - (now - start)) * 1e3)}
        if self.dispatched_at:
            fields["prefill_wait_time_ms"] = (self.dispatched_at - start) * 1e3
        if first := self.meter.first_token_at:
            fields["prefill_time_ms"] = (first - self.dispatched_at) * 1e3
            fields["ttft_ms"] = (first - start) * 1e3
        fields["total_time_ms"] = (now - start) * 1e3
        route = self.streams[0].route
        if route is not None and (decision := route.decision) is not None:
            fields["kv_hit_rate"] = decision.hit_rate
            fields["router_queue_depth"] = route.queue_depth
        return fields

    def routing(self) -> dict[str, Any] | list[dict[str, Any]]:
        """The `routing` object of nvext: why each prompt went where it did. A list if there are several prompts."""
        explained = [explain(stream) for stream in self.streams]
        return explained[0] if len(explained) == 1 else explained
