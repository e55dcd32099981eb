"""What do the request plane's tests share? A sink that remembers, pairs of runtimes, and worker processes."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from dynamo.runtime import Client, Context, DistributedRuntime
from dynamo.runtime.errors import DynamoException
from dynamo.runtime.streams import ResponseStream

ENDPOINT = "test.worker.generate"
SOON_S = 5.0  # long for a loaded machine, short for a test that would hang


class Sink:
    """Remembers everything that was pushed into it."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.flushes: list[int] = []
        self.error: DynamoException | None = None
        self.ended = False
        self.done = asyncio.Event()
        self.first = asyncio.Event()

    def on_item(self, item: msgspec.Raw) -> None:
        self.items.append(msgspec.msgpack.decode(item))
        self.first.set()

    def on_end(self) -> None:
        assert not self.done.is_set()
        self.ended = True
        self.done.set()

    def on_error(self, error: DynamoException) -> None:
        assert not self.done.is_set()
        self.error = error
        self.done.set()

    def flush(self) -> None:
        self.flushes.append(len(self.items))

    async def finished(self) -> "Sink":
        async with asyncio.timeout(SOON_S):
            await self.done.wait()
        return self


class Held:
    """A push handler that keeps its streams, so that the test decides what each answers."""

    def __init__(self) -> None:
        self.streams: list[ResponseStream] = []
        self.payloads: list[Any] = []
        self.stopped: list[str] = []
        self._came = asyncio.Event()

    def __call__(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        self.payloads.append(msgspec.msgpack.decode(payload))
        self.streams.append(stream)
        stream.context.watch(self.stopped.append)
        self._came.set()

    async def wait(self, count: int = 1) -> list[ResponseStream]:
        async with asyncio.timeout(SOON_S):
            while len(self.streams) < count:
                self._came.clear()
                await self._came.wait()
        return self.streams


@asynccontextmanager
async def caller(backend: str = "mem") -> AsyncIterator[DistributedRuntime]:
    """A second runtime, as another process would have one."""
    runtime = DistributedRuntime(discovery_backend=backend)
    try:
        yield runtime
    finally:
        await runtime.close()


async def connect(runtime: DistributedRuntime, path: str = ENDPOINT, count: int = 1) -> Client:
    """A client that sees `count` instances."""
    client = await runtime.endpoint(path).client()
    await until(lambda: len(client.available_ids()) >= count)
    return client


def push(client: Client, request: Any, instance_id: int | None = None, context: Context | None = None) -> Sink:
    """Start a request with a remembering sink."""
    sink = Sink()
    client.start(client.pick() if instance_id is None else instance_id, request, sink, context or Context())
    return sink


async def until(condition: Callable[[], bool], timeout_s: float = SOON_S) -> float:
    """Wait for something that has no event of its own; returns how long it took, in seconds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "it did not happen in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


class WorkerProcess:
    """`plane_worker.py` as a process. Its lines of output say what happened to it."""

    def __init__(self, store: Path, *args: str, **environ: str) -> None:
        script = Path(__file__).with_name("plane_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *args],
            env={**os.environ, "DYN_FILE_KV": str(store), "DYN_DISCOVERY_BACKEND": "file", **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    async def line(self, timeout_s: float = 20.0) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    async def wait(self, timeout_s: float = 20.0) -> int:
        """Its exit status."""
        return await asyncio.to_thread(self.process.wait, timeout_s)

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


async def dial(worker: DistributedRuntime) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a worker's listener, of somebody who has said nothing yet."""
    host, _, port = worker.server.host_port.rpartition(":")
    return await asyncio.open_connection(host, int(port))
