"""Is each token endpoint spoken and read rightly? Events are as the engines' own servers send them."""

import json
from typing import Any

import msgspec
import pytest

from dynamo.attach.dialects import Dialect, dialects_of
from dynamo.attach.dialects.completions import Completions
from dynamo.attach.dialects.sglang_generate import SglangGenerate
from dynamo.attach.dialects.vllm_generate import VllmGenerate
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest
from dynamo.runtime.errors import InvalidArgument, Unknown

ALL: list[Dialect] = [VllmGenerate("m"), Completions("m", 100), SglangGenerate("m")]


def request(token_ids: list[int] | None = None, **sections: Any) -> PreprocessedRequest:
    fields = {"model": "ours", "token_ids": [5, 6] if token_ids is None else token_ids, "eos_token_ids": [1]}
    return msgspec.convert(fields | sections, PreprocessedRequest)


def read(dialect: Dialect, asked: PreprocessedRequest, *events: dict[str, Any]) -> list[EngineOutput]:
    reader = dialect.reader(asked)
    outputs = [reader.read(json.dumps(event).encode()) for event in events]
    found = [output for output in outputs if output is not None]
    if found[-1].finish_reason is not None:
        found[-1].completion_usage = reader.usage()
    return found


def test_each_engine_has_its_languages() -> None:
    assert [d.name for d in dialects_of("vllm", "m", 1)] == ["/inference/v1/generate", "/v1/completions"]
    assert [d.name for d in dialects_of("unknown", "m", 1)] == ["/inference/v1/generate", "/v1/completions"]
    assert [d.name for d in dialects_of("sglang", "m", 1)] == ["/generate"]


