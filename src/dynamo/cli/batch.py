"""How is a file of prompts answered, each line once, whatever happens in between?

Input lines are either `{"text": "..."}` or OpenAI's batch form `{"custom_id", "method", "url", "body"}`. Results go to
`output.jsonl` beside the input, in the order of the input; until all are there they are kept in a journal
(`dynamo.cli.journal`), from which a second run goes on. A line that fails is recorded as failed and stops nothing.
"""

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from dynamo.cli.client import error_message
from dynamo.cli.journal import Journal, JournalError, Work

OUTPUT_NAME = "output.jsonl"
SYNC_S = 1.0  # between two fsyncs of the journal: what a power failure may cost
ATTEMPTS = 6  # at a line that met an overloaded or absent worker: waits of 0.5, 1, 2, 4, 8 s, about a worker's restart
FIRST_WAIT_S = 0.5
RETRIED = {429, 502, 503, 504, 529}
READ_TIMEOUT_S = 3600.0  # for one answer; unary answers come whole, after all their tokens
ROUTES = ("/v1/chat/completions", "/v1/completions")


class BatchError(Exception):
    """The batch cannot start; the message says what to do."""


class Settings(msgspec.Struct, frozen=True):
    """How to ask. `fields` go into the requests of `{"text"}` lines."""

    base_url: str
    model: str
    concurrency: int
    fields: dict[str, Any] = {}


class Summary(msgspec.Struct):
    """What a run did; `resumed` lines were there before it."""

    lines: int = 0
    resumed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0


Progress = Callable[[int, int, int], None]
"""Called with (lines done, lines in all, output tokens so far) after each line."""


def output_path(source: Path) -> Path:
    """Where the results of `source` go."""
    return source.with_name(OUTPUT_NAME)


def journal_path(source: Path) -> Path:
    """Where they are kept until all are there."""
    return source.with_name(OUTPUT_NAME + ".journal")


def check_source(source: Path, overwrite: bool) -> None:
    """Whether the batch may run at all; asked before anything is started.

    Raises:
        BatchError: no such file, or its output exists and no run was interrupted.
    """
    if not source.is_file():
        raise BatchError(f"in=batch: there is no file {source}")
    output = output_path(source)
    if output == source:
        raise BatchError(f"in=batch: {source} is where the results would go; rename the input")
    if output.exists() and not journal_path(source).exists() and not overwrite:
        raise BatchError(f"{output} exists: move it away, or say --overwrite")


async def run_batch(source: Path, settings: Settings, progress: Progress) -> Summary:
    """Answer every line of `source` that has no result yet, then write the output.

    Raises:
        BatchError: the journal belongs to other work, or is in use.
        OSError: the disk is full, or a file cannot be read.
    """
    digest, lines = await asyncio.to_thread(_measure, source)
    work = Work(digest, lines, {"model": settings.model, "fields": settings.fields})
    try:
        journal = Journal(journal_path(source), work)
    except JournalError as e:
        raise BatchError(str(e)) from e
    try:
        summary = await _Run(source, settings, journal, lines, progress).run()
        await asyncio.to_thread(journal.write_output, output_path(source))
    finally:
        journal.close()
    return summary


def _measure(source: Path) -> tuple[str, int]:
    """SHA-256 of the file and its number of lines that are not blank."""
    digest, lines = hashlib.sha256(), 0
    with source.open("rb") as f:
        for raw in f:
            digest.update(raw)
            lines += bool(raw.strip())
    return digest.hexdigest(), lines


def _pending(source: Path, journal: Journal) -> Iterator[tuple[int, bytes]]:
    with source.open("rb") as f:
        for index, raw in enumerate(line for line in f if line.strip()):
            if not journal.has(index):
                yield index, raw


