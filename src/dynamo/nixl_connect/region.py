"""Which memory does NIXL know, and how often is it needed?"""

from typing import Any

from dynamo.nixl_connect.device import Device


class Region:
    """A piece of memory and how many hold it registered. Only the thread of an `Agent` changes it.

    `owner` keeps the memory alive for as long as anything refers to the region.
    """

    __slots__ = ("agent", "device", "holds", "owner", "ptr", "registration", "size")

    def __init__(self, ptr: int, size: int, device: Device, owner: Any) -> None:
        self.ptr = ptr
        self.size = size  # bytes
        self.device = device
        self.owner = owner
        self.holds = 0
        self.agent: Any = None  # the one that registered it, while there are holds
        self.registration: Any = None  # NIXL's list that takes it back

    @property
    def identity(self) -> tuple[int, int, str]:
        """What NIXL tells regions apart by: address, bytes, device."""
        return (self.ptr, self.size, str(self.device))

    @property
    def triple(self) -> tuple[int, int, int]:
        """NIXL's form of it."""
        return (self.ptr, self.size, self.device.id)
