"""Through what do the operations of one worker reach their peers?"""

import secrets
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

from dynamo.nixl_connect.agent import Agent
from dynamo.nixl_connect.errors import InvalidType
from dynamo.nixl_connect.metadata import unpack
from dynamo.nixl_connect.remotes import BusyError, Peer
from dynamo.nixl_connect.waiting import outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from dynamo.nixl_connect.connector import Connector


class Connection:
    """One NIXL agent of a connector, with its thread. All operations of a connector share one."""

    def __init__(self, connector: "Connector", number: int) -> None:
        if not isinstance(number, int) or number < 1:
            raise InvalidType(f"Connection: `number` is {number!r}; give an int from 1", "number")
        self._connector = connector
        # A peer that remembers an agent of this name from before a restart must not take this one for it.
        self._name = f"{connector.name}-{number}-{secrets.token_hex(4)}"
        self.agent = Agent(self._name, connector.timeout_s)
        weakref.finalize(self, self.agent.stop).atexit = False  # at exit the agents are stopped together

    @property
    def connector(self) -> "Connector":
        """Whose it is."""
        return self._connector

    @property
    def name(self) -> str:
        """The agent's name: the connector's, a number, and what tells it from an earlier one."""
        return self._name

    @property
    def metadata(self) -> bytes:
        """NIXL's description of the agent and all that is registered. Waits for the agent: half a second, once."""
        return self.agent.call(self.agent.metadata).result(self.agent.patience_s)

    async def initialize(self) -> None:
        """Make the agent now rather than with the first operation."""
        await outcome(self.agent.call(self.agent.start), self.agent.patience_s)

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"Connection(name={self._name!r})"


class Remote:
    """A peer's agent, known here from its metadata. Leaving a `with` block, or `del`, lets go of it.

    Raises InvalidValue for metadata that is damaged or not NIXL's; `name` raises PeerGone if it cannot be reached.
    """

    def __init__(self, connection: Connection, nixl_metadata: bytes | str) -> None:
        if not isinstance(connection, Connection):
            raise InvalidType(f"`connection` is {type(connection).__name__}; give operation.connection", "connection")
        plain, agent = unpack(nixl_metadata), connection.agent
        self._connection = connection
        self._loaded: Future[Peer] = agent.call(lambda: agent.load_peer(plain, ()))
        self._is_mine = True

    @classmethod
    def of(cls, connection: Connection, loaded: "Future[Peer]") -> "Remote":
        """The peer of an operation, which lets go of it by itself."""
        remote = cls.__new__(cls)
        remote._connection, remote._loaded = connection, loaded
        remote._is_mine = False
        return remote

    @property
    def connection(self) -> Connection:
        """The connection that knows it."""
        return self._connection

    @property
    def name(self) -> str:
        """The peer's agent's name. Waits until it is loaded: up to 60 ms."""
        return self._loaded.result(self._connection.agent.patience_s).name

    def __enter__(self) -> "Remote":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        if getattr(self, "_is_mine", False):  # not there if the arguments were refused
            self._is_mine = False
            agent = self._connection.agent
            agent.post(_release(agent, self._loaded))

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Remote(name={self.name}, connection={self._connection.name})"


def _release(agent: Agent, loaded: "Future[Peer]") -> "Callable[[], None]":
    def work() -> None:
        if not loaded.done():
            raise BusyError
        if loaded.exception() is None:
            agent.release_peer(loaded.result())

    return work
