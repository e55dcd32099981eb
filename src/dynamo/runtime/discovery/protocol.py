"""Who is there? What a discovery backend must do, and what it says.

Keys are paths like `v1/instances/{ns}/{comp}/{ep}/{iid:x}`; the first two segments are the bucket. A key
lives as long as the process that put it, and at most `LEASE_TTL_S` longer. Everything is level-triggered: a
watch may merge changes of one key, but its last word is always the truth.
"""

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

LEASE_TTL_S = 10.0  # the primary lease users know: a crashed worker is gone after at most this


class Put(msgspec.Struct, frozen=True):
    """The key is there, with this value. Also sent when an owner puts it again."""

    key: str
    value: bytes


class Delete(msgspec.Struct, frozen=True):
    """The key is gone."""

    key: str


Change = Put | Delete


class Discovery(Protocol):
    """One process's view of, and its entries in, the shared key space."""

    async def put(self, key: str, value: bytes, *, create: bool = False) -> None:
        """Set a key that vanishes with this process.

        Raises:
            DiscoveryError: the store cannot be written; or `create` and another live process holds the key.
        """

    async def delete(self, key: str) -> None:
        """Remove a key of this process. A key that is not there is ignored."""

    async def get_prefix(self, prefix: str) -> dict[str, bytes]:
        """All live keys that start with `prefix`. A watch begun before will tell when one of them goes.

        Raises DiscoveryError if the store cannot be read.
        """

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """A Put for every live key, then every change, until closed. Begins now, not at the first `anext`.

        Outages of the store end no watch.
        """

    def hurry(self) -> None:
        """The process is about to end: wait no longer for a store that does not answer."""

    async def close(self) -> None:
        """Remove this process's keys and end its watches. Safe to call twice."""
