"""When may a decode worker's engine go on behind the first token, and not draw it once more?

The client has the first token from the prefill worker. If the engine gets it as the prompt's last, its first step makes
the second token; if it has to repeat the first one, that is a whole step for nothing. But then it must not matter which
of the two a token is counted with.
"""

from dataclasses import replace
from typing import Any

from dynamo.vllm.driver import DriverRequest

_GREEDY = 1e-5  # a temperature below this is none, for vLLM
_OF_ANSWERS = (  # what looks at an answer's tokens from its first one on, or reports them
    "presence_penalty",
    "frequency_penalty",
    "structured_outputs",
    "bad_words",
    "thinking_token_budget",
    "repetition_detection",
    "logprobs",
    "logprob_token_ids",
    "trace_decode_token_ids",
    "watermarking",
    "extra_args",
)


def may_follow(params: Any, *, any_seed: bool = False) -> bool:
    """Whether the tokens after the first come out alike. `params` are vLLM's, without what we add to them.

    A repetition penalty counts prompt and answer alike. A seed draws a number for each token of the answer; a request
    without one draws whatever comes, and so may one whose seed is of no matter to its client (`any_seed`).
    """
    if any(getattr(params, name, None) for name in _OF_ANSWERS) or params.max_tokens == 1:
        return False
    return any_seed or params.seed is None or params.temperature < _GREEDY


def behind(request: DriverRequest, token: int) -> DriverRequest:
    """The request that goes on behind its first token."""
    params = request.sampling_params.clone()
    params.extra_args = None
    params.max_tokens = None if params.max_tokens is None else params.max_tokens - 1
    params.min_tokens = max(0, params.min_tokens - 1)
    return replace(request, token_ids=[*request.token_ids, token], sampling_params=params)
