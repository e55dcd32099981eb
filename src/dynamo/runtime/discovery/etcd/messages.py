"""What do etcd's answers look like? The JSON form of its v3 API, as far as discovery needs it.

In that form keys and values are base64 and 64-bit numbers are strings; msgspec does both. Fields that have their
default value are left out by the server.
"""

from typing import Any, TypeVar

import msgspec

RANGE, PUT, TXN = "/v3/kv/range", "/v3/kv/put", "/v3/kv/txn"
WATCH, AUTHENTICATE = "/v3/watch", "/v3/auth/authenticate"
GRANT, KEEP_ALIVE, REVOKE, TIME_TO_LIVE = (
    "/v3/lease/grant", "/v3/lease/keepalive", "/v3/lease/revoke", "/v3/lease/timetolive"
)  # fmt: skip

LEFT = b"null"
"""The value of a key just before its owner deletes it: what tells leaving from a lease that ended."""

T = TypeVar("T")


class Header(msgspec.Struct):
    """Of every answer. `revision` counts the store's changes, `raft_term` its elections; both only ever rise."""

    revision: int = 0
    raft_term: int = 0


class KeyValue(msgspec.Struct):
    """A key as it stands. Of a deletion only the key, and in `mod_revision` when it was."""

    key: bytes
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0


class Done(msgspec.Struct):
    """An answer of which only the header matters."""

    header: Header = msgspec.field(default_factory=Header)


class Ranged(msgspec.Struct):
    """The answer to a range."""

    header: Header = msgspec.field(default_factory=Header)
    kvs: list[KeyValue] = []


class TxnPart(msgspec.Struct):
    """What one operation of a transaction answered."""

    response_range: Ranged = msgspec.field(default_factory=Ranged)


class TxnAnswer(msgspec.Struct):
    """Whether the condition held, and what the operations of its branch answered."""

    succeeded: bool = False
    responses: list[TxnPart] = []


class Lease(msgspec.Struct):
    """The answer to a grant or a question. `ttl` is 0 or less if there is no such lease (any more)."""

    ttl: int = msgspec.field(default=0, name="TTL")
    keys: list[bytes] = []


class KeepAliveAnswer(msgspec.Struct):
    """One answer of the keep-alive stream."""

    result: Lease = msgspec.field(default_factory=Lease)


class Token(msgspec.Struct):
    """What a user name and password are worth."""

    token: str


class Event(msgspec.Struct):
    """One change."""

    kv: KeyValue
    type: str = "PUT"


class WatchAnswer(msgspec.Struct):
    """One message of a watch: that it was created, changes, a sign of life, or that it is over."""

    header: Header = msgspec.field(default_factory=Header)
    created: bool = False
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0
    events: list[Event] = []


class WatchLine(msgspec.Struct):
    """A line of a watch's body."""

    result: WatchAnswer | None = None
    error: dict[str, Any] | None = None


class Failure(msgspec.Struct):
    """The body of an answer that is not 200. `code` is gRPC's."""

    message: str = ""
    error: str = ""
    code: int = 2


def decode(data: bytes, kind: type[T]) -> T:
    """Read an answer. Raises msgspec.DecodeError."""
    return msgspec.json.decode(data, type=kind, strict=False)  # not strict: numbers are strings


def prefix_range(prefix: str) -> dict[str, bytes]:
    """All keys that start with `prefix`."""
    first = prefix.encode()
    return {"key": first, "range_end": first[:-1] + bytes([first[-1] + 1])}