@pytest.mark.parametrize("dialect", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("sections", "param"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"multi_modal_data": {"image": []}}, "multi_modal_data"),
        ({"output_options": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"sampling_options": {"use_beam_search": True}}, "use_beam_search"),
        ({"prefill_result": {"a": 1}}, "prefill_result"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(dialect: Dialect, sections: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        dialect.body(request(**sections), "r")
    assert refused.value.param == param


@pytest.mark.parametrize("dialect", ALL, ids=lambda d: d.name)
def test_what_is_not_said_is_left_to_the_server(dialect: Dialect) -> None:
    body = dialect.body(request(), "r")
    sampling = body.get("sampling_params", body)
    assert not {"temperature", "top_p", "seed", "min_tokens", "logprobs", "ignore_eos"} & set(sampling)
    assert sampling["stop_token_ids"] == [1]
    assert None not in sampling.values()


@pytest.mark.parametrize("dialect", ALL, ids=lambda d: d.name)
def test_no_token_ends_an_answer_that_ignores_eos(dialect: Dialect) -> None:
    body = dialect.body(request(stop_conditions={"ignore_eos": True}), "r")
    sampling = body.get("sampling_params", body)
    assert sampling["ignore_eos"] is True
    assert "stop_token_ids" not in sampling


def test_an_answer_without_a_limit_may_fill_the_context() -> None:
    assert "max_tokens" not in VllmGenerate("m").body(request(), "r")["sampling_params"]
    assert Completions("m", 100).body(request(), "r")["max_tokens"] == 98
    with pytest.raises(InvalidArgument):
        Completions("m", None).body(request(), "r")
    assert SglangGenerate("m").body(request(), "r")["sampling_params"]["max_new_tokens"] >= 1 << 20


def test_where_and_whose_cache_is_said() -> None:
    asked = request(routing={"dp_rank": 2, "cache_salt": "tenant"})
    for dialect in ALL[:2]:
        assert dialect.headers(asked) == {"X-data-parallel-rank": "2"}
        assert dialect.body(asked, "r")["cache_salt"] == "tenant"
    body = SglangGenerate("m").body(asked, "r")
    assert (body["routed_dp_rank"], body["cache_salt"]) == (2, "tenant")


@pytest.mark.parametrize(
    ("guided", "vllm", "sglang"),
    [
        ({"regex": "a+"}, {"regex": "a+"}, {"regex": "a+"}),
        ({"json": {"type": "object"}}, {"json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"choice": ["a.", "b"]}, {"choice": ["a.", "b"]}, {"regex": r"(a\.|b)"}),
        ({"grammar": "root ::= x"}, {"grammar": "root ::= x"}, {"ebnf": "root ::= x"}),
    ],
)
def test_constraints_are_said_in_each_engines_words(
    guided: dict[str, Any], vllm: dict[str, Any], sglang: dict[str, Any]
) -> None:
    asked = request(sampling_options={"guided_decoding": guided})
    assert VllmGenerate("m").body(asked, "r")["sampling_params"]["structured_outputs"] == vllm
    assert Completions("m", 9).body(asked, "r")["structured_outputs"] == vllm
    assert sglang.items() <= SglangGenerate("m").body(asked, "r")["sampling_params"].items()


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": None, "stop_reason": None, **fields}], "usage": None}


def test_log_probabilities_of_the_token_endpoint_name_their_tokens() -> None:
    asked = request(output_options={"logprobs": 2})
    tops = [
        {"token_id": 9, "logprob": -3.0, "rank": 7},
        {"token_id": 4, "logprob": -0.5, "rank": 1},
        {"token_id": 3, "logprob": -1.0, "rank": 2},
    ]
    content = [{"token_id": 9, "logprob": -3.0, "rank": 7, "top_logprobs": tops}]
    (output,) = read(VllmGenerate("m"), asked, choice(token_ids=[9], logprobs={"content": content}))
    assert output.log_probs == [-3.0]
    assert output.top_logprobs is not None
    assert [(t.token_id, t.rank) for t in output.top_logprobs[0]] == [(4, 1), (3, 2), (9, 7)]
    assert output.cum_log_probs == -3.0


def test_log_probabilities_of_completions_name_their_tokens() -> None:
    asked = request(output_options={"logprobs": 1})
    logprobs = {"token_logprobs": [-3.0], "top_logprobs": [{"token_id:9": -3.0, "token_id:4": -0.5}]}
    (output,) = read(Completions("m", 9), asked, choice(token_ids=[9], logprobs=logprobs))
    assert output.top_logprobs is not None
    assert [(t.token_id, t.logprob) for t in output.top_logprobs[0]] == [(4, -0.5), (9, -3.0)]


@pytest.mark.parametrize("dialect", ALL[:2], ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("reason", "stop_reason", "expected"),
    [
        ("stop", None, "eos"),
        ("stop", 1, "eos"),
        ("stop", 77, "stop"),
        ("length", None, "length"),
        ("abort", None, "cancelled"),
        ("error", None, "error"),
    ],
)
def test_ends_are_told_in_engines_words(dialect: Dialect, reason: str, stop_reason: int | None, expected: str) -> None:
    event = choice(token_ids=[77]) | {}
    event["choices"][0] |= {"finish_reason": reason, "stop_reason": stop_reason}
    usage = {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 1}}}
    reader = dialect.reader(request())
    output = reader.read(json.dumps(event).encode())
    assert reader.read(json.dumps(usage).encode()) is None
    assert output is not None
    assert output.finish_reason == expected
    counted = reader.usage()
    assert counted.prompt_tokens_details is not None
    assert (counted.prompt_tokens, counted.completion_tokens, counted.prompt_tokens_details.cached_tokens) == (2, 1, 1)


@pytest.mark.parametrize("incremental", [False, True])
def test_sglang_streams_are_read_whether_they_repeat_themselves_or_not(incremental: bool) -> None:
    made = [7, 8, 8, 9, 77]
    events, start = [], 0
    for end in (1, 3, 5):
        ids = made[start:end] if incremental else made[:end]
        finish = {"type": "stop", "matched": 77} if end == 5 else None
        meta = {"completion_tokens": end, "cached_tokens": 2, "finish_reason": finish}
        meta |= {"output_token_logprobs": [[-float(i), i, "x"] for i in ids]}
        meta |= {"output_top_logprobs": [[[-0.5, 3, "y"]] for _ in ids]}
        events.append({"text": "?", "output_ids": ids, "meta_info": meta})
        start = end
    outputs = read(SglangGenerate("m"), request(output_options={"logprobs": 1}), *events)
    assert [output.token_ids for output in outputs] == [[7], [8, 8], [9, 77]]
    assert [output.log_probs for output in outputs] == [[-7.0], [-8.0, -8.0], [-9.0, -77.0]]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", 77)
    usage = outputs[-1].completion_usage
    assert usage is not None
    assert usage.completion_tokens == 5


def test_sglang_says_when_it_gave_a_request_up() -> None:
    meta = {"completion_tokens": 0, "finish_reason": {"type": "abort", "message": "out of memory"}}
    with pytest.raises(Unknown, match="out of memory"):
        read(SglangGenerate("m"), request(), {"output_ids": [], "meta_info": meta})


@pytest.mark.parametrize("dialect", ALL, ids=lambda d: d.name)
def test_an_error_in_the_stream_keeps_its_words(dialect: Dialect) -> None:
    reader = dialect.reader(request())
    with pytest.raises(Unknown, match="no room"):
        reader.read(b'{"error": {"message": "no room", "code": 500}}')
    with pytest.raises(InvalidArgument, match="too long"):
        reader.read(b'{"error": {"message": "too long", "code": 400}}')