class _Run:
    def __init__(self, source: Path, settings: Settings, journal: Journal, lines: int, progress: Progress) -> None:
        self.settings = settings
        self.journal = journal
        self.progress = progress
        self.summary = Summary(lines=lines, resumed=journal.done)
        self._pending = _pending(source, journal)

    async def run(self) -> Summary:
        started = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=READ_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=self.settings.concurrency)
        async with aiohttp.ClientSession(self.settings.base_url, timeout=timeout, connector=connector) as session:
            syncing = asyncio.create_task(self._sync())
            try:
                await _all([self._work(session) for _ in range(self.settings.concurrency)])
            finally:
                syncing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await syncing
                await asyncio.to_thread(self.journal.sync)
        self.summary.seconds = time.monotonic() - started
        return self.summary

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self.journal.sync)

    async def _work(self, session: aiohttp.ClientSession) -> None:
        for index, raw in self._pending:  # one iterator for all: each takes the next line when it is free
            result = await self._answer(session, index, raw)
            self.journal.append(index, result)
            self.progress(self.journal.done, self.summary.lines, self.summary.completion_tokens)

    async def _answer(self, session: aiohttp.ClientSession, index: int, raw: bytes) -> dict[str, Any]:
        started = time.monotonic()
        line: dict[str, Any] = {}
        try:
            line = _parse(raw)
            url, body = self._request(line)
            status, request_id, answer = await _post(session, url, body)
        except (ValueError, aiohttp.ClientError, TimeoutError) as e:
            self.summary.failed += 1
            return _failed(line, index, f"{type(e).__name__}: {e}" if not isinstance(e, ValueError) else str(e))
        if status != 200:
            self.summary.failed += 1
        elif isinstance(answer, dict):
            usage = answer.get("usage") or {}
            self.summary.prompt_tokens += usage.get("prompt_tokens") or 0
            self.summary.completion_tokens += usage.get("completion_tokens") or 0
        if "text" in line:
            return _text_result(line, index, status, answer, time.monotonic() - started)
        response = {"status_code": status, "request_id": request_id, "body": answer}
        return {"id": f"batch_req_{index + 1}", "custom_id": line.get("custom_id"), "response": response, "error": None}

    def _request(self, line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if "text" in line:
            messages = [{"role": "user", "content": line["text"]}]
            return ROUTES[0], {"model": self.settings.model, "messages": messages, **self.settings.fields}
        url = line.get("url", ROUTES[0])
        if url not in ROUTES:
            raise ValueError(f"url {url!r}: choose one of {', '.join(ROUTES)}")
        return url, {"model": self.settings.model, **line["body"], "stream": False}


async def _all(workers: list[Coroutine[Any, Any, None]]) -> None:
    """Run them together; the first error ends the others and is raised as itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker)
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from None


def _parse(raw: bytes) -> dict[str, Any]:
    line = json.loads(raw)
    if isinstance(line, dict) and (isinstance(line.get("text"), str) or isinstance(line.get("body"), dict)):
        return line
    raise ValueError('a line is {"text": "..."} or {"custom_id": "...", "body": {...}}')


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, str | None, Any]:
    """Ask until it is neither overloaded nor gone, `ATTEMPTS` times at most."""
    for attempt in range(ATTEMPTS):
        last = attempt == ATTEMPTS - 1
        try:
            async with session.post(url, json=body) as response:
                raw = await response.read()
                if response.status not in RETRIED or last:
                    return response.status, response.headers.get("x-request-id"), _decoded(raw)
        except (aiohttp.ClientConnectionError, TimeoutError):
            if last:
                raise
        await asyncio.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


def _text_result(line: dict[str, Any], index: int, status: int, answer: Any, seconds: float) -> dict[str, Any]:
    if status != 200:
        return _failed(line, index, error_message(json.dumps(answer).encode()), status)
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    return {
        **line,
        "response": choice["message"]["content"],
        "tokens_in": usage.get("prompt_tokens", 0),
        "tokens_out": usage.get("completion_tokens", 0),
        "elapsed_ms": round(seconds * 1000),
        "finish_reason": choice.get("finish_reason"),
    }


def _failed(line: dict[str, Any], index: int, message: str, status: int | None = None) -> dict[str, Any]:
    error = {"message": message, "line": index + 1, **({"status_code": status} if status else {})}
    if "body" in line:
        return {"id": f"batch_req_{index + 1}", "custom_id": line.get("custom_id"), "response": None, "error": error}
    return {**line, "response": None, "error": error}
