"""Which tools may the model call, and how is it made to call one?

Tools stay dicts, as the caller wrote them, because chat templates print them key by key. A forced choice
(`required`, or one tool by name) becomes a JSON schema that constrains the output [M8].
"""

from typing import Any, Literal

import msgspec

from dynamo.llm.protocols.validation import check_json, check_text, fail, kind, show


class ForcedTools(msgspec.Struct, frozen=True):
    """A call that must happen. `name` is the one tool, or None if the model picks among all.

    The output is then either the arguments object of that tool, or a list of `{"name", "parameters"}`.
    """

    schema: dict[str, Any]
    name: str | None = None


def check_tools(tools: list[dict[str, Any]]) -> None:
    """Refuse tools that are not function definitions. Raises InvalidArgument."""
    for i, tool in enumerate(tools):
        if (word := tool.get("type")) != "function":
            fail(f'tools[{i}].type must be "function", got {show(word)}', f"tools[{i}].type")
        function = tool.get("function")
        if not isinstance(function, dict):
            fail(f"tools[{i}].function must be an object, got {kind(function)}", f"tools[{i}].function")
        check_text(function.get("name"), f"tools[{i}].function.name", empty=False)
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            where = f"tools[{i}].function.parameters"
            fail(f"{where} must be a JSON schema (an object), got {kind(parameters)}", where)
    check_json(tools, "tools")


def forced_tools(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> ForcedTools | None:
    """The schema a `tool_choice` forces on the output; None for `auto`, `none` and no choice.

    Raises:
        InvalidArgument: the choice is malformed, or names a tool that is not there.
    """
    if choice is None or choice in ("auto", "none"):
        return None
    if isinstance(choice, str):
        if choice != "required":
            fail(f'tool_choice must be "none", "auto", "required" or an object, got {show(choice)}', "tool_choice")
        if not tools:
            fail('tool_choice "required" needs tools', "tool_choice")
        return ForcedTools(_any_call(tools, parallel))
    if choice.get("type") != "function":
        fail(f'tool_choice.type must be "function", got {show(choice.get("type"))}', "tool_choice.type")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    check_text(name, "tool_choice.function.name", empty=False)
    tool = next((tool for tool in tools or () if tool["function"]["name"] == name), None)
    if tool is None:
        fail(f"tool_choice names {show(name)}, which is not among tools", "tool_choice.function.name")
    return ForcedTools(_parameters(tool), name)


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool's parameter schema; a tool that declares none takes an empty object."""
    return tool["function"].get("parameters") or {"type": "object", "properties": {}}


def _any_call(tools: list[dict[str, Any]], parallel: bool | None) -> dict[str, Any]:
    """One call or more (one if not `parallel`), each to one of the tools with that tool's parameters."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = dict(_parameters(tool))
        definitions.update(parameters.pop("$defs", {}))  # references are from the root of the whole schema
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [tool["function"]["name"]]},
                    "parameters": parameters,
                },
                "required": ["name", "parameters"],
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}}
    if parallel is False:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """A piece of a function call; `arguments` is JSON text, in pieces when it streams."""

    name: str | None = None
    arguments: str = ""


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """A piece of a tool call as OpenAI streams it: id, type and name come with the first piece only."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None
