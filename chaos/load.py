"""What do clients see while things break? They ask steadily, and know every right answer.

A client does what any client behind a balancer does: where no answer has begun, it tries another frontend, for a
while; once one has begun, it takes what comes. Every request ends as one of `OUTCOMES`.
"""

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from chaos.questions import Question

Outcome = Literal["right", "refused", "cut", "wrong", "lost", "hung"]
OUTCOMES: dict[Outcome, str] = {
    "right": "the right answer, whole",
    "refused": "a clear error that says it may be tried again (429, 503, 504, 529), also in mid-answer",
    "cut": "the connection to the frontend broke in mid-answer, as the client sees",
    "wrong": "another text, another count, or an error that blames the request",
    "lost": "an answer that ended in order, but neither whole nor with an error",
    "hung": "nothing for longer than the patience of a client",
}
RETRYABLE = frozenset((429, 503, 504, 529))

CONNECT_S = 3.0
PATIENCE_S = 40.0  # without a byte. The longest that is promised: 8 s until a silent worker is given up, 10 s until
# another is there, and as long again where the fault lasts; then what TCP's last back-off adds
TRIES_S = 30.0  # so long a client looks for a frontend that begins to answer
PAUSE_S = 0.1  # between two tries


@dataclass
class Answer:
    """What became of one request."""

    number: int
    stream: bool
    asked: float
    outcome: Outcome = "lost"
    detail: str = ""
    frontend: str = ""
    tries: int = 0
    ended: float = 0.0
    worst_pause_s: float = 0.0
    text: str = ""
    began: bool = False
    again: Outcome | None = None
    """What became of it when the client asked anew, once it had been cut."""


class Wrong(Exception):  # noqa: N818 - it is an outcome
    """The answer is not the one that is right."""


class Refused(Exception):  # noqa: N818 - it is an outcome
    """A clear error that says it may be tried again."""


@dataclass
class _Reading:
    """One answer as it comes."""

    answer: Answer
    question: Question
    last: float
    usage: dict[str, Any] | None = None
    finish: str | None = None
    done: bool = False

    def heard(self) -> None:
        now = time.monotonic()
        self.answer.worst_pause_s = max(self.answer.worst_pause_s, now - self.last)
        self.last = now

    def event(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
            return
        value = json.loads(line[6:])
        if "error" in value:
            _error(value.get("code"), value["error"]["message"])
        self.usage = value.get("usage") or self.usage
        for choice in value.get("choices", ()):
            self.answer.text += choice["delta"].get("content") or ""
            self.finish = choice.get("finish_reason") or self.finish
        if not self.question.text.startswith(self.answer.text):
            raise Wrong(f"token after token it became {self.answer.text[-60:]!r}")

    def whole(self) -> None:
        """The body ended in order: is all of it there? Raises Wrong."""
        answer, question = self.answer, self.question
        if not self.done:
            answer.outcome = "lost"
            return
        if answer.text != question.text:
            raise Wrong(f"{len(answer.text)} characters instead of {len(question.text)}, ending {answer.text[-40:]!r}")
        counts = self.usage and (self.usage["prompt_tokens"], self.usage["completion_tokens"])
        if counts != (question.prompt_tokens, question.tokens) or self.finish != "length":
            raise Wrong(f"usage {self.usage}, finish reason {self.finish}")
        answer.outcome = "right"


def _error(status: int | None, message: str) -> None:
    if status in RETRYABLE:
        raise Refused(f"{status} {message}")
    raise Wrong(f"error {status} {message}")


class Client:
    """Asks one question after the other. `urls`: frontends by name, of which it begins with another each time."""

    def __init__(self, urls: dict[str, str], first: int = 0) -> None:
        self._urls = urls
        self._turn = itertools.cycle(list(urls)[first % len(urls) :] + list(urls)[: first % len(urls)])

    async def ask(self, session: aiohttp.ClientSession, question: Question, slow: "Slow | None" = None) -> Answer:
        """Ask until an answer begins; read it to its end."""
        answer = Answer(question.number, question.body["stream"], time.monotonic())
        reading = _Reading(answer, question, answer.asked)
        while True:
            answer.frontend = next(self._turn)
            answer.tries += 1
            try:
                await self._try(session, reading, slow)
                break
            except aiohttp.SocketTimeoutError:
                answer.outcome, answer.detail = "hung", f"nothing for {PATIENCE_S:g} s"
                break
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, Refused) as e:
                answer.outcome = "refused" if isinstance(e, Refused) or not answer.began else "cut"
                answer.detail = f"{type(e).__name__}: {e}"
                if answer.began or time.monotonic() - answer.asked > TRIES_S:
                    break
                await asyncio.sleep(PAUSE_S)
            except (Wrong, aiohttp.ContentTypeError, ValueError, KeyError) as e:
                answer.outcome, answer.detail = "wrong", f"{type(e).__name__}: {e}"
                break
        answer.ended = time.monotonic()
        if answer.outcome != "right":
            answer.worst_pause_s = max(answer.worst_pause_s, answer.ended - reading.last)
        return answer

    async def _try(self, session: aiohttp.ClientSession, reading: _Reading, slow: "Slow | None") -> None:
        url = f"{self._urls[reading.answer.frontend]}/v1/chat/completions"
        async with session.post(url, json=reading.question.body) as response:
            if response.status != 200:
                body = await response.json()
                _error(response.status, body["error"]["message"])
            if not reading.answer.stream:
                body = json.loads(await response.read())
                reading.answer.began = True
                reading.heard()
                reading.usage, choice = body["usage"], body["choices"][0]
                reading.answer.text, reading.finish = choice["message"]["content"], choice["finish_reason"]
                reading.done = True
            else:
                reading.answer.began = True
                async for raw in response.content:
                    reading.heard()
                    line = raw.decode().strip()
                    if line.startswith("data: "):
                        reading.event(line)
                    if slow is not None:
                        await slow.pause(len(raw))
            reading.whole()


