"""How is SGLang's own endpoint spoken, `/generate`? Every SGLang server has it.

Written after SGLang 0.5.23's source, and run against a stand-in only.
"""

import json
import re
from typing import Any

from dynamo.attach.dialects.dialect import Reader, cache_salt, given, refuse_unsupported, stop_token_ids
from dynamo.llm.protocols.engine import EngineOutput, GuidedDecoding, PreprocessedRequest, TopLogprob
from dynamo.runtime.errors import InvalidArgument, Unknown

_UNLIMITED = 1 << 30  # SGLang cuts it to what fits; without a limit its default is 128


class SglangGenerate:
    """Tokens in, tokens out (and text, which nobody reads)."""

    name = path = "/generate"

    def __init__(self, model: str) -> None:
        self._model = model

    def body(self, request: PreprocessedRequest, request_id: str) -> dict[str, Any]:
        """See `Dialect.body`."""
        refuse_unsupported(request)
        wants_logprobs = request.output_options.logprobs is not None
        routing = request.routing
        return {
            "rid": request_id,
            "input_ids": request.token_ids,
            "sampling_params": _sampling(request),
            "stream": True,
            **({"return_logprob": True, "top_logprobs_num": request.output_options.logprobs} if wants_logprobs else {}),
            **given(cache_salt=cache_salt(request), routed_dp_rank=routing.dp_rank if routing is not None else None),
        }

    def headers(self, request: PreprocessedRequest) -> dict[str, str]:
        """See `Dialect.headers`."""
        return {}

    def reader(self, request: PreprocessedRequest) -> Reader:
        """See `Dialect.reader`."""
        return _Reader(request)


def _sampling(request: PreprocessedRequest) -> dict[str, Any]:
    sampling, stop = request.sampling_options, request.stop_conditions
    if stop.max_thinking_tokens is not None:
        raise InvalidArgument("SGLang has no limit of thinking tokens; leave it out", "nvext.max_thinking_tokens")
    bias = sampling.logit_bias
    return given(
        max_new_tokens=_UNLIMITED if stop.max_tokens is None else stop.max_tokens,
        min_new_tokens=stop.min_tokens,
        ignore_eos=stop.ignore_eos,
        stop_token_ids=stop_token_ids(request) or None,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        sampling_seed=sampling.seed,
        logit_bias={str(token): value for token, value in bias.items()} if bias else None,
        **_guided(sampling.guided_decoding),
    )


def _guided(guided: GuidedDecoding | None) -> dict[str, str]:
    if guided is None:
        return {}
    found: dict[str, str] = {}
    if guided.json is not None:
        found["json_schema"] = guided.json if isinstance(guided.json, str) else json.dumps(guided.json)
    if guided.regex is not None:
        found["regex"] = guided.regex
    if guided.choice is not None:
        found["regex"] = "(" + "|".join(re.escape(word) for word in guided.choice) + ")"
    if guided.grammar is not None:
        found["ebnf"] = guided.grammar
    if guided.structural_tag is not None:
        tag = guided.structural_tag
        found["structural_tag"] = tag if isinstance(tag, str) else json.dumps(tag)
    return found


class _Reader(Reader):
    def output(self, event: dict[str, Any]) -> EngineOutput | None:
        meta = event["meta_info"]
        self.note_cached(meta.get("cached_tokens"))
        ids = event["output_ids"]
        if len(ids) == meta["completion_tokens"]:  # all so far; with --incremental-streaming-output only the new ones
            ids = ids[self.generated :]
        output = EngineOutput(token_ids=ids)
        if self.logprobs is not None and ids:
            made = meta["output_token_logprobs"][-len(ids) :]
            output.log_probs = [entry[0] for entry in made]
            if self.logprobs:
                tops = meta["output_top_logprobs"][-len(ids) :]
                output.top_logprobs = [_alternatives(*pair, self.logprobs) for pair in zip(made, tops, strict=True)]
        ended = meta["finish_reason"]
        if ended is not None:
            if ended["type"] == "abort":
                raise Unknown(f"the server ended this request: {ended.get('message')}")
            self.end(output, ended["type"], ended.get("matched"))
        return output if ids or ended is not None else None


def _alternatives(made: list[Any], tops: list[list[Any]] | None, count: int) -> list[TopLogprob]:
    """Likeliest first, the sampled token among them. An entry is [log probability, token id, text]."""
    found = [TopLogprob(top[1], top[0], rank) for rank, top in enumerate(tops or (), 1)][:count]
    if all(top.token_id != made[1] for top in found):
        found.append(TopLogprob(made[1], made[0]))
    return found
