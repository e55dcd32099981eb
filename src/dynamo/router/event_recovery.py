"""What did a worker say that was not heard? Ask it.

One question on the request plane, its answer in parts. Everything is bounded: time, size, and how many workers are
asked at once.
"""

import asyncio
from collections.abc import Callable

import msgspec

from dynamo.router.recovery import KV_EVENTS_TOPIC, Ask, Retold, SourceRecord
from dynamo.runtime.connection import ConnectionPool
from dynamo.runtime.context import Context
from dynamo.runtime.errors import UNDECODABLE, DynamoException, StreamIncomplete
from dynamo.runtime.instances import Target, parse_instance

ANSWER_TIMEOUT_S = 10.0  # a cache of a million blocks is told in 3 s
MAX_ANSWER_BYTES = 256 << 20  # some six million blocks


def publisher_of(key: str) -> int | None:
    """The publisher's id, if a discovery key is of a source of KV events."""
    head, _, tail = key.rpartition("/")
    if not head.endswith(f"/topic/{KV_EVENTS_TOPIC}"):
        return None
    try:
        return int(tail, 16)
    except ValueError:
        return None


def read_source(publisher_id: int, value: bytes) -> tuple[SourceRecord, Target | None]:
    """A source's record, and where to ask it, if it can be asked. Raises ValueError for anything else."""
    try:
        record = msgspec.json.decode(value, type=SourceRecord)
        if record.publisher_id != publisher_id:
            raise ValueError(f"its publisher_id {record.publisher_id:x} does not fit its key")
        target = record.metadata.recovery_target
        if target is None:
            return record, None
        return record, parse_instance(f"/{target['instance_id']:x}", msgspec.json.encode(target), _ignore)
    except (*UNDECODABLE, KeyError, TypeError) as e:
        raise ValueError(f"it is not a source's record: {e}") from e


def _ignore(instance_id: int) -> None:
    """An endpoint that only this feed asks needs no inhibition: the feed waits longer each time."""


class _Answer:
    """Collects the parts of an answer. See `StreamSink`."""

    def __init__(self) -> None:
        self.parts: list[msgspec.Raw] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.abort: Callable[[], None] = lambda: None
        self._bytes = 0

    def on_item(self, item: msgspec.Raw) -> None:
        self._bytes += memoryview(item).nbytes
        if self._bytes > MAX_ANSWER_BYTES:
            self.on_error(StreamIncomplete(f"the answer has more than {MAX_ANSWER_BYTES} bytes"))
            self.abort()
        else:
            self.parts.append(item)

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def on_error(self, error: DynamoException) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def flush(self) -> None:
        """Nothing is passed on before the end."""


async def ask(pool: ConnectionPool, target: Target, from_event_id: int | None) -> list[Retold]:
    """A worker's answer, all parts of it.

    Raises:
        DynamoException: it cannot be reached, or failed.
        TimeoutError: it did not answer within ANSWER_TIMEOUT_S.
        ValueError: it answered something else.
    """
    answer, context = _Answer(), Context()
    call = pool.get(target.host_port).call(target, Ask(from_event_id), answer, context)
    answer.abort = lambda: call.cancel("kill")
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await answer.done
    except TimeoutError:
        raise TimeoutError(f"it did not answer within {ANSWER_TIMEOUT_S:g} s") from None
    finally:
        if not answer.done.done() or answer.done.cancelled():
            call.cancel("kill")
    parts = [msgspec.msgpack.decode(part, type=Retold) for part in answer.parts]
    if not parts or len({(part.kind, part.next_event_id) for part in parts}) != 1:
        raise ValueError("its answer is empty or contradicts itself")
    return parts
