"""How is memory offered to a peer, and how is a peer's memory read or written?

`ReadableOperation` and `WritableOperation` offer; `ReadOperation` and `WriteOperation` act on an offer, once. Whoever
holds an operation may await it, cancel it or leave its `with` block; its memory stays registered, and alive, until it
is over. Every wait ends: with the transfer, with a typed error, or at the connector's deadline.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from dynamo.nixl_connect.agent import Agent
from dynamo.nixl_connect.connection import Connection, Remote
from dynamo.nixl_connect.descriptor import Descriptor, as_list, refuse_constants
from dynamo.nixl_connect.device import device_of
from dynamo.nixl_connect.errors import InvalidState, InvalidType, InvalidValue
from dynamo.nixl_connect.flight import Flight
from dynamo.nixl_connect.kinds import OperationKind, OperationStatus
from dynamo.nixl_connect.metadata import RdmaMetadata, SerializedDescriptor, pack, unpack
from dynamo.nixl_connect.region import Region
from dynamo.nixl_connect.remotes import Peer
from dynamo.nixl_connect.waiting import outcome

Descriptors = Descriptor | list[Descriptor]


class AbstractOperation:
    """What all operations have: a kind, a status, an end. Not to be made directly."""

    def __init__(self, connection: Connection, kind: OperationKind, local_descriptors: Descriptors, key: str) -> None:
        if not isinstance(connection, Connection):
            raise InvalidType(f"`connection` is {type(connection).__name__}; give a Connection", "connection")
        self._connection = connection
        self._local = as_list(local_descriptors, "local_descriptors")
        self._flight = Flight(kind, key, [d._region for d in self._local], connection.agent.patience_s)

    @property
    def connection(self) -> Connection:
        """The connection that it goes through."""
        return self._connection

    @property
    def operation_kind(self) -> OperationKind:
        """READ or WRITE, seen from the side that begins."""
        return self._flight.kind

    @property
    def status(self) -> OperationStatus:
        """How far it is now. Costs nothing: a thread keeps it."""
        return self._flight.status

    async def wait_for_completion(self) -> None:
        """Wait until it is over and NIXL has let go of the memory. After `cancel` that is all it does.

        Raises TransferTimeout at the connector's deadline, PeerGone, PeerCancelled or TransferFailed.
        """
        await outcome(self._flight.over, self._connection.agent.patience_s)

    def cancel(self) -> None:
        """Give it up. Does nothing if it is over.

        Bytes that are on their way still arrive: use the memory again only after `wait_for_completion`. An offer is
        withdrawn, but a peer that has its metadata may be reading: the memory is kept for five seconds more.
        """
        self._connection.agent.cancel(self._flight)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        flight = getattr(self, "_flight", None)  # none if the arguments were refused
        if flight is not None and not flight.status.is_final:
            self._connection.agent.cancel(flight)

    def __repr__(self) -> str:
        about = f"operation_kind={self.operation_kind}, local_descriptors={_words(self._local)}"
        return f"{type(self).__name__}({about}, notification_key={self._flight.key!r}, status={str(self.status)!r})"


class PassiveOperation(AbstractOperation):
    """Memory offered to one peer. `metadata()` is what the peer needs."""

    def __init__(self, connection: Connection, operation_kind: OperationKind, local_descriptors: Descriptors) -> None:
        super().__init__(connection, operation_kind, local_descriptors, str(uuid.uuid4()))
        agent, flight = connection.agent, self._flight
        self._agent_metadata = agent.call(lambda: agent.offer(flight))
        _fail_with(agent, self._agent_metadata, flight)

    def metadata(self, hex_encode: bool = False) -> RdmaMetadata:
        """What to send to the peer, by any way. Good for one operation. `hex_encode`: no base64 in it.

        Raises what registering the memory raised, if it failed.
        """
        self._flight.is_known = True
        packed = pack(self._agent_metadata.result(self._connection.agent.patience_s), hex_encode)
        return RdmaMetadata(
            descriptors=[descriptor.metadata for descriptor in self._local],
            nixl_metadata=packed,
            notification_key=self._flight.key,
            operation_kind=int(self.operation_kind),
        )


class ReadableOperation(PassiveOperation):
    """Memory that one peer may read."""

    def __init__(self, connection: Connection, local_descriptors: Descriptors) -> None:
        super().__init__(connection, OperationKind.READ, local_descriptors)


class WritableOperation(PassiveOperation):
    """Memory that one peer may write."""

    def __init__(self, connection: Connection, local_descriptors: Descriptors) -> None:
        refuse_constants(as_list(local_descriptors, "local_descriptors"), "local_descriptors")
        super().__init__(connection, OperationKind.WRITE, local_descriptors)


class ActiveOperation(AbstractOperation):
    """A transfer with the memory that a peer's metadata describes. It begins at once.

    Raises InvalidType, InvalidValue or InvalidState, naming the argument, before anything is sent.
    """

    def __init__(
        self,
        connection: Connection,
        operation_kind: OperationKind,
        local_descriptors: Descriptors,
        remote_metadata: RdmaMetadata,
    ) -> None:
        if not isinstance(remote_metadata, RdmaMetadata):
            what = type(remote_metadata).__name__
            raise InvalidType(f"`remote_metadata` is {what}; give the peer's RdmaMetadata", "remote_metadata")
        if remote_metadata.operation_kind != operation_kind:
            raise InvalidState(
                f"the metadata offers operation_kind={remote_metadata.operation_kind}, so no {operation_kind} of it",
                "operation_kind",
            )
        if not remote_metadata.notification_key:
            raise InvalidValue("`notification_key` is empty", "notification_key")
        agent_metadata = unpack(remote_metadata.nixl_metadata)
        super().__init__(connection, operation_kind, local_descriptors, remote_metadata.notification_key)
        self._remote_metadata = remote_metadata
        _refuse_other_sizes(self._local, remote_metadata.descriptors)
        self._begin(agent_metadata)

    def _begin(self, agent_metadata: bytes) -> None:
        agent, flight = self._connection.agent, self._flight
        regions = [Region(d.ptr, d.size, device_of(d.device), None) for d in self._remote_metadata.descriptors]
        if len({region.device.kind for region in regions}) > 1:
            raise InvalidValue("`descriptors` mixes host and device memory; use one operation for each", "descriptors")

        def begin() -> Peer:
            peer = agent.load_peer(agent_metadata, [region.identity for region in regions])
            agent.begin(flight, peer, regions)
            return peer

        peer = agent.call(begin)
        _fail_with(agent, peer, flight)
        self._remote = Remote.of(self._connection, peer)

    @property
    def remote(self) -> Remote:
        """The peer."""
        return self._remote

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, remote_descriptors={_words(self._remote_metadata.descriptors)})"


class ReadOperation(ActiveOperation):
    """Reads a peer's memory into the local one."""

    def __init__(self, connection: Connection, remote_metadata: RdmaMetadata, local_descriptors: Descriptors) -> None:
        refuse_constants(as_list(local_descriptors, "local_descriptors"), "local_descriptors")
        super().__init__(connection, OperationKind.READ, local_descriptors, remote_metadata)

    def results(self) -> list[Descriptor]:
        """The local memory, filled. Raises InvalidState unless the operation is complete."""
        if self.status is not OperationStatus.COMPLETE:
            raise InvalidState(f"there are no results: the operation is {self.status.name}, not COMPLETE")
        return list(self._local)


