"""What does every language share in which a server is sent tokens?"""

import json
from abc import ABC, abstractmethod
from typing import Any, Protocol

import msgspec

from dynamo.llm.protocols.engine import (
    CompletionUsage,
    EngineOutput,
    FinishReason,
    GuidedDecoding,
    PreprocessedRequest,
    PromptTokensDetails,
)
from dynamo.runtime.errors import UNDECODABLE, DynamoException, InvalidArgument, Unknown


class Dialect(Protocol):
    """One language."""

    name: str
    path: str

    def body(self, request: PreprocessedRequest, request_id: str) -> dict[str, Any]:
        """The server's body for one choice, streamed. Raises InvalidArgument for what it has no word for."""
        ...

    def headers(self, request: PreprocessedRequest) -> dict[str, str]:
        """What is said in headers."""
        ...

    def reader(self, request: PreprocessedRequest) -> "Reader":
        """Who reads the answer."""
        ...


class Reader(ABC):
    """Reads one answer, event by event."""

    def __init__(self, request: PreprocessedRequest) -> None:
        self.logprobs = request.output_options.logprobs
        self.generated = 0
        self._prompt_tokens = len(request.token_ids)
        self._eos = frozenset(request.eos_token_ids)
        self._cached: int | None = None
        self._cumulative = 0.0

    def read(self, event: bytes) -> EngineOutput | None:
        """What an event adds, None if nothing.

        Raises:
            DynamoException: the server reports an error in its stream, or the event cannot be read.
        """
        try:
            found = msgspec.json.decode(event, type=dict[str, Any])
        except UNDECODABLE as e:
            raise Unknown(f"the server sent an event that cannot be read: {e}: {event[:200]!r}") from None
        if (error := found.get("error")) is not None:
            raise stream_error(error)
        try:
            output = self.output(found)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            raise Unknown(f"the server sent an event of another form: {e!r}: {event[:200]!r}") from None
        if output is not None:
            self.generated += len(output.token_ids)
            if output.log_probs:
                self._cumulative += sum(output.log_probs)
                output.cum_log_probs = self._cumulative
        return output

    @abstractmethod
    def output(self, event: dict[str, Any]) -> EngineOutput | None:
        """What a decoded event adds. May raise KeyError and the like for one of another form."""

    def note_usage(self, usage: dict[str, Any] | None) -> None:
        """The server's own counts: only what it had cached is news."""
        details = (usage or {}).get("prompt_tokens_details") or {}
        if isinstance(cached := details.get("cached_tokens"), int):
            self._cached = cached

    def note_cached(self, cached: object) -> None:
        """How many tokens of the prompt the server had cached."""
        if isinstance(cached, int):
            self._cached = cached

    def usage(self) -> CompletionUsage:
        """The counts of the whole request."""
        details = None if self._cached is None else PromptTokensDetails(self._cached)
        return CompletionUsage(self._prompt_tokens, self.generated, self._prompt_tokens + self.generated, details)

    def end(self, output: EngineOutput, reason: str | None, stop_reason: int | str | None) -> None:
        """How the choice ended, if it did, in engines' words."""
        if reason is None:
            return
        output.finish_reason = _FINISH.get(reason, "error")
        output.stop_reason = stop_reason
        if reason == "stop" and (stop_reason is None or stop_reason in self._eos):
            output.finish_reason = "eos"


_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "repetition": "stop",
    "length": "length",
    "abort": "cancelled",
    "content_filter": "content_filter",
}


def stream_error(error: Any) -> DynamoException:
    """An error that a server reports in its stream, after its 200."""
    message, param, code = str(error), None, None
    if isinstance(error, dict):
        message, param, code = str(error.get("message") or error), error.get("param"), error.get("code")
    if code in (400, 422):
        return InvalidArgument(message, param if isinstance(param, str) else None)
    return Unknown(f"the server failed on this request: {message}")


def refuse_unsupported(request: PreprocessedRequest) -> None:
    """Refuse what no server can be asked for in tokens. Raises InvalidArgument."""
    if not request.token_ids:
        raise InvalidArgument("the prompt is empty: give at least one token", "token_ids")
    if request.multi_modal_data:
        raise InvalidArgument(
            "an attached server takes text only in tokens; --mode openai passes images on", "multi_modal_data"
        )
    if request.output_options.prompt_logprobs is not None:
        raise InvalidArgument(
            "prompt_logprobs are not streamed by servers, so an attached one cannot give them; ask it directly, "
            "or attach it with --mode openai",
            "prompt_logprobs",
        )
    if request.sampling_options.use_beam_search:
        raise InvalidArgument("beam search is not available; leave use_beam_search out", "use_beam_search")
    if request.prefill_result is not None or request.bootstrap_info is not None:
        raise InvalidArgument("an attached server computes prompts itself", "prefill_result")


def stop_token_ids(request: PreprocessedRequest) -> list[int]:
    """All tokens that end the answer, each once."""
    stop = request.stop_conditions
    ids = [*(stop.stop_token_ids or ()), *(stop.stop_token_ids_hidden or ())]
    if not stop.ignore_eos:
        ids.extend(request.eos_token_ids)
    return list(dict.fromkeys(ids))


def given(**fields: Any) -> dict[str, Any]:
    """Those that are not None: what is left out takes the server's own default."""
    return {name: value for name, value in fields.items() if value is not None}


def vllm_sampling(request: PreprocessedRequest) -> dict[str, Any]:
    """The sampling fields that all of vLLM's endpoints name alike."""
    sampling, stop = request.sampling_options, request.stop_conditions
    return given(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        logit_bias=sampling.logit_bias or None,
        min_tokens=stop.min_tokens,
        ignore_eos=stop.ignore_eos,
        logprobs=request.output_options.logprobs,
        stop_token_ids=stop_token_ids(request) or None,
        thinking_token_budget=stop.max_thinking_tokens,
        structured_outputs=_structured(sampling.guided_decoding),
    )


def _structured(guided: GuidedDecoding | None) -> dict[str, Any] | None:
    if guided is None:
        return None
    if guided.backend not in (None, "auto"):
        raise InvalidArgument(
            "guided_decoding.backend is chosen where the attached server is started; leave it out",
            "guided_decoding.backend",
        )
    tag = guided.structural_tag
    chosen = given(
        json=guided.json,
        regex=guided.regex,
        choice=guided.choice,
        grammar=guided.grammar,
        structural_tag=tag if tag is None or isinstance(tag, str) else json.dumps(tag),
    )
    if chosen and guided.whitespace_pattern is not None:
        chosen["whitespace_pattern"] = guided.whitespace_pattern
    return chosen or None


def vllm_headers(request: PreprocessedRequest) -> dict[str, str]:
    """vLLM reads the data parallel rank from a header."""
    rank = request.routing.dp_rank if request.routing is not None else None
    return {} if rank is None else {"X-data-parallel-rank": str(rank)}


def cache_salt(request: PreprocessedRequest) -> str | None:
    """Whose cache the request may use; None for everyone's."""
    return (request.routing.cache_salt or None) if request.routing is not None else None
