"""Which records pass, how they look, and how few there are of the same."""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.runtime import logs
from dynamo.runtime.logs import TRACE, LogConfig, LogFilter, Rarely, apply_config, bind, parse_filter, read_config


@pytest.fixture(autouse=True)
def root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def logged(text: str = "info", form: logs.Format = "jsonl") -> tuple[io.StringIO, logging.Logger]:
    stream = io.StringIO()
    apply_config(LogConfig(parse_filter(text), form, local_time=False, colour=False), stream)
    return stream, logging.getLogger("dynamo.test")


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


# --- the filter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("info", LogFilter(logging.INFO, {})),
        ("WARN", LogFilter(logging.WARNING, {})),
        ("debug,dynamo.router=trace", LogFilter(logging.DEBUG, {"dynamo.router": TRACE})),
        ("dynamo.llm=off, error", LogFilter(logging.ERROR, {"dynamo.llm": logging.CRITICAL + 1})),
        ("dynamo.router", LogFilter(logging.INFO, {"dynamo.router": TRACE})),
        ("dynamo::runtime=warn", LogFilter(logging.INFO, {"dynamo.runtime": logging.WARNING})),
        ("", LogFilter()),
    ],
)
def test_filter_syntax(text: str, expected: LogFilter) -> None:
    assert parse_filter(text) == expected


@pytest.mark.parametrize(
    "text", ["loud", "inof", "dynamo=loud", "a b", "=info", "[span]=info", "1x=debug", "info;debug"]
)
def test_a_wrong_filter_says_what_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match=r"level|target"):
        parse_filter(text)


@given(st.text(max_size=40))
def test_any_text_is_a_filter_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_filter(text), LogFilter)


def test_the_longest_target_wins() -> None:
    stream, _ = logged("warn,dynamo.a=info,dynamo.a.b=error")
    logging.getLogger("dynamo.a").info("yes")
    logging.getLogger("dynamo.a.c").info("yes")
    logging.getLogger("dynamo.a.b").warning("no")
    logging.getLogger("dynamo.z").info("no")
    assert [line["message"] for line in lines(stream)] == ["yes", "yes"]


def test_trace_is_below_debug() -> None:
    stream, log = logged("trace")
    log.log(TRACE, "fine detail")
    assert lines(stream)[0]["level"] == "TRACE"


def test_configuring_again_replaces_handler_and_levels() -> None:
    first, log = logged("warn,dynamo.test=debug")
    second, log = logged("warn")
    log.info("dropped")
    log.warning("kept")
    assert first.getvalue() == ""
    assert [line["message"] for line in lines(second)] == ["kept"]


# --- how a line looks


def test_a_json_line_has_time_level_target_message_and_extra() -> None:
    stream, log = logged()
    log.warning("slow by %d ms", 7, extra={"worker": 3, "odd": {1, 2}})
    (line,) = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", str(line["time"]))
    assert (line["level"], line["target"], line["message"]) == ("WARN", "dynamo.test", "slow by 7 ms")
    assert line["worker"] == 3


def test_lines_of_a_request_carry_its_ids() -> None:
    stream, log = logged()
    with bind(trace_id="a" * 32, span_id="b" * 16, x_request_id="r-1"):
        log.info("inside")
    log.info("outside")
    inside, outside = lines(stream)
    assert (inside["trace_id"], inside["span_id"], inside["x_request_id"]) == ("a" * 32, "b" * 16, "r-1")
    assert "trace_id" not in outside


def test_an_explicit_id_wins_over_the_bound_one() -> None:
    stream, log = logged()
    with bind(x_request_id="bound"):
        log.info("x", extra={"x_request_id": "given"})
    assert lines(stream)[0]["x_request_id"] == "given"


def test_an_exception_is_one_json_line() -> None:
    stream, log = logged()
    try:
        raise KeyError("missing")
    except KeyError:
        log.exception("failed")
    (line,) = lines(stream)
    assert "KeyError: 'missing'" in str(line["exception"])


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(st.integers(), st.floats(), st.binary(), st.text())))
def test_any_extra_gives_valid_json(extra: dict[str, object]) -> None:
    record = logging.makeLogRecord({"name": "x", "levelno": logging.INFO, "msg": "m", **extra})
    assert json.loads(logs.JsonLines().format(record))["message"] == "m"