class WriteOperation(ActiveOperation):
    """Writes the local memory into a peer's."""

    def __init__(self, connection: Connection, local_descriptors: Descriptors, remote_metadata: RdmaMetadata) -> None:
        super().__init__(connection, OperationKind.WRITE, local_descriptors, remote_metadata)


async def begun(operation: AbstractOperation) -> None:
    """Wait until NIXL has the operation. If the waiting is cancelled, so is the operation."""
    try:
        await outcome(operation._flight.begun, operation.connection.agent.patience_s)
    except BaseException:
        operation.cancel()
        raise


def _fail_with(agent: Agent, promise: "Future[Any]", flight: Flight) -> None:
    """Where the agent's thread could not even begin the flight, end it with the same error."""

    def check(done: "Future[Any]") -> None:
        error = done.exception()
        if error is not None and not flight.over.done():
            agent.fail(flight, error)

    promise.add_done_callback(check)


def _refuse_other_sizes(local: Sequence[Descriptor], remote: Sequence[SerializedDescriptor]) -> None:
    if len(local) != len(remote):
        raise InvalidValue(
            f"`local_descriptors` are {len(local)}, the peer's are {len(remote)}; give one for each",
            "local_descriptors",
        )
    for position, (here, there) in enumerate(zip(local, remote, strict=True)):
        if here.size != there.size:
            raise InvalidValue(
                f"`local_descriptors`[{position}] is {here.size} bytes, the peer's is {there.size}; they must be equal",
                "local_descriptors",
            )


def _words(descriptors: Sequence[Descriptor] | Sequence[SerializedDescriptor]) -> str:
    return str(descriptors[0]) if len(descriptors) == 1 else str(list(descriptors))
