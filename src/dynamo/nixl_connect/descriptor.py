"""Which bytes of memory are meant, and who keeps them alive?"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynamo.nixl_connect.connection import Connection
from dynamo.nixl_connect.device import Device, DeviceKind, device_of
from dynamo.nixl_connect.errors import InvalidState, InvalidType, InvalidValue
from dynamo.nixl_connect.metadata import SerializedDescriptor
from dynamo.nixl_connect.region import Region

if TYPE_CHECKING:
    import torch

FORMS = "a torch.Tensor, (ndarray, device), bytes, bytearray, memoryview or (address, size, device, owner)"


class Descriptor:
    """A contiguous piece of memory, from one of the forms that `data` takes:

    - `torch.Tensor`, on the host or on a GPU;
    - `(ndarray, device)`, NumPy on `"cpu"` or CuPy on `"cuda:N"`;
    - `bytes`, `bytearray` or `memoryview`, on the host (receive into `bytearray`: Python takes `bytes` for constant);
    - `(address, size in bytes, device, owner)`: `owner` is any object that keeps the memory alive, or None.

    Nothing is copied. The descriptor keeps the owner alive, and so does NIXL while the memory is registered.
    Raises InvalidType for another form, InvalidValue for memory that is not contiguous or a device that does not fit.
    """

    __slots__ = ("_connection", "_device", "_is_single_constant", "_region")

    def __init__(
        self,
        data: "torch.Tensor | tuple[Any, Device | str] | bytes | bytearray | memoryview"
        " | tuple[int, int, Device | str, Any]",
    ) -> None:
        self._connection: Connection | None = None  # the one that the user registered it with, until taken back
        if data is None:
            raise InvalidValue(f"Descriptor: `data` is None; give {FORMS}", "data")
        ptr, size, self._device, owner = _located(data)
        if ptr < 0 or size < 0:
            raise InvalidValue(f"Descriptor: address {ptr} and size {size} must not be negative", "data")
        self._is_single_constant = isinstance(data, bytes) and size == 1  # Python has one object for each such value
        self._region = Region(ptr, size, self._device, owner)

    @property
    def device(self) -> Device:
        """Where the memory is."""
        return self._device

    @property
    def ptr(self) -> int:
        """Its address."""
        return self._region.ptr

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self._region.size

    @property
    def is_registered(self) -> bool:
        """Whether NIXL knows it, by the user's wish or because an operation needs it."""
        return self._region.holds > 0

    @property
    def metadata(self) -> SerializedDescriptor:
        """Its wire form."""
        return SerializedDescriptor(device=str(self._device), ptr=self.ptr, size=self.size)

    @staticmethod
    def from_serialized(serialized: SerializedDescriptor) -> "Descriptor":
        """The descriptor that a wire form names."""
        if not isinstance(serialized, SerializedDescriptor):
            raise InvalidType(f"`serialized` is {type(serialized).__name__}; give a SerializedDescriptor", "serialized")
        return serialized.to_descriptor()

    def register_with_connector(self, connection: Connection) -> None:
        """Register the memory until it is taken back, so that operations need not do it each time.

        Waits for NIXL (a millisecond for 256 MB of host memory). Twice is as once.
        Raises InvalidState if another connection has it, TransferFailed if NIXL refuses.
        """
        if not isinstance(connection, Connection):
            raise InvalidType(f"`connection` is {type(connection).__name__}; give operation.connection", "connection")
        if self._connection is connection:
            return
        if self._connection is not None:
            raise InvalidState(f"this descriptor is registered with {self._connection}, so not with {connection} too")
        connection.agent.call(lambda: connection.agent.hold(self._region)).result(connection.agent.patience_s)
        self._connection = connection

    def deregister_with_connector(self, connection: Connection) -> None:
        """Take back what `register_with_connector` did. An operation that still needs the memory keeps it registered.

        Raises InvalidState if it is not registered with `connection`.
        """
        if not isinstance(connection, Connection):
            raise InvalidType(f"`connection` is {type(connection).__name__}; give operation.connection", "connection")
        if self._connection is not connection:
            raise InvalidState(f"this descriptor is registered with {self._connection}, not with {connection}")
        self._connection = None
        connection.agent.call(lambda: connection.agent.let_go(self._region)).result(connection.agent.patience_s)

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            region, agent = self._region, connection.agent
            agent.post(lambda: agent.let_go(region))

    def __str__(self) -> str:
        return f"ptr={self.ptr:#x}, size={self.size}, device={self._device}"

    def __repr__(self) -> str:
        return f"Descriptor({self})"


