"""How does a caller send a request to an endpoint, and read the answer?

Two faces on one mechanism: `Client.start` pushes into a sink, with no task; `generate`, `round_robin`,
`direct` … give an async iterator, itself a sink.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from dynamo.runtime import wire
from dynamo.runtime.annotated import Annotated
from dynamo.runtime.cards import ids_by_runtime_data
from dynamo.runtime.connection import Call, ConnectionPool
from dynamo.runtime.context import TIME_IS_OVER, CancelLevel, Context
from dynamo.runtime.errors import (
    Cancelled,
    CannotConnect,
    ConnectionTimeout,
    DeadlineExceeded,
    DynamoException,
    WorkerUnavailable,
)
from dynamo.runtime.instances import Instance, InstanceSet, Target
from dynamo.runtime.selection import Chooser, RouterMode
from dynamo.runtime.streams import StreamSink

PAUSE_BYTES = 1 << 20  # an iterator that nobody reads asks its worker to wait from here on ...
RESUME_BYTES = 1 << 18  # ... until this little is left
MAX_UNREAD_BYTES = 64 << 20  # a worker that pushes on regardless loses the stream


class Client:
    """Sends requests to the instances of one endpoint."""

    def __init__(self, instances: InstanceSet, pool: ConnectionPool, mode: RouterMode = RouterMode.RoundRobin) -> None:
        self._set = instances
        self._pool = pool
        self._mode = mode
        self._chooser = Chooser()

    def __repr__(self) -> str:
        return f"Client({self._set.address}, {len(self._set.targets)} instances, {self._mode.value})"

    # --- who is there

    def instance_ids(self) -> list[int]:
        """All live instances, by rising id."""
        return sorted(self._set.targets)

    def endpoint_ids(self) -> list[int]:
        """The name of `instance_ids` in the first generation of this interface."""
        return self.instance_ids()

    def available_ids(self) -> list[int]:
        """The live instances without those that failed in the last seconds or are leaving."""
        return [target.instance_id for target in self._set.available]

    def instances(self) -> list[Instance]:
        """The discovery records of all live instances."""
        return [target.instance for _, target in sorted(self._set.targets.items())]

    async def wait_for_instances(self, timeout_s: float | None = None) -> list[int]:
        """Wait until there is an instance to send to. Without `timeout_s` it waits as long as its caller does.

        Raises:
            ConnectionTimeout: none came within `timeout_s`.
        """
        try:
            await self._set.wait_available(timeout_s)
        except TimeoutError:
            raise ConnectionTimeout(f"no instance of {self._set.address} came within {timeout_s:g} s") from None
        return self.instance_ids()

    async def wait_for_endpoints(self, timeout_s: float | None = None) -> list[int]:
        """The name of `wait_for_instances` in the first generation of this interface."""
        return await self.wait_for_instances(timeout_s)

    async def wait_for_instances_by_runtime_data(
        self, key: str, value: Any, min_count: int = 1, timeout_s: float | None = None
    ) -> list[int]:
        """Wait for `min_count` instances whose model card has `runtime_config.runtime_data[key] == value`.

        Raises:
            ConnectionTimeout: there were fewer for `timeout_s`.
        """
        return await ids_by_runtime_data(
            self._set.discovery, self._set.address, self.instance_ids, key, value, min_count, timeout_s
        )

    async def wait_for_instance_by_runtime_data(self, key: str, value: Any, timeout_s: float | None = None) -> int:
        """The first instance that `wait_for_instances_by_runtime_data` finds."""
        return (await self.wait_for_instances_by_runtime_data(key, value, 1, timeout_s))[0]

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every change of the live or available instances."""
        self._set.on_change(callback)

    def off_change(self, callback: Callable[[], None]) -> None:
        """Forget a callback given to `on_change`."""
        self._set.off_change(callback)

    # --- choosing

    def pick(self, mode: RouterMode | None = None) -> int:
        """The id of an available instance. Raises WorkerUnavailable."""
        return self._pick(mode or self._mode).instance_id

    def _pick(self, mode: RouterMode) -> Target:
        available = self._set.available
        if not available:
            known = len(self._set.targets)
            why = f"its {known} instance(s) failed or are leaving" if known else "it has no instance"
            raise WorkerUnavailable(f"no worker for {self._set.address}: {why}")
        return self._chooser.choose(mode, available)

    def inflight(self, instance_id: int) -> int:
        """Requests of this process in flight at an instance; 0 for unknown ones."""
        target = self._set.targets.get(instance_id)
        return target.inflight if target is not None else 0

    def report_failure(self, instance_id: int) -> None:
        """Leave an instance out of choices for DYN_RUNTIME_INHIBITED_DURATION_SECS."""
        self._set.inhibit(instance_id)

    # --- sending

    def start(
        self,
        instance_id: int,
        request: object,
        sink: StreamSink,
        context: Context,
        headers: dict[str, str] | None = None,
    ) -> Call | None:
        """Send `request` to an instance; the answer is pushed into `sink`, from later turns of the loop.

        Anything that msgspec can encode is a request; a `msgspec.Raw` is sent as it is. All errors go to
        `sink.on_error`. Cancel through `context`; after a kill the sink hears nothing more.
        """
        try:
            target = self._set.targets.get(instance_id)
            if target is None:
                raise CannotConnect(f"instance {instance_id:x} of {self._set.address} is not there")
            return self._pool.get(target.host_port).call(target, request, sink, context, headers)
        except DynamoException as e:
            asyncio.get_running_loop().call_soon(_refuse, sink, e)
            return None

    async def generate(
        self, request: object, annotated: bool = True, context: Context | None = None
    ) -> "ResponseIterator":
        """Send to an instance chosen by the client's router mode. Raises WorkerUnavailable, InvalidArgument."""
        return self._send(self._pick(self._mode), request, annotated, context)

    async def random(
        self, request: object, annotated: bool = True, context: Context | None = None
    ) -> "ResponseIterator":
        """Send to a random instance."""
        return self._send(self._pick(RouterMode.Random), request, annotated, context)

    async def round_robin(
        self, request: object, annotated: bool = True, context: Context | None = None
    ) -> "ResponseIterator":
        """Send to the next instance in turn."""
        return self._send(self._pick(RouterMode.RoundRobin), request, annotated, context)

    async def power_of_two(
        self, request: object, annotated: bool = True, context: Context | None = None
    ) -> "ResponseIterator":
        """Send to the less loaded of two random instances."""
        return self._send(self._pick(RouterMode.PowerOfTwoChoices), request, annotated, context)

    async def least_loaded(
        self, request: object, annotated: bool = True, context: Context | None = None
    ) -> "ResponseIterator":
        """Send to the instance with the fewest requests in flight from here."""
        return self._send(self._pick(RouterMode.LeastLoaded), request, annotated, context)

    async def direct(
        self, request: object, instance_id: int, annotated: bool = True, context: Context | None = None
    ) -> "ResponseIterator":
        """Send to one instance, also if it was left out of choices. Raises CannotConnect if it is not there."""
        target = self._set.targets.get(instance_id)
        if target is None:
            raise CannotConnect(f"instance {instance_id:x} of {self._set.address} is not there")
        return self._send(target, request, annotated, context)

    async def bidirectional(
        self,
        requests: AsyncIterator[Any],
        instance_id: int | None = None,
        annotated: bool = True,
        context: Context | None = None,
    ) -> "ResponseIterator":
        """Open a stream of requests to a bidirectional endpoint; answers come while requests still go out."""
        target = self._set.targets.get(instance_id) if instance_id is not None else self._pick(self._mode)
        if target is None:
            raise CannotConnect(f"instance {instance_id:x} of {self._set.address} is not there")
        responses = self._send(target, None, annotated, context)
        responses.pump(requests)
        return responses

    def _send(self, target: Target, request: object, annotated: bool, context: Context | None) -> "ResponseIterator":
        sink = _Buffer(context or Context())
        sink.call = self._pool.get(target.host_port).call(target, request, sink, sink.context)
        return ResponseIterator(sink, annotated)


