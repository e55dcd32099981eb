"""What constrains an answer's form: a schema, a pattern, a grammar, or a tool's parameters?"""

from typing import Any

import msgspec

from dynamo.llm.protocols.engine import GuidedDecoding
from dynamo.llm.protocols.validation import check_json, check_text, fail, kind, show

ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""The schema of `response_format: json_object`."""


class JsonSchemaFormat(msgspec.Struct):
    """A named JSON schema; `strict` is always in effect."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """`type` is `text`, `json_object` or `json_schema`; the last needs `json_schema.schema`."""

    type: str
    json_schema: JsonSchemaFormat | None = None


def guided_decoding(
    *,
    response_format: ResponseFormat | None = None,
    json: Any = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
    backend: str | None = None,
    whitespace_pattern: str | None = None,
    tool_schema: dict[str, Any] | None = None,
) -> GuidedDecoding | None:
    """The one constraint these fields ask for, or None.

    Raises:
        InvalidArgument: two of them are given, or one is malformed.
    """
    format_schema = None if response_format is None else _format_schema(response_format)
    given = [
        name
        for name, value in (
            ("response_format", format_schema),
            ("guided_json", json),
            ("guided_regex", regex),
            ("guided_choice", choice),
            ("guided_grammar", grammar),
            ("tool_choice", tool_schema),
        )
        if value is not None
    ]
    if not given:
        return None
    if len(given) > 1:
        fail(f"at most one of {', '.join(given)} may constrain the output", given[1])
    schema = next((s for s in (format_schema, tool_schema) if s is not None), None)
    if json is not None:
        schema = _schema(json)
    if schema is not None:
        check_json(schema, given[0])
    if choice is not None and not choice:
        fail("guided_choice must not be empty", "guided_choice")
    for name, text in (("guided_regex", regex), ("guided_grammar", grammar)):
        if text is not None:
            check_text(text, name, empty=False)
    return GuidedDecoding(schema, regex, choice, grammar, None, backend, whitespace_pattern)


def _format_schema(wanted: ResponseFormat) -> dict[str, Any] | None:
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.type != "json_schema":
        fail(
            f"response_format.type must be text, json_object or json_schema, got {show(wanted.type)}",
            "response_format.type",
        )
    if wanted.json_schema is None:
        fail("response_format.json_schema is required when type is json_schema", "response_format.json_schema")
    if wanted.json_schema.schema is None:
        fail("response_format.json_schema.schema is required", "response_format.json_schema.schema")
    return wanted.json_schema.schema


def _schema(given: object) -> dict[str, Any]:
    """A schema that may also come as the text of one."""
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given)
        except (msgspec.DecodeError, RecursionError):
            fail("guided_json must be a JSON schema, got a string that is not JSON", "guided_json")
    if not isinstance(given, dict):
        fail(f"guided_json must be a JSON schema (an object), got {kind(given)}", "guided_json")
    return given
