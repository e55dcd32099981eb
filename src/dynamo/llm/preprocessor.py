"""Which tokens and options does an engine get for an OpenAI request?

A request is checked when it is decoded; here comes what only the model can tell: its chat template, vocabulary,
context length, and what its maker recommends where the request is silent.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

from dynamo.llm.chat_template import ChatTemplate
from dynamo.llm.generation_defaults import read_generation_defaults
from dynamo.llm.logprobs import LogprobFormat
from dynamo.llm.model_card import ModelDeploymentCard
from dynamo.llm.model_directory import CUSTOM_TEMPLATE
from dynamo.llm.output import NO_LIMIT, ChoiceDecoder, Echo, OutputPlan
from dynamo.llm.protocols.chat import ChatCompletionRequest
from dynamo.llm.protocols.common import CommonRequest
from dynamo.llm.protocols.completions import CompletionRequest
from dynamo.llm.protocols.engine import (
    CompletionUsage,
    OutputOptions,
    PreprocessedRequest,
    PromptTokensDetails,
    Routing,
    SamplingOptions,
    StopConditions,
)
from dynamo.llm.protocols.tools import ForcedTools
from dynamo.llm.protocols.validation import fail
from dynamo.llm.tokenizer import Tokenizer
from dynamo.llm.tokenizer_config import read_json_object
from dynamo.runtime import buckets
from dynamo.runtime.errors import InvalidArgument
from dynamo.runtime.instruments import Histogram
from dynamo.runtime.options import env_number

MAX_I32 = 2**31 - 1  # the largest token count engines take


class Prepared:
    """One prompt, ready to be sent, and how to read what comes back.

    With several prompts in one request each has its own; `first_index` is the index of its first choice.
    """

    __slots__ = ("_decoders", "_plan", "first_index", "formatted_prompt", "request")

    def __init__(
        self, request: PreprocessedRequest, plan: OutputPlan, formatted_prompt: str | None, first_index: int = 0
    ) -> None:
        self.request = request
        self.formatted_prompt = formatted_prompt
        self.first_index = first_index
        self._plan = plan
        self._decoders: list[ChoiceDecoder] = []

    def decoder_for(self, index: int) -> ChoiceDecoder:
        """A decoder for the outputs whose `index` is this; its own `index` is that of the choice in the answer."""
        decoder = ChoiceDecoder(self._plan, self.first_index + index)
        self._decoders.append(decoder)
        return decoder

    def usage(self) -> CompletionUsage:
        """Tokens so far: the prompt once, and what all decoders of this prompt have read."""
        prompt = len(self.request.token_ids)
        completion = sum(decoder.completion_tokens for decoder in self._decoders)
        cached = [decoder.cached_tokens for decoder in self._decoders if decoder.cached_tokens is not None]
        details = PromptTokensDetails(max(cached)) if cached else None
        return CompletionUsage(prompt, completion, prompt + completion, details)


def total_usage(parts: Sequence[Prepared]) -> CompletionUsage:
    """The usage of a request of several prompts."""
    each = [part.usage() for part in parts]
    cached = [usage.prompt_tokens_details.cached_tokens or 0 for usage in each if usage.prompt_tokens_details]
    return CompletionUsage(
        sum(usage.prompt_tokens for usage in each),
        sum(usage.completion_tokens for usage in each),
        sum(usage.total_tokens for usage in each),
        PromptTokensDetails(sum(cached)) if cached else None,
    )


class PreparationTimes:
    """How long the two parts of making a prompt take, in seconds."""

    def __init__(self, template: Histogram | None = None, tokenize: Histogram | None = None) -> None:
        self.template = template or Histogram(buckets.WORK_SECONDS)
        self.tokenize = tokenize or Histogram(buckets.WORK_SECONDS)


class Preprocessor:
    """Turns requests for one model into tokens. Loading reads files: call it off the event loop.

    Two variables of the environment hold for every model of the process: `DYN_CONTEXT_WINDOW` lowers the context
    length, `DYN_MAX_OUTPUT_TOKENS` bounds the length of an answer.

    Raises:
        InvalidArgument: a file of the model is missing or broken; names it.
    """

    def __init__(self, card: ModelDeploymentCard, directory: Path, times: PreparationTimes | None = None) -> None:
        self.card = card
        self._times = times or PreparationTimes()
        self.tokenizer = Tokenizer.load(directory)
        custom = directory / CUSTOM_TEMPLATE
        self.template = ChatTemplate.load(directory, custom if custom.is_file() else None)
        self._checksum = card.checksum
        self._defaults = read_generation_defaults(directory)
        declared = read_json_object(directory / "config.json").get("vocab_size")
        # Some models pad their embedding beyond the tokenizer's ids, some tokenizers add ids: either is a real token.
        self.vocab_size = max(self.tokenizer.vocab_size, declared if isinstance(declared, int) else 0)
        self._eos_ids = list(self.tokenizer.eos_ids)
        self._eos_set = frozenset(self._eos_ids)
        window = int(env_number("DYN_CONTEXT_WINDOW", 0)) or None
        lengths = [length for length in (card.context_length, window) if length is not None]
        self.context_length = min(lengths) if lengths else None
        self._max_output = int(env_number("DYN_MAX_OUTPUT_TOKENS", 0)) or MAX_I32

    async def chat(self, request: ChatCompletionRequest) -> Prepared:
        """Prepare a chat request.

        Raises:
            InvalidArgument: the template refuses the messages, or the prompt does not fit.
        """
        ext = request.nvext
        text: str | None = None
        if ext is not None and ext.token_data is not None:
            token_ids = ext.token_data
            self._check_vocabulary(token_ids, "nvext.token_data")
        else:
            raw = ext is not None and ext.use_raw_prompt
            start = perf_counter()
            text = request.raw_prompt if raw else self._render(request)
            rendered = perf_counter()
            token_ids = await self.tokenizer.encode_async(text, bool(request.add_special_tokens))
            self._times.template.observe(rendered - start)
            self._times.tokenize.observe(perf_counter() - rendered)
        logprobs = self._logprob_format(request, request.top_logprob_count, chat=True)
        tools = None if request.tool_choice is None else request.forced_tools()
        return self._prepare(request, token_ids, text, "messages", logprobs, tools=tools)

    async def completion(self, request: CompletionRequest) -> list[Prepared]:
        """Prepare a completion request: one for each prompt, in order. See `chat`."""
        prepared = []
        for i, prompt in enumerate(request.prompts):
            where = f"prompt[{i}]" if len(request.prompts) > 1 else "prompt"
            text = prompt if isinstance(prompt, str) else None
            if request.nvext is not None and request.nvext.token_data is not None:
                where, token_ids = "nvext.token_data", request.nvext.token_data
                self._check_vocabulary(token_ids, where)
            elif isinstance(prompt, str):
                # A prompt of a completion begins a sequence: the tokenizer's own first token belongs to it.
                start = perf_counter()
                token_ids = await self.tokenizer.encode_async(prompt, request.add_special_tokens is not False)
                self._times.tokenize.observe(perf_counter() - start)
            else:
                token_ids = prompt
                self._check_vocabulary(token_ids, where)
            logprobs = self._logprob_format(request, request.top_logprob_count, chat=False)
            echo = self._echo(request, text, token_ids, logprobs) if request.echo else None
            index = i * request.choices
            prepared.append(self._prepare(request, token_ids, text, where, logprobs, echo=echo, first_index=index))
        return prepared

    def _render(self, request: ChatCompletionRequest) -> str:
        if self.template is None:
            raise InvalidArgument(
                f"model {self.card.display_name} has no chat template: use /v1/completions, or nvext.use_raw_prompt",
                "messages",
            )
        config = self.card.runtime_config
        arguments = request.template_arguments
        if config.default_thinking_mode is not None:
            arguments.setdefault("enable_thinking", config.default_thinking_mode == "enabled")
        hide_tools = request.tool_choice == "none" and config.exclude_tools_when_tool_choice_none
        continued = bool(request.continue_final_message)
        prompted = request.add_generation_prompt
        return self.template.render(
            request.messages,
            None if hide_tools or not request.tools else request.tools,
            add_generation_prompt=not continued if prompted is None else prompted,
            continue_final_message=continued,
            **arguments,
        )

    def _check_vocabulary(self, token_ids: Sequence[int], name: str) -> None:
        if token_ids and max(token_ids) >= self.vocab_size:
            fail(f"{name} has token id {max(token_ids)}, outside the vocabulary of {self.vocab_size}", name)

    def _logprob_format(self, request: CommonRequest, count: int | None, *, chat: bool) -> LogprobFormat | None:
        if count is None:
            return None
        return LogprobFormat(self.tokenizer, count, chat, bool(request.return_tokens_as_token_ids))

    def _echo(
        self, request: CommonRequest, text: str | None, token_ids: list[int], logprobs: LogprobFormat | None
    ) -> Echo:
        """The prompt as the answer repeats it; what each token of it made is only needed for log-probabilities."""
        skip = request.skip_special_tokens is not False
        if text is None:
            text = self.tokenizer.decode(token_ids, skip)
        if logprobs is None:
            return Echo(text, [], [])
        decoder = self.tokenizer.decoder(skip)
        return Echo(text, token_ids, [len(decoder.push([token])) for token in token_ids])

    def _prepare(
        self,
        request: CommonRequest,
        token_ids: list[int],
        text: str | None,
        where: str,
        logprobs: LogprobFormat | None,
        *,
        echo: Echo | None = None,
        tools: ForcedTools | None = None,
        first_index: int = 0,
    ) -> Prepared:
        stops = self._stop_conditions(request, token_ids, where)
        options = self._output_options(request, logprobs, echo)
        routing = self._routing(request)
        engine_request = PreprocessedRequest(
            model=self.card.display_name,
            token_ids=token_ids,
            stop_conditions=stops,
            sampling_options=self._sampling_options(request),
            output_options=options,
            eos_token_ids=self._eos_ids,
            mdc_sum=self._checksum,
            annotations=request.annotations,
            routing=routing,
            router_config_override=None if request.nvext is None else request.nvext.router_config_override,
        )
        skip = request.skip_special_tokens is not False
        plan = OutputPlan(
            new_decoder=partial(self.tokenizer.decoder, skip, token_ids),
            eos_ids=frozenset() if request.ignore_eos else self._eos_set,
            stop_ids=frozenset(request.stop_token_ids or ()),
            stop_strings=request.stop_strings,
            include_stop=bool(request.include_stop_str_in_output),
            max_tokens=NO_LIMIT if stops.max_tokens is None else stops.max_tokens,
            min_tokens=request.min_tokens or 0,
            logprobs=logprobs,
            echo=echo,
            tools=tools,
        )
        return Prepared(engine_request, plan, text, first_index)

    def _stop_conditions(self, request: CommonRequest, token_ids: list[int], where: str) -> StopConditions:
        if request.stop_token_ids:
            self._check_vocabulary(request.stop_token_ids, "stop_token_ids")
        limit = self._token_limit(request, len(token_ids), where)
        if request.min_tokens and limit is not None and request.min_tokens > limit:
            fail(f"min_tokens is {request.min_tokens}, but only {limit} tokens can follow this prompt", "min_tokens")
        return StopConditions(
            max_tokens=limit,
            stop=request.stop_strings or None,
            stop_token_ids=request.stop_token_ids or None,
            stop_token_ids_hidden=None if request.ignore_eos else self._eos_ids or None,
            min_tokens=request.min_tokens or None,
            ignore_eos=request.ignore_eos or None,
            max_thinking_tokens=None if request.nvext is None else request.nvext.max_thinking_tokens,
        )

    def _token_limit(self, request: CommonRequest, prompt_tokens: int, where: str) -> int | None:
        """How many tokens may follow: what is asked for, or recommended, as far as it fits [M26]."""
        if not prompt_tokens:
            fail(f"{where} makes an empty prompt: no tokens", where)
        wanted = request.token_limit
        if wanted is None:
            wanted = self._defaults.max_new_tokens
        if self.context_length is None:
            return None if wanted is None and self._max_output == MAX_I32 else min(wanted or MAX_I32, self._max_output)
        room = self.context_length - prompt_tokens
        if room < 1:
            raise InvalidArgument(
                f"Validation: {where}: this model's maximum context length is {self.context_length} tokens, the prompt "
                f"has {prompt_tokens}, and at least one must be left for the answer; shorten the prompt",
                where,
                "context_length_exceeded",
            )
        return min(room, self._max_output, room if wanted is None else wanted)

    def _sampling_options(self, request: CommonRequest) -> SamplingOptions:
        defaults = self._defaults
        top_k = defaults.top_k if request.top_k is None else request.top_k
        if request.logit_bias:
            self._check_vocabulary(list(request.logit_bias), "logit_bias")
        return SamplingOptions(
            n=request.n if request.choices > 1 else None,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty),
            temperature=_first(request.temperature, defaults.temperature),
            top_p=_first(request.top_p, defaults.top_p),
            top_k=-1 if top_k == 0 else top_k,  # engines agree on -1 for "off", not on 0
            min_p=_first(request.min_p, defaults.min_p),
            seed=request.seed,
            include_stop_str_in_output=request.include_stop_str_in_output or None,
            logit_bias=request.logit_bias or None,
            guided_decoding=request.guided,
        )

    def _output_options(
        self, request: CommonRequest, logprobs: LogprobFormat | None, echo: Echo | None
    ) -> OutputOptions:
        count = None if logprobs is None else logprobs.count
        wants_prompt = (echo is not None and count is not None) or "prompt_logprobs" in request.extra_fields
        return OutputOptions(
            logprobs=count,
            prompt_logprobs=(count or 0) if wants_prompt else None,
            skip_special_tokens=request.skip_special_tokens,
            formatted_prompt="formatted_prompt" in request.annotations or None,
            return_tokens_as_token_ids=request.return_tokens_as_token_ids or None,
        )

    def _routing(self, request: CommonRequest) -> Routing | None:
        """What the body says of where the request should go and how urgent it is."""
        ext, lora = request.nvext, self.card.lora
        if ext is None and lora is None and request.cache_salt is None and request.priority is None:
            return None
        routing = Routing(
            cache_salt=request.cache_salt, priority=request.priority, lora_name=None if lora is None else lora.name
        )
        if ext is not None:
            for name in _PINS:
                setattr(routing, name, getattr(ext, name))
            if ext.agent_hints is not None:
                routing.expected_output_tokens = ext.agent_hints.osl
                routing.strict_priority = ext.agent_hints.strict_priority
            if ext.routing_constraints is not None:
                routing.required_taints = ext.routing_constraints.required_taints
                routing.preferred_taints = ext.routing_constraints.preferred_taints
        return routing


_PINS = ("backend_instance_id", "prefill_worker_id", "decode_worker_id", "dp_rank", "prefill_dp_rank")


def _first(said: float | None, recommended: float | None) -> float | None:
    return recommended if said is None else said
