"""How does a stream of tokens become a stream of events?

`add` appends bytes, `flush` writes them: one system call for each read of a worker's socket, whatever came with it,
and no task, queue or future in between. The 200 waits for the first output, so that what fails before it still gets
its own status. A client that reads slowly gets fewer, bigger events: while its socket is full, text collects here and
leaves as one event a choice when the socket drains.
"""

from time import perf_counter
from typing import Any

from dynamo.frontend import sse
from dynamo.frontend.answer import Answer, AnswerPlan
from dynamo.frontend.args import Limits
from dynamo.frontend.fold import Fold
from dynamo.frontend.http1 import Request, sent
from dynamo.frontend.metrics import FrontendMetrics, RequestMeter
from dynamo.frontend.server import head_bytes
from dynamo.llm.output import TextDelta
from dynamo.llm.protocols.engine import EngineOutput
from dynamo.runtime.errors import DynamoException

STALLED_CLIENT_S = 60.0  # a client whose full socket did not drain for so long is not reading, and is dropped


class StreamAnswer(Answer):
    """Server-sent events to one client."""

    def __init__(
        self,
        request: Request,
        plan: AnswerPlan,
        meter: RequestMeter,
        metrics: FrontendMetrics,
        limits: Limits,
    ) -> None:
        super().__init__(request, plan, meter, metrics, limits)
        self.paused = self.connection.writing_paused
        self._paused_at = perf_counter()
        self._form = sse.ChunkForm(chat=plan.chat, response_id=plan.response_id, created=plan.created, model=plan.model)
        self._parts: list[bytes] = []
        self._frames: list[tuple[bytes, bytes] | None] = [None] * plan.choices
        self._held: dict[int, Fold] = {}
        self._committed = False
        self._ended = False
        self._written_at = perf_counter()
        self._chunked = request.version >= (1, 1)
        self._whole = bool(plan.continuous_usage or plan.extra_fields)
        self._keep_alive_s = limits.sse_keep_alive_ms / 1e3

    # --- from the workers

    def add(self, number: int, delta: TextDelta, output: EngineOutput) -> None:
        if self.paused:
            self._hold(number, delta, output)
            return
        frame = self._frames[number]
        if frame is None:
            self._begin_choice(number, delta, output)
        elif self._whole or delta.finish_reason is not None or delta.logprobs is not None or delta.tool_calls:
            self._add_whole(number, delta, output)
        elif delta.text:
            head, tail = frame
            self._parts += (head, sse.json_bytes(delta.text), tail)

    def _begin_choice(self, number: int, delta: TextDelta, output: EngineOutput) -> None:
        """The first output of a choice: a chat's role goes before it."""
        self._frames[number] = self._form.text_frame(number)
        if self.plan.chat:
            self._parts.append(self._form.chunk([self._form.choice(number, TextDelta(""), role=True)]))
        self.add(number, delta, output)

    def _add_whole(self, number: int, delta: TextDelta, output: EngineOutput | None) -> None:
        """An event with more in it than text. How a choice ended is an event of its own, as OpenAI's service has it."""
        finish = delta.finish_reason
        if finish is not None:
            delta.finish_reason = None
        if delta.text or delta.logprobs is not None or delta.tool_calls or (self._whole and finish is None):
            self._parts.append(self._chunk(self._form.choice(number, delta), self._nvext(output, delta, last=False)))
        if finish is not None:
            end = TextDelta("", finish, stop_reason=delta.stop_reason)
            self._parts.append(self._chunk(self._form.choice(number, end), self._nvext(None, end, last=True)))

    def _chunk(self, choice: dict[str, Any], nvext: dict[str, Any] | None) -> bytes:
        return self._form.chunk([choice], self.usage() if self.plan.continuous_usage else None, nvext)

    def _nvext(self, output: EngineOutput | None, delta: TextDelta, *, last: bool) -> dict[str, Any] | None:
        """The extension object of a chunk: what of `extra_fields` this chunk can say [N9][N12]."""
        wanted = self.plan.extra_fields
        if not wanted:
            return None
        fields: dict[str, Any] = {}
        if "worker_id" in wanted:
            fields["worker_id"] = self.worker_fields()
        if "timing" in wanted and last:
            fields["timing"] = self.timing()
        if "routing" in wanted and last:
            fields["routing"] = self.routing()
        if "stop_reason" in wanted and last:
            fields["stop_reason"] = delta.stop_reason
        if "completion_token_ids" in wanted:
            fields["completion_token_ids"] = output.token_ids if output is not None else []
        if output is not None:
            for name in ("engine_data", "prompt_logprobs"):
                if name in wanted and (value := getattr(output, name)) is not None:
                    fields[name] = value
        return fields

    def flush(self) -> None:
        if self._parts and not self.closed and not self.paused:
            self._write(b"".join(self._parts))
            self._parts.clear()

    # --- to the client

    def commit(self) -> None:
        """Send the 200 now, although no output has come."""
        if not self._committed and not self.closed:
            self._write(b"")

    def _head(self) -> bytes:
        self._committed = True
        head = head_bytes(
            self.request,
            200,
            "text/event-stream",
            None,
            (("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no"), *self.plan.headers),
            keep_alive=self.request.keep_alive and self._chunked,
        )
        facts = b"".join(sse.annotation_event(name, value) for name, value in self.plan.annotations)
        return head + self._framed(facts)

    def _framed(self, data: bytes) -> bytes:
        """One chunk of HTTP's; nothing for nothing, because an empty chunk would end the body."""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data

    def _write(self, data: bytes, end: bytes = b"") -> None:
        framed = self._framed(data) + end
        if not self._committed:
            framed = self._head() + framed
        transport = self.connection.transport
        if transport is not None:
            transport.write(framed)
            self._written_at = self.active_at

    def complete(self) -> None:
        if self.paused:
            self._ended = True  # the rest is written when the client has read what it has
            return
        if self.plan.usage:
            self._parts.append(self._form.chunk([], self.usage()))
        self._parts.append(sse.DONE)
        self._finish()

    def write_error(self, error: DynamoException, body: bytes) -> None:
        if not self._committed:
            self.resolve(error)
            return
        self._release()
        self._parts.append(sse.error_event(body))
        self._finish()

    def _finish(self) -> None:
        self.closed = True
        self._write(b"".join(self._parts), b"0\r\n\r\n" if self._chunked else b"")
        self._parts.clear()
        self.resolve(sent(self.request.keep_alive and self._chunked))

    # --- slow clients

    def on_full(self) -> None:
        """The socket's buffer is over its high-water mark."""
        self.paused = True
        self._paused_at = perf_counter()

    def on_writable(self) -> None:
        self.paused = False
        if self.closed:
            return
        self._release()
        if self._ended:
            self.complete()
        else:
            self.flush()

    def _hold(self, number: int, delta: TextDelta, output: EngineOutput) -> None:
        """Merge what comes while the client does not read. Bounded by the answer's own length."""
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = Fold()
        held.add(delta)
        if self.plan.extra_fields:
            held.keep(output)

    def _release(self) -> None:
        held, self._held = self._held, {}
        for number, fold in held.items():
            self.add(number, *fold.whole())

    # --- the watchdog

    def check(self, now: float) -> None:
        if self.paused and now - self._paused_at > STALLED_CLIENT_S:
            transport = self.connection.transport
            if transport is not None:
                transport.abort()  # and the connection tells `on_gone`
            return
        if not self._ended:
            super().check(now)
        if self._keep_alive_s and not self.closed and not self.paused and now - self._written_at >= self._keep_alive_s:
            self._write(sse.KEEP_ALIVE)
            self._written_at = now
