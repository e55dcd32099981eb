"""Which tokens and options does an engine get for a request?"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynamo.llm.model_card import ModelDeploymentCard, ModelRuntimeConfig
from dynamo.llm.model_directory import CUSTOM_TEMPLATE, build_card
from dynamo.llm.preprocessor import Preprocessor, total_usage
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest, Routing
from dynamo.llm.protocols.openai import decode_chat, decode_completion
from dynamo.runtime.errors import InvalidArgument

USER = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Any:
    return decode_chat(json.dumps({"model": "m", "messages": USER, **fields}).encode())


def completion(**fields: Any) -> Any:
    return decode_completion(json.dumps({"model": "m", "prompt": "hello", **fields}).encode())


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def load(directory: Path, **config: Any) -> Preprocessor:
    return Preprocessor(build_card(directory, name="m", runtime_config=ModelRuntimeConfig(**config)), directory)


async def request_of(preprocessor: Preprocessor, **fields: Any) -> PreprocessedRequest:
    return (await preprocessor.chat(chat(**fields))).request


async def test_a_chat_request_becomes_tokens_of_the_rendered_template(model_dir: Path) -> None:
    preprocessor = load(model_dir)
    prepared = await preprocessor.chat(chat(max_tokens=7, temperature=0.5))
    assert prepared.formatted_prompt is not None
    assert "hello" in prepared.formatted_prompt
    assert prepared.request.token_ids == preprocessor.tokenizer.encode(prepared.formatted_prompt)
    assert prepared.request.stop_conditions.max_tokens == 7
    assert prepared.request.sampling_options.temperature == 0.5
    assert prepared.request.mdc_sum == preprocessor.card.checksum
    assert prepared.request.eos_token_ids == list(preprocessor.tokenizer.eos_ids)


async def test_an_answer_comes_back_as_text_with_its_usage(model_dir: Path) -> None:
    preprocessor = load(model_dir)
    prepared = await preprocessor.chat(chat(n=2))
    ids = preprocessor.tokenizer.encode("so it is")
    deltas = [prepared.decoder_for(i).push(EngineOutput(token_ids=ids, finish_reason="length")) for i in range(2)]
    assert [delta.text for delta in deltas] == ["so it is"] * 2
    usage = prepared.usage()
    assert usage.prompt_tokens == len(prepared.request.token_ids)
    assert usage.completion_tokens == 2 * len(ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_without_max_tokens_the_answer_may_fill_the_context(model_dir: Path) -> None:
    request = await request_of(load(model_dir, context_length=100))
    assert request.stop_conditions.max_tokens == 100 - len(request.token_ids)


async def test_max_tokens_is_cut_to_what_fits(model_dir: Path) -> None:
    request = await request_of(load(model_dir, context_length=100), max_tokens=10**15)
    assert request.stop_conditions.max_tokens == 100 - len(request.token_ids)


async def test_a_prompt_as_long_as_the_context_is_refused(model_dir: Path) -> None:
    length = len((await request_of(load(model_dir))).token_ids)
    with pytest.raises(InvalidArgument) as caught:
        await request_of(load(model_dir, context_length=length))
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert f"maximum context length is {length} tokens" in caught.value.message
    assert f"prompt has {length}" in caught.value.message


async def test_the_environment_lowers_the_limits(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_CONTEXT_WINDOW", "200")
    monkeypatch.setenv("DYN_MAX_OUTPUT_TOKENS", "9")
    preprocessor = load(model_dir)
    assert preprocessor.context_length == 200
    assert (await request_of(preprocessor)).stop_conditions.max_tokens == 9
    assert (await request_of(preprocessor, max_tokens=5)).stop_conditions.max_tokens == 5


async def test_min_tokens_that_cannot_fit_are_refused(model_dir: Path) -> None:
    with pytest.raises(InvalidArgument, match="min_tokens is 100, but only"):
        await request_of(load(model_dir, context_length=100), min_tokens=100)


async def test_the_model_s_recommendations_fill_in_silence(copy: Path) -> None:
    config = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 33}
    (copy / "generation_config.json").write_text(json.dumps(config))
    preprocessor = load(copy)
    silent = await request_of(preprocessor)
    sampling = silent.sampling_options
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (0.6, 20, 0.9, 1.1)
    assert silent.stop_conditions.max_tokens == 33
    said = (await request_of(preprocessor, temperature=0, top_k=0, max_tokens=44)).stop_conditions.max_tokens
    assert said == 44
    sampling = (await request_of(preprocessor, temperature=0, top_k=0)).sampling_options
    assert (sampling.temperature, sampling.top_k) == (0, -1)


async def test_nonsense_in_the_recommendations_is_left_out(copy: Path) -> None:
    config = {"temperature": -1, "top_k": "many", "top_p": 7, "max_new_tokens": 0}
    (copy / "generation_config.json").write_text(json.dumps(config))
    sampling = (await request_of(load(copy))).sampling_options
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (None, None, None)


@pytest.mark.parametrize(
    "fields",
    [
        lambda wrong: {"stop_token_ids": [wrong]},
        lambda wrong: {"logit_bias": {str(wrong): 1}},
        lambda wrong: {"nvext": {"token_data": [wrong]}},
    ],
)
async def test_token_ids_outside_the_vocabulary_are_refused(
    model_dir: Path, fields: Callable[[int], dict[str, Any]]
) -> None:
    preprocessor = load(model_dir)
    wrong = preprocessor.vocab_size
    with pytest.raises(InvalidArgument, match=f"outside the vocabulary of {wrong}"):
        await preprocessor.chat(chat(**fields(wrong)))


async def test_a_prompt_outside_the_vocabulary_is_refused(model_dir: Path) -> None:
    preprocessor = load(model_dir)
    with pytest.raises(InvalidArgument, match="prompt has token id"):
        await preprocessor.completion(completion(prompt=[preprocessor.vocab_size]))


async def test_token_data_replaces_the_prompt(model_dir: Path) -> None:
    assert (await request_of(load(model_dir), nvext={"token_data": [5, 6, 7]})).token_ids == [5, 6, 7]


async def test_a_raw_prompt_skips_the_template(model_dir: Path) -> None:
    preprocessor = load(model_dir)
    request = await request_of(preprocessor, nvext={"use_raw_prompt": True})
    assert request.token_ids == preprocessor.tokenizer.encode("hello")


async def test_ignore_eos_leaves_no_hidden_stops(model_dir: Path) -> None:
    stops = (await request_of(load(model_dir), ignore_eos=True)).stop_conditions
    assert stops.ignore_eos is True
    assert stops.stop_token_ids_hidden is None


async def test_a_model_without_template_says_what_to_do(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match="model m has no chat template: use /v1/completions"):
        await load(copy).chat(chat())


async def test_a_custom_template_of_the_card_is_used(copy: Path) -> None:
    (copy / CUSTOM_TEMPLATE).write_text("custom: {{ messages[0].content }} {{ mood }}")
    prepared = await load(copy).chat(chat(chat_template_kwargs={"mood": "glad"}))
    assert prepared.formatted_prompt == "custom: hello glad"


async def test_tools_are_hidden_from_the_template_when_none_may_be_called(copy: Path) -> None:
    (copy / CUSTOM_TEMPLATE).write_text("{{ tools is none }} {{ enable_thinking }}")
    preprocessor = load(copy, default_thinking_mode="disabled")
    tools = [{"type": "function", "function": {"name": "f"}}]
    shown = await preprocessor.chat(chat(tools=tools))
    hidden = await preprocessor.chat(chat(tools=tools, tool_choice="none", chat_template_args={"enable_thinking": 1}))
    assert (shown.formatted_prompt, hidden.formatted_prompt) == ("False False", "True 1")


async def test_continuing_the_final_message_adds_no_prompt(model_dir: Path) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well,"}]
    prepared = await load(model_dir).chat(chat(messages=messages, continue_final_message=True))
    assert prepared.formatted_prompt is not None
    assert prepared.formatted_prompt.endswith("Well,")


async def test_routing_carries_what_the_body_says(model_dir: Path) -> None:
    preprocessor = load(model_dir)
    assert (await request_of(preprocessor)).routing is None
    nvext = {"backend_instance_id": 5, "dp_rank": 1, "agent_hints": {"priority": 3, "osl": 70}, "cache_salt": "t"}
    assert (await request_of(preprocessor, nvext=nvext)).routing == Routing(
        backend_instance_id=5, dp_rank=1, priority=3, expected_output_tokens=70, cache_salt="t"
    )


async def test_an_adapter_s_name_is_in_the_routing(model_dir: Path) -> None:
    card = build_card(model_dir, lora_name="pirate", base_model="m")
    request = (await Preprocessor(card, model_dir).chat(chat())).request
    assert request.routing == Routing(lora_name="pirate")


async def test_each_prompt_of_a_completion_is_a_request(model_dir: Path) -> None:
    preprocessor = load(model_dir)
    first, second = await preprocessor.completion(completion(prompt=["hello", "you"], n=2))
    assert first.formatted_prompt == "hello"
    assert second.decoder_for(1).index == 3
    first.decoder_for(0).push(EngineOutput(token_ids=[5, 6], finish_reason="length"))
    usage = total_usage([first, second])
    assert usage.prompt_tokens == len(first.request.token_ids) + len(second.request.token_ids)
    assert usage.completion_tokens == 2


async def test_a_prompt_of_token_ids_is_taken_as_it_is(model_dir: Path) -> None:
    (prepared,) = await load(model_dir).completion(completion(prompt=[5, 6, 7]))
    assert prepared.request.token_ids == [5, 6, 7]


@pytest.mark.parametrize("as_ids", [False, True])
async def test_an_echo_repeats_the_prompt(model_dir: Path, as_ids: bool) -> None:
    preprocessor = load(model_dir)
    text = "hello there"
    prompt = preprocessor.tokenizer.encode(text) if as_ids else text
    (prepared,) = await preprocessor.completion(completion(prompt=prompt, echo=True, logprobs=2))
    assert prepared.request.output_options.prompt_logprobs == 2
    answer = preprocessor.tokenizer.encode(" and you")
    output = EngineOutput(token_ids=answer, finish_reason="length", log_probs=[-1.0] * len(answer))
    delta = prepared.decoder_for(0).push(output)
    assert delta.text == "hello there and you"
    assert delta.logprobs is not None
    offsets = delta.logprobs.text_offset  # type: ignore[union-attr]
    assert offsets[0] == 0
    assert offsets[-len(answer)] == len(text)


async def test_options_reach_the_engine(model_dir: Path) -> None:
    request = await request_of(
        load(model_dir),
        n=2,
        seed=4,
        stop="x",
        logprobs=True,
        top_logprobs=3,
        skip_special_tokens=False,
        guided_regex="a+",
        nvext={"annotations": ["formatted_prompt"], "extra_fields": ["prompt_logprobs"], "max_thinking_tokens": 9},
    )
    assert (request.sampling_options.n, request.sampling_options.seed) == (2, 4)
    assert request.sampling_options.guided_decoding is not None
    assert request.stop_conditions.stop == ["x"]
    assert request.stop_conditions.max_thinking_tokens == 9
    assert request.output_options.logprobs == 3
    assert request.output_options.prompt_logprobs == 3
    assert request.output_options.skip_special_tokens is False
    assert request.output_options.formatted_prompt is True


def test_a_card_survives_its_json(model_dir: Path) -> None:
    card = build_card(model_dir)
    assert ModelDeploymentCard.from_json(card.to_json()) == card
