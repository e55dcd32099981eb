"""Which constraint does a request put on the output, and what do forced tool calls look like?"""

import json
from typing import Any

import pytest

from dynamo.llm.guided_tools import GuidedToolCalls
from dynamo.llm.protocols.engine import GuidedDecoding
from dynamo.llm.protocols.openai import decode_chat
from dynamo.llm.protocols.tools import ForcedTools
from dynamo.runtime.errors import InvalidArgument

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or SCHEMA}}


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GuidedDecoding(json={"type": "object"})),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            GuidedDecoding(json=SCHEMA),
        ),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "b"}, GuidedDecoding(json=SCHEMA, backend="b")),
        ({"guided_json": json.dumps(SCHEMA)}, GuidedDecoding(json=SCHEMA)),
        ({"nvext": {"guided_regex": "a+"}}, GuidedDecoding(regex="a+")),
        ({"guided_choice": ["a", "b"]}, GuidedDecoding(choice=["a", "b"])),
        ({"guided_grammar": "root ::= x"}, GuidedDecoding(grammar="root ::= x")),
        (
            {
                "tools": [tool("f"), tool("g", {"type": "object"})],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            GuidedDecoding(json=SCHEMA),
        ),
        ({"tools": [tool("f")], "tool_choice": "auto"}, None),
    ],
)
def test_the_constraint_of_a_request(fields: dict[str, Any], expected: GuidedDecoding | None) -> None:
    assert decode_chat(chat(**fields)).guided == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type must be text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is required"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema.schema is required"),
        ({"guided_json": 5}, "guided_json must be a JSON schema (an object), got an integer"),
        ({"guided_json": "{"}, "got a string that is not JSON"),
        ({"guided_choice": []}, "guided_choice must not be empty"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "at most one of guided_regex, guided_choice"),
        (
            {"response_format": {"type": "json_object"}, "tools": [tool("f")], "tool_choice": "required"},
            "at most one of response_format, tool_choice",
        ),
        ({"tool_choice": "required"}, 'tool_choice "required" needs tools'),
        ({"tools": [tool("f")], "tool_choice": "any"}, 'tool_choice must be "none", "auto", "required" or an object'),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            'tool_choice names "g", which is not among tools',
        ),
        ({"tools": [{"type": "search"}]}, 'tools[0].type must be "function", got "search"'),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name must be a string, got null"),
    ],
)
def test_a_wrong_constraint_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_chat(chat(**fields))
    assert message in caught.value.message


def test_schemas_that_no_wire_takes_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"properties": deep}
    for schema, message in ((deep, "nested more than 64 levels"), ({"minimum": 2**70}, "more than 64 bits")):
        with pytest.raises(InvalidArgument) as caught:
            decode_chat(chat(guided_json=schema))
        assert message in caught.value.message


def test_required_lets_the_model_choose_among_tools() -> None:
    tools = [
        tool("f", {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "string"}}})
    ]
    request = decode_chat(chat(tools=[*tools, tool("g")], tool_choice="required", parallel_tool_calls=False))
    guided = request.guided
    assert guided is not None
    assert guided.json["type"] == "array"
    assert guided.json["maxItems"] == 1
    assert guided.json["$defs"] == {"P": {"type": "string"}}
    names = [call["properties"]["name"]["enum"] for call in guided.json["items"]["anyOf"]]
    assert names == [["f"], ["g"]]


def test_a_tool_forced_by_name_streams_its_arguments() -> None:
    calls = GuidedToolCalls(ForcedTools(SCHEMA, "f"))
    (first,) = calls.push('{"x"')
    assert first.function.name == "f"
    assert first.function.arguments == '{"x"'
    assert first.id is not None
    assert first.id.startswith("call-")
    (second,) = calls.push(": 1}")
    assert (second.function.name, second.function.arguments, second.id) == (None, ": 1}", None)
    assert calls.push("") == []
    assert calls.finish() == ([], "")
    assert calls.finish_reason == "stop"


def test_required_calls_come_when_they_are_complete() -> None:
    calls = GuidedToolCalls(ForcedTools(SCHEMA))
    assert calls.push('[{"name": "f", "parameters": {"x": 1}},') == []
    assert calls.push('{"name": "g", "parameters": {}}]') == []
    found, rest = calls.finish()
    assert [(call.index, call.function.name, call.function.arguments) for call in found] == [
        (0, "f", '{"x": 1}'),
        (1, "g", "{}"),
    ]
    assert rest == ""
    assert calls.finish_reason == "tool_calls"


def test_required_calls_that_broke_off_stay_text() -> None:
    calls = GuidedToolCalls(ForcedTools(SCHEMA))
    calls.push('[{"name": "f", "para')
    assert calls.finish() == ([], '[{"name": "f", "para')
