"""What is logged, where, and in which form?

`configure_logging` reads `DYN_LOG` (which records pass), `DYN_LOGGING_CONSOLE_FORMAT` (how they look) and their
relatives, and puts one handler on the root logger, writing to stderr. `bind` says whose request the code is
working on, so that every line of it carries `trace_id`, `span_id` and `x_request_id`. `Rarely` keeps a log
site from writing gigabytes.
"""

import contextlib
import json
import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TextIO

import msgspec

from dynamo.runtime.options import env_bool

TRACE: Final = 5  # below DEBUG (10); Python has no level of that name

LEVELS: Final = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
LEVEL_NAMES: Final = {TRACE: "TRACE", logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}

Format = Literal["readable", "jsonl"]


@dataclass(frozen=True, slots=True)
class LogFilter:
    """`default` for every logger, `targets` for those below a dotted name; the longest name wins."""

    default: int = logging.INFO
    targets: Mapping[str, int] = field(default_factory=dict)

    def merged(self, other: "LogFilter") -> "LogFilter":
        """This filter with the targets of `other` over its own, and `other`'s default."""
        return LogFilter(other.default, {**self.targets, **other.targets})


def parse_filter(text: str) -> LogFilter:
    """Read a filter such as `info`, `debug,dynamo.router=trace` or `warn,dynamo.llm=off`.

    A level alone is the default; a dotted name alone is a logger to show completely. `::` may stand for the
    dot. Raises ValueError saying what is wrong.
    """
    default = logging.INFO
    targets: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        target, equals, level = part.partition("=")
        if "[" in part:
            raise ValueError(f"{part!r}: filters on spans are not supported; write target=level")
        if not equals and part.lower() in LEVELS:
            default = LEVELS[part.lower()]
        elif not equals:
            targets[_bare_target(part)] = TRACE
        else:
            targets[_target(target)] = _level(part, level)
    return LogFilter(default, targets)


def _level(part: str, word: str) -> int:
    try:
        return LEVELS[word.strip().lower()]
    except KeyError:
        raise ValueError(
            f"{part!r}: unknown level {word.strip()!r}; use trace, debug, info, warn, error or off"
        ) from None


def _bare_target(word: str) -> str:
    """A logger's name without a level: only what cannot be a misspelt level."""
    if "." not in word and "::" not in word and word != "dynamo":
        raise ValueError(f"unknown level {word!r}; use trace, debug, info, warn, error or off, or write {word}=level")
    return _target(word)


def _target(text: str) -> str:
    name = text.strip().replace("::", ".")
    if not name or not all(piece.isidentifier() for piece in name.split(".")):
        raise ValueError(
            f"{text.strip()!r} is neither a level (trace, debug, info, warn, error, off) nor a logger's name"
        )
    return name


# --- whose request is it?


class RequestIds(NamedTuple):
    """What each line of a request's work carries. Empty strings are left out."""

    trace_id: str = ""
    span_id: str = ""
    x_request_id: str = ""


_NOBODY: Final = RequestIds()
current_request: ContextVar[RequestIds] = ContextVar("dynamo_request", default=_NOBODY)


@contextlib.contextmanager
def bind(trace_id: str = "", span_id: str = "", x_request_id: str = "") -> Iterator[None]:
    """Within the block, and in tasks started there, log lines carry these ids."""
    token = current_request.set(RequestIds(trace_id, span_id, x_request_id))
    try:
        yield
    finally:
        current_request.reset(token)


# --- how a line looks

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


def extra_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the call gave in `extra=`, without what every record has."""
    return {k: v for k, v in record.__dict__.items() if k not in _STANDARD}


def _ids(record: logging.LogRecord) -> dict[str, str]:
    ids = current_request.get()
    return {k: v for k, v in zip(RequestIds._fields, ids, strict=True) if v and k not in record.__dict__}


class _Timestamps:
    def __init__(self, local: bool) -> None:
        self._zone = None if local else UTC

    def text(self, seconds: float) -> str:
        stamp = datetime.fromtimestamp(seconds, UTC).astimezone(self._zone).isoformat(timespec="microseconds")
        return stamp.removesuffix("+00:00") + "Z" if self._zone else stamp


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, target, message, the request's ids, and the call's `extra`."""

    def __init__(self, *, local_time: bool = False) -> None:
        super().__init__()
        self._times = _Timestamps(local_time)

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self._times.text(record.created),
            "level": level_name(record.levelno),
            "target": record.name,
            "message": record.getMessage(),
            **_ids(record),
            **extra_of(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        try:
            return msgspec.json.encode(fields, enc_hook=str).decode()
        except (TypeError, ValueError, UnicodeError, OverflowError):
            return json.dumps(fields, default=str, skipkeys=True)  # takes what msgspec refuses: huge ints, odd keys


_COLOURS: Final = {TRACE: "35", logging.DEBUG: "34", logging.INFO: "32", logging.WARNING: "33", logging.ERROR: "31"}


class Readable(logging.Formatter):
    """`2026-11-24T06:49:04.297670Z  INFO dynamo.runtime.worker: message key=value`."""

    def __init__(self, *, local_time: bool = False, colour: bool = False) -> None:
        super().__init__()
        self._times = _Timestamps(local_time)
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        stamp, level, target = self._times.text(record.created), f"{level_name(record.levelno):>5}", f"{record.name}:"
        if self._colour:
            stamp, target = f"\x1b[2m{stamp}\x1b[0m", f"\x1b[2m{target}\x1b[0m"
            level = f"\x1b[{_COLOURS.get(min(record.levelno, logging.ERROR), '32')}m{level}\x1b[0m"
        line = f"{stamp} {level} {target} {record.getMessage()}"
        for key, value in (_ids(record) | extra_of(record)).items():
            line += f" {key}={value}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + record.stack_info
        return line


def level_name(level: int) -> str:
    """TRACE, DEBUG, INFO, WARN or ERROR."""
    return LEVEL_NAMES.get(level) or logging.getLevelName(level)


# --- setting it up


class LogConfig(NamedTuple):
    """What the environment says about logging."""

    filter: LogFilter
    format: Format
    local_time: bool
    colour: bool


def read_config(environ: Mapping[str, str], stream: TextIO) -> LogConfig:
    """The configuration. Raises ValueError that names the variable."""
    colour = not environ.get("NO_COLOR") and stream.isatty() and not env_bool("DYN_SDK_DISABLE_ANSI_LOGGING", False)
    return LogConfig(_read_filter(environ), _read_format(environ), env_bool("DYN_LOG_USE_LOCAL_TZ", False), colour)


def _read_filter(environ: Mapping[str, str]) -> LogFilter:
    path = environ.get("DYN_LOGGING_CONFIG_PATH", "").strip()
    from_file = _filter_from_file(Path(path)) if path else LogFilter()
    text = environ.get("DYN_LOG", "").strip()
    if not text:
        return from_file
    try:
        return from_file.merged(parse_filter(text))
    except ValueError as e:
        raise ValueError(f"DYN_LOG: {e}") from None


def _filter_from_file(path: Path) -> LogFilter:
    """A TOML file with `log_level = "info"` and a table `[log_filters]` of `"target" = "level"`."""
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"DYN_LOGGING_CONFIG_PATH: cannot read {str(path)!r}: {e}") from None
    try:
        unknown = content.keys() - {"log_level", "log_filters"}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r}; the keys are log_level and log_filters")
        targets = content.get("log_filters", {})
        if not isinstance(targets, dict):
            raise ValueError("log_filters must be a table of target = level")  # noqa: TRY004 - all become one ValueError
        default = _level("log_level", str(content.get("log_level", "info")))
        return LogFilter(default, {_target(t): _level(t, str(level)) for t, level in targets.items()})
    except ValueError as e:
        raise ValueError(f"DYN_LOGGING_CONFIG_PATH: {str(path)!r}: {e}") from None


