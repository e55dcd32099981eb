"""How is vLLM's token endpoint spoken, `/inference/v1/generate`?

Servers offer it that were started with `--enable-scale-out` or `--tokens-only`.
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


class VllmGenerate:
    """Tokens in, tokens out: the server makes no text at all."""

    name = path = "/inference/v1/generate"

    def __init__(self, model: str) -> None:
        self._model = model

    def body(self, request: PreprocessedRequest, request_id: str) -> dict[str, Any]:
        """See `Dialect.body`. Without `max_tokens` the server takes what fits."""
        refuse_unsupported(request)
        sampling = vllm_sampling(request) | given(max_tokens=request.stop_conditions.max_tokens)
        return {
            "request_id": request_id,
            "model": self._model,
            "token_ids": request.token_ids,
            "sampling_params": {**sampling, "detokenize": False},
            "stream": True,
            "stream_options": {"include_usage": True},
            **given(cache_salt=cache_salt(request)),
        }

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
            content = choice["logprobs"]["content"]
            output.log_probs = [entry["logprob"] for entry in content]
            if self.logprobs:
                output.top_logprobs = [_alternatives(entry, self.logprobs) for entry in content]
        self.end(output, choice["finish_reason"], choice.get("stop_reason"))
        return output


def _alternatives(entry: dict[str, Any], count: int) -> list[TopLogprob]:
    """Likeliest first, the sampled token among them. The server gives the sampled one first, then the likeliest."""
    found = {top["token_id"]: TopLogprob(top["token_id"], top["logprob"], top["rank"]) for top in entry["top_logprobs"]}
    sampled = TopLogprob(entry["token_id"], entry["logprob"], entry["rank"])
    ordered = sorted(found.values(), key=lambda top: top.rank or 0)[:count]
    if all(top.token_id != sampled.token_id for top in ordered):
        ordered.append(sampled)
    return ordered