def _refuse(sink: StreamSink, error: DynamoException) -> None:
    sink.on_error(error)
    sink.flush()


class _Buffer:
    """The sink behind an iterator: holds what has come and is not read yet."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.call: Call | None = None
        self.items: deque[msgspec.Raw] = deque()
        self.finished = False
        self.error: DynamoException | None = None
        self.go = asyncio.Event()
        self.go.set()
        self._unread_bytes = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        left_s = context.time_left()
        if left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._time_is_over)
        context.watch(self._on_cancel)

    def on_item(self, item: msgspec.Raw) -> None:
        size = memoryview(item).nbytes
        self._unread_bytes += size
        self.items.append(item)
        if self._unread_bytes > PAUSE_BYTES and self.call is not None:
            if self._unread_bytes > MAX_UNREAD_BYTES:
                self.call.cancel("kill")
                self.on_error(Cancelled(f"{self._unread_bytes} bytes of the stream were left unread"))
                self.items.clear()
            elif not self._paused:
                self._paused = True
                self.call.flow(False)

    def take(self) -> msgspec.Raw:
        """The oldest item."""
        item = self.items.popleft()
        self._unread_bytes -= memoryview(item).nbytes
        if self._paused and self._unread_bytes <= RESUME_BYTES and self.call is not None:
            self._paused = False
            if not self.finished:
                self.call.flow(True)
        return item

    def on_end(self) -> None:
        self._finish(None)

    def on_error(self, error: DynamoException) -> None:
        self._finish(error)
        self.flush()

    def on_flow(self, go: bool) -> None:
        """The worker of a bidirectional stream asks to wait, or to go on."""
        if go:
            self.go.set()
        else:
            self.go.clear()

    def flush(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _on_cancel(self, level: CancelLevel) -> None:
        if level == "kill" and not self.finished:
            self.items.clear()
            self._finish(Cancelled("the request was killed"))
            self.flush()

    def _time_is_over(self) -> None:
        """Nobody waits for the rest; the worker has its own clock, but may be silent."""
        if self.call is not None:
            self.call.cancel("kill")
        self.on_error(DeadlineExceeded(TIME_IS_OVER))

    def _finish(self, error: DynamoException | None) -> None:
        if not self.finished:
            self.finished = True
            if self._timer is not None:
                self._timer.cancel()
            self.error = error
            self.go.set()
            self.context.unwatch(self._on_cancel)

    async def wait(self) -> None:
        """Until there is something to look at."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter  # ends with the connection, which pings bound


