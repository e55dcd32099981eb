"""Which requests came when, how long were they, and what did their prompts have in common?

A prompt is a row of block ids: equal ids at the same place mean equal text. Readers are generators that look one
request ahead, so a trace of any length takes no more memory than the requests under way.
"""

import csv
import heapq
import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import msgspec

TRACE_BLOCK = 512  # tokens a block id stands for in Mooncake's traces

Ids = Sequence[int]


class TraceError(ValueError):
    """A trace does not say what it must; names the file and the line."""


class TraceRequest(msgspec.Struct, kw_only=True):
    """One request of a workload. `arrival_ms` counts from the first; None comes `delay_ms` after the session's last
    turn has ended. `ids` name the prompt's blocks of `block_tokens` tokens; with `answer_ids` they go on and name the
    answer's too, so that the next turn finds it in the cache."""

    arrival_ms: float | None
    input_tokens: int
    output_tokens: int
    ids: Ids = ()
    block_tokens: int = TRACE_BLOCK
    session_id: str | None = None
    turn: int = 0
    delay_ms: float = 0.0
    answer_ids: bool = False


class SharedPrefixes:
    """Gives prompts without ids some: the first `ratio` of each is one of `groups` prefixes, the rest its own.

    `zipf` above 0 makes group k as likely as 1/k^zipf; at 0 all are equally likely and take turns.
    """

    def __init__(
        self, ratio: float = 0.0, groups: int = 0, *, zipf: float = 0.0, seed: int = 42, block_tokens: int = 64
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"shared_prefix_ratio must be between 0 and 1, got {ratio!r}")
        if groups < 0:
            raise ValueError(f"num_prefix_groups must not be negative, got {groups!r}")
        if zipf < 0:
            raise ValueError(f"zipf must not be negative, got {zipf!r}")
        self.block_tokens = block_tokens
        self._ratio = ratio if groups else 0.0
        self._groups = groups
        self._weights = list(itertools.accumulate(1 / k**zipf for k in range(1, groups + 1))) if zipf else None
        self._rng = random.Random(seed)
        self._turn = itertools.count()
        self._unique = 1 << 40  # beyond any prefix's ids

    def ids(self, tokens: int) -> Ids:
        """Ids for a prompt of `tokens` tokens. A part of a block that is shared counts as shared."""
        blocks = -(-tokens // self.block_tokens)
        shared = min(blocks, math.ceil(tokens * self._ratio / self.block_tokens))
        start, self._unique = self._unique, self._unique + blocks - shared
        own = range(start, self._unique)
        if not shared:
            return own
        first = self._group() << 20  # room for a prefix of a million blocks
        return [*range(first, first + shared), *own]

    def _group(self) -> int:
        if self._weights:
            return self._rng.choices(range(self._groups), cum_weights=self._weights)[0]
        return next(self._turn) % self._groups


# --- Mooncake


class _MooncakeLine(msgspec.Struct):
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None
    timestamp: float | None = None
    delay: float | None = None
    session_id: str | int | None = None


def read_mooncake(path: Path, block_tokens: int = TRACE_BLOCK) -> Iterator[TraceRequest]:
    """Requests of a Mooncake trace: `{"timestamp": ms, "input_length", "output_length", "hash_ids": […]}` a line.

    Multi-turn lines carry a `session_id`, and after the first `delay` (ms) in place of `timestamp`.

    Raises:
        TraceError: a line is not of this form, or earlier than the one before.
    """
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    turns: dict[str, int] = {}
    last = -math.inf
    with _open(path) as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = decode(text)
                request = _mooncake_request(line, block_tokens)
            except (msgspec.DecodeError, ValueError) as e:
                raise TraceError(f"{path}:{number}: {e}") from None
            if request.session_id is not None:
                request.turn = turns.get(request.session_id, 0)
                turns[request.session_id] = request.turn + 1
            if request.arrival_ms is None:
                if not request.turn:
                    raise TraceError(f"{path}:{number}: timestamp: is missing, and no earlier line has this session_id")
            elif request.arrival_ms < last:
                raise TraceError(
                    f"{path}:{number}: timestamp: {request.arrival_ms:g} comes before {last:g} of an earlier line; "
                    "sort the lines by timestamp"
                )
            else:
                last = request.arrival_ms
            yield request


def _mooncake_request(line: _MooncakeLine, block_tokens: int) -> TraceRequest:
    for name in ("input_length", "output_length"):
        if getattr(line, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(line, name)}")
    if line.hash_ids is None:
        raise ValueError("hash_ids: is missing")
    if len(line.hash_ids) * block_tokens < line.input_length:
        raise ValueError(
            f"hash_ids: {len(line.hash_ids)} blocks of {block_tokens} tokens do not cover input_length "
            f"{line.input_length}; set the trace's block size"
        )
    if line.timestamp is not None and not 0 <= line.timestamp < math.inf:
        raise ValueError(f"timestamp: must be at least 0, got {line.timestamp:g}")
    if line.delay is not None and not 0 <= line.delay < math.inf:
        raise ValueError(f"delay: must be at least 0, got {line.delay:g}")
    if line.timestamp is None and line.session_id is None:
        raise ValueError("timestamp: is missing; only later turns of a session_id can do without")
    return TraceRequest(
        arrival_ms=line.timestamp,
        input_tokens=line.input_length,
        output_tokens=line.output_length,
        ids=line.hash_ids,
        block_tokens=block_tokens,
        session_id=None if line.session_id is None else str(line.session_id),
        delay_ms=line.delay or 0.0,
    )


# --- Azure


def read_azure(path: Path, prefixes: SharedPrefixes | None = None) -> Iterator[TraceRequest]:
    """Requests of an Azure LLM inference trace: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

    It says nothing of the prompts' content: nothing is shared, unless `prefixes` make something up.

    Raises:
        TraceError: a column is missing, or a value is not what it must be.
    """
    prefixes = prefixes or SharedPrefixes()
    last = -math.inf
    with _open(path) as lines:
        rows = csv.DictReader(lines)
        missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(rows.fieldnames or ())
        if missing:
            raise TraceError(f"{path}:1: {', '.join(sorted(missing))}: no such column")
        for row in rows:
            try:
                arrival_ms = _timestamp_ms(row["TIMESTAMP"])
                tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                if min(tokens) < 1:
                    raise ValueError("ContextTokens and GeneratedTokens must be at least 1")
                if arrival_ms < last:
                    raise ValueError("TIMESTAMP: comes before an earlier line's; sort the lines")
            except (ValueError, TypeError) as e:
                raise TraceError(f"{path}:{rows.line_num}: {e}") from None
            last = arrival_ms
            yield TraceRequest(
                arrival_ms=arrival_ms,
                input_tokens=tokens[0],
                output_tokens=tokens[1],
                ids=prefixes.ids(tokens[0]),
                block_tokens=prefixes.block_tokens,
            )


def _timestamp_ms(text: str) -> float:
    text = text.strip()
    whole, _, fraction = text.partition(".")
    # Seven digits of a second are published; datetime reads six.
    moment = datetime.fromisoformat(whole + "+00:00")
    return moment.timestamp() * 1000 + float("0." + fraction if fraction else 0) * 1000


# --- synthetic


class SyntheticWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests made up by numbers. Times come from `request_rate` (per second, at random) or `arrival_interval_ms`;
    with neither, all want to start at once, and a limit of concurrency spreads them.

    `spread` varies both lengths: 0.5 means from half to one and a half times. With `history` each turn's prompt
    begins with the whole conversation before it, else turns have only their group's prefix in common.
    """

    input_tokens: int
    output_tokens: int
    request_count: int
    request_rate: float | None = None
    arrival_interval_ms: float | None = None
    turns_per_session: int = 1
    inter_turn_delay_ms: float = 0.0
    shared_prefix_ratio: float = 0.0
    num_prefix_groups: int = 0
    zipf: float = 0.0
    spread: float = 0.0
    history: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "request_count", "turns_per_session"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.request_rate is not None and self.arrival_interval_ms is not None:
            raise ValueError("request_rate and arrival_interval_ms exclude each other")
        for name in ("request_rate", "arrival_interval_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if not 0 <= self.inter_turn_delay_ms < math.inf:
            raise ValueError(f"inter_turn_delay_ms must be at least 0, got {self.inter_turn_delay_ms!r}")
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread must be at least 0 and below 1, got {self.spread!r}")

    def requests(self) -> Iterator[TraceRequest]:
        """The requests, session by session; a session's later turns follow its first."""
        rng = random.Random(self.seed)
        prefixes = SharedPrefixes(self.shared_prefix_ratio, self.num_prefix_groups, zipf=self.zipf, seed=self.seed + 1)
        now = 0.0
        for session in range(self.request_count):
            yield from self._session(session, now, rng, prefixes)
            if self.request_rate is not None:
                now += rng.expovariate(self.request_rate) * 1000
            elif self.arrival_interval_ms is not None:
                now += self.arrival_interval_ms

    def _session(
        self, session: int, now: float, rng: random.Random, prefixes: SharedPrefixes
    ) -> Iterator[TraceRequest]:
        turns = self.turns_per_session
        lengths = [
            (_around(self.input_tokens, self.spread, rng), _around(self.output_tokens, self.spread, rng))
            for _ in range(turns)
        ]
        whole = prefixes.ids(sum(map(sum, lengths))) if self.history else ()
        told = 0
        for turn, (input_tokens, output_tokens) in enumerate(lengths):
            prompt = told + input_tokens
            yield TraceRequest(
                arrival_ms=None if turn else now,
                input_tokens=prompt,
                output_tokens=output_tokens,
                ids=whole or prefixes.ids(prompt),
                block_tokens=prefixes.block_tokens,
                session_id=f"session_{session}" if turns > 1 else None,
                turn=turn,
                delay_ms=self.inter_turn_delay_ms if turn else 0.0,
                answer_ids=self.history,
            )
            told = prompt + output_tokens if self.history else 0


def _around(tokens: int, spread: float, rng: random.Random) -> int:
    return max(1, round(tokens * rng.uniform(1 - spread, 1 + spread))) if spread else tokens


# --- any


FORMATS = ("mooncake", "azure")


def read_trace(
    paths: Iterable[str | os.PathLike[str]],
    trace_format: str | None = None,
    *,
    block_tokens: int | None = None,
    prefixes: SharedPrefixes | None = None,
) -> Iterator[TraceRequest]:
    """Requests of one or several trace files, merged by time. The format is told by the name's end if not given.

    Raises:
        TraceError: a file is not there, or not of the format.
    """
    streams = [_reader(Path(path), trace_format, block_tokens, prefixes)(Path(path)) for path in paths]
    if not streams:
        raise TraceError("trace_files: none given")
    if len(streams) == 1:
        return streams[0]
    return _merged(streams)


def _reader(
    path: Path, trace_format: str | None, block_tokens: int | None, prefixes: SharedPrefixes | None
) -> Callable[[Path], Iterator[TraceRequest]]:
    if trace_format is None:
        trace_format = "azure" if path.suffix == ".csv" else "mooncake"
    if trace_format == "azure":
        return lambda path: read_azure(path, prefixes)
    if trace_format == "mooncake":
        return lambda path: read_mooncake(path, block_tokens or TRACE_BLOCK)
    raise TraceError(f"trace_format: must be one of {', '.join(FORMATS)}, got {trace_format!r}")


def _merged(streams: list[Iterator[TraceRequest]]) -> Iterator[TraceRequest]:
    """By arrival; a later turn follows the request before it in its file. Sessions of two files are two sessions."""

    def keyed(stream: Iterator[TraceRequest], file: int) -> Iterator[tuple[float, int, int, TraceRequest]]:
        last = 0.0
        for number, request in enumerate(stream):
            if request.session_id is not None:
                request.session_id = f"{file}/{request.session_id}"
            last = last if request.arrival_ms is None else request.arrival_ms
            yield last, file, number, request

    merged = heapq.merge(*(keyed(stream, file) for file, stream in enumerate(streams)))
    return (request for *_, request in merged)


def _open(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as e:
        raise TraceError(f"{path}: {e.strerror}") from None


def count_lines(paths: Iterable[str | os.PathLike[str]]) -> int:
    """How many lines there are, for a progress bar."""
    total = 0
    for path in paths:
        with Path(path).open("rb") as file:
            total += sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return total


def describe(requests: Iterable[TraceRequest]) -> dict[str, Any]:
    """What a workload is like: counts, mean lengths, and the share of prompt blocks that an endless cache would hold.

    Keeps every id seen, so its memory grows with the trace.
    """
    count = input_tokens = output_tokens = blocks = known = 0
    seen: set[int] = set()
    last = 0.0
    for request in requests:
        count += 1
        input_tokens += request.input_tokens
        output_tokens += request.output_tokens
        last = request.arrival_ms if request.arrival_ms is not None else last
        prompt = request.ids[: -(-request.input_tokens // request.block_tokens)]
        blocks += len(prompt)
        known += next((i for i, id_ in enumerate(prompt) if id_ not in seen), len(prompt))
        seen.update(prompt)
    return {
        "requests": count,
        "mean_input_tokens": input_tokens / max(1, count),
        "mean_output_tokens": output_tokens / max(1, count),
        "duration_s": last / 1000,
        "reusable_ratio": known / max(1, blocks),
    }
