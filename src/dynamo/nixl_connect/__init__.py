"""How do two processes move tensors and bytes into each other's memory, by NIXL?

One side offers memory and sends its metadata by any way; the other reads or writes it; both await the end:

    connector = Connector()
    with await connector.create_readable(Descriptor(tensor)) as offer:      # here
        await send_somehow(offer.metadata())
        await offer.wait_for_completion()

    with await connector.begin_read(metadata, Descriptor(mine)) as read:    # there
        await read.wait_for_completion()

Needs NIXL: `pip install 'ai-dynamo[nixl]'`. Without it, importing this raises `NixlMissing`, an ImportError.
"""

from dynamo.nixl_connect import bindings

bindings.load()

from dynamo.nixl_connect.connection import Connection, Remote  # noqa: E402 - what it needs is known to be there
from dynamo.nixl_connect.connector import Connector  # noqa: E402
from dynamo.nixl_connect.descriptor import Descriptor  # noqa: E402
from dynamo.nixl_connect.device import Device, DeviceKind  # noqa: E402
from dynamo.nixl_connect.errors import (  # noqa: E402
    InvalidState,
    InvalidType,
    InvalidValue,
    NixlMissing,
    PeerCancelled,
    PeerGone,
    TransferFailed,
    TransferTimeout,
)
from dynamo.nixl_connect.kinds import OperationKind, OperationStatus  # noqa: E402
from dynamo.nixl_connect.metadata import RdmaMetadata, SerializedDescriptor  # noqa: E402
from dynamo.nixl_connect.operations import (  # noqa: E402
    AbstractOperation,
    ActiveOperation,
    PassiveOperation,
    ReadableOperation,
    ReadOperation,
    WritableOperation,
    WriteOperation,
)

__all__ = [
    "AbstractOperation",
    "ActiveOperation",
    "Connection",
    "Connector",
    "Descriptor",
    "Device",
    "DeviceKind",
    "InvalidState",
    "InvalidType",
    "InvalidValue",
    "NixlMissing",
    "OperationKind",
    "OperationStatus",
    "PassiveOperation",
    "PeerCancelled",
    "PeerGone",
    "RdmaMetadata",
    "ReadOperation",
    "ReadableOperation",
    "Remote",
    "SerializedDescriptor",
    "TransferFailed",
    "TransferTimeout",
    "WritableOperation",
    "WriteOperation",
]