def test_a_readable_line() -> None:
    stream, log = logged(form="readable")
    with bind(x_request_id="r-1"):
        log.info("hello", extra={"worker": 3})
    pattern = r"\S+Z  INFO dynamo\.test: hello x_request_id=r-1 worker=3\n"
    assert re.fullmatch(pattern, stream.getvalue())


def test_colours_only_where_asked() -> None:
    record = logging.makeLogRecord({"name": "x", "levelno": logging.ERROR, "levelname": "ERROR", "msg": "m"})
    assert "\x1b[" not in logs.Readable().format(record)
    assert "\x1b[31m" in logs.Readable(colour=True).format(record)


# --- the environment


def test_jsonl_by_either_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_LOGGING_JSONL", "1")
    assert read_config(os.environ, io.StringIO()).format == "jsonl"
    monkeypatch.setenv("DYN_LOGGING_CONSOLE_FORMAT", "readable")
    assert read_config(os.environ, io.StringIO()).format == "readable"


def test_a_toml_file_gives_filters_and_dyn_log_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log.toml"
    file.write_text('log_level = "error"\n[log_filters]\n"dynamo.router" = "debug"\n')
    monkeypatch.setenv("DYN_LOGGING_CONFIG_PATH", str(file))
    assert read_config(os.environ, io.StringIO()).filter == LogFilter(logging.ERROR, {"dynamo.router": logging.DEBUG})
    monkeypatch.setenv("DYN_LOG", "warn")
    assert read_config(os.environ, io.StringIO()).filter.default == logging.WARNING


@pytest.mark.parametrize(
    "content", ['log_level = "loud"', "x = 1", "not toml", 'log_filters = "x"', "[log_filters]\na=1"]
)
def test_a_wrong_toml_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    file = tmp_path / "log.toml"
    file.write_text(content)
    monkeypatch.setenv("DYN_LOGGING_CONFIG_PATH", str(file))
    with pytest.raises(ValueError, match=r"DYN_LOGGING_CONFIG_PATH.*log\.toml"):
        read_config(os.environ, io.StringIO())


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DYN_LOG", "dynamo=loud"),
        ("DYN_LOGGING_CONSOLE_FORMAT", "xml"),
        ("DYN_LOG_USE_LOCAL_TZ", "maybe"),
        ("DYN_LOGGING_CONFIG_PATH", "/nowhere/log.toml"),
    ],
)
def test_a_wrong_variable_ends_the_program_with_one_line(variable: str, text: str) -> None:
    code = "from dynamo.runtime.logging import configure_dynamo_logging as c; c()"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, variable: text}, capture_output=True, text=True, timeout=30
    )
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {variable}: ")
    assert run.stderr.count("\n") == 1


def test_local_time_carries_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from dynamo.runtime.logging import configure_dynamo_logging as c; c(); import logging; logging.info('x')"
    env = {**os.environ, "DYN_LOG_USE_LOCAL_TZ": "1", "TZ": "Asia/Tokyo", "DYN_LOGGING_JSONL": "true"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert json.loads(run.stderr)["time"].endswith("+09:00")


# --- not too often


def test_rarely_logs_once_an_interval_and_counts_the_rest() -> None:
    stream, log = logged()
    now = [0.0]
    rarely = Rarely(log, interval_s=10, clock=lambda: now[0])
    assert [rarely.warning("k", "it failed: %s", i) for i in range(5)] == [True, False, False, False, False]
    assert rarely.warning("other", "another")
    now[0] = 10.0
    assert rarely.warning("k", "it failed: %s", 9)
    messages = [line["message"] for line in lines(stream)]
    assert messages == ["it failed: 0", "another", "it failed: 9 (4 more like this were not logged)"]


def test_rarely_forgets_the_oldest_of_many_keys() -> None:
    _, log = logged("off")
    rarely = Rarely(log)
    for i in range(logs.MAX_RARE_KEYS * 3):
        rarely.warning(f"host {i}", "x")
    assert len(rarely._keys) == logs.MAX_RARE_KEYS
