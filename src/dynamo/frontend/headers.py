"""What do the headers of a request say beside its body?

Its id and trace, metadata that travels to the worker, and where it should go [A43, N5, N8, N10, N11]. Headers win over
what the body says of the same thing.
"""

import re
from collections.abc import Iterable, Mapping

import msgspec

from dynamo.llm.protocols.engine import PreprocessedRequest, Routing
from dynamo.runtime.context import TIMEOUT_HEADER, Context, new_request_id
from dynamo.runtime.errors import InvalidArgument

MAX_U64 = 2**64 - 1
MAX_U32 = 2**32 - 1
MAX_I32 = 2**31 - 1
MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000  # a week: more is a mistake, and timers do not take what is without bounds
MAX_METADATA_BYTES = 16384  # names and values together; they travel with the request to every hop

METADATA_PREFIX = "x-dynamo-meta-"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")  # printable and short: it is echoed, logged and sent on
_TRACE = ("traceparent", "tracestate")

# Where a session's id is found, best first: ours, then those that coding agents send.
_SESSION = ("x-dynamo-session-id", "x-claude-code-session-id", "thread-id", "x-session-id")
_PARENT_SESSION = ("x-dynamo-parent-session-id", "x-codex-parent-thread-id", "x-parent-session-id")
_AGENT = (
    ("session_id", _SESSION),
    ("parent_session_id", _PARENT_SESSION),
    ("session_final", ("x-dynamo-session-final",)),
    ("agent_id", ("x-claude-code-agent-id",)),
    ("parent_agent_id", ("x-claude-code-parent-agent-id",)),
)

# Header (and its deprecated name) -> field of `Routing`, least and greatest value.
_PINS: tuple[tuple[tuple[str, ...], str, int, int], ...] = (
    (("x-dynamo-worker-instance-id", "x-worker-instance-id"), "backend_instance_id", 0, MAX_U64),
    (("x-dynamo-prefill-instance-id", "x-prefill-instance-id"), "prefill_worker_id", 0, MAX_U64),
    (("x-dynamo-dp-rank", "x-dp-rank"), "dp_rank", 0, MAX_U32),
    (("x-dynamo-prefill-dp-rank", "x-prefill-dp-rank"), "prefill_dp_rank", 0, MAX_U32),
    (("x-dynamo-request-priority",), "priority", -MAX_I32 - 1, MAX_I32),
    (("x-dynamo-request-strict-priority",), "strict_priority", 0, MAX_U32),
)
_TENANT = "x-tenant-id"
_KNOWN_PLAIN = frozenset((*_TRACE, "thread-id"))


def relevant(headers: Iterable[tuple[str, str]], metadata_header: str | None = None) -> dict[str, str]:
    """The headers that mean anything here, by lower-case name. Of repeated ones the first counts."""
    found: dict[str, str] = {}
    extra = metadata_header.lower() if metadata_header else None
    for name, value in headers:
        key = name.lower()
        if key.startswith("x-") or key in _KNOWN_PLAIN or key == extra:
            found.setdefault(key, value)
    return found


def request_id(found: Mapping[str, str]) -> str:
    """The client's `x-request-id` if it can be echoed safely, else a new id."""
    given = found.get("x-request-id")
    return given if given and _REQUEST_ID.fullmatch(given) else new_request_id()


def make_context(found: Mapping[str, str], metadata_header: str | None = None, timeout_s: float = 0.0) -> Context:
    """The context of a request: its id, its time, its trace and its metadata.

    `metadata_header` names one more header whose value becomes the metadata of the same name [DYN_METADATA_HEADER].
    `timeout_s` is the longest that any request may take; 0: no bound.

    Raises:
        InvalidArgument: there is more metadata than may travel, or the timeout is no number.
    """
    context = Context(request_id(found))
    asked = found.get(TIMEOUT_HEADER)
    if asked is not None:
        asked_s = _whole(TIMEOUT_HEADER, asked, 1, MAX_TIMEOUT_MS) / 1000
        timeout_s = min(asked_s, timeout_s or asked_s)
    if timeout_s:
        context.set_timeout(timeout_s)
    if not found:
        return context
    cut = len(METADATA_PREFIX)
    metadata = {name[cut:]: value for name, value in found.items() if name.startswith(METADATA_PREFIX)}
    if metadata_header and (value := found.get(metadata_header.lower())) is not None:
        metadata[metadata_header.lower()] = value
    if metadata:
        if sum(len(k) + len(v) for k, v in metadata.items()) > MAX_METADATA_BYTES:
            raise InvalidArgument(
                f"the {METADATA_PREFIX}* headers hold more than {MAX_METADATA_BYTES} bytes", f"{METADATA_PREFIX}*"
            )
        context.metadata.update(metadata)
    if any(name in found for name in _TRACE):
        context.set_trace({**{n: found[n] for n in _TRACE if n in found}, "x-request-id": context.id()})
    return context


def routing_pins(found: Mapping[str, str]) -> Routing | None:
    """Where the headers send a request, how urgent they call it, and whose cache it may use; None if they say nothing.

    Raises:
        InvalidArgument: a header's value is not a number in range; `param` is the header's name.
    """
    values: dict[str, int | str] = {}
    for names, field, least, greatest in _PINS:
        for name in names:
            if (text := found.get(name)) is not None:
                values[field] = _whole(name, text, least, greatest)
                break
    if tenant := found.get(_TENANT):
        values["cache_salt"] = tenant
    return msgspec.convert(values, Routing) if values else None


def apply_pins(pins: Routing, request: PreprocessedRequest) -> None:
    """Put what the headers say of the routing over what the body says."""
    routing = request.routing = request.routing or Routing()
    for name in pins.__struct_fields__:
        if (value := getattr(pins, name)) is not None:
            setattr(routing, name, value)
    if pins.priority is not None:
        routing.priority_jump = float(pins.priority)  # what a router's queue orders by


def agent_context(found: Mapping[str, str]) -> dict[str, str] | None:
    """Which session of which agent the request belongs to, from the first header of each kind that is there [N11]."""
    context = {}
    for field, names in _AGENT:
        for name in names:
            if value := found.get(name):
                context[field] = value
                break
    return context or None


def _whole(name: str, text: str, least: int, greatest: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= greatest:
        raise InvalidArgument(f"header {name}: {text[:60]!r} is not an integer between {least} and {greatest}", name)
    return number
