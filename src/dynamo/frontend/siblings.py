"""How do the processes that share one port answer as one?

Each has a socket of its own beside the shared one (`Share.inner`, an abstract Unix address: no file, nobody from
another machine). There it shows what it has counted itself and takes the settings that were made at another process.
`/metrics` asks all of them and labels each series with the process that counted it, so that sums are right and a
process that begins anew is a counter that begins anew.
"""

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from dynamo.frontend.http1 import HttpServer, Request, Sent
from dynamo.frontend.metrics import FrontendMetrics
from dynamo.frontend.models import ModelRegistry, Settings
from dynamo.frontend.server import answer
from dynamo.runtime.metrics import CONTENT_TYPE

log = logging.getLogger(__name__)

LABEL = "http_worker"
UP = "http_worker_up"
ASK_S = 1.0  # a process that needs longer to say what it has counted hangs, and is reported so
MAX_BODY_BYTES = 1 << 20  # of settings
METRICS_PATH, SETTINGS_PATH = "/metrics", "/settings"


class Share(NamedTuple):
    """The part that one process has in a port. `siblings`: the inner addresses of all, by number."""

    number: int
    listening: Sequence[socket.socket]
    inner: socket.socket
    siblings: Sequence[str]


class Siblings:
    """One process's side of it."""

    def __init__(self, share: Share, metrics: FrontendMetrics, prefix: str, models: ModelRegistry) -> None:
        self._share = share
        self._metrics = metrics
        self._up = f"{prefix}_{UP}"
        self._models = models
        self._http: HttpServer | None = None
        self._listening: asyncio.Server | None = None

    async def start(self) -> None:
        """Take over what was set at the others, and answer them from now on."""
        for number, said in (await self._ask_others("GET", SETTINGS_PATH)).items():
            if said is not None and self._adopt(said, number):
                break
        self._http = HttpServer(self._answer, MAX_BODY_BYTES)
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_unix_server(self._http, sock=self._share.inner)

    async def close(self) -> None:
        """Answer the others no more."""
        if self._listening is not None and self._http is not None:
            self._listening.close()
            await self._http.shutdown(ASK_S)
        self._listening = self._http = None

    async def metrics(self) -> bytes:
        """What all processes have counted, in Prometheus' text format."""
        others = await self._ask_others("GET", METRICS_PATH)
        texts = {number: said for number, said in others.items() if said is not None}
        texts[self._share.number] = self._metrics.render()
        up = [f"# HELP {self._up} Whether this process of those that share the port answers\n# TYPE {self._up} gauge"]
        up += [f'{self._up}{{{LABEL}="{number}"}} {number in texts:d}' for number in range(len(self._share.siblings))]
        return merged(texts) + "\n".join(up).encode() + b"\n"

    async def tell_settings(self) -> None:
        """Let all have the settings that were just made here."""
        said = await self._ask_others("POST", SETTINGS_PATH, msgspec.json.encode(self._models.settings))
        if missed := [number for number, word in said.items() if word is None]:
            log.warning("settings did not reach processes %s of this port; one that begins anew asks for them", missed)

    async def _ask_others(self, method: str, path: str, body: bytes = b"") -> dict[int, bytes | None]:
        """What each of the others says, None if it does not."""
        others = [number for number in range(len(self._share.siblings)) if number != self._share.number]
        said = await asyncio.gather(*(self._ask(self._share.siblings[number], method, path, body) for number in others))
        return dict(zip(others, said, strict=True))

    async def _ask(self, address: str, method: str, path: str, body: bytes) -> bytes | None:
        try:
            async with asyncio.timeout(ASK_S):
                return await _exchange(address, method, path, body)
        except (OSError, TimeoutError, ValueError):
            return None

    async def _answer(self, request: Request) -> Sent:
        """A question of another process."""
        if request.path == METRICS_PATH:
            return answer(request, 200, self._metrics.render(), CONTENT_TYPE, close=True)
        if request.method == "POST":
            ok = self._adopt(request.body, None)
            return answer(request, 200 if ok else 400, b"", close=True)
        return answer(request, 200, msgspec.json.encode(self._models.settings), close=True)

    def _adopt(self, said: bytes, number: int | None) -> bool:
        try:
            settings = msgspec.json.decode(said, type=Settings)
        except msgspec.DecodeError as e:  # of another version, while one replaces the other
            log.warning("settings of process %s of this port are not understood: %s", number, e)
            return False
        self._models.adopt(settings)
        return True


async def _exchange(address: str, method: str, path: str, body: bytes) -> bytes:
    """One request and the body of its answer. Raises OSError, ValueError if it is no success."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(address)  # at once, or BlockingIOError where too many wait already
        reader, writer = await asyncio.open_unix_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: sibling\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        said = await reader.read(-1)
    finally:
        writer.close()
    head_said, _, content = said.partition(b"\r\n\r\n")
    if not head_said.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"{path}: {head_said[:40]!r}")
    return content


def merged(texts: Mapping[int, bytes]) -> bytes:
    """Texts of several processes as one: each family once, each series with its process's number."""
    families: dict[str, list[str]] = {}
    for number, text in sorted(texts.items()):
        label = f'{LABEL}="{number}"'
        lines: list[str] = []
        known = False
        for line in text.decode().splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                known = name in families
                lines = families.setdefault(name, [])
            if not line.startswith("#"):
                lines.append(_labelled(line, label))
            elif not known:
                lines.append(line)
    return b"".join(("\n".join(lines) + "\n").encode() for lines in families.values())


def _labelled(line: str, label: str) -> str:
    """A sample with one more label."""
    name, brace, rest = line.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"
