"""What does a simulated engine do with a request as half of a pair?

`Prefill` holds the blocks of computed prompts and hands out handles for them; `Decode` claims a handle, lets the
transfer's time pass, and gives the sequence its blocks without computing them. Both know the bootstrap handoff too.
The tokens are the same as those of one engine, so whoever compares them sees every mistake on the way.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynamo.engine.handoff import NO_HANDOFF, Layout, Ledger
from dynamo.engine.takeover import Claim, Claims, Grant, Refusal, first_token_of
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest
from dynamo.mocker.bootstrap import BootstrapServer, enter
from dynamo.mocker.transfer import TransferTiming
from dynamo.runtime.errors import DynamoException, InvalidArgument, StreamIncomplete

log = logging.getLogger(__name__)

TRANSPORT = "mocker"


class Inner(Protocol):
    """The simulated engine behind a role."""

    def enqueue(
        self, request_id: str, request: PreprocessedRequest, *, keep: bool = False, transferred: int | None = None
    ) -> None:
        """Queue a request. Raises InvalidArgument."""

    def held_tokens(self, request: PreprocessedRequest) -> int:
        """How many of the prompt's tokens are cached where `enqueue` would queue it. Raises InvalidArgument."""

    def take_kept(self, request_id: str) -> Callable[[], None]:
        """What frees the blocks that a finished request kept."""

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request that no scheduler has."""

    def deliver(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        """Hand on outputs that no step made."""


class Bootstrap(msgspec.Struct):
    """`PreprocessedRequest.bootstrap_info`."""

    bootstrap_host: str
    bootstrap_port: int
    bootstrap_room: int


def bootstrap_of(request: PreprocessedRequest) -> Bootstrap | None:
    """Where the two halves meet, if they start at once. Raises InvalidArgument."""
    if request.bootstrap_info is None:
        return None
    try:
        return msgspec.convert(request.bootstrap_info, Bootstrap)
    except msgspec.ValidationError as e:
        raise InvalidArgument(f"bootstrap_info: {e}", "bootstrap_info") from None


class Prefill:
    """Makes first tokens, and keeps their prompts' blocks. `bootstrap` is its port for the other handoff."""

    def __init__(self, inner: Inner, ledger: Ledger, layout: Layout, timing: TransferTiming, lease_s: float) -> None:
        self._inner = inner
        self._ledger = ledger
        self._layout = layout
        self._timing = timing
        self._lease_s = lease_s
        self._engine_id = secrets.token_hex(8)
        self._requests: dict[str, PreprocessedRequest] = {}
        self._kept: dict[str, Callable[[], None]] = {}
        self._ends: dict[str, EngineOutput] = {}  # request id → its last output, which waits for its reader
        self.bootstrap: BootstrapServer | None = None
        ledger.free = self._free

    def submit(self, request_id: str, request: PreprocessedRequest) -> None:
        """See `LLMEngine.submit`."""
        if request.prefill_result is not None:
            raise InvalidArgument("this worker only computes prompts; it takes over no other's", "prefill_result")
        if bootstrap_of(request) is not None and self.bootstrap is None:
            raise InvalidArgument("this worker has no bootstrap port (--bootstrap-ports)", "bootstrap_info")
        stop = request.stop_conditions
        minimum = None if stop.min_tokens is None else min(1, stop.min_tokens)
        short = msgspec.structs.replace(stop, max_tokens=1, min_tokens=minimum)
        keep = NO_HANDOFF not in request.annotations
        self._inner.enqueue(request_id, msgspec.structs.replace(request, stop_conditions=short), keep=keep)
        if keep:
            self._requests[request_id] = request

    def on_output(self, request_id: str, output: EngineOutput) -> bool:
        """Add a handle to the last output; where a decode worker is met, keep its end back. The caller sees it all."""
        request = self._requests.pop(request_id, None)
        if request is None or output.finish_reason is None:
            return True
        free = self._inner.take_kept(request_id)
        meeting = bootstrap_of(request)
        if meeting is not None and self.bootstrap is not None:
            end = EngineOutput(finish_reason=output.finish_reason, stop_reason=output.stop_reason)
            end.completion_usage, output.completion_usage = output.completion_usage, None
            output.finish_reason = output.stop_reason = None
            self._ends[request_id] = end
            self._requests[request_id] = request  # until its KV is not needed any more
            self.bootstrap.ready(meeting.bootstrap_room, lambda: self._fetched(request_id, free))
        elif output.finish_reason != "length":
            free()
        else:
            key = secrets.token_hex(8)
            self._kept[key] = free
            usage = output.completion_usage
            details = usage.prompt_tokens_details if usage is not None else None
            output.disaggregated_params = self._ledger.issue(
                request,
                self._layout,
                self._engine_id,
                {"kept": key},
                self._lease_s,
                cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
                kv_bytes=self._timing.bytes_per_token * len(request.token_ids),
                lease_s=self._lease_s,
            )
        return True

    def _fetched(self, request_id: str, free: Callable[[], None]) -> None:
        """The decode worker has what it came for, or will not come: the request ends here."""
        free()
        end = self._ends.pop(request_id, None)
        if end is not None:
            del self._requests[request_id]
            self._inner.deliver([(request_id, end)])

    def forget(self, request_id: str) -> None:
        """It was aborted or failed."""
        request = self._requests.pop(request_id, None)
        self._ends.pop(request_id, None)
        meeting = bootstrap_of(request) if request is not None else None
        if meeting is not None and self.bootstrap is not None:
            self.bootstrap.gone(meeting.bootstrap_room)

    def _free(self, params: Any, how: str) -> None:
        free = self._kept.pop(params["kept"], None)
        if free is not None:
            free()

    async def close(self) -> None:
        """Stop waiting for readers."""
        if self.bootstrap is not None:
            await self.bootstrap.close()


