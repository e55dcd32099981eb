"""What may a body of POST /v1/chat/completions say?

Messages stay dicts, as the caller wrote them: a chat template reads whatever keys its model knows.
"""

from typing import Any

from dynamo.llm.protocols.common import MAX_TOP_LOGPROBS, CommonRequest
from dynamo.llm.protocols.tools import ForcedTools, check_tools, forced_tools
from dynamo.llm.protocols.validation import check_text, check_whole, fail, kind, show

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Content parts that are text, and the key of the text in each."""
_MEDIA_PARTS = frozenset({"image_url", "image", "input_audio", "audio_url", "video_url", "file"})
_FIELD = "it is a field of the request"
_NOT_TEMPLATE_ARGUMENTS = {
    "chat_template": "the template is the model's own",
    "messages": _FIELD,
    "tools": _FIELD,
    "add_generation_prompt": _FIELD,
    "continue_final_message": _FIELD,
    "self": "Jinja reserves the name",
}
_CONTENT = "must be a string or a list of parts"


class ChatCompletionRequest(CommonRequest, kw_only=True):
    """A chat request, checked. See `CommonRequest` for what None means."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_args: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    verbosity: Any = None  # harmless: a wish of OpenAI's own models

    @property
    def top_logprob_count(self) -> int | None:
        """How many alternatives a token to report: 0 for the token alone, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What the caller passes to the chat template; `chat_template_kwargs` wins where both name a thing."""
        arguments: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            arguments["reasoning_effort"] = self.reasoning_effort
        return arguments | (self.chat_template_args or {}) | (self.chat_template_kwargs or {})

    @property
    def raw_prompt(self) -> str:
        """The text of the first message, for `nvext.use_raw_prompt`."""
        content = self.messages[0]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(part[_TEXT_PARTS[part["type"]]] for part in content)

    def forced_tools(self) -> ForcedTools | None:
        """The tool call that must happen, if one must. Raises InvalidArgument."""
        return forced_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def forced_schema(self) -> dict[str, Any] | None:
        """A forced tool call is a constraint like the others."""
        forced = None if self.tool_choice is None else self.forced_tools()
        return None if forced is None else forced.schema

    def check(self) -> None:
        """Refuse what is malformed, out of range or not possible. Raises InvalidArgument."""
        _check_messages(self.messages)
        if self.tools is not None:
            check_tools(self.tools)
        super().check()
        if self.top_logprobs is not None:
            check_whole(self.top_logprobs, "top_logprobs", 0, MAX_TOP_LOGPROBS)
            if not self.logprobs:
                fail("top_logprobs may only be given with logprobs: true", "top_logprobs")
        if self.modalities and self.modalities != ["text"]:
            fail('modalities must be ["text"]: this model answers in text only', "modalities")
        for name in ("chat_template_args", "chat_template_kwargs"):
            for key in getattr(self, name) or ():
                if key in _NOT_TEMPLATE_ARGUMENTS:
                    fail(f"{name} must not contain {key}: {_NOT_TEMPLATE_ARGUMENTS[key]}", name)
        if self.continue_final_message:
            if self.add_generation_prompt:
                fail("continue_final_message and add_generation_prompt exclude each other", "continue_final_message")
            if self.messages[-1]["role"] != "assistant":
                fail("continue_final_message needs a last message of role assistant", "continue_final_message")
        raw = self.nvext is not None and self.nvext.use_raw_prompt
        if raw and (len(self.messages) != 1 or not self.messages[0].get("content")):
            fail("nvext.use_raw_prompt needs exactly one message with content", "nvext.use_raw_prompt")


def _check_messages(messages: list[dict[str, Any]]) -> None:
    if not messages:
        fail("messages must not be empty", "messages")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role.__class__ is not str or role not in ROLES:
            _refuse_role(role, f"messages[{i}].role")
        content = message.get("content")
        if content.__class__ is not str:
            _check_parts(content, message, f"messages[{i}].content")
        if len(message) > 2 or "content" not in message:  # more than role and content
            _check_other_keys(message, i)


def _refuse_role(role: object, where: str) -> None:
    if role is None:
        fail(f"{where} is required", where)
    check_text(role, where)
    fail(f"{where} must be one of system, developer, user, assistant, tool, function, got {show(role)}", where)


def _check_parts(content: object, message: dict[str, Any], where: str) -> None:
    """Content that is not a string: nothing beside a call, or parts that are all text."""
    if content is None:
        if message["role"] == "assistant" and (message.get("tool_calls") or message.get("function_call")):
            return
        if "content" not in message:
            fail(f"{where} is required", where)
        fail(f"{where} {_CONTENT}, got null", where)
    if not isinstance(content, list):
        fail(f"{where} {_CONTENT}, got {kind(content)}", where)
    for i, part in enumerate(content):
        at = f"{where}[{i}]"
        if not isinstance(part, dict):
            fail(f"{at} must be an object with a type, got {kind(part)}", at)
        word = part.get("type")
        if not isinstance(word, str) or word not in _TEXT_PARTS:
            if isinstance(word, str) and word in _MEDIA_PARTS:
                fail(f"{at} has type {word}, but this model takes text only", at)
            fail(f'{at}.type must be "text", got {show(word)}', f"{at}.type")
        check_text(part.get(_TEXT_PARTS[word]), f"{at}.{_TEXT_PARTS[word]}")


def _check_other_keys(message: dict[str, Any], i: int) -> None:
    """Keys of a message that OpenAI defines; other keys are the chat template's business."""
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            check_text(message[key], f"messages[{i}].{key}")
    if message.get("audio") is not None:
        fail(f"messages[{i}].audio: this model takes text only", f"messages[{i}].audio")
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        fail(f"messages[{i}].tool_calls must be a list, got {kind(calls)}", f"messages[{i}].tool_calls")
    for j, call in enumerate(calls):
        at = f"messages[{i}].tool_calls[{j}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            fail(f"{at}.function must be an object with name and arguments", f"{at}.function")
        check_text(function.get("name"), f"{at}.function.name", empty=False)
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, (str, dict)):
            fail(f"{at}.function.arguments must be a string of JSON, got {kind(arguments)}", f"{at}.function.arguments")
