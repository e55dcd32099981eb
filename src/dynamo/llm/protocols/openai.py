"""What does an OpenAI request body say? Bytes in, one checked struct out, or an InvalidArgument."""

from typing import Any, TypeVar

import msgspec

from dynamo.llm.protocols.chat import ChatCompletionRequest
from dynamo.llm.protocols.common import (
    REFUSED,
    AgentHints,
    CommonRequest,
    NvExt,
    RequestDefaults,
    StreamOptions,
    tolerates_unknown_fields,
)
from dynamo.llm.protocols.completions import CompletionRequest
from dynamo.llm.protocols.guided import JsonSchemaFormat, ResponseFormat
from dynamo.llm.protocols.tools import FunctionDelta, ToolCallDelta
from dynamo.llm.protocols.validation import explain_syntax, explain_type, fail, unknown_fields
from dynamo.runtime.errors import InvalidArgument

Body = bytes | bytearray | memoryview
_Request = TypeVar("_Request", bound=CommonRequest)

_NESTED: dict[str, type[msgspec.Struct]] = {
    "stream_options": StreamOptions,
    "nvext": NvExt,
    "nvext.agent_hints": AgentHints,
}
_PROMPT = "a string, a list of strings, a list of token ids or a list of lists of token ids"
_PHRASES = {
    "messages": "a list of messages",
    "prompt": _PROMPT,
    "stop": "a string or a list of strings",
    "logit_bias": "an object of token id to bias",
    "tool_choice": '"none", "auto", "required" or an object',
}

_chat = msgspec.json.Decoder(ChatCompletionRequest)
_completion = msgspec.json.Decoder(CompletionRequest)


def decode_chat(body: Body, defaults: RequestDefaults | None = None) -> ChatCompletionRequest:
    """Decode and check the body of a chat request. `defaults` fill in what it does not say.

    Raises:
        InvalidArgument: with a message for the sender, and the field in `param` if it is a field's fault.
    """
    return _decode(_chat, body, defaults)


def decode_completion(body: Body, defaults: RequestDefaults | None = None) -> CompletionRequest:
    """Decode and check the body of a completion request. See `decode_chat`."""
    return _decode(_completion, body, defaults)


def decode_untyped(body: Body, request: CommonRequest) -> dict[str, Any]:
    """The body as a dict, for a worker that reads OpenAI requests itself (`ModelInput.Text`), defaults filled in.

    `request` is what `decode_chat` or `decode_completion` made of the same body.
    """
    document: dict[str, Any] = msgspec.json.decode(body)
    document["model"] = request.model
    for name in ("temperature", "max_completion_tokens"):
        if document.get(name) is None and (value := getattr(request, name)) is not None:
            document[name] = value
    return document


def _decode(decoder: msgspec.json.Decoder[_Request], body: Body, defaults: RequestDefaults | None) -> _Request:
    try:
        request = decoder.decode(body)
    except msgspec.ValidationError as e:
        request = _decode_again(decoder, body, e)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise explain_syntax(bytes(body), e) from None
    if defaults is not None:
        request.apply(defaults)
    request.check()
    return request


def _decode_again(decoder: msgspec.json.Decoder[_Request], body: Body, error: msgspec.ValidationError) -> _Request:
    """The body has an unknown field or a wrong type: name all unknown fields, or the first wrong type."""
    try:
        document = msgspec.json.decode(body)
    except msgspec.ValidationError:  # a number that no type can hold; the first error may know where
        raise explain_type(error, _PHRASES) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise explain_syntax(bytes(body), e) from None
    if not isinstance(document, dict):
        raise explain_type(error, _PHRASES) from None
    named = {name: document[name] for name in REFUSED if name in document}
    unknown = unknown_fields(document, decoder.type, _NESTED)
    if unknown and not tolerates_unknown_fields():
        _refuse(unknown, named)
    try:
        return msgspec.convert(document, decoder.type, str_keys=True)
    except msgspec.ValidationError as e:
        raise explain_type(e, _PHRASES) from None


def _refuse(unknown: list[str], named: dict[str, Any]) -> None:
    """Refuse fields that are unknown; those known but not possible get their reason, or pass if they ask nothing."""
    unexplained = []
    for name in unknown:
        if name not in named:
            unexplained.append(name)
            continue
        reason, idle = REFUSED[name]
        if not any(named[name] == value and type(named[name]) is type(value) for value in idle):
            fail(f"{name} {reason}", name)
    if unexplained:
        listed = ", ".join(f"`{name}`" for name in unexplained)
        fail(f"Unsupported parameter(s): {listed}", unexplained[0])


__all__ = [
    "ChatCompletionRequest",
    "CommonRequest",
    "CompletionRequest",
    "FunctionDelta",
    "InvalidArgument",
    "JsonSchemaFormat",
    "NvExt",
    "RequestDefaults",
    "ResponseFormat",
    "StreamOptions",
    "ToolCallDelta",
    "decode_chat",
    "decode_completion",
    "decode_untyped",
]