def _read_format(environ: Mapping[str, str]) -> Format:
    word = environ.get("DYN_LOGGING_CONSOLE_FORMAT", "").strip().lower()
    if word == "readable" or (not word and not env_bool("DYN_LOGGING_JSONL", False)):
        return "readable"
    if word in ("jsonl", ""):
        return "jsonl"
    raise ValueError(f"DYN_LOGGING_CONSOLE_FORMAT: {word!r} is not one of readable, jsonl")


_ours: list[logging.Handler] = []
_levelled: set[str] = set()


def configure_logging(stream: TextIO | None = None) -> None:
    """Set the root logger up from the environment; calling again reads it anew.

    A wrong variable ends the program with one line that names it, and exit status 2.
    """
    stream = stream or sys.stderr
    try:
        config = read_config(os.environ, stream)
    except ValueError as e:
        sys.stderr.write(f"error: {e}\n")
        raise SystemExit(2) from None
    apply_config(config, stream)


def apply_config(config: LogConfig, stream: TextIO) -> None:
    """Put one handler on the root logger, in place of the one put before, and set the levels."""
    logging.addLevelName(TRACE, "TRACE")
    handler = logging.StreamHandler(stream)
    if config.format == "jsonl":
        handler.setFormatter(JsonLines(local_time=config.local_time))
    else:
        handler.setFormatter(Readable(local_time=config.local_time, colour=config.colour))
    root = logging.getLogger()
    for old in _ours:
        root.removeHandler(old)
    _ours[:] = [handler]
    root.addHandler(handler)
    root.setLevel(config.filter.default)
    for name in _levelled - config.filter.targets.keys():
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name, level in config.filter.targets.items():
        logging.getLogger(name).setLevel(level)
    _levelled.clear()
    _levelled.update(config.filter.targets)
    logging.captureWarnings(True)


# --- not too often

MAX_RARE_KEYS: Final = 1024  # keys may come from outside (an address, say), so they are bounded


class Rarely:
    """Logs the first line of each key at once, then at most one an interval, with a count of those left out.

    `interval_s` defaults to 10 s: often enough to see that it goes on, rare enough for any number of hosts.
    """

    def __init__(
        self, log: logging.Logger, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._interval_s = interval_s
        self._clock = clock
        self._keys: dict[str, list[float]] = {}  # key -> [time of the last line, lines left out since]

    def log(self, level: int, key: str, message: str, *args: object, **extra: object) -> bool:
        """Log unless a line of this key was logged within the interval. Gives whether it was."""
        now = self._clock()
        state = self._keys.get(key)
        if state is not None and now - state[0] < self._interval_s:
            state[1] += 1
            return False
        left_out = int(state[1]) if state else 0
        self._keys.pop(key, None)
        if len(self._keys) >= MAX_RARE_KEYS:
            self._keys.pop(next(iter(self._keys)))  # the one that was logged longest ago
        self._keys[key] = [now, 0]
        if left_out:
            message, args = message + " (%d more like this were not logged)", (*args, left_out)
        self._log.log(level, message, *args, extra=extra or None, stacklevel=3)
        return True

    def info(self, key: str, message: str, *args: object, **extra: object) -> bool:
        return self.log(logging.INFO, key, message, *args, **extra)

    def warning(self, key: str, message: str, *args: object, **extra: object) -> bool:
        return self.log(logging.WARNING, key, message, *args, **extra)

    def error(self, key: str, message: str, *args: object, **extra: object) -> bool:
        return self.log(logging.ERROR, key, message, *args, **extra)
