"""Which vLLM sampling parameters does a request ask for, and which field is wrong when vLLM refuses?"""

import json
import re
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from dynamo.llm.protocols.engine import GuidedDecoding, PreprocessedRequest
from dynamo.runtime.errors import DynamoException, InvalidArgument, Unknown

_I64_MAX = 2**63 - 1  # vLLM carries seeds as a signed 64 bit integer (msgpack, torch.Generator)


def sampling_params(request: PreprocessedRequest, defaults: dict[str, Any], grammar_backend: str) -> SamplingParams:
    """The parameters of one choice.

    Args:
        request: what the frontend sent; options it left at None take the model's default, then vLLM's.
        defaults: the model's own sampling defaults (its generation_config.json), as vLLM reads them.
        grammar_backend: the structured output backend the engine was started with.

    Raises:
        InvalidArgument: vLLM cannot do what is asked; names the field.
    """
    sampling, stop, output = request.sampling_options, request.stop_conditions, request.output_options
    if sampling.use_beam_search:
        raise InvalidArgument("beam search is not available with vLLM; leave use_beam_search out", "use_beam_search")
    if sampling.seed is not None and not -_I64_MAX - 1 <= sampling.seed <= _I64_MAX:
        raise InvalidArgument(f"seed must fit in a signed 64 bit integer, got {sampling.seed}", "seed")
    wanted = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": _seed(request),
        "logit_bias": sampling.logit_bias,
        "min_tokens": stop.min_tokens,
        "ignore_eos": stop.ignore_eos,
        "logprobs": output.logprobs,
        "prompt_logprobs": output.prompt_logprobs,
        "thinking_token_budget": stop.max_thinking_tokens,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    # No max_tokens means: as many as fit. vLLM fills that in from the prompt's length; its own default would be 16.
    max_tokens = stop.max_tokens if stop.max_tokens is not None else defaults.get("max_tokens")
    stop_ids = [*(stop.stop_token_ids or ()), *(stop.stop_token_ids_hidden or ())]
    if not stop.ignore_eos:
        stop_ids.extend(request.eos_token_ids)
    try:
        return SamplingParams.from_optional(
            **{**defaults, **given, "max_tokens": max_tokens},
            stop_token_ids=stop_ids or None,
            structured_outputs=structured_outputs(sampling.guided_decoding, grammar_backend),
            detokenize=False,  # text is the frontend's work
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,  # made for this one request, so vLLM need not copy it
        )
    except Exception as error:
        if not is_refusal(error):
            raise
        raise invalid(error) from error


def structured_outputs(guided: GuidedDecoding | None, backend: str) -> StructuredOutputsParams | None:
    """The constraint on the output, if there is one. Raises InvalidArgument for one that vLLM cannot keep."""
    if guided is None:
        return None
    constraints = {
        "json": guided.json,
        "regex": guided.regex,
        "choice": guided.choice,
        "grammar": guided.grammar,
        "structural_tag": guided.structural_tag,
    }
    chosen = {name: value for name, value in constraints.items() if value is not None}
    if not chosen:
        return None
    if guided.backend not in (None, "auto", backend):
        raise InvalidArgument(
            f"guided_decoding.backend {guided.backend!r} is not the one this engine was started with ({backend!r}); "
            "leave it out, or start the worker with --structured-outputs-config.backend",
            "guided_decoding.backend",
        )
    if "structural_tag" in chosen and not isinstance(chosen["structural_tag"], str):
        chosen["structural_tag"] = json.dumps(chosen["structural_tag"])
    if guided.whitespace_pattern is not None:
        chosen["whitespace_pattern"] = guided.whitespace_pattern
    try:
        return StructuredOutputsParams(**chosen)
    except Exception as error:
        if not is_refusal(error):
            raise
        raise InvalidArgument(f"guided_decoding: {_first_line(error)}", "guided_decoding") from error


def _seed(request: PreprocessedRequest) -> int | None:
    """The seed; for the rest of an answer that another worker began, one that does not draw the same numbers again."""
    seed, resumed = request.sampling_options.seed, request.resumed_tokens
    return seed if seed is None or not resumed else (seed ^ resumed * 0x9E3779B1) & _I64_MAX


def is_refusal(error: BaseException) -> bool:
    """Whether vLLM blames the request. By name: its base class of client errors is not in every version."""
    return isinstance(error, (ValueError, TypeError, OverflowError)) or any(
        cls.__name__ == "VLLMClientError" for cls in type(error).__mro__
    )


# vLLM names the parameter in its error only sometimes; its messages name it in the text nearly always.
_FIELD_WORDS = (
    ("prompt_logprobs", "prompt_logprobs"),
    ("prompt logprobs", "prompt_logprobs"),
    ("logprobs", "logprobs"),
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("presence_penalty", "presence_penalty"),
    ("frequency_penalty", "frequency_penalty"),
    ("repetition_penalty", "repetition_penalty"),
    ("min_tokens", "min_tokens"),
    ("max_tokens", "max_tokens"),
    ("stop_token_ids", "stop_token_ids"),
    ("logit_bias", "logit_bias"),
    ("thinking_token_budget", "max_thinking_tokens"),
    ("data_parallel_rank", "dp_rank"),
    ("lora", "model"),
    ("structured output", "guided_decoding"),
    ("structured_outputs", "guided_decoding"),
    ("grammar", "guided_decoding"),
    ("json", "guided_decoding"),
    ("regex", "guided_decoding"),
    ("choice", "guided_decoding"),
    ("seed", "seed"),
    ("prompt", "token_ids"),
    ("token id", "token_ids"),
)
_RENAMED = {"thinking_token_budget": "max_thinking_tokens", "data_parallel_rank": "dp_rank"}


def invalid(error: BaseException) -> InvalidArgument:
    """vLLM's refusal as an `InvalidArgument` that names the request's field."""
    message = _first_line(error)
    named = getattr(error, "parameter", None)
    if isinstance(named, str) and named:
        return InvalidArgument(message, _RENAMED.get(named, named))
    lowered = message.lower()
    for word, param in _FIELD_WORDS:
        if re.search(rf"\b{re.escape(word)}", lowered):
            return InvalidArgument(message, param)
    return InvalidArgument(message)


def engine_error(before_guided_output: bool) -> DynamoException:
    """What to tell the caller of a request that vLLM ended with an error; it gives no reason but in its log.

    Args:
        before_guided_output: the request's output was constrained and had not begun: nearly always its grammar.
    """
    if before_guided_output:
        return InvalidArgument(
            "vLLM could not compile or follow the constraint of guided_decoding; its log has the reason",
            "guided_decoding",
        )
    return Unknown("vLLM failed on this request; its log has the reason")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:1000]  # a schema quoted in full would fill the caller's screen
