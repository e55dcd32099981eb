"""Which headers of a request say where it should go and how urgent it is?"""

from collections.abc import Callable, Mapping

from dynamo.llm.protocols.engine import Routing
from dynamo.llm.protocols.validation import MAX_U32, MAX_U64, fail

_MAX_I32 = 2**31 - 1


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    def read(text: str, header: str) -> int:
        # The length test comes first: int() of very long text is slow, then an error.
        if len(text) > 20 or not text.strip().removeprefix("-").isdecimal() or not low <= int(text) <= high:
            fail(f"header {header} must be an integer between {low} and {high}", header)
        return int(text)

    return read


def _text(text: str, _header: str) -> str:
    return text


_HEADERS: dict[str, tuple[str, Callable[[str, str], int | str]]] = {
    "x-dynamo-worker-instance-id": ("backend_instance_id", _whole(0, MAX_U64)),
    "x-dynamo-prefill-instance-id": ("prefill_worker_id", _whole(0, MAX_U64)),
    "x-dynamo-dp-rank": ("dp_rank", _whole(0, MAX_U32)),
    "x-dynamo-prefill-dp-rank": ("prefill_dp_rank", _whole(0, MAX_U32)),
    "x-dynamo-request-priority": ("priority", _whole(-_MAX_I32 - 1, _MAX_I32)),
    "x-dynamo-request-strict-priority": ("strict_priority", _whole(0, MAX_U32)),
    "x-tenant-id": ("cache_salt", _text),
}


def routing_from_headers(headers: Mapping[str, str]) -> Routing | None:
    """What the headers [N5][N8][N10] say of the routing, None if nothing. They stand over the body's fields.

    `headers` must look names up without regard to case, or have them in lower case.

    Raises:
        InvalidArgument: naming the header whose value is no such number.
    """
    found: Routing | None = None
    for header, (name, read) in _HEADERS.items():
        value = headers.get(header)
        if value:
            found = found or Routing()
            setattr(found, name, read(value, header))
    return found
