"""How does a prompt get its first token from a prefill worker, before a decode worker goes on? (facts G8)

A `RemotePrefill` is one prompt at one prefill worker. It ends once: with the worker's output, which holds the first
token and the handle of the KV that the worker keeps, or with the reason why there is none. The handle is used once or
given back; what is lost on the way is computed by the decode worker, and costs the client time only.

A worker whose card names a bootstrap port gives no handle: it meets a decode worker there, which is asked at the same
time and makes the first token, too (facts G9). `dynamo.frontend.meeting` has that side of it.
"""

import logging
import random
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import msgspec

from dynamo.frontend.pools import PrefillPool
from dynamo.frontend.route import Route, name_rank, wanted_of
from dynamo.llm.kv_lease import Keeping
from dynamo.llm.protocols.engine import SEED_IS_OURS, EngineOutput, PreprocessedRequest
from dynamo.llm.topology import Near
from dynamo.router.model_router import ModelRouter
from dynamo.router.model_split import ModelSplit
from dynamo.router.types import Decision, RouteRequest
from dynamo.runtime.context import Context
from dynamo.runtime.errors import DynamoException, StreamIncomplete, Unknown, WorkerUnavailable

log = logging.getLogger(__name__)

MAX_SEED = 2**31 - 1  # every engine takes so much

_decode = msgspec.msgpack.Decoder(EngineOutput).decode


class Unpaired(WorkerUnavailable):
    """Nobody may go on from what the prefill worker would compute."""