class ResponseIterator(AsyncIterator[Any]):
    """The answer of one request. Dropping it before its end cancels the request."""

    def __init__(self, buffer: _Buffer, annotated: bool) -> None:
        self._buffer = buffer
        self._annotated = annotated
        self._loop = asyncio.get_running_loop()
        self._pump: asyncio.Task[None] | None = None

    async def __anext__(self) -> Any:
        buffer = self._buffer
        while not buffer.items:
            if buffer.finished:
                if buffer.error is not None:
                    error, buffer.error = buffer.error, None
                    raise error
                raise StopAsyncIteration
            await buffer.wait()
        item = Annotated.from_wire(wire.decode(buffer.take()))
        return item if self._annotated else item.data()

    async def aclose(self) -> None:
        """Leave the stream; the worker drops the request."""
        self._leave()

    def pump(self, requests: AsyncIterator[Any]) -> None:
        """Send `requests` as they come, for a bidirectional stream."""
        self._pump = self._loop.create_task(_pump(requests, self._buffer))

    def _leave(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
        buffer = self._buffer
        if not buffer.finished and buffer.call is not None:
            buffer._finish(None)
            buffer.call.cancel("kill")
        buffer.items.clear()

    def __del__(self) -> None:
        if not self._buffer.finished and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._buffer_leaver())

    def _buffer_leaver(self) -> Callable[[], None]:
        buffer, pump = self._buffer, self._pump

        def leave() -> None:
            if pump is not None:
                pump.cancel()
            if not buffer.finished and buffer.call is not None:
                buffer._finish(None)
                buffer.call.cancel("kill")

        return leave


async def _pump(requests: AsyncIterator[Any], buffer: _Buffer) -> None:
    call = buffer.call
    assert call is not None
    call.on_flow = buffer.on_flow
    try:
        async for request in requests:
            await buffer.go.wait()  # set at the latest when the stream ends
            if buffer.finished:
                return
            call.data(request)
        call.end()
    except DynamoException as e:
        call.cancel("kill")
        buffer.on_error(e)
