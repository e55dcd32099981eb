"""What happens to the outputs of a worker on their way into an answer?

An `EngineStream` is one prompt at one worker: the sink that the request plane calls from the socket's callback. An
output is decoded, becomes text, and goes into the answer in one chain of calls.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import msgspec

from dynamo.frontend.answer import Answer
from dynamo.frontend.metrics import Push
from dynamo.frontend.migration import RETRY_S, Migration
from dynamo.frontend.pools import Workers
from dynamo.frontend.remote_prefill import RemotePrefill, Unpaired
from dynamo.frontend.route import OutputBlocks, Route, name_rank, wanted_of
from dynamo.frontend.stream_facts import note_worker
from dynamo.llm.output import ChoiceDecoder, TextDelta
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest, Routing
from dynamo.router.computed_elsewhere import computed_elsewhere
from dynamo.router.model_router import ModelRouter
from dynamo.router.model_split import ModelSplit
from dynamo.router.types import Decision, RouteRequest
from dynamo.runtime.annotated import Annotated
from dynamo.runtime.context import Context
from dynamo.runtime.errors import (
    CannotConnect,
    DynamoException,
    EngineShutdown,
    RouterQueueLimitExceeded,
    StreamIncomplete,
    Unknown,
    WorkerOverloaded,
    WorkerUnavailable,
)

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # workers tried while no connection to them can be made; nothing was sent, so trying is safe

_decode = msgspec.msgpack.Decoder(EngineOutput).decode
_decode_any = msgspec.msgpack.Decoder().decode


class _Choice:
    """One answer to the prompt. `number` is its place among all choices of the HTTP request."""

    __slots__ = ("decoder", "last_at", "number", "push")

    def __init__(self, decoder: ChoiceDecoder, number: int, push: Push) -> None:
        self.decoder = decoder
        self.push = push
        self.number = number
        self.last_at = 0.0


class EngineStream:
    """One prompt of an answer. Ends once: with all choices finished, or with an error for the whole answer."""

    __slots__ = (
        "_answer",
        "_blocks",
        "_choices",
        "_computing",
        "_dispatch_at",
        "_migration",
        "_request",
        "_unfinished",
        "_wanted",
        "_workers",
        "attempts",
        "context",
        "dispatched_at",
        "dp_rank",
        "ended",
        "flush",
        "instance_id",
        "prompt_tokens",
        "remote",
        "route",
        "split",
    )

    def __init__(
        self,
        answer: Answer,
        workers: Workers,
        request: PreprocessedRequest,
        decoders: list[ChoiceDecoder],
        first_number: int,
        context: Context,
        migration: Migration | None = None,
    ) -> None:
        self._answer = answer
        self._migration = migration
        self._workers = workers
        self._request = request
        timed = answer.metrics.text.maybe_timed
        self._choices = [_Choice(each, first_number + i, timed(each.push)) for i, each in enumerate(decoders)]
        self._unfinished = len(decoders)
        self.attempts = 0
        self.context = context
        self.instance_id: int | None = None
        self.dp_rank = request.routing.dp_rank if request.routing is not None else None
        self.prompt_tokens = len(request.token_ids)
        self.route: Route | None = None
        """Its place at a worker or in the queue, where a router keeps account."""
        self.remote: RemotePrefill | None = None
        """Its time at a prefill worker, if it had one."""
        self.split: dict[str, Any] | None = None
        """Why it was, or was not, sent to a prefill worker; where the client asks."""
        self._wanted: RouteRequest | None = None
        self._computing = True  # until the worker's first token
        self._blocks: OutputBlocks | None = None
        self._dispatch_at = self.dispatched_at = 0.0
        self.ended = False
        self.flush: Callable[[], None] = answer.flush  # no call of our own between the socket and the answer

    # --- to the worker

    def dispatch(self) -> None:
        """Send the prompt, to a prefill worker first if one is to compute it. Raises what says that it cannot be."""
        pool = self._workers.prefill
        if pool is None or self.remote is not None:
            self._dispatch()
            return
        ways = self._prefilled, self._not_prefilled, self._meets
        remote = RemotePrefill(pool, self._request, self.context, *ways, self.flush, self._workers.pairs)
        split = self._workers.split
        if split is None:
            self._prefill(remote)
        else:
            split.decode.turn.ask(partial(self._try, self._decide, split, remote))

    def _decide(self, split: ModelSplit, remote: RemotePrefill) -> None:
        """Send the prompt to who is to compute it. What the next one sees has this one booked."""
        if self._travels(split, remote):
            self._prefill(remote)
        else:
            self.attempts += 1
            self._dispatch_at = perf_counter()
            self._place(split.decode, self._make_route(split.decode))

    def _travels(self, split: ModelSplit, remote: RemotePrefill) -> bool:
        """Whether a prefill worker is to compute the prompt, which is hashed here, and here only."""
        answer = self._answer
        here = self._wanted = wanted_of(split.decode, self._request, self.context)
        found = split.decide(here, remote.wanted(split.prefill, here.sequence_hashes))
        where = "prefill" if found.remote else "decode"
        answer.metrics.splits.labels(split.decode.name, where, split.policy, found.cause).value += 1
        if answer.plan.explains_routing:
            self.split = split.explain(found)
        return found.remote

    def _prefill(self, remote: RemotePrefill) -> None:
        answer = self._answer
        self.remote = remote
        answer.dispatched_at = answer.active_at = perf_counter()
        try:
            remote.start(explain=answer.plan.explains_routing)
        except DynamoException as e:
            remote.ended = True
            self._not_prefilled(e)

    def _prefilled(self, output: EngineOutput) -> None:
        """The first token, which goes to the client at once; the decode worker goes on from there."""
        remote = self.remote
        answer = self._answer
        if self._request.bootstrap_info is not None:
            answer.metrics.prefills.labels("done").value += 1
            return
        assert remote is not None
        if answer.closed:
            remote.cancel()
            return
        if remote.handle is None and len(self._choices) > 1:  # the first choice ended, of the others nothing is known
            self._not_prefilled(StreamIncomplete("its first choice ended with its first token"))
            return
        answer.metrics.prefills.labels("done").value += 1
        tokens = list(output.token_ids)
        self._on_output(answer, output)
        if self.ended or answer.closed:
            remote.cancel()  # the first token was the last
            return
        self._request = remote.go_on(self._request, tokens)
        self._go_on_from(remote)

    def _meets(self, meeting: dict[str, Any]) -> None:
        """The prefill worker has the prompt. The decode worker gets it now, and waits for the KV by itself."""
        remote = self.remote
        assert remote is not None
        self._request.bootstrap_info = meeting
        self._go_on_from(remote)

    def _go_on_from(self, remote: RemotePrefill) -> None:
        routing = self._request.routing = self._request.routing or Routing()
        routing.prefill_worker_id, routing.prefill_dp_rank = remote.instance_id, remote.dp_rank
        self._try(self._dispatch)

    def _not_prefilled(self, error: DynamoException) -> None:
        """Then the decode worker computes the prompt, too: the client sees latency only."""
        if self.ended or self._answer.closed:
            return
        if self._request.bootstrap_info is not None:
            if self.completion_tokens:  # it had what it waited for
                return
            self._leave_meeting()
        shed = isinstance(error, WorkerOverloaded | RouterQueueLimitExceeded)
        outcome = "shed" if shed else "unpaired" if isinstance(error, Unpaired) else "lost"
        self._answer.metrics.prefills.labels(outcome).value += 1
        level = logging.INFO if shed else logging.WARNING
        log.log(level, "request %s is computed by a decode worker alone: %s", self.context.id(), error)
        # Not now: if a connection broke, the request plane first takes its worker out of rotation.
        asyncio.get_running_loop().call_soon(self._try, self._dispatch)

    def _dispatch(self) -> None:
        """Choose a worker and send the prompt, now, or soon where a router says where. Raises what says that it cannot
        be sent."""
        self.attempts += 1
        self._dispatch_at = perf_counter()
        router = self._workers.router
        if router is None:
            near = self.remote.near if self.remote is not None and self.has_prefill else None
            self._send(self._workers.choose(self._request, near))
        else:
            router.turn.ask(partial(self._try, self._ask, router))

    def _try(self, step: Callable[..., None], *what: object) -> None:
        """Do a step that sends the request on. The client hears of whatever goes wrong: nobody else waits for it."""
        if self.ended or self._answer.closed:
            return
        try:
            step(*what)
        except DynamoException as e:
            self._refuse(e)
        except Exception as e:
            log.exception("request %s could not be routed", self.context.id())
            self._refuse(Unknown(f"the request could not be routed: {e!r}"))

    def _ask(self, router: ModelRouter) -> None:
        """Ask for a worker, together with the others of this turn."""
        router.turn.then(partial(self._try, self._place, router, self._make_route(router)))

    def _make_route(self, router: ModelRouter) -> Route:
        """The prompt's way, which hashes it; that of before where its worker could not be reached."""
        if self.route is None:
            wanted = self._wanted or wanted_of(router, self._request, self.context)
            self._wanted = None  # of this prompt, and of this way to it
            if self.has_prefill:
                computed_elsewhere(wanted)
                if self.remote is not None:
                    self.remote.guide(wanted, self._workers.split)
            explain = self._answer.plan.explains_routing
            self.route = Route(router, wanted, self._go, self._refuse, explain=explain)
        return self.route

    def _place(self, router: ModelRouter, route: Route) -> None:
        decision = route.place()  # which may refuse it: then it may have another route by now
        if decision is not None:
            router.turn.then(partial(self._try, self._go, decision))
        elif self.remote is not None and self._request.prefill_result is not None:
            self.remote.keep(self._request.prefill_result["disaggregated_params"])

    def _refuse(self, error: DynamoException) -> None:
        """There will be no answer."""
        if self._leaves_place(error) or self._works_alone(error) or self._waits_for_worker(error):
            return
        self._give_up_handle()
        if self._migration is not None:
            self._migration.end("failure")
            error = self._migration.final(error)
        self._answer.fail(error)

    def _leaves_place(self, error: DynamoException) -> bool:
        """Whether another worker may compute a prompt whose KV nobody may have."""
        result = self._request.prefill_result
        if not isinstance(error, WorkerUnavailable) or result is None or self.remote is None:
            return False
        if not self.remote.leave_place(result["disaggregated_params"]):
            return False
        self.route = self._wanted = None  # which were for that place
        self._try(self._dispatch)
        return True

    def _go(self, decision: Decision) -> None:
        """The router's answer."""
        route = self.route
        assert route is not None
        self.dp_rank = name_rank(route.router, self._request, decision)
        if route.router.config.router_track_output_blocks:
            self._blocks = OutputBlocks(route)
        self._send(decision.worker.worker_id)

    def _send(self, instance_id: int) -> None:
        self.instance_id = instance_id
        if self.remote is not None:
            self.remote.hand_over()
        answer = self._answer
        self.dispatched_at = now = perf_counter()
        answer.metrics.route_seconds.observe(now - self._dispatch_at)
        answer.active_at = now
        if not self.has_prefill:
            answer.dispatched_at = now
        self._workers.start_request(instance_id, self._request, self, self.context)

    def cancel(self) -> None:
        """Nobody wants the rest: the worker frees what it holds within a step."""
        if not self.ended:
            self.ended = True
            self.context.kill()
            if self._migration is not None:
                self._migration.end("cancelled")
            if self.remote is not None:
                self.remote.cancel()
                if self.completion_tokens <= 1:  # the decode worker may not have claimed it
                    self._give_up_handle()
            if self.route is not None:
                self.route.cancel()

    # --- from the worker

    def on_item(self, item: msgspec.Raw) -> None:
        """See `StreamSink`. The hot path: about 3 µs for a token of plain text."""
        answer = self._answer
        if answer.closed:
            return
        try:
            output = _decode(item)
        except msgspec.DecodeError as e:
            self._on_other_item(item, e)
            return
        self._on_output(answer, output)

    def _on_output(self, answer: Answer, output: EngineOutput) -> None:
        index = output.index
        if not 0 <= index < len(self._choices):
            self._broken(f"an output for choice {index} of {len(self._choices)}")
            return
        if output.finish_reason in ("cancelled", "error") and self._goes_on_after(output.finish_reason):
            return
        choice = self._choices[index]
        delta = choice.push(output)
        now = perf_counter()
        answer.active_at = now
        if self._migration is not None:
            self._migration.add(output)
        if delta.token_count:
            answer.meter.tokens(now, choice.last_at, delta.token_count)
            if self._computing and self.instance_id is not None:  # not the first token of a prefill worker
                self._computing = False
                self._computed(delta, output)
            choice.last_at = now
            if self._blocks is not None:
                self._blocks.add(delta.token_count)
        if delta.finish_reason is None:
            answer.add(choice.number, delta, output)
        elif delta.finish_reason in ("error", "cancelled"):
            error = choice.decoder.error or EngineShutdown("the worker gave the request up")
            answer.fail(error)
        else:
            answer.add(choice.number, delta, output)
            self._choice_finished()

    def _computed(self, delta: TextDelta, output: EngineOutput) -> None:
        """The worker's first token."""
        if self.route is not None:
            if delta.finish_reason is None or delta.token_count > 1 or self._unfinished > 1:
                # Else the end comes with it, which says enough at half the cost.
                self.route.first_token()
            remote, here = self.remote, self.instance_id
            if output.engine_data is not None and remote is not None and remote.meeting is None and here is not None:
                self._workers.see_transfer(output.engine_data, here, remote.places)
        if self._migration is not None:
            self._migration.end("success")

    def _on_other_item(self, item: msgspec.Raw, error: msgspec.DecodeError) -> None:
        """Not an `EngineOutput`: perhaps one with remarks around it, perhaps nonsense."""
        try:
            annotated: Annotated[Any] = Annotated.from_wire(_decode_any(item))
            if annotated.is_error():
                self._answer.fail(Unknown("; ".join(annotated.comments()) or "the worker reported an error"))
            elif (data := annotated.data()) is not None:
                self._on_output(self._answer, msgspec.convert(data, EngineOutput))
        except msgspec.DecodeError:
            self._broken(f"an output that cannot be read: {error}")

    def _broken(self, what: str) -> None:
        log.error("worker %x sent %s, for request %s", self.instance_id or 0, what, self.context.id())
        self._answer.fail(Unknown(f"the worker sent {what}"))

    def _choice_finished(self) -> None:
        self._unfinished -= 1
        if self._unfinished:
            return
        self.ended = True
        if self.remote is not None:
            self.remote.let_go()
        for each in self._choices:
            if each.decoder.stopped_early:
                self.context.stop_generating()
                break
        if self.route is not None:
            self.route.finish(self.completion_tokens, self.cached_tokens)
        note_worker(self, self._answer)
        self._answer.stream_ended()

    def on_end(self) -> None:
        """See `StreamSink`. A worker need not name a finish reason: the end of its stream is one."""
        if self.ended or self._answer.closed:
            return
        for index, choice in enumerate(self._choices):
            if choice.decoder.finish_reason is None:
                self._on_output(self._answer, EngineOutput(index=index, finish_reason="stop"))

    def on_error(self, error: DynamoException) -> None:
        """See `StreamSink`. Where nothing was sent, another worker may get it."""
        if self.ended or self._answer.closed:
            return
        if isinstance(error, CannotConnect) and self.attempts < MAX_ATTEMPTS:
            # Not now, as above.
            asyncio.get_running_loop().call_soon(self._try, self._dispatch)
        elif not self.move(error):
            self._refuse(error)

    # --- from one worker to another

    def _goes_on_after(self, finish_reason: str) -> bool:
        """Whether an answer goes on that its worker ended so."""
        error = EngineShutdown("the worker gave the request up")
        return self._works_alone(error) if finish_reason == "error" else self.move(error)

    def move(self, error: DynamoException) -> bool:
        """Let another worker go on, if one may; the client sees a pause."""
        if self._works_alone(error):
            return True
        migration = self._migration
        if migration is None or self.ended or self._answer.closed:
            return False
        if not migration.allows(error):
            return False
        log.warning("request %s moves after %d tokens: %s", self.context.id(), len(migration.tokens), error)
        migration.begin(error)
        if self.instance_id is not None and not isinstance(error, WorkerOverloaded):
            self._workers.avoid(self.instance_id)
        self._leave_worker()
        self._request = migration.request()
        asyncio.get_running_loop().call_soon(self._try, self.dispatch)
        return True

    def _leave_worker(self) -> None:
        """Free what is held for the request where it was, and make it one that was never sent."""
        before, self.context = self.context, self.context.detached(self.context.id())
        before.kill()
        if self.remote is not None:
            self.remote.cancel()
            self._give_up_handle()
        if self.route is not None:
            self.route.cancel()
        self.remote = self.route = self._wanted = self._blocks = self.instance_id = None
        self.attempts, self._computing = 0, True
        self._answer.active_at = perf_counter()

    def _works_alone(self, error: DynamoException) -> bool:
        """Let a decode worker begin anew, where two were to meet and one of them failed before there was a token."""
        if self._request.bootstrap_info is None or self.completion_tokens or not error.migratable:
            return False
        if self.ended or self._answer.closed:
            return False
        self._not_prefilled(error)
        return True

    def _leave_meeting(self) -> None:
        """Let both workers forget the prompt. It is not sent to a prefill worker again: `remote` stays."""
        remote = self.remote
        self._leave_worker()
        if remote is not None:
            remote.meeting = self._request.bootstrap_info = None
        self.remote = remote

    def _waits_for_worker(self, error: DynamoException) -> bool:
        """Where all workers are gone, others may come: a moment's wait costs less than the answer."""
        if not isinstance(error, WorkerUnavailable) or self._migration is None or not self._migration.may_wait:
            return False
        self._leave_worker()
        asyncio.get_running_loop().call_later(RETRY_S, self._try, self.dispatch)
        return True

    def _give_up_handle(self) -> None:
        """Nobody fetches what a prefill worker keeps. If somebody has begun to, that is theirs to end."""
        if self._request.prefill_result is not None and self.remote is not None:
            self.remote.give_back(self._request.prefill_result["disaggregated_params"])
            self._request.prefill_result = None

    # --- facts

    @property
    def has_prefill(self) -> bool:
        """Whether a prefill worker has computed the prompt, or does now."""
        return self._request.prefill_result is not None or self._request.bootstrap_info is not None

    @property
    def completion_tokens(self) -> int:
        """Tokens made so far, hidden ones too."""
        count = 0
        for choice in self._choices:
            count += choice.decoder.completion_tokens
        return count

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens the worker had cached, if it told; one that went on may have had the answer so far as well."""
        for choice in self._choices:
            if (count := choice.decoder.cached_tokens) is not None:
                moved = self._migration is not None and self._migration.moves
                return min(count, self.prompt_tokens) if moved else count
        return None
