"""How is a server sent tokens that has only OpenAI's completions? vLLM takes a prompt of ids and gives ids back.

The server detokenizes all the same; nobody reads its text.
"""

from typing import Any

from dynamo.attach.dialects.dialect import (
    Reader,
    cache_salt,
    given,
    refuse_unsupported,
    vllm_headers,
    vllm_sampling,
)
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest, TopLogprob
from dynamo.runtime.errors import InvalidArgument

_AS_ID = "token_id:"  # how vLLM writes a token with `return_tokens_as_token_ids`


class Completions:
    """`/v1/completions` with `return_token_ids` (vLLM 0.10.2 and later). `max_model_len` in tokens."""

    name = path = "/v1/completions"

    def __init__(self, model: str, max_model_len: int | None) -> None:
        self._model = model
        self._max_model_len = max_model_len

    def body(self, request: PreprocessedRequest, request_id: str) -> dict[str, Any]:
        """See `Dialect.body`."""
        refuse_unsupported(request)
        return {
            "request_id": request_id,
            "model": self._model,
            "prompt": request.token_ids,
            "max_tokens": self._max_tokens(request),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **vllm_sampling(request),
            **({} if request.output_options.logprobs is None else {"return_tokens_as_token_ids": True}),
            **given(cache_salt=cache_salt(request)),
        }

    def _max_tokens(self, request: PreprocessedRequest) -> int:
        """Always said: a completion without it has 16 tokens."""
        wanted = request.stop_conditions.max_tokens
        if wanted is not None:
            return wanted
        if self._max_model_len is None:
            raise InvalidArgument("say how many tokens the answer may have: the server does not tell", "max_tokens")
        return max(1, self._max_model_len - len(request.token_ids))

    def headers(self, request: PreprocessedRequest) -> dict[str, str]:
        """See `Dialect.headers`."""
        return vllm_headers(request)

    def reader(self, request: PreprocessedRequest) -> Reader:
        """See `Dialect.reader`."""
        return _Reader(request)


class _Reader(Reader):
    def output(self, event: dict[str, Any]) -> EngineOutput | None:
        self.note_usage(event.get("usage"))
        if not event["choices"]:
            return None
        choice = event["choices"][0]
        output = EngineOutput(token_ids=choice["token_ids"] or [])
        if self.logprobs is not None and output.token_ids:
            logprobs = choice["logprobs"]
            output.log_probs = logprobs["token_logprobs"]
            if self.logprobs:
                output.top_logprobs = [
                    _alternatives(sampled, logprob, tops, self.logprobs)
                    for sampled, logprob, tops in zip(
                        output.token_ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
                    )
                ]
        self.end(output, choice.get("finish_reason"), choice.get("stop_reason"))
        return output


def _alternatives(sampled: int, logprob: float, tops: dict[str, float] | None, count: int) -> list[TopLogprob]:
    """Likeliest first, the sampled token among them."""
    ranked = sorted((tops or {}).items(), key=lambda item: -item[1])
    found = [TopLogprob(int(name.removeprefix(_AS_ID)), value, rank) for rank, (name, value) in enumerate(ranked, 1)]
    found = found[:count]
    if all(top.token_id != sampled for top in found):
        found.append(TopLogprob(sampled, logprob))
    return found
