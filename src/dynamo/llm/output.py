"""What does an engine's output say to the client: which text, ended how, with which log-probabilities?

A `ChoiceDecoder` reads the outputs of one choice. It holds back what might still turn out to be a stop string
and hides the tokens that end an answer. It is also a safety net: if an engine runs past a stop token, a stop
string or the token limit, the answer ends here and `stopped_early` asks the caller to cancel the engine.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from dynamo.llm.guided_tools import GuidedToolCalls
from dynamo.llm.logprobs import ChatLogprobs, CompletionLogprobs, Entry, LogprobFormat, PendingLogprobs
from dynamo.llm.protocols.engine import EngineOutput, TopLogprob
from dynamo.llm.protocols.tools import ForcedTools, ToolCallDelta
from dynamo.llm.stop_matcher import StopMatcher
from dynamo.runtime.errors import DynamoException, InvalidArgument, Unknown

FINISH_WORDS = {"eos": "stop"}
"""The engine's words for an end that OpenAI's API calls otherwise. `cancelled` and `error` stay as they are: they
are no answer to be shown as complete, and the caller decides what to make of them."""

NO_LIMIT = 2**62  # tokens; where no limit is known


class TextDelta(msgspec.Struct, gc=False):
    """What one output adds to a choice. `finish_reason` is OpenAI's word, set on the last delta only.

    `token_count` counts all tokens the engine made, hidden ones too. `stop_reason` is the stop string or the stop
    token id of the request that ended the choice, None for an end-of-sequence token.
    """

    text: str
    finish_reason: str | None = None
    logprobs: ChatLogprobs | CompletionLogprobs | None = None
    token_count: int = 0
    tool_calls: list[ToolCallDelta] | None = None
    stop_reason: int | str | None = None


class TextDecoder(Protocol):
    """The detokenizer of one choice (`dynamo.llm.detokenizer.IncrementalDecoder`)."""

    def push(self, ids: list[int]) -> str:
        """The text these tokens complete."""
        ...

    def finish(self) -> str:
        """The text still held."""
        ...


class Echo(msgspec.Struct, frozen=True):
    """The prompt that an answer begins with: its text, its tokens, and the characters each token made."""

    text: str
    token_ids: list[int]
    lengths: list[int]


class OutputPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How the outputs of all choices of one prompt are to be read. `None` and empty mean the feature is off."""

    new_decoder: Callable[[], TextDecoder]
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    stop_strings: list[str] = []
    include_stop: bool = False
    max_tokens: int = NO_LIMIT
    min_tokens: int = 0
    logprobs: LogprobFormat | None = None
    echo: Echo | None = None
    tools: ForcedTools | None = None


class _Cut(NamedTuple):
    """How much of an output counts: tokens to show, tokens to count, and how the choice ended there."""

    shown: list[int]
    counted: int
    finish: str | None
    reason: int | str | None


