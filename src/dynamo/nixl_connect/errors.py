"""What can go wrong when memory moves between two processes?

NixlMissing                 no NIXL is installed; the message names the extra (also an ImportError)
InvalidValue                an argument is wrong; nothing was sent (also a ValueError)
InvalidType                 an argument has the wrong type (also a TypeError)
InvalidState                the call does not fit what the object is, or was used for, by now (also a RuntimeError)
TransferFailed              NIXL could not move the bytes (also a RuntimeError)
PeerGone                    the other process, or the way to it, is gone (also a ConnectionError)
PeerCancelled               the other side gave the transfer up
TransferTimeout             not over at its deadline (also a TimeoutError)

All are `dynamo.runtime.errors.DynamoException`; the second base is what scripts written for the peer catch.
"""

# ruff: noqa: N818 - named as the tree they grow on
from dynamo.runtime.errors import (
    Cancelled,
    ConnectionTimeout,
    Disconnected,
    DynamoException,
    InvalidArgument,
)


class NixlMissing(DynamoException, ImportError):
    """No build of NIXL can be loaded here."""


class InvalidValue(InvalidArgument, ValueError):
    """An argument's value is wrong; the message names it and the fix."""


class InvalidType(InvalidArgument, TypeError):
    """An argument's type is wrong; the message names it and the fix."""


class InvalidState(InvalidArgument, RuntimeError):
    """The call does not fit the object's state: metadata used twice, a descriptor of another connection."""


class TransferFailed(DynamoException, RuntimeError):
    """NIXL refused or could not finish the transfer."""


class PeerGone(Disconnected, ConnectionError):
    """The peer's process ended, or the way to it broke, before the transfer was over."""


class PeerCancelled(Cancelled, RuntimeError):
    """The peer began this transfer and gave it up; the memory may hold part of it."""


class TransferTimeout(ConnectionTimeout, TimeoutError):
    """The transfer was not over at its deadline."""
