"""What does a vLLM engine do with a request as half of a pair?

A role stands between the engine's contract and its driver: it changes a request on its way in and its outputs on
their way out. `Whole` changes nothing, `Prefill` keeps the prompt's KV and hands out a handle for it, `Decode` claims
a handle, has the engine fetch the KV, and takes the token that the client has already out of the answer.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynamo.engine.handoff import NO_HANDOFF, Layout, Ledger
from dynamo.engine.takeover import Claim, Claims, Grant, Refusal, first_token_of
from dynamo.llm.protocols.engine import (
    SEED_IS_OURS,
    CompletionUsage,
    EngineOutput,
    PreprocessedRequest,
    PromptTokensDetails,
)
from dynamo.runtime.errors import DynamoException, InvalidArgument, StreamIncomplete
from dynamo.vllm.driver import EXTERNAL_TOKENS, FIRST_TOKEN, DriverRequest
from dynamo.vllm.following import behind, may_follow

log = logging.getLogger(__name__)

_KV_PARAMS = "kv_transfer_params"  # where vLLM's connectors look, in SamplingParams.extra_args
_DEADLINE = "remote_blocks_expiry_time"  # in those; `dynamo.vllm.kv_nixl` reads it


class Inner(Protocol):
    """The engine behind a role."""

    def send(self, request: DriverRequest, prefill_tokens: int) -> None:
        """Give a request to vLLM. Raises DynamoException."""

    def withdraw(self, request_id: str) -> None:
        """Take it back from vLLM."""

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request that vLLM does not have (any more)."""

    def extend_read(self, params: dict[str, Any], deadline: float) -> None:
        """What these parameters of vLLM's say to read may be read until later."""


class Role(Protocol):
    """See the module."""

    def adapt(self, request: PreprocessedRequest) -> PreprocessedRequest:
        """The request as the engine is to do it."""

    def submit(self, request: DriverRequest, original: PreprocessedRequest) -> None:
        """Send it now or later. Raises DynamoException."""

    def on_output(self, request_id: str, output: EngineOutput) -> bool:
        """Look at what vLLM made. False: the caller is not to see it."""

    def forget(self, request_id: str) -> None:
        """It ended, failed or was aborted."""


class Whole:
    """An engine that does whole requests."""

    def __init__(self, inner: Inner) -> None:
        self._inner = inner

    def adapt(self, request: PreprocessedRequest) -> PreprocessedRequest:
        if request.prefill_result is not None or request.bootstrap_info is not None:
            raise InvalidArgument(
                "this worker computes prompts itself; it cannot take over another worker's prefill", "prefill_result"
            )
        return request

    def submit(self, request: DriverRequest, original: PreprocessedRequest) -> None:
        self._inner.send(request, len(request.token_ids))

    def on_output(self, request_id: str, output: EngineOutput) -> bool:
        return True

    def forget(self, request_id: str) -> None:
        """Nothing is kept."""


class Prefill:
    """An engine that makes first tokens, and keeps the KV of their prompts for others."""

    def __init__(self, inner: Inner, ledger: Ledger, lease_s: float) -> None:
        self._inner = inner
        self.ledger = ledger
        self._lease_s = lease_s
        self._kept: dict[str, PreprocessedRequest] = {}
        self.layout: Layout
        self.engine_id = ""
        self.bytes_per_token = 0
        self.renewable = False
        """Whether vLLM keeps KV for longer if it is asked to."""

    def adapt(self, request: PreprocessedRequest) -> PreprocessedRequest:
        if request.prefill_result is not None:
            raise InvalidArgument("this worker only computes prompts; it takes over no other's", "prefill_result")
        stop = request.stop_conditions
        minimum = None if stop.min_tokens is None else min(1, stop.min_tokens)
        return msgspec.structs.replace(
            request, stop_conditions=msgspec.structs.replace(stop, max_tokens=1, min_tokens=minimum)
        )

    def submit(self, request: DriverRequest, original: PreprocessedRequest) -> None:
        if NO_HANDOFF not in original.annotations:
            _add(request.sampling_params, _KV_PARAMS, {"do_remote_decode": True, "do_remote_prefill": False})
            self._kept[request.request_id] = original
        self._inner.send(request, len(request.token_ids))

    def on_output(self, request_id: str, output: EngineOutput) -> bool:
        params, output.disaggregated_params = output.disaggregated_params, None
        request = self._kept.get(request_id)
        if output.finish_reason is None or request is None:
            return True
        if output.finish_reason != "length":  # the first token was the last: there is nothing to go on from
            self.give_back(params)
            return True
        until = (params or {}).get(_DEADLINE)
        output.disaggregated_params = self.ledger.issue(
            request,
            self.layout,
            self.engine_id,
            params,
            self._lease_s if until is None else until - time.monotonic(),
            cached_tokens=_cached(output),
            kv_bytes=self.bytes_per_token * len(request.token_ids),
            lease_s=self._lease_s if self.renewable else 0.0,
        )
        return True

    def give_back(self, params: Any) -> None:
        """Free KV that nobody was told of."""
        if params:
            self.ledger.free(params, "released")

    def forget(self, request_id: str) -> None:
        self._kept.pop(request_id, None)


