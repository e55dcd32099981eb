"""How is a wrong request told to its sender, in the words of the request?

Every refusal is an `InvalidArgument` whose message begins with `Validation: ` and whose `param` is the path of
the field (`messages[0].content`). Nothing here knows what a chat is.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import msgspec

from dynamo.runtime.errors import InvalidArgument

MAX_U32 = 2**32 - 1
MAX_U64 = 2**64 - 1
MIN_I64, MAX_I64 = -(2**63), 2**63 - 1
MAX_QUOTED = 60  # characters of a value that a message repeats
MAX_NESTING = 64  # levels of a JSON value that is passed on to an engine; schemas people write have under 20

_KINDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_GOT = {**_KINDS, "bool": "a boolean", "float": "a fractional number"}
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected `(?P<wanted>[^`]+)`(?: of .*)?, got `(?P<got>[^`]+)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]+)`$")


def fail(message: str, param: str | None = None) -> NoReturn:
    """Refuse the request. Raises InvalidArgument."""
    raise InvalidArgument(f"Validation: {message}", param)


def show(value: object) -> str:
    """A value as it may be quoted in a message: short, whatever it is."""
    if isinstance(value, int) and abs(value) > MAX_U64:
        return "a number of more than 64 bits"  # printing it could itself be refused by the interpreter
    if isinstance(value, (list, dict)):
        return kind(value)
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."


def kind(value: object) -> str:
    """What JSON calls the type of a decoded value, with its article."""
    for types, word in (
        (bool, "a boolean"),
        (str, "a string"),
        (int, "an integer"),
        (float, "a number"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, types):
            return word
    return "null"


def check_range(value: float | None, name: str, low: float, high: float) -> None:
    """Refuse a number outside `low..high`; None passes."""
    if value is not None and not low <= value <= high:
        fail(f"{name} must be between {low:g} and {high:g}, got {show(value)}", name)


def check_whole(value: int | None, name: str, low: int, high: int = MAX_U32) -> None:
    """Refuse an integer outside `low..high`; None passes. Only the bound that was crossed is named."""
    if value is None or low <= value <= high:
        return
    bound = f"at least {low}" if value < low else f"at most {high}"
    fail(f"{name} must be {bound}, got {show(value)}", name)


def check_token_ids(ids: Sequence[int], name: str) -> None:
    """Refuse what cannot be a token id of any vocabulary; the model's own bound is checked when it is known."""
    if not ids:
        return
    low, high = min(ids), max(ids)
    if low < 0 or high > MAX_U32:
        wrong = low if low < 0 else high
        fail(f"{name} must hold token ids, got {show(wrong)}", name)


def check_text(value: object, name: str, *, empty: bool = True) -> None:
    """Refuse what is not a string or, unless `empty`, an empty one."""
    if not isinstance(value, str):
        fail(f"{name} must be a string, got {kind(value)}", name)
    if not value and not empty:
        fail(f"{name} must not be empty", name)


def check_json(value: object, name: str) -> None:
    """Refuse a JSON value that is nested over 64 levels or has an integer of over 64 bits: no wire takes it."""
    level: list[object] = [value]
    for _ in range(MAX_NESTING):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, int) and not MIN_I64 <= item <= MAX_U64:
                fail(f"{name} holds a number of more than 64 bits", name)
        if not below:
            return
        level = below
    fail(f"{name} is nested more than {MAX_NESTING} levels deep", name)


@cache
def _field_names(struct: type[msgspec.Struct]) -> frozenset[str]:
    """What a struct's fields are called in JSON."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(struct))


def unknown_fields(
    document: dict[str, Any], known: type[msgspec.Struct], nested: dict[str, type[msgspec.Struct]], path: str = ""
) -> list[str]:
    """Take out of `document` what `known` does not define and give back the paths, in the document's order.

    `nested` names the fields, by path, whose own fields are looked at too. A field that is null asks for nothing
    and is dropped without a word.
    """
    fields = _field_names(known)
    found: list[str] = []
    for name in list(document):
        value = document[name]
        if name not in fields:
            del document[name]
            if value is not None:
                found.append(f"{path}{name}")
        elif f"{path}{name}" in nested and isinstance(value, dict):
            found += unknown_fields(value, nested[f"{path}{name}"], nested, f"{path}{name}.")
    return found


def explain_syntax(body: bytes, error: Exception) -> InvalidArgument:
    """Say why a body could not be read as JSON at all."""
    if not body.strip():
        return InvalidArgument("the request body is empty; send a JSON object")
    if isinstance(error, RecursionError):
        return InvalidArgument("the request body is nested too deeply")
    try:
        body.decode()
    except UnicodeDecodeError as e:
        return InvalidArgument(f"the request body is not valid UTF-8 (byte {e.start})")
    reason = str(error).removeprefix("JSON is malformed: ").replace("Input data was truncated", "it ends too early")
    return InvalidArgument(f"the request body is not valid JSON: {reason}")


def explain_type(error: msgspec.ValidationError, phrases: dict[str, str]) -> InvalidArgument:
    """Say which field has a wrong type. `phrases` is what to say of a field in place of the list of types."""
    match = _WHERE.match(str(error))
    assert match is not None  # the pattern matches any text
    what, path = match["what"], (match["path"] or "").lstrip(".").replace("[...]", "[*]")
    if missing := _MISSING.match(what):
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidArgument(f"Validation: {name} is required", name)
    if wrong := _EXPECTED.match(what):
        wanted = phrases.get(path) or " or ".join(
            _KINDS.get(word, word) for word in wrong["wanted"].split(" | ") if word != "null"
        )
        got = _GOT.get(wrong["got"], wrong["got"])
        if match["key"]:
            return InvalidArgument(f"Validation: the keys of {path} must be integers", path)
        if not path:
            return InvalidArgument(f"Validation: the request body must be {wanted}, got {got}")
        return InvalidArgument(f"Validation: {path} must be {wanted}, got {got}", path)
    if "out of range" in what:
        return InvalidArgument(f"Validation: {path} is a number out of range", path or None)
    return InvalidArgument(f"Validation: {path or 'the request body'}: {what}", path or None)