class RemotePrefill:
    """One prompt at a prefill worker.

    Args:
        done: called with the worker's output: the first token, and `disaggregated_params` unless it was the last.
        failed: called with the reason why there will be none. Neither is called after `cancel`.
        meets: called once the worker was asked, if a decode worker is to be asked at the same time, with what both get
            as `bootstrap_info`. The output that `done` is called with then says no more than that the KV was fetched.
        pairs: whether a decode worker may have KV that must stay in a place.
        flush: called when all that came with one read of the socket was given to `done`.
    """

    __slots__ = (
        "_context",
        "_done",
        "_early",
        "_failed",
        "_keeping",
        "_meets",
        "_pairs",
        "_pool",
        "_request",
        "_seed",
        "_wanted",
        "began_at",
        "dp_rank",
        "ended",
        "flush",
        "handle",
        "instance_id",
        "meeting",
        "near",
        "route",
        "took_s",
        "waits",
    )

    def __init__(
        self,
        pool: PrefillPool,
        request: PreprocessedRequest,
        context: Context,
        done: Callable[[EngineOutput], None],
        failed: Callable[[DynamoException], None],
        meets: Callable[[dict[str, Any]], None],
        flush: Callable[[], None],
        pairs: Callable[[Near], bool] = lambda near: True,
    ) -> None:
        self._pool = pool
        self._pairs = pairs
        self.near: Near | None = None
        """Where its KV may, or should, go; once a worker was chosen."""
        self._seed = seed_for(request)
        self._request = seeded(for_prefill(request), self._seed)
        self._context = context.detached(f"{context.id()}-prefill")
        self._done = done
        self._failed = failed
        self._meets = meets
        self.flush = flush
        self._wanted: RouteRequest | None = None
        self.route: Route | None = None
        self.instance_id: int | None = None
        self.dp_rank: int | None = None
        self.handle: dict[str, Any] | None = None
        """Of the KV, until it is used."""
        self.meeting: dict[str, Any] | None = None
        """Where a decode worker meets this one, if they work at the same time."""
        self.waits = False
        """Whether the handle that was taken is no decode worker's yet."""
        self._keeping: Keeping | None = None
        self._early: EngineOutput | None = None
        self.ended = False
        self.began_at = perf_counter()
        self.took_s = 0.0

    def wanted(self, router: ModelRouter, hashes: Sequence[int]) -> RouteRequest:
        """What the pool's router will be asked for; the prompt's hashes are known. Raises InvalidArgument."""
        self._wanted = wanted_of(router, self._request, self._context, hashes)
        return self._wanted

    def start(self, *, explain: bool = False) -> None:
        """Choose a worker and send the prompt, now or when one has room. Raises what says that it cannot be sent."""
        router = self._pool.router
        if router is None:
            self._send(self._pool.choose(self._request))
            return
        wanted = self._wanted or wanted_of(router, self._request, self._context)
        self.route = Route(router, wanted, self._go, self._fail, explain=explain)
        self.route.ask()

    def _go(self, decision: Decision) -> None:
        assert self._pool.router is not None
        self.dp_rank = name_rank(self._pool.router, self._request, decision)
        self._send(decision.worker.worker_id)

    def _send(self, instance_id: int) -> None:
        self.instance_id = instance_id
        self.near = self._pool.near(instance_id)
        if self.near is not None and not self._pairs(self.near):
            # No KV may leave the place, and nobody is there to have it.
            self._fail(Unpaired(f"no decode worker has the taint {self.near.taint} of the prefill worker chosen"))
            return
        self.meeting = self._request.bootstrap_info = self._pool.meeting(instance_id, self.dp_rank)
        self._pool.start_request(instance_id, self._request, self, self._context)
        if self.meeting is not None and not self.ended:
            self._meets(self.meeting)

    @property
    def serves(self) -> bool:
        """Whether the prompt is, or was, computed for the decode worker: not if that does it alone."""
        return self.took_s > 0 or self.meeting is not None

    def go_on(self, request: PreprocessedRequest, token_ids: list[int]) -> PreprocessedRequest:
        """What the decode worker gets. The handle is its for its one use. Where the seed is ours, its engine may do
        without."""
        result: dict[str, Any] = {"disaggregated_params": self.take_handle(), "token_ids": token_ids}
        if self._seed is not None:
            result[SEED_IS_OURS] = True
        request = seeded(request, self._seed)
        request.prefill_result = result
        return request

    def take_handle(self) -> dict[str, Any] | None:
        """The handle, for its one use."""
        handle, self.handle = self.handle, None
        return handle

    def cancel(self) -> None:
        """Nobody wants it any more: the worker stops within a step, and gives its KV to others."""
        if not self.ended:
            self.ended = True
            # Not a kill, after which nothing is heard: the handle may be on its way already.
            self._context.stop_generating()
            if self.route is not None:
                self.route.cancel()
        if (handle := self.take_handle()) is not None:
            self.give_back(handle)

    def let_go(self) -> None:
        """The answer is complete. A worker that has not even computed the prompt by now does it for nobody."""
        if self.meeting is not None and not self.ended and self._early is None:
            self.cancel()

    @property
    def places(self) -> frozenset[str]:
        """Where the KV comes from."""
        return self._pool.places(self.instance_id) if self.instance_id is not None else frozenset()

    def guide(self, wanted: RouteRequest, split: ModelSplit | None) -> None:
        """Let the router of the decode workers know where the KV may, or should, go [K48], and what way it has."""
        if split is not None and self.meeting is None:  # those who meet move all of it
            wanted.journey = split.journey(self.places)
        if self.near is None:
            return
        if self.near.weight is None:
            wanted.required_taints |= {self.near.taint}
        else:
            wanted.preferred_taints = {self.near.taint: self.near.weight, **wanted.preferred_taints}

    def leave_place(self, handle: dict[str, Any]) -> bool:
        """Nobody is left where the KV must stay. Then it stays there for good, and whoever takes the request computes
        the prompt; False if that is not why there was no worker."""
        if self.near is None or self.near.weight is not None:
            return False
        log.warning("KV is not used: no decode worker has the taint %s any more", self.near.taint)
        self.near = None
        self.give_back(handle)
        return True

    def keep(self, handle: dict[str, Any]) -> None:
        """The handle that was taken waits for a decode worker: its KV must be there when it gets one."""
        if not self.waits:
            self.waits = True
            self._keeping = self._pool.keep(handle)

    def hand_over(self) -> None:
        """A decode worker sees to it now."""
        self.waits = False
        if self._keeping is not None:
            self._keeping.stop()
            self._keeping = None

    def give_back(self, handle: dict[str, Any]) -> None:
        """Nobody will use the handle that was taken."""
        self.hand_over()
        self._pool.give_back(handle)

    # --- from the worker

    def on_item(self, item: msgspec.Raw) -> None:
        """See `StreamSink`."""
        if self.ended:
            self._too_late(item)
            return
        try:
            output = _decode(item)
        except msgspec.DecodeError as e:
            self._context.kill()
            self._fail(Unknown(f"the prefill worker sent an output that cannot be read: {e}"))
            return
        if output.finish_reason in ("error", "cancelled"):
            self._fail(StreamIncomplete(f"the prefill worker ended the prompt with {output.finish_reason}"))
        elif output.finish_reason is None:
            self._early = output
            if self.route is not None:
                self.route.first_token()
        elif output.finish_reason == "length" and output.disaggregated_params is None and self.meeting is None:
            self._fail(StreamIncomplete("the prefill worker made a first token and kept nothing to go on from"))
        else:
            self._finish(output)

    def _too_late(self, item: msgspec.Raw) -> None:
        """It was cancelled. KV that was kept all the same is given back."""
        try:
            handle = _decode(item).disaggregated_params
        except msgspec.DecodeError:
            return
        if handle is not None:
            self.give_back(handle)

    def _finish(self, output: EngineOutput) -> None:
        if self._early is not None and not output.token_ids:  # the token came before the end of its request
            for name in ("token_ids", "log_probs", "top_logprobs", "text"):
                setattr(output, name, getattr(self._early, name))
        self.ended = True
        self.took_s = perf_counter() - self.began_at
        if self.route is not None:
            self.route.first_token()
            self.route.finish(len(output.token_ids))
        self.handle = output.disaggregated_params
        output.disaggregated_params = None
        if self.handle is not None:
            output.finish_reason = None  # it only means that prefill makes one token
        self._done(output)

    def on_end(self) -> None:
        """See `StreamSink`."""
        self._fail(StreamIncomplete("the prefill worker ended without a first token"))

    def on_error(self, error: DynamoException) -> None:
        """See `StreamSink`."""
        self._fail(error)

    def _fail(self, error: DynamoException) -> None:
        if self.ended:
            return
        self.ended = True
        if self.route is not None:
            self.route.cancel()
        self._failed(error)


def for_prefill(request: PreprocessedRequest) -> PreprocessedRequest:
    """What the prefill worker gets: the same prompt and the same sampling, for one token, sent by its own pins."""
    routing = request.routing
    if routing is not None:
        routing = msgspec.structs.replace(
            routing,
            backend_instance_id=routing.prefill_worker_id,
            decode_worker_id=None,
            dp_rank=routing.prefill_dp_rank,
            expected_output_tokens=1,
        )
    stops = msgspec.structs.replace(request.stop_conditions, max_tokens=1)
    return msgspec.structs.replace(request, routing=routing, stop_conditions=stops)


def seed_for(request: PreprocessedRequest) -> int | None:
    """What lets both workers draw the same first token, if the request needs it and has none: it is sampled."""
    sampling = request.sampling_options
    return random.randrange(MAX_SEED) if sampling.seed is None and sampling.temperature != 0 else None


def seeded(request: PreprocessedRequest, seed: int | None) -> PreprocessedRequest:
    """The request with this seed, if there is one."""
    if seed is None:
        return request
    sampling = msgspec.structs.replace(request.sampling_options, seed=seed)
    return msgspec.structs.replace(request, sampling_options=sampling)
