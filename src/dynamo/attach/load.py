"""How busy does the server's /metrics say it is, and what is its cache?

Prometheus text, of which a dozen samples matter. Names are those of vLLM and SGLang; what an engine does not tell
stays None.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

_LINE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")  # 0..1; the second until 0.10
_CACHE = "vllm:cache_config_info"
_STARTED = "process_start_time_seconds"
_WANTED = (*_RUNNING, *_WAITING, *_USAGE, _CACHE, _STARTED)


class Sample(NamedTuple):
    """One line."""

    name: str
    labels: dict[str, str]
    value: float


class RankLoad(msgspec.Struct):
    """One data parallel rank. `usage` is the share of its KV blocks in use, 0..1."""

    running: int = 0
    waiting: int = 0
    usage: float = 0.0


class Metrics(msgspec.Struct):
    """What a server's metrics tell."""

    ranks: dict[int, RankLoad] = {}
    block_size: int | None = None
    total_blocks: int | None = None
    prefix_caching: bool | None = None
    started_at: float | None = None
    """Unix time at which the server's process began."""


def read_metrics(text: str) -> Metrics:
    """The samples that matter. Lines that are none are passed over."""
    found = Metrics()
    for sample in samples(text):
        if sample.name == _CACHE:
            _read_cache(found, sample.labels)
        elif sample.name == _STARTED:
            found.started_at = sample.value
        else:
            _read_load(found.ranks.setdefault(_rank(sample.labels), RankLoad()), sample)
    return found


def samples(text: str) -> Iterator[Sample]:
    """The wanted lines."""
    for line in text.splitlines():
        if line.startswith(_WANTED) and (match := _LINE.match(line)) is not None and match[1] in _WANTED:
            try:
                value = float(match[3])
            except ValueError:
                continue
            yield Sample(match[1], dict(_LABEL.findall(match[2] or "")), value)


def _rank(labels: dict[str, str]) -> int:
    text = labels.get("engine") or labels.get("dp_rank") or "0"
    return int(text) if text.isdigit() else 0


def _read_load(load: RankLoad, sample: Sample) -> None:
    if sample.name in _RUNNING:
        load.running = int(sample.value)
    elif sample.name in _WAITING:
        load.waiting = int(sample.value)
    elif sample.value == sample.value:  # not NaN
        load.usage = max(load.usage, sample.value)


def _read_cache(found: Metrics, labels: dict[str, str]) -> None:
    found.block_size = _number(labels.get("block_size"))
    found.total_blocks = _number(labels.get("num_gpu_blocks"))
    caching = labels.get("enable_prefix_caching")
    found.prefix_caching = None if caching not in ("True", "False") else caching == "True"


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() and int(text) > 0 else None
