"""What does one side tell the other so that it can reach its memory?

The wire form is the peer's: `nixl_metadata` is NIXL's own description of the agent, deflated (zlib, level 6), then
base64 after the mark `b64:`, or bare hexadecimal. zlib's checksum finds what was damaged on the way. The models are
pydantic because users embed them in their own.
"""

import base64
import binascii
import zlib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, field_validator

from dynamo.nixl_connect.device import DeviceKind, device_of
from dynamo.nixl_connect.errors import InvalidType, InvalidValue
from dynamo.nixl_connect.kinds import OperationKind

if TYPE_CHECKING:
    from dynamo.nixl_connect.descriptor import Descriptor

BASE64_MARK = "b64:"
ZLIB_LEVEL = 6  # as the peer's
MAX_AGENT_METADATA_BYTES = 16 << 20  # 32,000 regions of 500 bytes each; more is an attack or a mistake
_AGENT_NAME_MARK = b"nixlSerDes|Agent"


class SerializedDescriptor(BaseModel):
    """A piece of memory as it is named on the wire. Raises pydantic's ValidationError for fields out of range."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "cpu"
    ptr: int = 0
    size: int = 0

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        device = device_of(value)
        if device.kind is DeviceKind.UNSPECIFIED:
            raise ValueError("`device` must be 'cpu', 'cuda:<id>' or 'xpu:<id>'")
        return value.strip().lower()

    @field_validator("ptr")
    @classmethod
    def _an_address(cls, value: int) -> int:
        if not 0 < value < 1 << 64:
            raise ValueError("`ptr` must be an address between 1 and 2**64 - 1")
        return value

    @field_validator("size")
    @classmethod
    def _a_length(cls, value: int) -> int:
        if not 0 <= value < 1 << 64:
            raise ValueError("`size` must be a number of bytes between 0 and 2**64 - 1")
        return value

    def to_descriptor(self) -> "Descriptor":
        """A descriptor of the same memory, which is the other process's unless this is its own."""
        from dynamo.nixl_connect.descriptor import Descriptor

        return Descriptor((self.ptr, self.size, self.device, None))


class RdmaMetadata(BaseModel):
    """All that a peer needs to read or write the memory of one operation, once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    descriptors: list[SerializedDescriptor] = []
    nixl_metadata: str = ""
    notification_key: str = ""
    operation_kind: int = 0

    @field_validator("operation_kind")
    @classmethod
    def _a_kind(cls, value: int) -> int:
        if value not in (OperationKind.READ, OperationKind.WRITE):
            raise ValueError("`operation_kind` must be 1 (READ) or 2 (WRITE)")
        return value

    def to_descriptors(self) -> "Descriptor | list[Descriptor]":
        """The remote memory: one descriptor, or a list if there are several. Raises InvalidValue if there is none."""
        if not self.descriptors:
            raise InvalidValue("RdmaMetadata: `descriptors` is empty", "descriptors")
        several = [serialized.to_descriptor() for serialized in self.descriptors]
        return several if len(several) > 1 else several[0]


def pack(agent_metadata: bytes, hex_encode: bool) -> str:
    """NIXL's bytes as text for the wire."""
    deflated = zlib.compress(agent_metadata, ZLIB_LEVEL)
    return deflated.hex() if hex_encode else BASE64_MARK + base64.b64encode(deflated).decode()


def unpack(text: Any) -> bytes:
    """What `pack` packed; bytes are NIXL's own already. Raises InvalidValue or InvalidType naming what is wrong."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise InvalidType(f"`nixl_metadata` is {type(text).__name__}; give the str that the peer sent", "nixl_metadata")
    if not text:
        raise InvalidValue("`nixl_metadata` is empty; give what the peer's operation.metadata() said", "nixl_metadata")
    try:
        if text.startswith(BASE64_MARK):
            deflated = base64.b64decode(text.removeprefix(BASE64_MARK), validate=True)
        else:
            deflated = bytes.fromhex(text)
        inflater = zlib.decompressobj()
        plain = inflater.decompress(deflated, MAX_AGENT_METADATA_BYTES)
    except (binascii.Error, ValueError, zlib.error) as e:
        raise InvalidValue(f"`nixl_metadata` was damaged on the way: {e}", "nixl_metadata") from e
    if not inflater.eof or not plain:
        what = "is cut short" if len(plain) < MAX_AGENT_METADATA_BYTES else f"exceeds {MAX_AGENT_METADATA_BYTES} bytes"
        raise InvalidValue(f"`nixl_metadata` {what}", "nixl_metadata")
    return plain


def agent_name_in(agent_metadata: bytes) -> str | None:
    """Which agent does it describe? None if NIXL's form is not the one known here."""
    if not agent_metadata.startswith(_AGENT_NAME_MARK):
        return None
    start = len(_AGENT_NAME_MARK) + 8  # a little-endian length, then the name
    length = int.from_bytes(agent_metadata[start - 8 : start], "little")
    if not 0 < length <= 1024 or len(agent_metadata) < start + length:
        return None
    return agent_metadata[start : start + length].decode(errors="replace")
