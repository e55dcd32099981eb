"""Which token comes next, when there is no model?

Token i of a request is a function of the request's content, its seed and i alone. So the output does not depend
on the batch, the speed, or how often the sequence was preempted and computed again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import xxhash

from dynamo.llm.protocols.engine import EngineOutput, FinishReason, PreprocessedRequest, TopLogprob
from dynamo.runtime.errors import InvalidArgument

_STRIDE = 0x9E3779B1  # 2^32 / golden ratio: neighbours in the output are far apart in the vocabulary
_FIRST_NATURAL_END, _LAST_NATURAL_END = 64, 320  # tokens; an answer's length where the request sets none
_MAX_LOGPROBS = 64  # alternatives a token; the synthetic probabilities halve, so more would all be zero


class Reasoning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Outputs begin with a thought of `thinking_ratio` of the output's length between two marker tokens."""

    start_thinking_token_id: int
    end_thinking_token_id: int
    thinking_ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.thinking_ratio <= 1:
            raise ValueError("thinking_ratio: must be between 0 and 1")


@dataclass(slots=True)
class Script:
    """What one choice will say: fixed when the request arrives. Token i is in general
    `vocabulary[(start + i * stride) % size]`; `plain` says that nothing else applies before `max_tokens`."""

    start: int
    max_tokens: int
    plain: bool = True
    min_tokens: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    natural_end: int | None = None  # the index of a closing eos, where the request bounds nothing
    end_of_thought: int | None = None  # the index of the closing mark, where the model reasons
    logprobs: int | None = None


class Sampler:
    """Makes scripts for requests, and tokens from scripts. One a process: it holds the vocabulary.

    `vocabulary` must be ids of ordinary tokens; those with whole characters read best.
    """

    def __init__(self, vocabulary: Sequence[int], reasoning: Reasoning | None = None) -> None:
        if not vocabulary:
            raise ValueError("vocabulary: is empty, so there is no token to put out")
        self.vocabulary = list(vocabulary)
        self.size = len(self.vocabulary)
        self.stride = _STRIDE % self.size or 1
        while math.gcd(self.stride, self.size) != 1:  # so that every token gets its turn
            self.stride += 1
        self._reasoning = reasoning
        self._members = frozenset(self.vocabulary)

    def script(self, request: PreprocessedRequest, room: int) -> Script:
        """Plan the answer to a request that has room for `room` tokens in its context.

        Raises:
            InvalidArgument: `max_tokens` is less than one, or too many logprobs are asked for.
        """
        stop, output = request.stop_conditions, request.output_options
        if stop.max_tokens is not None and stop.max_tokens < 1:
            raise InvalidArgument(f"max_tokens: must be at least 1, not {stop.max_tokens}", "max_tokens")
        if max(output.logprobs or 0, output.prompt_logprobs or 0) > _MAX_LOGPROBS:
            raise InvalidArgument(f"logprobs: at most {_MAX_LOGPROBS} alternatives a token", "logprobs")
        made = request.resumed_tokens  # by a worker that was lost; the rest is what that one would have said
        content = _content_seed(request)
        start = content + made * self.stride
        script = Script(start, min(stop.max_tokens or room, room), min_tokens=stop.min_tokens or 0)
        if not stop.ignore_eos:
            script.eos_ids = frozenset(request.eos_token_ids)
            if stop.max_tokens is None and request.eos_token_ids:
                length = _FIRST_NATURAL_END + content % (_LAST_NATURAL_END - _FIRST_NATURAL_END) - made
                script.natural_end = max(length, script.min_tokens)
        script.stop_ids = frozenset(stop.stop_token_ids or ()) | frozenset(stop.stop_token_ids_hidden or ())
        script.logprobs = output.logprobs
        if self._reasoning:
            length = min(script.max_tokens, script.natural_end or script.max_tokens)
            script.end_of_thought = int(length * self._reasoning.thinking_ratio)
            if stop.max_thinking_tokens is not None:
                script.end_of_thought = min(script.end_of_thought, stop.max_thinking_tokens + 1)
        special = self._reasoning or script.natural_end is not None or output.logprobs is not None
        script.plain = not special and self._members.isdisjoint(script.eos_ids | script.stop_ids)
        return script

    def token(self, script: Script, index: int) -> int:
        """Token `index` of the output."""
        if index == script.natural_end:
            return min(script.eos_ids)
        if self._reasoning and script.end_of_thought:
            if index == 0:
                return self._reasoning.start_thinking_token_id
            if index == script.end_of_thought:
                return self._reasoning.end_thinking_token_id
        position = script.start + index * self.stride
        token = self.vocabulary[position % self.size]
        if index < script.min_tokens:  # an end is not allowed yet: the next ordinary token instead
            ends = script.eos_ids | script.stop_ids
            for _ in range(self.size):
                if token not in ends:
                    break
                position += 1
                token = self.vocabulary[position % self.size]
        return token

    def sample(self, script: Script, index: int) -> EngineOutput:
        """Token `index` with all that the request wants to know of it, its finish reason among that."""
        token = self.token(script, index)
        output = EngineOutput([token])
        reason, stop_reason = self._ended_by(script, index, token)
        if reason:
            output.finish_reason, output.stop_reason = reason, stop_reason
        if script.logprobs is not None:
            ranked = self.ranked(token, script.start + index * self.stride, max(1, script.logprobs))
            output.log_probs = [ranked[0].logprob]
            output.top_logprobs = [ranked]
        return output

    def _ended_by(self, script: Script, index: int, token: int) -> tuple[FinishReason | None, int | None]:
        if index >= script.min_tokens:
            if token in script.eos_ids:
                return "eos", None
            if token in script.stop_ids:
                return "stop", token
        return ("length", None) if index + 1 >= script.max_tokens else (None, None)

    def ranked(self, token: int, position: int, count: int) -> list[TopLogprob]:
        """The chosen token as the likeliest of `count`; each alternative is half as likely as the one before."""
        ids = [token]
        for i in range(position + 1, position + 1 + self.size):
            if len(ids) == count:
                break
            if (other := self.vocabulary[i % self.size]) != token:
                ids.append(other)
        return [TopLogprob(id_, -math.log(2) * rank, rank) for rank, id_ in enumerate(ids, 1)]

    def prompt_logprobs(self, prompt: Sequence[int], count: int) -> list[list[TopLogprob] | None]:
        """Alternatives at every position of the prompt but the first, where there is nothing to go by."""
        ranked = (self.ranked(token, token, max(1, count)) for token in prompt[1:])
        return [None, *ranked]


def _content_seed(request: PreprocessedRequest) -> int:
    """A number that is the same for the same prompt, adapter and seed, in every process."""
    sampling, lora = request.sampling_options, request.routing.lora_name if request.routing else None
    prompt = request.token_ids[: len(request.token_ids) - request.resumed_tokens]
    content = msgspec.msgpack.encode((prompt, sampling.seed, lora))
    return xxhash.xxh3_64_intdigest(content)
