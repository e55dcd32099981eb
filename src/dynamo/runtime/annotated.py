"""What does user code see of one item of a stream: data, or a remark about the stream?"""

from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

EXT_ANNOTATED = 1  # msgpack extension type of an item with remarks: [data, id, event, comment]


class Annotated(Generic[T]):
    """One item with its remarks. Handlers may yield it; plain items are its `data`."""

    __slots__ = ("_comment", "_data", "_event", "_id")

    def __init__(
        self,
        data: T | None = None,
        id: str | None = None,  # noqa: A002 - the name users know
        event: str | None = None,
        comment: list[str] | None = None,
    ) -> None:
        self._data = data
        self._id = id
        self._event = event
        self._comment = comment

    def __repr__(self) -> str:
        return f"Annotated(data={self._data!r}, id={self._id!r}, event={self._event!r}, comment={self._comment!r})"

    def data(self) -> T | None:
        """The item itself; None if there are only remarks."""
        return self._data

    def id(self) -> str | None:
        """The item's id, if it has one."""
        return self._id

    def event(self) -> str | None:
        """The kind of remark; `error` for an error."""
        return self._event

    def comments(self) -> list[str]:
        """The remarks."""
        return self._comment or []

    def is_error(self) -> bool:
        """Whether this item tells of an error."""
        return self._event == "error"

    def to_wire(self) -> object:
        """The item as it is sent: plain data if there are no remarks."""
        if self._id is None and self._event is None and self._comment is None:
            return self._data
        fields = (self._data, self._id, self._event, self._comment)
        return msgspec.msgpack.Ext(EXT_ANNOTATED, _encode(fields))

    @classmethod
    def from_wire(cls, item: Any) -> "Annotated[Any]":
        """The inverse of `to_wire`, from a decoded item."""
        if isinstance(item, msgspec.msgpack.Ext) and item.code == EXT_ANNOTATED:
            data, id_, event, comment = _decode(item.data)
            return Annotated(data, id_, event, comment)
        return Annotated(item)


def _encode(fields: object) -> bytes:
    from dynamo.runtime import wire

    return wire.encode(fields)


_decode = msgspec.msgpack.Decoder(tuple[Any, str | None, str | None, list[str] | None]).decode