@dataclass(slots=True)
class _Takeover:
    """One request whose prompt a prefill worker computes or has computed."""

    request: PreprocessedRequest
    began: float
    drop_first: bool
    claim: Claim | None = None
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    came_over: bool = False
    started: bool = False
    report: dict[str, Any] | None = None


class Decode:
    """Goes on from what prefill workers computed."""

    def __init__(self, inner: Inner, claims: Claims, layout: Layout, timing: TransferTiming) -> None:
        self._inner = inner
        self._claims = claims
        self._timing = timing
        self._takeovers: dict[str, _Takeover] = {}
        claims.layout = layout

    def submit(self, request_id: str, request: PreprocessedRequest) -> None:
        """See `LLMEngine.submit`."""
        loop = asyncio.get_running_loop()
        meeting = bootstrap_of(request)
        if request.prefill_result is not None:
            takeover = _Takeover(request, loop.time(), first_token_of(request) is not None)
            self._takeovers[request_id] = takeover
            takeover.claim = self._claims.begin(request, lambda answer: self._answered(request_id, takeover, answer))
        elif meeting is not None:
            takeover = _Takeover(request, loop.time(), drop_first=False)
            self._takeovers[request_id] = takeover
            takeover.task = loop.create_task(self._meet(request_id, takeover, meeting), name="kv bootstrap")
        else:
            self._inner.enqueue(request_id, request)

    def _answered(self, request_id: str, takeover: _Takeover, answer: Grant | Refusal) -> None:
        if isinstance(answer, Refusal):
            takeover.claim = None
            self._lost(request_id, takeover, answer)
            return
        handle = answer.handle
        try:
            tokens = handle.num_tokens - self._inner.held_tokens(takeover.request)
        except DynamoException as error:
            if takeover.claim is not None:
                takeover.claim.cancel()
            self._fail(request_id, error)
            return
        seconds = self._timing.seconds(tokens)
        takeover.report = {
            "transport": TRANSPORT,
            "prefill_worker_id": handle.instance_id,
            "tokens": tokens,
            "bytes": handle.kv_bytes * tokens // handle.num_tokens,
        }
        loop = asyncio.get_running_loop()
        takeover.timer = loop.call_later(seconds, self._read, request_id, takeover, answer, seconds)

    def _read(self, request_id: str, takeover: _Takeover, grant: Grant, seconds: float) -> None:
        """The transfer's time has passed. What was read after the lease may be another prompt's."""
        if asyncio.get_running_loop().time() < grant.deadline:
            self._arrived(request_id, takeover, grant.handle.cached_tokens, seconds)
            return
        if takeover.claim is not None:
            takeover.claim.cancel()
            takeover.claim = None
        takeover.report = None
        self._lost(request_id, takeover, Refusal("late", "the transfer took longer than the lease"))

    async def _meet(self, request_id: str, takeover: _Takeover, meeting: Bootstrap) -> None:
        tokens = len(takeover.request.token_ids)
        try:
            fetch = await enter(meeting.bootstrap_host, meeting.bootstrap_port, meeting.bootstrap_room)
        except (OSError, TimeoutError) as error:
            self._lost(request_id, takeover, Refusal("unreachable", f"the prefill worker's bootstrap port: {error}"))
            return
        done = False
        try:
            if await fetch.ready():
                takeover.began = asyncio.get_running_loop().time()
                seconds = self._timing.seconds(tokens)
                await asyncio.sleep(seconds)
                done = True
        except (OSError, TimeoutError) as error:
            log.warning("request %s: waiting for its prefill failed: %r", request_id, error)
        finally:
            fetch.close(done)
        if not done:
            self._lost(request_id, takeover, Refusal("unreachable", "the prefill worker gave the prompt up"))
            return
        size = tokens * self._timing.bytes_per_token
        takeover.report = {"transport": "bootstrap", "tokens": tokens, "bytes": size}
        self._arrived(request_id, takeover, 0, seconds)

    def _arrived(self, request_id: str, takeover: _Takeover, cached: int, seconds: float) -> None:
        """The KV is here: all that is left to compute is the last position."""
        if takeover.claim is not None:
            takeover.claim.done()
            takeover.claim = None
        if takeover.report is not None:
            self._claims.metrics.transferred(takeover.report["bytes"], seconds)
        takeover.came_over = True
        self._enqueue(request_id, takeover, cached)

    def _lost(self, request_id: str, takeover: _Takeover, refusal: Refusal) -> None:
        log.warning("request %s: %s", request_id, refusal.why)
        if self._claims.on_lost == "error":
            self._fail(request_id, StreamIncomplete(f"the prefill worker's KV cannot be had: {refusal.why}"))
            return
        self._claims.metrics.recomputed(refusal.reason)
        self._enqueue(request_id, takeover, None)

    def _enqueue(self, request_id: str, takeover: _Takeover, cached: int | None) -> None:
        if self._takeovers.get(request_id) is not takeover:
            return  # aborted meanwhile
        try:
            self._inner.enqueue(request_id, takeover.request, transferred=cached)
        except DynamoException as error:
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: Exception) -> None:
        if self._takeovers.pop(request_id, None) is not None:
            self._inner.fail(request_id, error)

    def on_output(self, request_id: str, output: EngineOutput) -> bool:
        """Take the token that the client has out of the first output. False if nothing is left of it."""
        takeover = self._takeovers.get(request_id)
        if takeover is None:
            return True
        first = not takeover.started
        takeover.started = True
        if first and takeover.came_over and takeover.report is not None:
            seconds = asyncio.get_running_loop().time() - takeover.began
            self._claims.metrics.taken_over(takeover.report["tokens"], seconds)
            takeover.report["seconds"] = round(seconds, 6)
        if first and takeover.drop_first:
            output.prompt_logprobs = None
            for name in ("token_ids", "log_probs", "top_logprobs"):
                values = getattr(output, name)
                setattr(output, name, values[1:] if values else values)
            if output.finish_reason is None:
                return False
        del self._takeovers[request_id]
        output.engine_data = None if takeover.report is None else {"kv_transfer": takeover.report}
        return True

    def forget(self, request_id: str) -> None:
        """It was aborted or failed."""
        takeover = self._takeovers.pop(request_id, None)
        if takeover is None:
            return
        if takeover.timer is not None:
            takeover.timer.cancel()
        if takeover.task is not None:
            takeover.task.cancel()
        if takeover.claim is not None:
            takeover.claim.cancel()

    async def close(self) -> None:
        """Leave what is on its way."""
        for request_id in list(self._takeovers):
            self.forget(request_id)


def layout_of(model: str, block_size: int) -> Layout:
    """Simulated KV fits where model and block size are the same."""
    return Layout(TRANSPORT, model, block_size)
