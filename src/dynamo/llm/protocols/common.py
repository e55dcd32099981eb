"""What do a chat request and a completion request have in common?

The fields are OpenAI's, those that vLLM's server added, and NVIDIA's `nvext`. A field of a request is one of
four things: honoured; known to be harmless and accepted (`user`, `metadata`, ...); known, not possible, and
refused with a reason (`REFUSED`); unknown, and refused. None is ignored in silence.
"""

from functools import cached_property
from typing import Any

import msgspec

from dynamo.llm.protocols.engine import GuidedDecoding
from dynamo.llm.protocols.guided import ResponseFormat, guided_decoding
from dynamo.llm.protocols.validation import (
    MAX_I64,
    MAX_U64,
    MIN_I64,
    check_range,
    check_text,
    check_token_ids,
    check_whole,
    fail,
)
from dynamo.runtime.options import env_bool

MAX_STOPS = 32  # stop strings, and stop ids, in one request; what upstream's front end admits
MAX_CHOICES = 128  # OpenAI's bound of n
MAX_TOP_LOGPROBS = 20  # OpenAI's bound of top_logprobs, and vLLM's default

MAX_I32 = 2**31 - 1

EXTRA_FIELDS = (
    "worker_id",
    "timing",
    "engine_data",
    "stop_reason",
    "completion_token_ids",
    "prompt_logprobs",
    "routing",
)

