"""Traces say what came when; a line that does not is named."""

import pytest

from dynamo.replay.traces import SharedPrefixes, SyntheticWorkload, TraceError, describe, read_azure, read_trace
from tests.replay.workloads import TRACES, write_jsonl

LINE = {"timestamp": 100, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}


def test_a_mooncake_line_is_a_request(tmp_path):
    (request,) = read_trace([write_jsonl(tmp_path / "t.jsonl", LINE)])
    assert (request.arrival_ms, request.input_tokens, request.output_tokens) == (100, 600, 5)
    assert list(request.ids) == [7, 8]
    assert request.block_tokens == 512


def test_turns_of_a_session_follow_each_other(tmp_path):
    first = LINE | {"session_id": "s"}
    second = {"session_id": "s", "delay": 250, "input_length": 700, "output_length": 5, "hash_ids": [7, 8]}
    requests = list(read_trace([write_jsonl(tmp_path / "t.jsonl", first, LINE, second)]))
    assert [(r.session_id, r.turn, r.arrival_ms, r.delay_ms) for r in requests] == [
        ("s", 0, 100, 0),
        (None, 0, 100, 0),
        ("s", 1, None, 250),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_length": 0}, "input_length: must be at least 1"),
        ({"output_length": -1}, "output_length: must be at least 1"),
        ({"input_length": "x"}, "input_length"),
        ({"hash_ids": None}, "hash_ids: is missing"),
        ({"input_length": 1025}, "2 blocks of 512 tokens do not cover input_length 1025"),
        ({"timestamp": -1}, "timestamp: must be at least 0"),
        ({"timestamp": None}, "timestamp: is missing"),
        ({"timestamp": None, "session_id": "x"}, "no earlier line has this session_id"),
        ({"delay": -5}, "delay: must be at least 0"),
        ({"timestamp": 50}, "comes before 100 of an earlier line; sort"),
    ],
)
def test_a_bad_line_is_named_with_its_fault(tmp_path, change, words):
    path = write_jsonl(tmp_path / "t.jsonl", LINE, LINE, LINE | change)
    with pytest.raises(TraceError) as e:
        list(read_trace([path]))
    assert f"{path}:3: " in str(e.value)
    assert words in str(e.value)


def test_what_is_not_json_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 1\n')
    with pytest.raises(TraceError, match=r"t\.jsonl:1: "):
        list(read_trace([path]))


def test_a_missing_file_and_an_unknown_format_are_errors(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        list(read_trace([tmp_path / "none.jsonl"]))
    with pytest.raises(TraceError, match="must be one of mooncake, azure"):
        read_trace([tmp_path / "none.jsonl"], "weka")


def test_files_are_merged_by_time_and_their_sessions_kept_apart(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", LINE, LINE | {"timestamp": 300, "session_id": "s"})
    two = write_jsonl(tmp_path / "b.jsonl", LINE | {"timestamp": 200, "session_id": "s"})
    merged = list(read_trace([one, two]))
    assert [r.arrival_ms for r in merged] == [100, 200, 300]
    assert merged[1].session_id != merged[2].session_id


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
)


def test_an_azure_csv_is_read_and_shares_nothing(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    one, two = read_trace([path])
    assert two.arrival_ms - one.arrival_ms == pytest.approx(52)
    assert (one.input_tokens, one.output_tokens) == (4808, 10)
    assert set(one.ids).isdisjoint(two.ids)


def test_an_azure_csv_can_be_given_prefixes(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    one, two = read_azure(path, SharedPrefixes(0.5, 1))
    shared = set(one.ids) & set(two.ids)
    assert len(shared) == -(-3180 // 2 // 64)


def test_a_bad_azure_row_is_named(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE + "yesterday,1,1\n")
    with pytest.raises(TraceError, match=r"azure\.csv:4: .*yesterday"):
        list(read_azure(path))
    path.write_text("TIMESTAMP,ContextTokens\n")
    with pytest.raises(TraceError, match="GeneratedTokens: no such column"):
        list(read_azure(path))


def test_a_reader_looks_one_line_ahead(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", LINE, LINE | {"output_length": 0})
    reader = read_trace([path])
    assert next(reader).output_tokens == 5
    with pytest.raises(TraceError):
        next(reader)


def test_prefix_groups_take_turns_or_follow_zipf():
    even = SharedPrefixes(0.5, 4)
    firsts = [even.ids(640)[0] for _ in range(8)]
    assert firsts[:4] == firsts[4:]
    assert len(set(firsts)) == 4
    skewed = SharedPrefixes(0.5, 4, zipf=2.0)
    firsts = [skewed.ids(640)[0] for _ in range(400)]
    counts = sorted((firsts.count(first) for first in set(firsts)), reverse=True)
    assert counts[0] > 2 * counts[1] > 2 * counts[-1]


def test_synthetic_requests_are_the_same_for_the_same_seed():
    def made(seed):
        workload = SyntheticWorkload(
            input_tokens=1000, output_tokens=50, request_count=50, request_rate=5, spread=0.5, seed=seed
        )
        return [(r.arrival_ms, r.input_tokens, r.output_tokens, tuple(r.ids)) for r in workload.requests()]

    assert made(1) == made(1) != made(2)


def test_a_turn_with_history_begins_with_all_before_it():
    workload = SyntheticWorkload(
        input_tokens=640, output_tokens=64, request_count=1, turns_per_session=3, history=True, inter_turn_delay_ms=5
    )
    turns = list(workload.requests())
    assert [t.input_tokens for t in turns] == [640, 1344, 2048]
    assert turns[0].ids == turns[1].ids
    assert [t.arrival_ms for t in turns] == [0, None, None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_tokens": 0},
        {"request_rate": 0},
        {"spread": 1.0},
        {"arrival_interval_ms": 5, "request_rate": 5},
        {"inter_turn_delay_ms": -1},
    ],
)
def test_an_impossible_workload_is_refused_by_field(wrong):
    numbers = {"input_tokens": 10, "output_tokens": 10, "request_count": 10} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_ms")[0]):
        SyntheticWorkload(**numbers)
    for arguments in ({"ratio": 2}, {"groups": -1}, {"zipf": -1}):
        with pytest.raises(ValueError, match="must"):
            SharedPrefixes(**arguments)


@pytest.mark.shared
def test_the_published_trace_is_what_its_authors_say():
    path = TRACES / "conversation_trace.jsonl"
    if not path.exists():
        pytest.skip("../shared is not there")
    facts = describe(read_trace([path]))
    assert facts["requests"] == 12031
    assert facts["mean_input_tokens"] == pytest.approx(12035, abs=1)
    assert facts["reusable_ratio"] == pytest.approx(0.3664, abs=1e-4)
