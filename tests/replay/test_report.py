"""What is told of a run: to programs, to terminals, to browsers."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from statistics import mean, quantiles

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dynamo.replay import ReplayReport, TelemetryOptions, TraceError, run_synthetic_trace_replay, run_trace_replay
from dynamo.replay.measures import Distribution, Sample, Timeline
from dynamo.replay.page import hit_rate, page
from dynamo.replay.plots import Axis, Series, plot
from dynamo.replay.table import table
from dynamo.router.config import KvRouterConfig
from tests.replay.workloads import outcome, write_jsonl

LINES = [
    {"timestamp": 100 * i, "input_length": 1000, "output_length": 8, "hash_ids": [i % 3, 10 + i % 3]} for i in range(30)
]


@pytest.fixture
def trace(tmp_path):
    return write_jsonl(tmp_path / "trace.jsonl", *LINES)


# --- for programs


def test_a_trace_is_replayed_and_reported(trace):
    report = run_trace_replay([trace], num_workers=2, router_mode="kv_router", capture_per_request=True)
    assert isinstance(report, ReplayReport)
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain) == ["summary", "per_request", "coverage", "planner"]
    summary = plain["summary"]
    assert (summary["num_requests"], summary["completed_requests"]) == (30, 30)
    assert summary["total_input_tokens"] == 30_000
    assert summary["policy"] == KvRouterConfig().router_policy
    assert plain["coverage"]["per_request_records"] == len(plain["per_request"]) == 30
    # 960 of 1000 tokens are full blocks; each of three prompts is computed once at each worker that gets it
    assert summary["prefix_cache_reused_ratio"] >= 24 * 960 / 30_000


def test_the_summary_agrees_with_the_requests(trace):
    report = run_trace_replay(str(trace), num_workers=2, capture_per_request=True)
    summary, requests = report.summary, report.per_request
    for name, key in (("ttft_ms", "ttft_ms"), ("e2e_latency_ms", "e2e_latency_ms"), ("tpot_ms", "itl_ms")):
        values = [request[key] for request in requests]
        assert summary[f"mean_{name}"] == pytest.approx(mean(values))
        assert summary[f"max_{name}"] == pytest.approx(max(values))
        assert summary[f"min_{name}"] == pytest.approx(min(values))
    assert summary["prefix_cache_reused_ratio"] == pytest.approx(
        sum(r["reused_input_tokens"] for r in requests) / summary["total_input_tokens"]
    )
    assert summary["num_ttft_samples"] == 30


def test_requests_are_written_one_a_line_as_they_end(trace, tmp_path):
    path = tmp_path / "requests.jsonl"
    report = run_trace_replay([trace], report_jsonl_path=path)
    assert report.per_request is None
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(int(request["uuid"]) for request in requests) == list(range(30))
    ends = [request["last_token_ms"] for request in requests]
    assert ends == sorted(ends)
    assert all(r["arrival_time_ms"] <= r["first_admit_ms"] < r["first_token_ms"] < r["last_token_ms"] for r in requests)


def test_goodput_counts_what_holds_the_goals(trace):
    report = run_trace_replay([trace], sla_ttft_ms=20, capture_per_request=True)
    good = sum(request["ttft_ms"] <= 20 for request in report.per_request)
    assert 0 < good < 30
    assert report.summary["goodput_completed_requests"] == good
    assert "goodput_completed_requests" not in run_trace_replay([trace]).summary


def test_samples_of_the_fleet_go_where_they_are_wanted(trace, tmp_path):
    heard = []
    path = tmp_path / "samples.jsonl"
    options = TelemetryOptions(sample_interval_ms=500, capture_in_memory=True, callback=heard.append, jsonl_path=path)
    report = run_trace_replay([trace], num_workers=2, telemetry_options=options)
    assert report.to_dict()["telemetry"]["samples"] == heard
    assert [json.loads(line) for line in path.read_text().splitlines()] == heard
    assert [sample["sampled_at_ms"] for sample in heard] == [500 * i for i in range(len(heard))]
    assert len(heard[0]["decode_scheduler_metrics"]) == 2
    assert run_trace_replay([trace], telemetry_options=TelemetryOptions(callback=heard.append)).telemetry is None


def test_a_synthetic_load_needs_no_file():
    report = run_synthetic_trace_replay(1000, 50, 6, num_workers=2, replay_concurrency=2)
    assert report.summary["mean_ttft_ms"] == pytest.approx(32.1059, abs=1e-3)  # what ai-dynamo 1.6.1 prints
    assert report.summary["mean_tpot_ms"] == pytest.approx(5.79277, abs=1e-4)
    assert report.summary["duration_ms"] == pytest.approx(947.855, abs=1e-2)


def test_turns_without_history_are_told_like_the_peers():
    report = run_synthetic_trace_replay(
        1000, 50, 6, replay_concurrency=1, turns_per_session=3, inter_turn_delay_ms=500, capture_per_request=True
    )
    first = report.per_request[:4]
    assert [(r["session_id"], r["turn_index"]) for r in first] == [
        ("session_0", 0),
        ("session_0", 1),
        ("session_0", 2),
        ("session_1", 0),
    ]
    assert [r["arrival_time_ms"] for r in first] == pytest.approx([0, 815.95164, 1631.90328, 1947.85492], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"router_mode": "nearest"}, "policy must be one of round-robin, .*linear"),
        ({"replay_mode": "online"}, "replay_mode must be 'offline'"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"arrival_speedup_ratio": 0}, "speedup must be above 0"),
        ({"replay_concurrency": 0}, "concurrency must be at least 1"),
        ({"trace_format": "weka"}, "trace_format must be one of mooncake, azure"),
        ({"planner_config": {}}, "planner_config: no planner is simulated in this version"),
        ({"extra_engine_args": {"engine": {"blok_size": 16}}}, "blok_size: is not simulated; did you mean block_size"),
        ({"extra_engine_args": {"block_size": 0}}, "block_size must be at least 1"),
        ({"extra_engine_args": {"backend": "sglang"}}, "extra_engine_args: .*sglang"),
        ({"extra_engine_args": {"speedup_ratio": 0}}, "speedup_ratio must be above 0"),
        ({"kv_event_lag_ms": -1}, "kv_event_lag_ms must not be negative"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(trace, arguments, words):
    with pytest.raises(ValueError, match=words):
        run_trace_replay([trace], **arguments)


def test_an_unknown_argument_is_a_type_error(trace):
    with pytest.raises(TypeError, match="'workers'"):
        run_trace_replay([trace], workers=2)


def test_a_synthetic_load_needs_one_pace():
    for pace in ({}, {"request_rate": 1.0, "replay_concurrency": 1}):
        with pytest.raises(ValueError, match="exactly one of replay_concurrency"):
            run_synthetic_trace_replay(10, 10, 10, **pace)


def test_a_bad_trace_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"t\.jsonl:2: "):
        run_trace_replay([write_jsonl(tmp_path / "t.jsonl", LINES[0], {"timestamp": 1})])


# --- measures


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=300), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_right_within_a_thousandth(values, share):
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    exact = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    assert distribution.quantile(share) == pytest.approx(exact, rel=1e-3)
    assert distribution.mean == pytest.approx(mean(values))
    assert (distribution.minimum, distribution.maximum) == (min(values), max(values))


def test_values_can_be_added_many_at_a_time():
    one, many = Distribution(), Distribution()
    for value in (1.0, 1.0, 1.0, 5.0):
        one.add(value)
    many.add(1.0, 3)
    many.add(5.0)
    assert one.summary("x") == many.summary("x")
    assert Distribution().summary("x") == {}
    assert quantiles([1.0, 1.0, 1.0, 5.0], n=2)[0] == pytest.approx(one.quantile(0.5), rel=1e-3)


def test_a_timeline_gets_coarser_instead_of_longer():
    timeline, last = Timeline(1.0, most=10), -1.0

    def take(at_s):
        nonlocal last
        since, last = at_s - last, at_s
        return Sample(at_s, [1], [0], [0.5], int(10 * since), int(5 * since))

    for at in range(100):
        timeline.catch_up(at, take)
    assert len(timeline.samples) <= 10
    assert timeline.interval_s >= 10
    assert sum(sample.prompt_tokens for sample in timeline.samples) == 10 * (int(timeline.samples[-1].at_s) + 1)
    assert [point[1] for point in hit_rate(timeline.samples)] == [0.5] * len(timeline.samples)


# --- for people


def test_the_table_has_a_row_a_run_and_only_columns_with_numbers():
    lines = table([outcome(), outcome("linear")]).splitlines()
    assert [line.split()[0] for line in lines] == ["policy", "round-robin", "linear"]
    assert "good/s" not in lines[0]
    assert len({len(line) for line in lines}) == 1


class Checker(HTMLParser):
    """Every element is closed, and nothing is loaded from anywhere."""

    VOID = frozenset({"meta", "!doctype"})

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else():
    html = page([outcome(), outcome("linear")], "A <b>title</b>")
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert checker.links == []
    assert "script" not in checker.seen
    assert "A &lt;b&gt;title" in html
    assert "<b>" not in html
    pictures = re.findall(r"<svg.*?</svg>", html)
    assert len(pictures) == 3 + 2 + 2 * 2
    for picture in pictures:
        root = ET.fromstring(picture)
        lines = [element for element in root.iter() if element.tag.endswith("path")]
        assert lines
        box = [float(number) for number in root.get("viewBox").split()]
        for line in lines:
            for px, py in re.findall(r"(-?[\d.]+) (-?[\d.]+)", line.get("d")):
                assert box[0] <= float(px) <= box[2]
                assert box[1] <= float(py) <= box[3]


@given(
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), max_size=20),
    st.booleans(),
    st.booleans(),
)
def test_any_numbers_can_be_plotted(points, log_x, log_y):
    picture = plot("p", [Series("a", sorted(points)), Series("b", [])], Axis("x", log_x), Axis("y", log_y))
    assert "nan" not in picture
    ET.fromstring(picture)
