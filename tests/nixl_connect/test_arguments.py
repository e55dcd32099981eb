"""What may be described and told, and what is refused with which words?"""

import zlib

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from dynamo.nixl_connect import (
    Connector,
    Descriptor,
    Device,
    DeviceKind,
    InvalidType,
    InvalidValue,
    OperationKind,
    OperationStatus,
    RdmaMetadata,
    SerializedDescriptor,
)
from dynamo.nixl_connect.metadata import MAX_AGENT_METADATA_BYTES, pack, unpack
from dynamo.runtime.errors import InvalidArgument, from_wire, to_wire


def test_values_on_the_wire_are_those_of_the_peer() -> None:
    assert {k.name: k.value for k in DeviceKind} == {"UNSPECIFIED": 0, "HOST": 1, "CUDA": 2, "XPU": 3}
    assert {k.name: k.value for k in OperationKind} == {"UNSPECIFIED": 0, "READ": 1, "WRITE": 2}
    names = ["UNINITIALIZED", "INITIALIZED", "IN_PROGRESS", "COMPLETE", "CANCELLED", "ERRORED"]
    assert [s.name for s in OperationStatus] == names
    assert [s.value for s in OperationStatus] == list(range(6))


@pytest.mark.parametrize(
    ("given", "kind", "number", "text"),
    [
        ("cpu", DeviceKind.HOST, 0, "cpu"),
        (" CPU ", DeviceKind.HOST, 0, "cpu"),
        ("cuda", DeviceKind.CUDA, 0, "cuda:0"),
        ("cuda:3", DeviceKind.CUDA, 3, "cuda:3"),
        ((DeviceKind.XPU, 1), DeviceKind.XPU, 1, "xpu:1"),
    ],
)
def test_devices(given: str, kind: DeviceKind, number: int, text: str) -> None:
    device = Device(given)
    assert (device.kind, device.id, str(device)) == (kind, number, text)


@pytest.mark.parametrize("given", ["tpu", "cuda:x", "cuda:-1", "", None])
def test_unknown_devices_are_refused(given: str) -> None:
    with pytest.raises(InvalidValue):
        Device(given)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"abc", 3),
        (bytearray(10), 10),
        (memoryview(b"abcd")[1:], 3),
        ((np.zeros((3, 4), dtype=np.float32), "cpu"), 48),
        ((np.zeros((3, 4), dtype=np.float32).T, Device("cpu")), 48),
        ((4096, 100, "cuda:1", None), 100),
        ((4096, 100, "cpu"), 100),
    ],
)
def test_forms_of_memory(data: object, size: int) -> None:
    descriptor = Descriptor(data)
    assert descriptor.size == size
    assert descriptor.ptr > 0
    assert Descriptor.from_serialized(descriptor.metadata).ptr == descriptor.ptr


def test_a_tensor_is_described_where_it_is() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(10)
    descriptor = Descriptor(tensor)
    assert (descriptor.ptr, descriptor.size, str(descriptor.device)) == (tensor.data_ptr(), 80, "cpu")
    with pytest.raises(InvalidValue, match="not contiguous"):
        Descriptor(torch.zeros(4, 4).t())


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (None, InvalidValue),
        ("text", InvalidType),
        (np.zeros(4), InvalidType),
        ((np.zeros((8, 8))[::2], "cpu"), InvalidValue),
        ((np.zeros(4), "cuda:0"), InvalidValue),
        ((-1, 10, "cpu", None), InvalidValue),
        ((10, -1, "cpu", None), InvalidValue),
        (memoryview(bytearray(10))[::2], InvalidValue),
    ],
)
def test_what_is_no_memory_is_refused(data: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="Descriptor"):
        Descriptor(data)


@pytest.mark.parametrize("empty", [b"", (np.zeros(0), "cpu"), (0, 10, "cpu", None), []])
async def test_nothing_cannot_be_offered(empty: object) -> None:
    with pytest.raises(InvalidValue, match="local_descriptors"):
        await Connector().create_readable(empty if empty == [] else Descriptor(empty))


async def test_host_and_device_memory_do_not_mix() -> None:
    with pytest.raises(InvalidValue, match="mixes"):
        await Connector().create_readable([Descriptor(b"abc"), Descriptor((4096, 3, "cuda:0", None))])


async def test_a_constant_of_python_is_not_written() -> None:
    with pytest.raises(InvalidValue, match="bytearray"):
        await Connector().create_writable(Descriptor(b"a"))


@pytest.mark.parametrize("wrong", [None, "x", [1]])
async def test_other_than_descriptors_is_refused(wrong: object) -> None:
    with pytest.raises(InvalidType, match="local_descriptors"):
        await Connector().create_readable(wrong)


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_every_operation_must_end_some_time(seconds: float) -> None:
    with pytest.raises(InvalidValue, match="DYN_NIXL_TIMEOUT_SECS"):
        Connector(timeout_s=seconds)


async def test_other_than_metadata_is_refused() -> None:
    with pytest.raises(InvalidType, match="remote_metadata"):
        await Connector().begin_read({"descriptors": []}, Descriptor(bytearray(3)))


def test_metadata_is_frozen_complete_and_fits_into_a_users_model() -> None:
    class Request(BaseModel):
        image: RdmaMetadata | None = None

    part = SerializedDescriptor(device="cpu", ptr=5, size=6)
    metadata = RdmaMetadata(descriptors=[part], nixl_metadata="b64:", notification_key="key", operation_kind=1)
    assert Request.model_validate_json(Request(image=metadata).model_dump_json()).image == metadata
    assert metadata.to_descriptors().size == 6
    with pytest.raises(ValidationError):
        metadata.notification_key = "other"
    for wrong in ({"operation_kind": 7}, {"extra": 1}, {"descriptors": [{"device": "tpu"}]}):
        with pytest.raises(ValidationError):
            RdmaMetadata.model_validate(wrong)


@pytest.mark.parametrize("as_hex", [False, True])
def test_agent_metadata_survives_the_wire(as_hex: bool) -> None:
    assert unpack(pack(b"nixlSerDes|" * 50, as_hex)) == b"nixlSerDes|" * 50


def test_agent_metadata_that_inflates_without_end_is_refused() -> None:
    bomb = zlib.compress(bytes(MAX_AGENT_METADATA_BYTES + 1)).hex()
    with pytest.raises(InvalidValue, match="exceeds"):
        unpack(bomb)


def test_errors_reach_other_processes_as_types_that_all_know() -> None:
    assert type(from_wire(to_wire(InvalidValue("wrong", "size")))) is InvalidArgument
