"""How does a worker move memory to and from other workers?"""

import socket
import uuid

from dynamo.nixl_connect.connection import Connection
from dynamo.nixl_connect.errors import InvalidType, InvalidValue
from dynamo.nixl_connect.metadata import RdmaMetadata
from dynamo.nixl_connect.operations import (
    Descriptors,
    ReadableOperation,
    ReadOperation,
    WritableOperation,
    WriteOperation,
    begun,
)
from dynamo.runtime.options import env_number

DEFAULT_TIMEOUT_S = 300.0  # an offer may wait for a request that is queued; then its memory is taken back


class Connector:
    """A worker's way to move memory. One is enough for a process; operations may run side by side.

    `worker_id`: a name, by default a random one. `timeout_s`: every operation is over after that many seconds, by
    default what DYN_NIXL_TIMEOUT_SECS says, else 300. Making one is cheap; the first operation, or `initialize`,
    makes the NIXL agent, which takes half a second.
    """

    def __init__(self, worker_id: str | None = None, *, timeout_s: float | None = None) -> None:
        if worker_id is not None and (not isinstance(worker_id, str) or not worker_id):
            raise InvalidType(f"`worker_id` is {worker_id!r}; give a non-empty str or None", "worker_id")
        self._worker_id = worker_id or uuid.uuid4().hex
        self._timeout_s = env_number("DYN_NIXL_TIMEOUT_SECS", DEFAULT_TIMEOUT_S) if timeout_s is None else timeout_s
        if not 0 < self._timeout_s < float("inf"):
            raise InvalidValue(
                f"`timeout_s` (DYN_NIXL_TIMEOUT_SECS) is {self._timeout_s}; give seconds over 0", "timeout_s"
            )
        self._connection: Connection | None = None

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._worker_id

    @property
    def hostname(self) -> str:
        """This machine's name."""
        return socket.gethostname()

    @property
    def timeout_s(self) -> float:
        """After how many seconds an operation is over in any case."""
        return self._timeout_s

    @property
    def is_cuda_available(self) -> bool:
        """Whether torch finds a CUDA device here."""
        try:
            import torch
        except ImportError:
            return False
        return bool(torch.cuda.is_available())

    async def initialize(self) -> None:
        """Make the NIXL agent now. Raises NixlMissing or TransferFailed if it cannot be made."""
        await self._shared().initialize()

    async def create_readable(self, local_descriptors: Descriptors) -> ReadableOperation:
        """Offer memory for one peer to read. Send the operation's `metadata()` to it, then await the operation."""
        operation = ReadableOperation(self._shared(), local_descriptors)
        await begun(operation)
        return operation

    async def create_writable(self, local_descriptors: Descriptors) -> WritableOperation:
        """Offer memory for one peer to write. Send the operation's `metadata()` to it, then await the operation."""
        operation = WritableOperation(self._shared(), local_descriptors)
        await begun(operation)
        return operation

    async def begin_read(self, remote_metadata: RdmaMetadata, local_descriptors: Descriptors) -> ReadOperation:
        """Begin to read a peer's memory. Raises InvalidValue for sizes that differ or metadata that is damaged,
        InvalidState for metadata of a writable or used before, PeerGone if the peer cannot be reached."""
        operation = ReadOperation(self._shared(), remote_metadata, local_descriptors)
        await begun(operation)
        return operation

    async def begin_write(self, local_descriptors: Descriptors, remote_metadata: RdmaMetadata) -> WriteOperation:
        """Begin to write into a peer's memory. Raises as `begin_read` does."""
        operation = WriteOperation(self._shared(), local_descriptors, remote_metadata)
        await begun(operation)
        return operation

    def _shared(self) -> Connection:
        if self._connection is None:
            self._connection = Connection(self, 1)
        return self._connection

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Connector) and self._worker_id == other._worker_id

    def __hash__(self) -> int:
        return hash(self._worker_id)

    def __str__(self) -> str:
        return self._worker_id

    def __repr__(self) -> str:
        return f"Connector(worker_id={self._worker_id!r}, hostname={self.hostname})"
