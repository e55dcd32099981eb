"""What does a request's JSON say, and which field of it is wrong?"""

import difflib
import logging
import re
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from dynamo.runtime.errors import UNDECODABLE, InvalidArgument
from dynamo.runtime.logs import Rarely
from dynamo.services.refusals import BAD_BODY

log = logging.getLogger(__name__)
rarely = Rarely(log)

T = TypeVar("T", bound=msgspec.Struct)

U64 = (1 << 64) - 1
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]*)`")


def decode(raw: bytes, body: type[T]) -> T:
    """A JSON object as a struct. A name that the struct does not have is told in the log and has no effect.

    Raises InvalidArgument naming the field.
    """
    try:
        given = msgspec.json.decode(raw) if raw.strip() else {}
    except UNDECODABLE as e:
        raise InvalidArgument(f"the body is not JSON: {e}") from None
    return convert(given, body)


def convert(given: Any, body: type[T]) -> T:
    """As `decode`, of an object that is decoded already."""
    if not isinstance(given, dict):
        raise InvalidArgument(f"the body must be a JSON object, not {type(given).__name__}", code=BAD_BODY)
    try:
        read = msgspec.convert(given, body)
    except msgspec.ValidationError as e:
        raise _refusal(str(e), given, body) from None
    names = _names(body)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            rarely.warning(f"{body.__name__} {name}", "the field %r of a request is not known here%s", name[:80], hint)
    return read


@lru_cache(maxsize=64)
def _names(body: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(body.__struct_encode_fields__)


def _refusal(text: str, given: dict[str, Any], body: type[msgspec.Struct]) -> InvalidArgument:
    """The decoder's words, begun by the field they are about."""
    where = _PATH.search(text)
    path = where[1] if where else ""
    reason = text[: where.start()] if where else text
    missing = _MISSING.search(reason)
    if missing:
        field = f"{path}.{missing[1]}".lstrip(".")
        near = difflib.get_close_matches(missing[1], [name for name in given if name not in _names(body)], n=1)
        return InvalidArgument(f"{field}: is missing" + (f"; is it {near[0]}?" if near else ""), field, BAD_BODY)
    reason = reason[:1].lower() + reason[1:]
    return InvalidArgument(f"{path}: {reason}" if path else reason, path or None, BAD_BODY)


def unsigned(name: str, hashes: list[int]) -> list[int]:
    """Hashes as unsigned 64-bit numbers; callers without unsigned numbers send them signed.

    Raises InvalidArgument for one that is neither.
    """
    if hashes and not (min(hashes) >= -(1 << 63) and max(hashes) <= U64):
        raise InvalidArgument(f"{name}: hashes are 64-bit numbers, signed or not", name, BAD_BODY)
    return [value & U64 for value in hashes]


def signed(value: int) -> int:
    """A hash for callers without unsigned numbers."""
    return value - (1 << 64) if value >> 63 else value


def check_zmq_endpoint(field: str, endpoint: str) -> str:
    """An address to connect to. Raises InvalidArgument naming the field."""
    if endpoint.startswith("ipc://") and len(endpoint) > len("ipc://"):
        return endpoint
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidArgument(f"{field}: {endpoint[:200]!r} is not tcp://host:port or ipc://path", field)
    return endpoint
