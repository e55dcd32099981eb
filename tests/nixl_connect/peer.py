"""The process at the other end: takes commands as lines of JSON, answers each with one.

make {name, sizes, fill, form}        memory, filled with a byte, or with 0, 1, 2, … 250, 0, … if `fill` is "ramp"
readable | writable {name, hex}       -> metadata
read | write {name, metadata}         begin; errors are {error, message}
wait {seconds}                        -> status of the last operation, or its error
cancel | leave                        the last operation
begin_and_cancel {name, metadata}     a read, given up at once
make_and_cancel {name, metadata}      a read, given up before it begins
rename {name, to}                     memory
digest {name}                         -> sha256 of the memory
offer_many {count, size}              -> metadata of as many readables, each with memory of its own
read_many {metadata, size}            -> digests, read side by side
"""

import asyncio
import contextlib
import ctypes
import hashlib
import json
import sys
from typing import Any

import numpy as np

import dynamo.nixl_connect as nixl


class Peer:
    def __init__(self, timeout_s: float) -> None:
        self.connector = nixl.Connector(timeout_s=timeout_s)
        self.memory: dict[str, list[Any]] = {}
        self.descriptors: dict[str, list[nixl.Descriptor]] = {}
        self.operation: Any = None
        self.many: list[Any] = []

    def make(self, name: str, sizes: list[int], fill: int | str = 0, form: str = "ndarray") -> None:
        self.memory[name] = [_filled(size, fill) for size in sizes]
        self.descriptors[name] = [_described(array, form) for array in self.memory[name]]

    async def readable(self, name: str, hex: bool = False) -> dict[str, Any]:  # noqa: A002 - as the interface calls it
        self.operation = await self.connector.create_readable(self.descriptors[name])
        return {"metadata": self.operation.metadata(hex_encode=hex).model_dump()}

    async def writable(self, name: str, hex: bool = False) -> dict[str, Any]:  # noqa: A002
        self.operation = await self.connector.create_writable(self.descriptors[name])
        return {"metadata": self.operation.metadata(hex_encode=hex).model_dump()}

    async def read(self, name: str, metadata: dict[str, Any]) -> None:
        meta = nixl.RdmaMetadata.model_validate(metadata)
        self.operation = await self.connector.begin_read(meta, self.descriptors[name])

    async def write(self, name: str, metadata: dict[str, Any]) -> None:
        meta = nixl.RdmaMetadata.model_validate(metadata)
        self.operation = await self.connector.begin_write(self.descriptors[name], meta)

    def rename(self, name: str, to: str) -> None:
        self.memory[to], self.descriptors[to] = self.memory.pop(name), self.descriptors.pop(name)

    async def begin_and_cancel(self, name: str, metadata: dict[str, Any]) -> None:
        await self.read(name, metadata)
        self.operation.cancel()

    async def make_and_cancel(self, name: str, metadata: dict[str, Any]) -> None:
        connection = (await self.connector.create_readable(nixl.Descriptor(bytearray(10)))).connection
        meta = nixl.RdmaMetadata.model_validate(metadata)
        self.operation = nixl.ReadOperation(connection, meta, self.descriptors[name])
        self.operation.cancel()  # before the two agents are connected

    async def wait(self, seconds: float = 20) -> dict[str, Any]:
        await asyncio.wait_for(self.operation.wait_for_completion(), seconds)
        return {"status": self.operation.status.name}

    def status(self) -> dict[str, Any]:
        return {"status": self.operation.status.name}

    def cancel(self) -> dict[str, Any]:
        self.operation.cancel()
        return self.status()

    def leave(self) -> None:
        with self.operation:
            pass

    def digest(self, name: str) -> dict[str, Any]:
        return {"digest": hashlib.sha256(b"".join(bytes(array) for array in self.memory[name])).hexdigest()}

    async def offer_many(self, count: int, size: int) -> dict[str, Any]:
        arrays = [np.full(size, number % 256, dtype=np.uint8) for number in range(count)]
        self.many = [await self.connector.create_readable(_described(array, "ndarray")) for array in arrays]
        return {"metadata": [operation.metadata().model_dump() for operation in self.many]}

    async def read_many(self, metadata: list[dict[str, Any]], size: int) -> dict[str, Any]:
        arrays = [np.zeros(size, dtype=np.uint8) for _ in metadata]

        async def read(meta: dict[str, Any], array: np.ndarray) -> None:
            parsed = nixl.RdmaMetadata.model_validate(meta)
            with await self.connector.begin_read(parsed, _described(array, "ndarray")) as operation:
                await operation.wait_for_completion()

        await asyncio.gather(*(read(meta, array) for meta, array in zip(metadata, arrays, strict=True)))
        return {"right": sum(bool((array == number % 256).all()) for number, array in enumerate(arrays))}

    async def wait_many(self) -> dict[str, Any]:
        await asyncio.gather(*(operation.wait_for_completion() for operation in self.many))
        return {"complete": sum(operation.status is nixl.OperationStatus.COMPLETE for operation in self.many)}


def _filled(size: int, fill: int | str) -> np.ndarray:
    if fill == "ramp":
        return np.resize(np.arange(251, dtype=np.uint8), size)
    return np.full(size, fill, dtype=np.uint8)


def _described(array: np.ndarray, form: str) -> nixl.Descriptor:
    if form == "tensor":
        import torch  # two seconds that the other tests need not wait for

        return nixl.Descriptor(torch.from_numpy(array))
    if form == "ndarray":
        return nixl.Descriptor((array, "cpu"))
    if form == "buffer":
        return nixl.Descriptor(memoryview(array))
    if form == "pointer":
        return nixl.Descriptor((array.ctypes.data, array.nbytes, nixl.Device("cpu"), array))
    assert form == "bytes"  # only to read from
    constant = bytes(array)
    address = ctypes.cast(ctypes.c_char_p(constant), ctypes.c_void_p).value
    descriptor = nixl.Descriptor(constant)
    assert descriptor.ptr == address
    return descriptor


async def main() -> None:
    peer = Peer(float(sys.argv[1]))
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        try:
            answer = getattr(peer, command.pop("do"))(**command)
            answer = await answer if asyncio.iscoroutine(answer) else answer
        except Exception as e:  # noqa: BLE001 - the test looks at it
            answer = {"error": type(e).__name__, "message": str(e)}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer or {}), flush=True)


asyncio.run(main())