class ChoiceDecoder:
    """Turns the outputs of one choice into text. Feed it every output in order until `finish_reason` is set."""

    __slots__ = (
        "_decoder",
        "_echo",
        "_ends",
        "_max_tokens",
        "_pending",
        "_plain",
        "_plan",
        "_stops",
        "_text",
        "_tools",
        "_visible",
        "cached_tokens",
        "completion_tokens",
        "error",
        "finish_reason",
        "index",
        "stopped_early",
    )

    def __init__(self, plan: OutputPlan, index: int = 0) -> None:
        self.index = index
        self.completion_tokens = 0
        self.cached_tokens: int | None = None
        """Tokens of the prompt the engine had cached, once it said so."""
        self.finish_reason: str | None = None
        self.stopped_early = False
        """The choice ended although the engine goes on: cancel it."""
        self.error: DynamoException | None = None
        """Why the choice ended with `error`."""

        self._plan = plan
        self._decoder = plan.new_decoder()
        self._text = self._decoder.push
        self._ends = plan.eos_ids | plan.stop_ids
        self._max_tokens = plan.max_tokens
        self._stops = StopMatcher(plan.stop_strings, plan.include_stop) if plan.stop_strings else None
        self._pending = PendingLogprobs() if plan.logprobs is not None else None
        self._echo = plan.echo
        self._tools = GuidedToolCalls(plan.tools) if plan.tools is not None else None
        self._visible = 0  # characters that went out, the echo included
        if plan.echo is not None:
            self._visible = len(plan.echo.text)
            if self._pending is not None:
                self._pending.skip(self._visible)
        self._plain = self._pending is None and self._echo is None and self._tools is None

    def push(self, output: EngineOutput) -> TextDelta:
        """What this output adds. After the end of the choice, nothing."""
        # The way of nearly every token; everything else takes `_push_any`, which gives the same answer.
        if self._plain and output.finish_reason is None and output.text is None and output.completion_usage is None:
            ids = output.token_ids
            count = self.completion_tokens + len(ids)
            if count < self._max_tokens and self._ends.isdisjoint(ids):
                if self._stops is None:
                    self.completion_tokens = count
                    return TextDelta(self._text(ids), None, None, len(ids))
                if len(ids) == 1 and count > self._plan.min_tokens:
                    self.completion_tokens = count
                    text, matched = self._stops.push(self._text(ids))
                    return TextDelta(text, None, None, 1) if matched is None else self._stop_at(text, matched)
        return self._push_any(output)

    def _stop_at(self, text: str, matched: str) -> TextDelta:
        """End the choice at a stop string, which the engine knows nothing of."""
        self._plain = False
        self.finish_reason = "stop"
        self.stopped_early = True
        return TextDelta(text, "stop", None, 1, None, matched)

    def _push_any(self, output: EngineOutput) -> TextDelta:
        if self.finish_reason is not None:
            return TextDelta("")
        if output.finish_reason == "error":
            return self._fail(Unknown("the engine ended the answer with an error"))
        if self._pending is not None and len(output.log_probs or ()) < len(output.token_ids):
            return self._fail(InvalidArgument("logprobs: the engine of this model reports none", "logprobs"))
        before = self.completion_tokens
        cut = self._cut(output)
        text, matched = self._read(output, cut)
        finish, reason = cut.finish, cut.reason
        if matched is None and finish is not None:
            tail, matched = self._drain()
            text += tail
        if matched is not None:
            finish, reason = "stop", matched
        self._note_usage(output)
        delta = TextDelta(text, None, None, self.completion_tokens - before)
        self._visible += len(text)
        if self._pending is not None or self._echo is not None:
            self._add_echo_and_logprobs(delta, output, finish is not None)
        if self._tools is not None:
            finish = self._add_tool_calls(delta, self._tools, finish)
        if finish is not None:
            self._plain = False
            self.finish_reason = delta.finish_reason = FINISH_WORDS.get(finish, finish)
            self.stopped_early = output.finish_reason is None
            delta.stop_reason = reason
        return delta

    def _cut(self, output: EngineOutput) -> _Cut:
        """Find the token that ends the choice, if one does, whether or not the engine says so."""
        plan, ids = self._plan, output.token_ids
        for i, token in enumerate(ids):
            count = self.completion_tokens + i + 1
            named = output.finish_reason is not None and output.stop_reason == token and i == len(ids) - 1
            if named or (token in self._ends and count >= plan.min_tokens):
                show = plan.include_stop and token in plan.stop_ids
                return _Cut(ids[: i + 1] if show else ids[:i], i + 1, "stop", None if token in plan.eos_ids else token)
            if count >= self._max_tokens and (i < len(ids) - 1 or output.finish_reason is None):
                return _Cut(ids[: i + 1], i + 1, "length", None)
        return _Cut(ids, len(ids), output.finish_reason, output.stop_reason)

    def _read(self, output: EngineOutput, cut: _Cut) -> tuple[str, str | None]:
        """The text that may go out, and the stop string that ended it. Token by token where that matters."""
        if output.text is not None or (self._stops is None and self._pending is None):
            self.completion_tokens += cut.counted
            return self._match(self._text(cut.shown) if output.text is None else output.text)
        pieces = []
        for i, token in enumerate(cut.shown):
            self.completion_tokens += 1
            piece = self._text([token])
            if self._pending is not None:
                assert output.log_probs is not None  # checked by `_push_any`
                top = output.top_logprobs[i] if i < len(output.top_logprobs or ()) else ()  # type: ignore[index]
                self._pending.add(token, output.log_probs[i], top, len(piece))
            piece, matched = self._match(piece)
            pieces.append(piece)
            if matched is not None:
                return "".join(pieces), matched
        self.completion_tokens += cut.counted - len(cut.shown)
        return "".join(pieces), None

    def _match(self, text: str) -> tuple[str, str | None]:
        """Look for stop strings, but only in what comes after the first `min_tokens` tokens, as vLLM does."""
        if self._stops is None or self.completion_tokens <= self._plan.min_tokens:
            return text, None
        return self._stops.push(text)

    def _drain(self) -> tuple[str, str | None]:
        """What the detokenizer and the stop matcher still hold at the end."""
        text, matched = self._match(self._decoder.finish())
        if matched is None and self._stops is not None:
            text += self._stops.finish()
        return text, matched

    def _note_usage(self, output: EngineOutput) -> None:
        usage = output.completion_usage
        if usage is None:
            return
        if usage.prompt_tokens_details is not None:
            self.cached_tokens = usage.prompt_tokens_details.cached_tokens
        if output.text is not None:  # engines that make text need not give token ids
            self.completion_tokens = max(self.completion_tokens, usage.completion_tokens)

    def _add_echo_and_logprobs(self, delta: TextDelta, output: EngineOutput, final: bool) -> None:
        entries: list[Entry] = []
        if self._echo is not None:
            delta.text = self._echo.text + delta.text
            if self._plan.logprobs is not None:
                entries = echo_entries(self._echo, output.prompt_logprobs)
            self._echo = None
            self._plain = self._pending is None and self._tools is None
        if self._pending is not None and self._plan.logprobs is not None:
            release = self._pending.release_last if final else self._pending.release
            entries += release(self._visible)
            if entries:
                delta.logprobs = self._plan.logprobs.format(entries)

    def _add_tool_calls(self, delta: TextDelta, tools: GuidedToolCalls, finish: str | None) -> str | None:
        """Say what the text means as calls in place of the text; gives back how the choice ended then."""
        calls = tools.push(delta.text)
        delta.text = ""
        if finish is not None:
            more, delta.text = tools.finish()
            calls += more
            if FINISH_WORDS.get(finish, finish) == "stop" and not delta.text:
                finish = tools.finish_reason
        delta.tool_calls = calls or None
        return finish

    def _fail(self, error: DynamoException) -> TextDelta:
        self.error = error
        self.finish_reason = "error"
        self.stopped_early = True
        self._plain = False
        return TextDelta("", "error")


def echo_entries(echo: Echo, prompt_logprobs: Sequence[list[TopLogprob] | None] | None) -> list[Entry]:
    """The prompt's tokens as entries; the first has no log-probability, and none has if the engine gave none."""
    entries, start = [], 0
    for i, (token, length) in enumerate(zip(echo.token_ids, echo.lengths, strict=True)):
        top = (prompt_logprobs[i] or []) if prompt_logprobs and i < len(prompt_logprobs) else []
        chosen = next((each.logprob for each in top if each.token_id == token), None)
        ordered = sorted(top, key=lambda each: -each.logprob)
        entries.append(Entry(token, chosen, ordered, start, start + length))
        start += length
    return entries
