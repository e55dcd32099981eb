"""May another worker go on with an answer, and from what? (facts F1, F2)

A worker that dies, hangs or leaves in mid-answer loses nothing that the client has seen: the tokens so far become the
end of the prompt, and what is left of the limits goes with them. It is done only where the rest is then what it would
have been: one choice, no grammar (its state is at the worker that is gone), no penalty that looks at the answer alone.
"""

from collections import Counter
from time import perf_counter

import msgspec

from dynamo.frontend.metrics import FrontendMetrics
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest, SamplingOptions, StopConditions
from dynamo.runtime.errors import CannotConnect, DynamoException, StreamIncomplete, WorkerOverloaded, WorkerUnavailable

WAIT_S = 10.0  # for any worker to be there again: a worker that restarts without its weights loaded takes longer
RETRY_S = 0.1
MAX_BIAS = 100.0  # what engines take for a token, and OpenAI allows
_NOTHING_SENT = (CannotConnect, WorkerOverloaded, WorkerUnavailable)


class MigrationRules(msgspec.Struct, frozen=True):
    """What the operator allows: moves of one request, and tokens of prompt and answer together that may move."""

    limit: int = 0
    max_seq_len: int | None = None


class Migration:
    """One prompt's moves. `tokens` are those of its answer so far; whoever reads outputs adds them."""

    __slots__ = (
        "_kind",
        "_metrics",
        "_model",
        "_objection",
        "_original",
        "_routing",
        "_rules",
        "_speaks_text",
        "moves",
        "since",
        "tokens",
    )

    def __init__(self, rules: MigrationRules, request: PreprocessedRequest, metrics: FrontendMetrics, model: str):
        self._rules = rules
        self._original = request
        self._routing = None if request.routing is None else msgspec.structs.replace(request.routing)
        self._metrics = metrics
        self._model = model
        self._kind = self._objection = ""
        self._speaks_text = False
        self.tokens: list[int] = []
        self.moves = 0
        self.since = 0.0
        """When the worker was lost, until another has gone on; 0 if none is."""

    def add(self, output: EngineOutput) -> None:
        """An output came."""
        if output.text is None:
            self.tokens += output.token_ids
        else:
            self._speaks_text = True

    def allows(self, error: DynamoException) -> bool:
        """Whether the request may move after this error."""
        if not error.migratable:
            return False  # it would be the same elsewhere
        self._objection = self._find_objection()
        return not self._objection

    def _find_objection(self) -> str:
        routing, longest = self._routing, self._rules.max_seq_len
        if self.moves >= self._rules.limit:
            return f"it has moved {self.moves} times, as often as --migration-limit allows"
        if routing is not None and (routing.backend_instance_id, routing.decode_worker_id) != (None, None):
            return "it is pinned to its worker"
        if longest is not None and len(self._original.token_ids) + len(self.tokens) > longest:
            self._metrics.migrations_too_long.labels(self._model).value += 1
            return f"it is longer than the {longest} tokens of --migration-max-seq-len"
        if self._speaks_text:
            return "its worker says text and no tokens, from which another could go on"
        return _cannot_continue(self._original) if self.tokens else ""

    def final(self, error: DynamoException) -> DynamoException:
        """What the client is told of an error that ends its answer, perhaps in the middle."""
        if not self.tokens or not (error.migratable or isinstance(error, WorkerUnavailable)):
            return error
        why = self._objection or "no worker to go on came in time"
        return StreamIncomplete(
            f"Stream ended before generation completed: {error.message}; not moved on because {why}"
        )

    def begin(self, error: DynamoException) -> None:
        """The request moves because of this."""
        self.moves += 1
        self.since = self.since or perf_counter()
        self._kind = "new_request" if isinstance(error, _NOTHING_SENT) else "ongoing_request"

    @property
    def may_wait(self) -> bool:
        """Whether the request moves, and a worker to move to may still come."""
        return self.since > 0 and perf_counter() - self.since < WAIT_S

    def end(self, outcome: str) -> None:
        """Another worker has gone on (`success`), none will (`failure`), or nobody wants it any more (`cancelled`)."""
        if self.since:
            self._metrics.migrations.labels(self._model, self._kind, outcome).value += 1
            self._metrics.migration_seconds.labels(self._model).observe(perf_counter() - self.since)
            self.since = 0.0

    def request(self) -> PreprocessedRequest:
        """What the next worker gets."""
        original, tokens = self._original, self.tokens
        routing = None if self._routing is None else msgspec.structs.replace(self._routing)
        if not tokens:
            return msgspec.structs.replace(original, routing=routing, prefill_result=None, bootstrap_info=None)
        if routing is not None and routing.expected_output_tokens is not None:
            routing.expected_output_tokens = max(1, routing.expected_output_tokens - len(tokens))
        return msgspec.structs.replace(
            original,
            token_ids=[*original.token_ids, *tokens],
            resumed_tokens=len(tokens),
            stop_conditions=_limits_left(original.stop_conditions, len(tokens)),
            sampling_options=_sampling_left(original.sampling_options, tokens),
            output_options=msgspec.structs.replace(original.output_options, prompt_logprobs=None),
            routing=routing,
            prefill_result=None,
            bootstrap_info=None,
        )


def may_ever_move(rules: MigrationRules, request: PreprocessedRequest) -> bool:
    """Whether it is worth to keep account. Several choices are several answers, of which each is at another place."""
    return rules.limit > 0 and (request.sampling_options.n or 1) == 1


def _cannot_continue(request: PreprocessedRequest) -> str:
    """Why the rest of an answer would not be what it would have been; empty if it would."""
    sampling = request.sampling_options
    if sampling.guided_decoding is not None:
        return "its grammar's state is lost with its worker"
    if sampling.presence_penalty:
        return "presence_penalty looks at the answer alone, of which a new worker knows nothing"
    if sampling.frequency_penalty and sampling.repetition_penalty not in (None, 1.0):
        return "frequency_penalty beside repetition_penalty looks at the answer alone"
    if request.stop_conditions.max_thinking_tokens is not None:
        return "its thought may have begun, of which a new worker knows nothing"
    return ""


def _limits_left(stop: StopConditions, made: int) -> StopConditions:
    return msgspec.structs.replace(
        stop,
        max_tokens=None if stop.max_tokens is None else max(1, stop.max_tokens - made),
        min_tokens=None if stop.min_tokens is None else max(0, stop.min_tokens - made),
    )


def _sampling_left(sampling: SamplingOptions, tokens: list[int]) -> SamplingOptions:
    """The options for the rest: the penalty for what is in the prompt now becomes a bias."""
    left = msgspec.structs.replace(sampling)
    if sampling.frequency_penalty:
        bias = dict(sampling.logit_bias or {})
        for token, count in Counter(tokens).items():
            wanted = bias.get(token, 0.0) - sampling.frequency_penalty * count
            bias[token] = max(-MAX_BIAS, min(MAX_BIAS, wanted))
        left.logit_bias = bias
    return left
