"""What do the messages of a request look like when a chat template gets them?

The rules are vLLM's, so that the prompt rendered here is the one that the engine would render. Input is never
changed; messages come back as new dicts.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo.llm.content_format import ContentFormat
from dynamo.runtime.errors import InvalidArgument

log = logging.getLogger(__name__)

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content part that are text, and the key that holds it."""
_PLAIN_ROLES = frozenset(("system", "user", "assistant"))


def shape_messages(
    messages: Sequence[Mapping[str, Any]], content: ContentFormat, knows_developer: bool
) -> list[dict[str, Any]]:
    """Messages for a template that wants its content as `content` says.

    - `string`: a list of text parts becomes one string, parts joined by newlines. A part of another type raises
      InvalidArgument. `openai`: a string becomes a list of one text part.
    - No content is `""` or `[]`. A tool's text is always one string.
    - The arguments of tool calls become an object; what is not a JSON object becomes `{}`, because it is history
      that the caller cannot mend. An empty list of tool calls is dropped.
    - `reasoning` is also given as `reasoning_content`, and the other way round.
    - `developer` becomes `system` for a template that does not know it; system messages are then merged into one at
      the start.
    """
    if content == "string" and all(map(_is_plain, messages)):
        return [dict(message) for message in messages]
    shaped = [_shape(dict(message), content, f"messages[{i}]") for i, message in enumerate(messages)]
    if not knows_developer and any(message.get("role") == "developer" for message in shaped):
        return _merge_system(shaped)
    return shaped


def _is_plain(message: Mapping[str, Any]) -> bool:
    """Whether it is a role and a text and no more, as most are."""
    return len(message) == 2 and isinstance(message.get("content"), str) and message.get("role") in _PLAIN_ROLES


def _shape(message: dict[str, Any], content: ContentFormat, at: str) -> dict[str, Any]:
    message["content"] = _content(message.get("content"), content, message.get("role") == "tool", f"{at}.content")
    if message.get("tool_calls"):
        message["tool_calls"] = [
            _tool_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(message["tool_calls"])
        ]
    else:
        message.pop("tool_calls", None)
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning is not None:
        message["reasoning"] = message["reasoning_content"] = reasoning
    return message


def _text_of(part: Any) -> str | None:
    """The text of a part, None if it is of another kind."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        key = _TEXT_PARTS.get(str(part.get("type", "text")))
        text = part.get(key) if key else None
        return text if isinstance(text, str) else None
    return None


def _content(value: Any, wanted: ContentFormat, is_tool: bool, at: str) -> str | list[dict[str, Any]]:
    if value is None:
        return "" if wanted == "string" or is_tool else []
    if isinstance(value, str):
        return value if wanted == "string" or is_tool else [{"type": "text", "text": value}]
    texts = [_text_of(part) for part in value]
    if wanted == "openai" and not (is_tool and None not in texts):
        return [
            dict(part) if text is None else {"type": "text", "text": text}
            for part, text in zip(value, texts, strict=True)
        ]
    for i, text in enumerate(texts):
        if text is None:
            kind = value[i].get("type") if isinstance(value[i], Mapping) else type(value[i]).__name__
            raise InvalidArgument(f"{at}[{i}] is of type {kind!r}, but this model's chat template takes text only", at)
    return "\n".join(text for text in texts if text is not None)


def _tool_call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidArgument(f"{at}.function must be an object with name and arguments", f"{at}.function")
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"), at)}}


def _arguments(value: Any, at: str) -> dict[str, Any]:
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            log.warning("%s.function.arguments is not JSON; the template gets an empty object", at)
            return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    renamed = [
        {**{k: v for k, v in message.items() if k != "tools"}, "role": "system"}
        if message.get("role") == "developer"
        else message
        for message in messages
    ]
    system = [message for message in renamed if message.get("role") == "system"]
    if len(system) == 1 and renamed[0] is system[0]:
        return renamed
    texts = [text for message in system if (text := _joined(message["content"]))]
    merged = {"role": "system", "content": "\n\n".join(texts)}
    return [merged, *(message for message in renamed if message.get("role") != "system")]


def _joined(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(text for part in content if (text := _text_of(part)))
