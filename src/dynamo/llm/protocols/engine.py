"""What the frontend and an engine say to each other, in tokens.

Field names are those that workers of the field know (a handler sees the request as a dict with these keys,
and may yield dicts with the keys of `EngineOutput`). Fields at their default stay off the wire.
"""

from typing import Any, Literal

import msgspec

SEED_IS_OURS = "seed_is_frontends"
"""In `prefill_result`: the client gave no seed. The one that is there is to draw the first token again, no more."""

FinishReason = Literal["stop", "eos", "length", "cancelled", "content_filter", "error"]
"""How a choice ended, in the engine's words; the OpenAI side says `stop` for both `eos` and `stop`."""


class StopConditions(msgspec.Struct, omit_defaults=True):
    """When to stop. `stop` strings are matched by the frontend, which alone holds text; ids by the engine too."""

    max_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_token_ids_hidden: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    max_thinking_tokens: int | None = None


class GuidedDecoding(msgspec.Struct, omit_defaults=True):
    """At most one of `json`, `regex`, `choice`, `grammar`, `structural_tag` constrains the output."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None
    backend: str | None = None
    whitespace_pattern: str | None = None


class SamplingOptions(msgspec.Struct, omit_defaults=True):
    """How to draw the next token; `None` leaves the engine's own default."""

    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    seed: int | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[int, float] | None = None
    guided_decoding: GuidedDecoding | None = None


class OutputOptions(msgspec.Struct, omit_defaults=True):
    """What to report beside the tokens. `logprobs` is the number of alternatives a token; 0 = the token alone."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    formatted_prompt: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class Routing(msgspec.Struct, omit_defaults=True):
    """What is known about where the request should go, and how urgent it is."""

    backend_instance_id: int | None = None
    prefill_worker_id: int | None = None
    decode_worker_id: int | None = None
    dp_rank: int | None = None
    prefill_dp_rank: int | None = None
    expected_output_tokens: int | None = None
    cache_salt: str | None = None
    priority_jump: float | None = None
    strict_priority: int | None = None
    priority: int | None = None
    lora_name: str | None = None
    required_taints: list[str] | None = None
    preferred_taints: dict[str, float] | None = None


class PreprocessedRequest(msgspec.Struct, omit_defaults=True):
    """A request as an engine gets it: tokens and options, no text."""

    model: str
    token_ids: list[int]
    stop_conditions: StopConditions = msgspec.field(default_factory=StopConditions)
    sampling_options: SamplingOptions = msgspec.field(default_factory=SamplingOptions)
    output_options: OutputOptions = msgspec.field(default_factory=OutputOptions)
    eos_token_ids: list[int] = []
    mdc_sum: str | None = None
    annotations: list[str] = []
    routing: Routing | None = None
    router_config_override: dict[str, Any] | None = None
    prefill_result: dict[str, Any] | None = None
    bootstrap_info: dict[str, Any] | None = None
    multi_modal_data: dict[str, Any] | None = None
    mm_routing_info: dict[str, Any] | None = None
    extra_args: dict[str, Any] | None = None
    agent_context: dict[str, Any] | None = None
    resumed_tokens: int = 0
    """How many of the last `token_ids` are of the answer: made by a worker that was lost, and seen by the client."""


class TopLogprob(msgspec.Struct, omit_defaults=True):
    """One alternative at one position. `rank` is 1 for the likeliest token."""

    token_id: int
    logprob: float
    rank: int | None = None
    token: str | None = None


class PromptTokensDetails(msgspec.Struct, omit_defaults=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int | None = None


class CompletionUsage(msgspec.Struct, omit_defaults=True):
    """Token counts of a whole request, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class EngineOutput(msgspec.Struct, omit_defaults=True):
    """What one engine step made for one choice of one request.

    `log_probs[i]` belongs to `token_ids[i]`, `top_logprobs[i]` are the alternatives there (the chosen token
    among them). `stop_reason` is the stop token id or string that ended the choice. `text` is set only by
    engines that make text themselves; then no detokenizing happens.
    """

    token_ids: list[int] = []
    index: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: str | None = None
    log_probs: list[float] | None = None
    top_logprobs: list[list[TopLogprob]] | None = None
    cum_log_probs: float | None = None
    prompt_logprobs: list[list[TopLogprob] | None] | None = None
    completion_usage: CompletionUsage | None = None
    disaggregated_params: dict[str, Any] | None = None
    engine_data: dict[str, Any] | None = None
