"""A worker that does what a test says, and a client that shows every byte."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from dynamo.frontend.service import FrontendService
from dynamo.llm import ModelInput, ModelType, register_model
from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PreprocessedRequest, PromptTokensDetails
from dynamo.llm.tokenizer import Tokenizer
from dynamo.runtime import DistributedRuntime
from dynamo.runtime.component import ServedEndpoint
from dynamo.runtime.streams import ResponseStream

StartFrontend = Callable[..., Awaitable[FrontendService]]
StartWorker = Callable[..., Awaitable["ScriptedWorker"]]
Served = tuple[FrontendService, "ScriptedWorker"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PATIENCE_S = 10.0  # for anything a test waits for


class Taken:
    """One request at a worker. Text is given as text: the worker tokenizes it, one output a token."""

    def __init__(self, request: PreprocessedRequest, stream: ResponseStream, tokenizer: Tokenizer) -> None:
        self.request = request
        self.stream = stream
        self.context = stream.context
        self._tokenizer = tokenizer
        self.cancelled = asyncio.Event()
        stream.context.on_stop(self.cancelled.set)

    def send(self, **fields: Any) -> None:
        """One output with these fields of `EngineOutput`."""
        self.stream.send(EngineOutput(**fields))

    def say(self, text: str, index: int = 0) -> int:
        """Text, a token at a time. Gives back the number of tokens."""
        tokens = self._tokenizer.encode(text)
        for token in tokens:
            self.send(token_ids=[token], index=index)
        return len(tokens)

    def finish(self, reason: str = "stop", index: int = 0, cached: int | None = None) -> None:
        """The last output of a choice."""
        details = None if cached is None else PromptTokensDetails(cached)
        usage = None if cached is None else CompletionUsage(prompt_tokens_details=details)
        self.send(index=index, finish_reason=reason, completion_usage=usage)

    def answer(self, text: str, reason: str = "stop") -> int:
        """Say, finish and end."""
        count = self.say(text)
        self.finish(reason)
        self.stream.end()
        return count


class ScriptedWorker:
    """Takes requests and leaves the answers to the test; or answers all alike, once `auto` is set."""

    def __init__(self, runtime: DistributedRuntime) -> None:
        self.runtime = runtime
        self.requests: asyncio.Queue[Taken] = asyncio.Queue()
        self.auto: str | None = None
        self.answered = 0
        self._served: ServedEndpoint | None = None
        self._tokenizer: Tokenizer | None = None

    @property
    def instance_id(self) -> int:
        return self.runtime.instance_id

    async def start(
        self,
        directory: Path,
        model: str,
        endpoint: str = "dynamo.backend.generate",
        model_type: ModelType = ModelType.Chat | ModelType.Completions,
        serve: bool = True,
        **options: Any,
    ) -> None:
        self._tokenizer = Tokenizer.load(directory)
        self.endpoint = self.runtime.endpoint(endpoint)
        if serve:
            self._served = await self.endpoint.start_push_endpoint(self._take)
        await register_model(ModelInput.Tokens, model_type, self.endpoint, directory, model, **options)

    def _take(self, payload: msgspec.Raw, stream: ResponseStream) -> None:
        assert self._tokenizer is not None
        request = msgspec.msgpack.decode(payload, type=PreprocessedRequest)
        taken = Taken(request, stream, self._tokenizer)
        if self.auto is None:
            self.requests.put_nowait(taken)
            return
        self.answered += 1
        for index in range(request.sampling_options.n or 1):
            taken.say(self.auto, index)
            taken.finish(index=index)
        stream.end()

    async def take(self) -> Taken:
        """The next request that came."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.requests.get()

    async def leave(self) -> None:
        """Stop in order."""
        await self.runtime.close()

    async def die(self) -> None:
        """Break every connection at once, as a killed process does."""
        for connection in tuple(self.runtime.server.connections):
            connection.drop("the test kills this worker")


class Answer:
    """An HTTP response as it came."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes, chunks: list[bytes]) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.chunks = chunks

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[str]:
        """The server-sent events, whole."""
        assert self.body.endswith(b"\n\n"), self.body
        return self.body.decode().split("\n\n")[:-1]

    def data(self) -> list[Any]:
        """The JSON of every data event but [DONE]."""
        lines = [event.removeprefix("data: ") for event in self.events() if event.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def text(self, index: int = 0) -> str:
        """The text of one choice of a stream."""
        pieces = []
        for chunk in self.data():
            for choice in chunk["choices"]:
                if choice["index"] == index:
                    pieces.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")
        return "".join(pieces)


class Wire:
    """One client connection, in bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, limit: int = 1 << 16, **options: Any) -> "Wire":
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit, **options))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, path: str, body: object, headers: str = "", version: str = "1.1") -> None:
        """Send a request with a JSON body, or with a body of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send(
            f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )

    def get(self, path: str, method: str = "GET") -> None:
        self.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers, names in lower case."""
        async with asyncio.timeout(PATIENCE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode().split("\r\n")[:-2]
        pairs = (line.split(": ", 1) for line in lines)
        return int(first.split(" ")[1]), {name.lower(): value for name, value in pairs}

    async def chunk(self) -> bytes:
        """One chunk of a chunked body; empty at its end."""
        async with asyncio.timeout(PATIENCE_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def read_rest(self) -> bytes:
        """What is left of a chunked body."""
        pieces = []
        while chunk := await self.chunk():
            pieces.append(chunk)
        return b"".join(pieces)

    async def read(self, *, method: str = "POST") -> Answer:
        """A whole response."""
        status, headers = await self.head()
        chunks: list[bytes] = []
        async with asyncio.timeout(PATIENCE_S):
            if headers.get("transfer-encoding") == "chunked":
                while chunk := await self.chunk():
                    chunks.append(chunk)
                body = b"".join(chunks)
            elif method == "HEAD":
                body = b""
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
        return Answer(status, headers, body, chunks)

    async def closed(self) -> bool:
        """Whether the server has closed the connection."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read() == b""

    def close(self) -> None:
        self.writer.close()


def chat(content: str = "Hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


async def ask(port: int, path: str, body: object, headers: str = "") -> Answer:
    """One request on a connection of its own."""
    wire = await Wire.open(port)
    try:
        wire.post(path, body, headers)
        return await wire.read()
    finally:
        wire.close()


async def fetch(port: int, path: str, method: str = "GET") -> Answer:
    """One request without a body."""
    wire = await Wire.open(port)
    try:
        wire.get(path, method)
        return await wire.read(method=method)
    finally:
        wire.close()


async def model_ready(service: FrontendService, name: str, workers: int = 1) -> None:
    """Wait until a model is ready with so many workers."""
    changed = asyncio.Event()
    service.models.on_change(changed.set)
    async with asyncio.timeout(10):
        while True:
            changed.clear()
            model = service.models.get(name)
            if model is not None and model.ready and sum(s.worker_count for s in model.sets.values()) == workers:
                return
            await changed.wait()


async def model_gone(service: FrontendService, name: str) -> None:
    """Wait until nobody serves a model."""
    changed = asyncio.Event()
    service.models.on_change(changed.set)
    async with asyncio.timeout(10):
        while (model := service.models.get(name)) is not None and model.ready:
            changed.clear()
            await changed.wait()


async def changed(service: FrontendService, true: Callable[[], object]) -> None:
    """Wait until a condition on the registry holds."""
    event = asyncio.Event()
    service.models.on_change(event.set)
    async with asyncio.timeout(10):
        while not true():
            event.clear()
            await event.wait()
