"""What may a body of POST /v1/completions say?"""

from dynamo.llm.protocols.common import MAX_TOP_LOGPROBS, CommonRequest
from dynamo.llm.protocols.validation import check_token_ids, check_whole, fail

MAX_PROMPTS = 1024  # prompts in one request: each is a request to an engine, and all answer on one stream
_PROMPT = "must be a string, a list of strings, a list of token ids or a list of lists of token ids"


class CompletionRequest(CommonRequest, kw_only=True):
    """A completion request, checked. See `CommonRequest` for what None means."""

    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def top_logprob_count(self) -> int | None:
        """How many alternatives a token to report: 0 for the token alone, None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or as token ids, in the order of the request."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item] # checked to be all integers
        return self.prompt  # type: ignore[return-value] # checked to hold no integers

    def check(self) -> None:
        """Refuse what is malformed, out of range or not possible. Raises InvalidArgument."""
        self._check_prompt()
        super().check()
        if self.logprobs is not None:
            check_whole(self.logprobs, "logprobs", 0, MAX_TOP_LOGPROBS)
        if self.nvext is not None and self.nvext.token_data is not None and len(self.prompts) > 1:
            fail("nvext.token_data needs exactly one prompt", "nvext.token_data")

    def _check_prompt(self) -> None:
        prompt = self.prompt
        if not prompt:
            fail("prompt must not be empty", "prompt")
        if isinstance(prompt, str):
            return
        kinds = set(map(type, prompt))
        if len(kinds) > 1:
            fail(f"prompt {_PROMPT}, not a mixture", "prompt")
        if int in kinds:
            check_token_ids(prompt, "prompt")  # type: ignore[arg-type] # all are integers
            return
        if len(prompt) > MAX_PROMPTS:
            fail(f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(prompt)}", "prompt")
        for i, one in enumerate(prompt):
            if not one:
                fail(f"prompt[{i}] must not be empty", f"prompt[{i}]")
            if isinstance(one, list):
                check_token_ids(one, f"prompt[{i}]")