@dataclass(slots=True)
class _Takeover:
    """One request of a decode engine whose prompt a prefill worker computed."""

    request: DriverRequest
    first_token: int | None
    began: float
    claim: Claim | None = None
    grant: Grant | None = None
    sent: bool = False
    started: bool = False
    report: dict[str, Any] | None = None
    shift: int = 0
    """Tokens of the answer that were made part of the prompt."""


class Decode:
    """An engine that goes on from what prefill workers computed."""

    def __init__(self, inner: Inner, claims: Claims, vocabulary: Callable[[], int]) -> None:
        self._inner = inner
        self.claims = claims
        self._vocabulary = vocabulary
        self._takeovers: dict[str, _Takeover] = {}
        self.longest = 0
        """Tokens of the longest prompt behind whose first token the engine may go on; see `dynamo.vllm.following`."""

    def adapt(self, request: PreprocessedRequest) -> PreprocessedRequest:
        if request.bootstrap_info is not None:
            raise InvalidArgument("vLLM hands over by prefill_result; leave bootstrap_info out", "bootstrap_info")
        if request.prefill_result is None or request.output_options.prompt_logprobs is None:
            return request
        # The prefill worker gave them. Asking for them again would make vLLM compute the prompt again.
        options = msgspec.structs.replace(request.output_options, prompt_logprobs=None)
        return msgspec.structs.replace(request, output_options=options)

    def submit(self, request: DriverRequest, original: PreprocessedRequest) -> None:
        if original.prefill_result is None:
            self._inner.send(request, len(request.token_ids))
            return
        token = first_token_of(original)
        if token is not None and not 0 <= token < self._vocabulary():
            raise InvalidArgument(f"prefill_result.token_ids: {token} is no token of this model", "prefill_result")
        takeover = _Takeover(request, token, time.monotonic())
        any_seed = original.prefill_result.get(SEED_IS_OURS) is True
        if token is None:
            pass
        elif len(request.token_ids) <= self.longest and may_follow(request.sampling_params, any_seed=any_seed):
            takeover.request, takeover.first_token, takeover.shift = behind(request, token), None, 1
            if any_seed:
                takeover.request.sampling_params.seed = None
        else:
            _add(request.sampling_params, FIRST_TOKEN, token)
        self._takeovers[request.request_id] = takeover
        takeover.claim = self.claims.begin(original, lambda answer: self._answered(takeover, answer), self._renewed)

    def _renewed(self, grant: Grant) -> None:
        """The request waits for its turn in the engine: what it was told of its time is out of date."""
        if grant.params:
            self._inner.extend_read(grant.params, grant.deadline)

    def _answered(self, takeover: _Takeover, answer: Grant | Refusal) -> None:
        request = takeover.request
        request_id = request.request_id
        tokens = len(request.token_ids)
        if isinstance(answer, Refusal):
            takeover.claim = None
            log.warning("request %s: %s; %s", request_id, answer.why, _CONSEQUENCE[self.claims.on_lost])
            if self.claims.on_lost == "error":
                self._fail(request_id, StreamIncomplete(f"the prefill worker's KV cannot be had: {answer.why}"))
                return
            self.claims.metrics.recomputed(answer.reason)
        else:
            takeover.grant = answer
            if answer.params:
                _add(request.sampling_params, _KV_PARAMS, dict(answer.params) | {_DEADLINE: answer.deadline})
            tokens = 0
        try:
            self._inner.send(request, tokens)
        except DynamoException as error:
            if takeover.claim is not None:
                takeover.claim.cancel()
                takeover.claim = None
            self._fail(request_id, error)
        else:
            takeover.sent = True

    def _fail(self, request_id: str, error: Exception) -> None:
        self.forget(request_id)
        self._inner.fail(request_id, error)

    def on_output(self, request_id: str, output: EngineOutput) -> bool:
        takeover = self._takeovers.get(request_id)
        if takeover is None:
            return True
        if not takeover.started:
            takeover.started = True
            self._arrived(takeover, output)
            if takeover.first_token is not None and not self._drop_first(takeover, takeover.first_token, output):
                return False
        output.engine_data, takeover.report = takeover.report, None
        if output.completion_usage is not None:
            _correct_usage(takeover, output.completion_usage)
        return True

    def _arrived(self, takeover: _Takeover, output: EngineOutput) -> None:
        """The first output: the KV came over, or the prompt was computed here after all."""
        source, output.engine_data = output.engine_data, None
        if takeover.claim is not None:
            takeover.claim.done()
            takeover.claim = None
        if takeover.grant is None:
            return
        request_id, handle = takeover.request.request_id, takeover.grant.handle
        seconds = time.monotonic() - takeover.began
        # The public driver does not say how many tokens came over; vLLM's own counters do.
        tokens = handle.num_tokens if source is None else source[EXTERNAL_TOKENS]
        if not tokens and handle.num_tokens > 1:  # the one position of a shorter prompt is always computed here
            self.claims.metrics.recomputed("transfer")
            log.warning("request %s: its KV did not come over, so the prompt was computed here", request_id)
            takeover.grant = None
            return
        self.claims.metrics.taken_over(tokens, seconds)
        log.info(
            "request %s: the KV of %d of %d prompt tokens came by %s from prefill worker %x; first token after %.1f ms",
            request_id, tokens, handle.num_tokens, handle.layout.transport, handle.instance_id, seconds * 1e3,
        )  # fmt: skip
        takeover.report = {
            "kv_transfer": {
                "transport": handle.layout.transport.partition(":")[0],
                "prefill_worker_id": handle.instance_id,
                "tokens": tokens,
                "bytes": handle.kv_bytes * tokens // handle.num_tokens,
                "seconds": round(seconds, 6),
            }
        }

    def _drop_first(self, takeover: _Takeover, token: int, output: EngineOutput) -> bool:
        """Take the token that the client has out of the first output. False if nothing is left to send now."""
        if output.token_ids and output.token_ids[0] != token:
            self.claims.metrics.differed()
            self._restart(takeover, token)
            return False
        output.token_ids = output.token_ids[1:]
        output.log_probs = output.log_probs[1:] if output.log_probs else output.log_probs
        output.top_logprobs = output.top_logprobs[1:] if output.top_logprobs else output.top_logprobs
        output.prompt_logprobs = None
        return bool(output.token_ids) or output.finish_reason is not None

    def _restart(self, takeover: _Takeover, token: int) -> None:
        """The engine began otherwise than the client was told: begin again, with the client's token in the prompt."""
        request_id = takeover.request.request_id
        log.warning("request %s: the first token came out otherwise here; keeping the client's", request_id)
        self._inner.withdraw(request_id)
        if takeover.request.sampling_params.structured_outputs is not None:
            self._fail(request_id, StreamIncomplete("the constrained output began otherwise on the decode worker"))
            return
        takeover.request, takeover.shift = behind(takeover.request, token), 1
        if takeover.request.sampling_params.max_tokens == 0:
            self._fail(request_id, InvalidArgument("max_tokens: prefill has made the only token", "max_tokens"))
            return
        try:
            self._inner.send(takeover.request, len(takeover.request.token_ids))
        except DynamoException as error:
            self._fail(request_id, error)

    def forget(self, request_id: str) -> None:
        takeover = self._takeovers.pop(request_id, None)
        if takeover is not None and takeover.claim is not None:
            # vLLM tells the other side itself when it is done with a request that it has.
            takeover.claim.done() if takeover.sent else takeover.claim.cancel()


def _correct_usage(takeover: _Takeover, usage: CompletionUsage) -> None:
    """What this engine got from elsewhere is not what the client's prompt found in a cache: the prefill worker says."""
    usage.prompt_tokens -= takeover.shift
    usage.completion_tokens += takeover.shift
    if takeover.grant is not None:
        usage.prompt_tokens_details = PromptTokensDetails(takeover.grant.handle.cached_tokens)


def _add(params: Any, name: str, value: Any) -> None:
    params.extra_args = (params.extra_args or {}) | {name: value}


def _cached(output: EngineOutput) -> int:
    usage = output.completion_usage
    details = usage.prompt_tokens_details if usage is not None else None
    return (details.cached_tokens or 0) if details is not None else 0


_CONSEQUENCE = {"recompute": "computing the prompt here", "error": "failing the request"}