@dataclass
class Slow:
    """A reader that takes so many bytes a second."""

    bytes_per_s: float
    _owed_s: float = 0.0

    async def pause(self, size: int) -> None:
        self._owed_s += size / self.bytes_per_s
        if self._owed_s > 0.05:
            owed, self._owed_s = self._owed_s, 0.0
            await asyncio.sleep(owed)


def open_session(receive_bytes: int | None = None) -> aiohttp.ClientSession:
    """What clients talk through. `receive_bytes`: of a socket's buffer, for readers that are to be slow."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=PATIENCE_S)
    if receive_bytes is None:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)

    def small(address: Any) -> socket.socket:
        family, kind, protocol = address[:3]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        return made

    connector = aiohttp.TCPConnector(limit=0, socket_factory=small, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=4096)


@dataclass
class Load:
    """Clients that ask, one question each at a time, until they are told to stop."""

    urls: dict[str, str]
    questions: Sequence[Question]
    clients: int = 12
    answers: list[Answer] = field(default_factory=list)
    on_answer: Callable[[Answer], None] | None = None
    _stopping: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        self._session = open_session()
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.clients)]

    async def _client(self, number: int) -> None:
        assert self._session is not None
        client = Client(self.urls, number)
        for at in itertools.count(number, self.clients):
            if self._stopping:
                return
            question = self.questions[at % len(self.questions)]
            answer = await client.ask(self._session, question)
            self.add(answer)
            if answer.outcome == "cut":  # as its user would: this is a request of its own
                anew = await client.ask(self._session, question)
                answer.again = anew.outcome
                self.add(anew)

    def add(self, answer: Answer) -> None:
        """One more request has ended."""
        self.answers.append(answer)
        if self.on_answer is not None:
            self.on_answer(answer)

    async def stop(self) -> None:
        """Let every client finish the question it asks; raises what went wrong with a client itself."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        assert self._session is not None
        await self._session.close()