def as_list(descriptors: Descriptor | list[Descriptor], name: str) -> list[Descriptor]:
    """One or several descriptors as a list that one operation can take.

    Raises InvalidType or InvalidValue that names the argument: not descriptors, none, empty memory, mixed kinds.
    """
    several = descriptors if isinstance(descriptors, list) else [descriptors]
    if not several:
        raise InvalidValue(f"`{name}` is an empty list; give at least one Descriptor", name)
    for one in several:
        if not isinstance(one, Descriptor):
            raise InvalidType(f"`{name}` holds {type(one).__name__}; give a Descriptor or a list of them", name)
        if one.size == 0 or one.ptr == 0:
            raise InvalidValue(f"`{name}` holds {one!r}, which is no memory that could move", name)
    if len(several) > 1 and len({one.device.kind for one in several}) > 1:
        raise InvalidValue(f"`{name}` mixes host and device memory; use one operation for each kind", name)
    return several


def refuse_constants(descriptors: Sequence[Descriptor], name: str) -> None:
    """Raise InvalidValue if bytes would arrive in an object that all of Python shares."""
    if any(one._is_single_constant for one in descriptors):
        raise InvalidValue(f"`{name}`: `bytes` of length 1 is shared by all of Python; receive into a bytearray", name)


def _located(data: Any) -> tuple[int, int, Device, Any]:
    """Address, bytes, device and owner of any of the forms."""
    if _is_tensor(data):
        if not data.is_contiguous():
            raise InvalidValue("Descriptor: the tensor is not contiguous; give tensor.contiguous()", "data")
        size = data.numel() * data.element_size()
        return data.data_ptr(), size, Device(str(data.device)), data
    if isinstance(data, bytes | bytearray | memoryview):
        if not len(data):
            return 0, 0, Device("cpu"), data
        try:
            view = np.frombuffer(data, dtype=np.uint8)  # holds the buffer: a bytearray cannot be resized meanwhile
        except (ValueError, BufferError) as e:
            raise InvalidValue(f"Descriptor: the memoryview is not contiguous: {e}", "data") from e
        return view.ctypes.data, view.nbytes, Device("cpu"), view
    if isinstance(data, tuple) and len(data) == 2:
        array, device = data
        return _array_located(array, device if isinstance(device, Device) else Device(device))
    if isinstance(data, tuple) and len(data) in (3, 4) and all(isinstance(number, int) for number in data[:2]):
        device = data[2] if isinstance(data[2], Device) else device_of(data[2])
        return data[0], data[1], device, data[3] if len(data) == 4 else None
    raise InvalidType(f"Descriptor: `data` is {type(data).__name__}; give {FORMS}", "data")


def _is_tensor(data: object) -> bool:
    """Whether it is torch's, without importing torch: a tensor exists only if somebody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(data, torch.Tensor)


def _array_located(array: Any, device: Device) -> tuple[int, int, Device, Any]:
    on_host, on_gpu = hasattr(array, "__array_interface__"), hasattr(array, "__cuda_array_interface__")
    if not (on_host or on_gpu):
        raise InvalidType(f"Descriptor: {type(array).__name__} is no NumPy or CuPy array", "data")
    if on_host != (device.kind is DeviceKind.HOST):
        raise InvalidValue(f"Descriptor: the array is on {'the host' if on_host else 'a GPU'}, not on {device}", "data")
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise InvalidValue("Descriptor: the array is not contiguous; give numpy.ascontiguousarray(array)", "data")
    interface = array.__array_interface__ if on_host else array.__cuda_array_interface__
    return int(interface["data"][0]), int(array.nbytes), device, array
