"""Where does a piece of memory live?"""

import enum
import functools
import re

from dynamo.nixl_connect.errors import InvalidType, InvalidValue


class DeviceKind(enum.IntEnum):
    """The kind of memory. The values are those that users know."""

    UNSPECIFIED = 0
    HOST = 1
    CUDA = 2
    XPU = 3

    def __str__(self) -> str:
        return _WORDS[self]

    @property
    def nixl_mem_type(self) -> str:
        """NIXL's word for it."""
        return "DRAM" if self is DeviceKind.HOST else "VRAM"


_WORDS = {
    DeviceKind.UNSPECIFIED: "<invalid>",
    DeviceKind.HOST: "cpu",
    DeviceKind.CUDA: "cuda",
    DeviceKind.XPU: "xpu",
}
_KINDS = {"cpu": DeviceKind.HOST, "host": DeviceKind.HOST, "cuda": DeviceKind.CUDA, "xpu": DeviceKind.XPU}
_FORM = re.compile(r"(cpu|host|cuda|xpu)(?::(\d{1,4}))?")


class Device:
    """A device, from `"cpu"`, `"cuda"`, `"cuda:1"`, `"xpu:0"` or `(DeviceKind, id)`.

    Raises InvalidValue for another text, InvalidType for another type.
    """

    __slots__ = ("_id", "_kind")

    def __init__(self, metadata: str | tuple[DeviceKind, int]) -> None:
        if metadata is None:
            raise InvalidValue("Device: `metadata` is None; give 'cpu', 'cuda:0' or (DeviceKind.CUDA, 0)", "metadata")
        if isinstance(metadata, str):
            form = _FORM.fullmatch(metadata.strip().lower())
            if form is None:
                raise InvalidValue(f"Device: {metadata!r} is none of 'cpu', 'cuda:<id>', 'xpu:<id>'", "metadata")
            self._kind = _KINDS[form[1]]
            self._id = int(form[2] or 0)
        elif isinstance(metadata, tuple) and len(metadata) == 2 and isinstance(metadata[1], int):
            self._kind, self._id = DeviceKind(metadata[0]), metadata[1]
        else:
            raise InvalidType(f"Device: `metadata` is {type(metadata).__name__}; give a str or (DeviceKind, int)")
        if self._kind is DeviceKind.HOST:
            self._id = 0  # host memory has no number in NIXL

    @property
    def id(self) -> int:
        """The device's number; 0 for the host."""
        return self._id

    @property
    def kind(self) -> DeviceKind:
        """What kind of memory it is."""
        return self._kind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and (self._kind, self._id) == (other._kind, other._id)

    def __hash__(self) -> int:
        return hash((self._kind, self._id))

    def __str__(self) -> str:
        numbered = self._kind in (DeviceKind.CUDA, DeviceKind.XPU)
        return f"{self._kind}:{self._id}" if numbered else str(self._kind)

    def __repr__(self) -> str:
        return f"Device(kind={self._kind}, id={self._id})"


@functools.lru_cache(256)  # a machine has few; parsing a name for each of 500 descriptors would cost a millisecond
def device_of(text: str) -> Device:
    """The device of that name."""
    return Device(text)