# Known fields that cannot be honoured: the reason, and the values that ask for nothing.
REFUSED: dict[str, tuple[str, tuple[object, ...]]] = {
    "functions": ("is deprecated; use tools", ([],)),
    "function_call": ("is deprecated; use tool_choice", ("none",)),
    "audio": ("is not supported: this model answers in text only", ()),
    "prediction": ("is not supported", ()),
    "web_search_options": ("is not supported", ()),
    "suffix": ("is not supported: no text can be inserted before it", ("",)),
    "use_beam_search": ("is not supported", (False,)),
    "length_penalty": ("is not supported: it belongs to beam search", (1.0,)),
    "truncate_prompt_tokens": ("is not supported: shorten the prompt", ()),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries beside the text. `continuous_usage_stats` puts the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AgentHints(msgspec.Struct, forbid_unknown_fields=True):
    """How urgent the request is (higher is sooner) and how long its answer may be (`osl`, tokens) [N10]."""

    priority: int | None = None
    strict_priority: int | None = None
    osl: int | None = None
    speculative_prefill: bool | None = None


class TaintConstraints(msgspec.Struct, forbid_unknown_fields=True):
    """Which workers may, and should, take the request [K47]: `preferred_taints` has weights, below zero to avoid."""

    required_taints: list[str] | None = None
    preferred_taints: dict[str, float] | None = None


class NvExt(msgspec.Struct, forbid_unknown_fields=True):
    """NVIDIA's extensions [N1-N12]. What root fields say too, root fields say first, but for `cache_salt`."""

    ignore_eos: bool | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    greed_sampling: bool | None = None
    use_raw_prompt: bool | None = None
    annotations: list[str] | None = None
    backend_instance_id: int | None = None
    prefill_worker_id: int | None = None
    decode_worker_id: int | None = None
    dp_rank: int | None = None
    prefill_dp_rank: int | None = None
    token_data: list[int] | None = None
    max_thinking_tokens: int | None = None
    cache_salt: str | None = None
    extra_fields: list[str] | None = None
    agent_hints: AgentHints | None = None
    routing_constraints: TaintConstraints | None = None
    router_config_override: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    def check(self) -> None:
        """Refuse what is out of range or not possible. Raises InvalidArgument."""
        if env_bool("DYN_DISABLE_FRONTEND_NVEXT", False):
            fail("nvext is switched off on this server (DYN_DISABLE_FRONTEND_NVEXT)", "nvext")
        check_whole(self.top_k, "nvext.top_k", -1, MAX_I32)
        for name in ("backend_instance_id", "prefill_worker_id", "decode_worker_id"):
            check_whole(getattr(self, name), f"nvext.{name}", 0, MAX_U64)
        for name in ("dp_rank", "prefill_dp_rank", "max_thinking_tokens"):
            check_whole(getattr(self, name), f"nvext.{name}", 0)
        if self.token_data is not None:
            if not self.token_data:
                fail("nvext.token_data must not be empty", "nvext.token_data")
            check_token_ids(self.token_data, "nvext.token_data")
        for name in self.extra_fields or ():
            if name not in EXTRA_FIELDS:
                fail(f"nvext.extra_fields: {name!r} is not one of {', '.join(EXTRA_FIELDS)}", "nvext.extra_fields")
        if (constraints := self.routing_constraints) is not None:
            for taint, weight in (constraints.preferred_taints or {}).items():
                check_range(weight, f"nvext.routing_constraints.preferred_taints[{taint!r}]", -100, 100)
        if hints := self.agent_hints:
            check_whole(hints.priority, "nvext.agent_hints.priority", -MAX_I32 - 1, MAX_I32)
            check_whole(hints.strict_priority, "nvext.agent_hints.strict_priority", 0)
            check_whole(hints.osl, "nvext.agent_hints.osl", 1)
            if hints.speculative_prefill:
                fail(
                    "nvext.agent_hints.speculative_prefill is not supported by this version",
                    "nvext.agent_hints.speculative_prefill",
                )


class RequestDefaults(msgspec.Struct, frozen=True):
    """What a request is taken to say where it is silent: the request template of the command line [A27]."""

    model: str | None = None
    temperature: float | None = None
    max_completion_tokens: int | None = None


class CommonRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Fields of both kinds of request. None is "not said" everywhere; engines then use their own defaults."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    n: int | None = None
    best_of: int | None = None

    response_format: ResponseFormat | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None

    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    nvext: NvExt | None = None

    # Accepted and of no effect on the answer: bookkeeping of OpenAI's own service.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None

    @property
    def choices(self) -> int:
        """How many answers are wanted to one prompt."""
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        """The number of tokens the answer may have, if the request says; the newer field name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list, empty for none."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def extra_fields(self) -> list[str]:
        """Which fields of `nvext` the answer shall carry."""
        return (self.nvext and self.nvext.extra_fields) or []

    @property
    def annotations(self) -> list[str]:
        """Which facts about the request a stream shall carry as events."""
        return (self.nvext and self.nvext.annotations) or []

    def apply(self, defaults: RequestDefaults) -> None:
        """Fill in what the request does not say."""
        self.model = self.model or defaults.model or ""
        if self.temperature is None:
            self.temperature = defaults.temperature
        if self.token_limit is None:
            self.max_completion_tokens = defaults.max_completion_tokens

    def check(self) -> None:
        """Refuse what is out of range or contradicts itself. Raises InvalidArgument."""
        if not self.model:
            fail("model is required", "model")
        self._check_sampling()
        self._check_length_and_stops()
        if self.stream_options is not None and not self.stream:
            fail("stream_options may only be given with stream: true", "stream_options")
        if self.cache_salt == "":
            fail("cache_salt must not be empty", "cache_salt")
        check_whole(self.priority, "priority", -MAX_I32 - 1, MAX_I32)
        if self.nvext is not None:
            self.nvext.check()
            self._merge_nvext(self.nvext)
        _ = self.guided

    @property
    def forced_schema(self) -> dict[str, Any] | None:
        """A schema that the output must have beside what these fields ask for."""
        return None

    @property
    def guided(self) -> GuidedDecoding | None:
        """What constrains the output, if anything does [M11]. Raises InvalidArgument if two things do."""
        if (
            self.response_format is None
            and self.guided_json is None
            and self.guided_regex is None
            and self.guided_choice is None
            and self.guided_grammar is None
            and self.forced_schema is None
        ):
            return None  # as nearly always, and a property that keeps its value takes a lock to find that out
        return self._guided

    @cached_property
    def _guided(self) -> GuidedDecoding | None:
        return guided_decoding(
            response_format=self.response_format,
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            backend=self.guided_decoding_backend,
            whitespace_pattern=self.guided_whitespace_pattern,
            tool_schema=self.forced_schema,
        )

    def _check_sampling(self) -> None:
        check_range(self.temperature, "temperature", 0, 2)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            fail(f"top_p must be greater than 0 and at most 1, got {self.top_p!r}", "top_p")
        if self.top_k is not None:
            check_whole(self.top_k, "top_k", -1, MAX_I32)
        check_range(self.min_p, "min_p", 0, 1)
        check_range(self.presence_penalty, "presence_penalty", -2, 2)
        check_range(self.frequency_penalty, "frequency_penalty", -2, 2)
        _check_repetition(self.repetition_penalty, "repetition_penalty")
        check_whole(self.seed, "seed", MIN_I64, MAX_I64)
        check_whole(self.n, "n", 1, MAX_CHOICES)
        if self.best_of is not None and self.best_of != self.choices:
            fail(f"best_of must equal n ({self.choices}) or be left out: choices are not ranked", "best_of")
        if self.logit_bias:
            check_token_ids(list(self.logit_bias), "logit_bias")
            for token, bias in self.logit_bias.items():
                check_range(bias, f"logit_bias[{token}]", -100, 100)

    def _check_length_and_stops(self) -> None:
        if self.max_tokens is not None:
            check_whole(self.max_tokens, "max_tokens", 1, MAX_I64)
        if self.max_completion_tokens is not None:
            check_whole(self.max_completion_tokens, "max_completion_tokens", 1, MAX_I64)
        if self.min_tokens is not None:
            check_whole(self.min_tokens, "min_tokens", 0)
            limit = self.token_limit
            if limit is not None and self.min_tokens > limit:
                fail(f"min_tokens must be at most max_tokens ({limit}), got {self.min_tokens}", "min_tokens")
        if self.stop is not None:
            if len(self.stop_strings) > MAX_STOPS:
                fail(f"stop must hold at most {MAX_STOPS} strings, got {len(self.stop_strings)}", "stop")
            for i, text in enumerate(self.stop_strings):
                check_text(text, "stop" if isinstance(self.stop, str) else f"stop[{i}]", empty=False)
        if self.stop_token_ids is not None:
            if len(self.stop_token_ids) > MAX_STOPS:
                fail(
                    f"stop_token_ids must hold at most {MAX_STOPS} ids, got {len(self.stop_token_ids)}",
                    "stop_token_ids",
                )
            check_token_ids(self.stop_token_ids, "stop_token_ids")

    def _merge_nvext(self, ext: NvExt) -> None:
        """Let `nvext` speak where the root fields are silent, and make greedy what asks to be."""
        _check_repetition(ext.repetition_penalty, "nvext.repetition_penalty")
        for name in _IN_BOTH:
            if getattr(self, name) is None:
                setattr(self, name, getattr(ext, name))
        if ext.cache_salt:
            self.cache_salt = ext.cache_salt  # stands over the root field [N8]
        if ext.greed_sampling:
            for name in ("temperature", "top_p", "top_k", "min_p"):
                if getattr(self, name) is not None:
                    fail(f"nvext.greed_sampling cannot be combined with {name}", "nvext.greed_sampling")
            self.temperature = 0.0
        if ext.agent_hints is not None and ext.agent_hints.priority is not None:
            self.priority = ext.agent_hints.priority


_IN_BOTH = (
    "ignore_eos",
    "top_k",
    "repetition_penalty",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
)


def _check_repetition(value: float | None, name: str) -> None:
    if value is not None and not 0 < value <= 2:
        fail(f"{name} must be greater than 0 and at most 2, got {value!r}", name)


def tolerates_unknown_fields() -> bool:
    """Whether the operator chose to let fields through that have no effect [A31]. Raises ValueError on nonsense."""
    return env_bool("DYN_IGNORE_OPENAI_FE_UNSUPPORTED_FIELDS", False)
