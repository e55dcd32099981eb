"""What do decode_chat and decode_completion admit, and how do they refuse?"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.llm.protocols.openai import (
    CompletionRequest,
    RequestDefaults,
    decode_chat,
    decode_completion,
    decode_untyped,
)
from dynamo.runtime.errors import InvalidArgument

USER = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": USER, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "hello", **fields}).encode()


def refusal(body: bytes, decode: Any = decode_chat) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        decode(body)
    return caught.value


def test_a_full_chat_request_decodes() -> None:
    request = decode_chat(
        chat(
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            temperature=0,
            top_p=1,
            top_k=-1,
            min_p=0.1,
            seed=-5,
            stop=["a", "b"],
            stop_token_ids=[1, 2],
            max_tokens=5,
            min_tokens=2,
            ignore_eos=True,
            logit_bias={"5": -100},
            n=3,
            best_of=3,
            logprobs=True,
            top_logprobs=20,
            priority=-1,
            nvext={"annotations": ["token_ids"], "agent_hints": {"priority": 7, "osl": 5}, "top_k": 9},
        )
    )
    assert request.stop_strings == ["a", "b"]
    assert request.logit_bias == {5: -100.0}
    assert request.choices == 3
    assert request.top_logprob_count == 20
    assert request.wants_usage
    assert request.annotations == ["token_ids"]
    assert request.priority == 7
    assert request.top_k == -1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "u"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("service_tier", "auto"),
        ("parallel_tool_calls", False),
        ("reasoning_effort", "low"),
        ("modalities", ["text"]),
        ("prompt_cache_key", "k"),
        ("safety_identifier", "s"),
        ("verbosity", "low"),
        ("functions", None),
        ("use_beam_search", False),
        ("something_unknown", None),
    ],
)
def test_harmless_fields_are_accepted(field: str, value: Any) -> None:
    decode_chat(chat(**{field: value}))


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"temperature": 3.5}, "temperature must be between 0 and 2, got 3.5", "temperature"),
        ({"temperature": "hot"}, "temperature must be a number, got a string", "temperature"),
        ({"temperature": True}, "temperature must be a number, got a boolean", "temperature"),
        ({"top_p": 0}, "top_p must be greater than 0 and at most 1, got 0.0", "top_p"),
        ({"top_k": -2}, "top_k must be at least -1, got -2", "top_k"),
        ({"min_p": 1.5}, "min_p must be between 0 and 1, got 1.5", "min_p"),
        ({"presence_penalty": -3}, "presence_penalty must be between -2 and 2, got -3.0", "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0 and at most 2", "repetition_penalty"),
        ({"n": 0}, "n must be at least 1, got 0", "n"),
        ({"n": 129}, "n must be at most 128, got 129", "n"),
        ({"n": 2, "best_of": 3}, "best_of must equal n (2)", "best_of"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0", "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer, got a fractional number", "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens must be at most max_tokens (4), got 5", "min_tokens"),
        ({"seed": 10**40}, "seed must be at most 9223372036854775807, got a number of more than 64 bits", "seed"),
        ({"stop": 3}, "stop must be a string or a list of strings, got an integer", "stop"),
        ({"stop": ["a", ""]}, "stop[1] must not be empty", "stop[1]"),
        ({"stop": ["a"] * 33}, "stop must hold at most 32 strings, got 33", "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must hold token ids, got -1", "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "the keys of logit_bias must be integers", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias[1] must be between -100 and 100, got 101.0", "logit_bias[1]"),
        ({"top_logprobs": 2}, "top_logprobs may only be given with logprobs: true", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be at most 20, got 21", "top_logprobs"),
        ({"stream_options": {}}, "stream_options may only be given with stream: true", "stream_options"),
        ({"messages": []}, "messages must not be empty", "messages"),
        ({"messages": "hi"}, "messages must be a list of messages, got a string", "messages"),
        ({"messages": [3]}, "messages[0] must be an object, got an integer", "messages[0]"),
        ({"model": None}, "model must be a string, got null", "model"),
        ({"model": ""}, "model is required", "model"),
        ({"modalities": ["text", "audio"]}, 'modalities must be ["text"]', "modalities"),
        ({"cache_salt": ""}, "cache_salt must not be empty", "cache_salt"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "must not contain chat_template", "chat_template_kwargs"),
        ({"chat_template_args": {"tools": []}}, "must not contain tools", "chat_template_args"),
        ({"continue_final_message": True}, "needs a last message of role assistant", "continue_final_message"),
        ({"functions": [{}]}, "functions is deprecated; use tools", "functions"),
        ({"audio": {"voice": "x"}}, "audio is not supported", "audio"),
        ({"nvext": {"extra_fields": ["x"]}}, "nvext.extra_fields: 'x' is not one of", "nvext.extra_fields"),
        ({"nvext": {"token_data": []}}, "nvext.token_data must not be empty", "nvext.token_data"),
        ({"nvext": {"dp_rank": "0"}}, "nvext.dp_rank must be an integer, got a string", "nvext.dp_rank"),
        ({"nvext": {"greed_sampling": True}, "top_p": 0.5}, "cannot be combined with top_p", "nvext.greed_sampling"),
        (
            {"nvext": {"agent_hints": {"speculative_prefill": True}}},
            "speculative_prefill is not supported",
            "nvext.agent_hints.speculative_prefill",
        ),
    ],
)
def test_a_wrong_chat_field_is_named(fields: dict[str, Any], message: str, param: str) -> None:
    error = refusal(chat(**fields))
    assert error.message.startswith("Validation: ")
    assert message in error.message
    assert error.param == param


@pytest.mark.parametrize(
    ("message", "text", "param"),
    [
        ({"content": "x"}, "messages[1].role is required", "messages[1].role"),
        ({"role": "bot", "content": "x"}, "must be one of system, developer, user", "messages[1].role"),
        ({"role": 3, "content": "x"}, "messages[1].role must be a string, got an integer", "messages[1].role"),
        ({"role": "user"}, "messages[1].content is required", "messages[1].content"),
        ({"role": "user", "content": None}, "must be a string or a list of parts, got null", "messages[1].content"),
        ({"role": "user", "content": 5}, "must be a string or a list of parts, got an integer", "messages[1].content"),
        ({"role": "user", "content": ["x"]}, "must be an object with a type", "messages[1].content[0]"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "has type image_url, but this model takes text only",
            "messages[1].content[0]",
        ),
        (
            {"role": "user", "content": [{"type": "poem"}]},
            '.type must be "text", got "poem"',
            "messages[1].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            ".text must be a string, got null",
            "messages[1].content[0].text",
        ),
        ({"role": "user", "content": "x", "name": 3}, "messages[1].name must be a string", "messages[1].name"),
        ({"role": "assistant", "tool_calls": [{}]}, "function must be an object", "messages[1].tool_calls[0].function"),
    ],
)
def test_a_wrong_message_is_named(message: dict[str, Any], text: str, param: str) -> None:
    error = refusal(chat(messages=[*USER, message]))
    assert text in error.message
    assert error.param == param


def test_an_assistant_message_may_be_only_a_call() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    request = decode_chat(
        chat(
            messages=[
                *USER,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "4", "tool_call_id": "c"},
            ]
        )
    )
    assert request.messages[1]["tool_calls"] == [call]


def test_unknown_keys_of_a_message_reach_the_template() -> None:
    request = decode_chat(chat(messages=[{"role": "user", "content": "x", "mood": "good"}]))
    assert request.messages[0]["mood"] == "good"


def test_all_unknown_fields_are_listed() -> None:
    error = refusal(chat(foo=1, bar=2, stream=True, stream_options={"odd": 1}, nvext={"agent_hints": {"x": 1}}))
    assert error.message == (
        "Validation: Unsupported parameter(s): `foo`, `bar`, `stream_options.odd`, `nvext.agent_hints.x`"
    )
    assert error.param == "foo"


def test_unknown_fields_pass_where_the_operator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_IGNORE_OPENAI_FE_UNSUPPORTED_FIELDS", "1")
    request = decode_chat(chat(foo=1, nvext={"odd": 1, "top_k": 4}, logit_bias={"7": 1}))
    assert request.top_k == 4
    assert request.logit_bias == {7: 1.0}


def test_nvext_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_DISABLE_FRONTEND_NVEXT", "1")
    assert "switched off" in refusal(chat(nvext={})).message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the request body is empty; send a JSON object"),
        (b"{", "the request body is not valid JSON: it ends too early"),
        (b'{"model":"\xff"}', "the request body is not valid UTF-8 (byte 10)"),
        (b'{"temperature":NaN}', "the request body is not valid JSON"),
        (b'{"temperature":-Infinity}', "the request body is not valid JSON"),
        (b'{"model":"\\ud800"}', "the request body is not valid JSON"),
        (b'{"messages":' + b"[" * 100_000, "the request body is nested too deeply"),
        (b"[]", "Validation: the request body must be an object, got a list"),
        (b"{}", "Validation: messages is required"),
        (b'{"model":"m","messages":[],"seed":' + b"9" * 5000 + b"}", "Validation: seed is a number out of range"),
        (b'{"model":"m","messages":[],"temperature":1e999}', "Validation: temperature is a number out of range"),
    ],
)
def test_a_malformed_body_is_explained(body: bytes, message: str) -> None:
    assert refusal(body).message.startswith(message)


def test_greed_sampling_makes_the_request_greedy() -> None:
    assert decode_chat(chat(nvext={"greed_sampling": True})).temperature == 0


def test_the_cache_salt_of_nvext_wins() -> None:
    assert decode_chat(chat(cache_salt="root", nvext={"cache_salt": "ext"})).cache_salt == "ext"


def test_defaults_fill_in_what_is_not_said() -> None:
    defaults = RequestDefaults("big", 0.3, 77)
    request = decode_chat(json.dumps({"messages": USER}).encode(), defaults)
    assert (request.model, request.temperature, request.token_limit) == ("big", 0.3, 77)
    request = decode_chat(chat(temperature=1, max_tokens=5), defaults)
    assert (request.model, request.temperature, request.token_limit) == ("m", 1, 5)


def test_the_untyped_body_has_the_defaults_too() -> None:
    body = json.dumps({"messages": USER, "user": "u"}).encode()
    request = decode_chat(body, RequestDefaults("big", 0.3, None))
    assert decode_untyped(body, request) == {"messages": USER, "user": "u", "model": "big", "temperature": 0.3}


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1, 2], [3]]])
def test_prompts_of_every_form_decode(prompt: Any) -> None:
    request = decode_completion(completion(prompt=prompt))
    expected = [prompt] if prompt in ("a", [1, 2]) else prompt
    assert request.prompts == expected


@pytest.mark.parametrize(
    "prompt", [[1, "a"], ["a", [1]], [], "", ["a", ""], [[1], []], [-1], [2**40], None, {}, [None]]
)
def test_wrong_prompts_are_refused(prompt: Any) -> None:
    error = refusal(completion(prompt=prompt), decode_completion)
    assert error.message.startswith("Validation: prompt")
    assert error.param is not None
    assert error.param.startswith("prompt")


def test_a_suffix_is_refused_with_a_reason() -> None:
    assert "suffix is not supported" in refusal(completion(suffix="x"), decode_completion).message
    assert isinstance(decode_completion(completion(suffix="")), CompletionRequest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({*decode_chat(chat()).__struct_fields__, *decode_completion(completion()).__struct_fields__, "suffix"})
near_requests = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6)


@given(json_values | near_requests)
@settings(max_examples=300, deadline=None)
def test_any_json_document_decodes_or_is_refused(document: Any) -> None:
    for base in ({}, {"model": "m", "messages": USER}, {"model": "m", "prompt": "x"}):
        value = {**base, **document} if isinstance(document, dict) else document
        for decode in (decode_chat, decode_completion):
            try:
                request = decode(json.dumps(value).encode())
            except InvalidArgument as e:
                assert e.message  # noqa: PT017 - either way is right
            else:
                assert request.model


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    for decode in (decode_chat, decode_completion):
        with pytest.raises(InvalidArgument):
            decode(body)


@given(
    st.sampled_from(["messages", "tools", "tool_choice", "response_format", "nvext", "logit_bias", "guided_json"]),
    json_values,
)
@settings(max_examples=300, deadline=None)
def test_any_value_of_a_nested_field_decodes_or_is_refused(field: str, value: Any) -> None:
    for shaped in (
        value,
        [value],
        {"type": "function", "function": value},
        [{"role": "assistant", "tool_calls": [value]}],
    ):
        try:
            decode_chat(chat(**{field: shaped}))
        except InvalidArgument as e:
            assert e.message  # noqa: PT017 - either way is right
