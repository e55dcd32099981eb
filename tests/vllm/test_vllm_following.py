"""When may a decode worker's engine go on behind the first token? Needs no vLLM."""

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo.engine.takeover import Refusal
from dynamo.llm.protocols.engine import SEED_IS_OURS, CompletionUsage, EngineOutput, PromptTokensDetails
from dynamo.vllm.driver import EXTERNAL_TOKENS, FIRST_TOKEN
from dynamo.vllm.following import may_follow
from tests.vllm.test_vllm_roles import FIRST, GRANT, PROMPT, Taking

PLAIN = {"temperature": 0.0, "seed": None, "max_tokens": 10}


def following(result: dict[str, Any] | None = None, **fields: Any) -> Taking:
    return Taking(longest=len(PROMPT), params=PLAIN | fields, result=result)


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"max_tokens": None}, True),
        ({"repetition_penalty": 1.3}, True),
        ({"seed": 3}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "seed": 3}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"structured_outputs": object()}, False),
        ({"bad_words": ["x"]}, False),
        ({"logprobs": 2}, False),
        ({"thinking_token_budget": 5}, False),
        ({"extra_args": {"own": 1}}, False),
        ({"max_tokens": 1}, False),
    ],
)
def test_only_what_does_not_count_an_answers_tokens_from_the_first_follows(fields: dict[str, Any], may: bool) -> None:
    assert may_follow(SimpleNamespace(**(PLAIN | fields))) is may


def test_a_seed_that_is_not_the_clients_follows_and_is_dropped() -> None:
    sampled = {"temperature": 0.7, "seed": 3}
    assert may_follow(SimpleNamespace(**(PLAIN | sampled)), any_seed=True)
    taking = following(**sampled, result={SEED_IS_OURS: True})
    taking.claims.then(GRANT)
    (sent,) = taking.engine.sent
    assert sent.token_ids == [*PROMPT, FIRST]
    assert sent.sampling_params.seed is None


@pytest.mark.parametrize("result", [{}, {SEED_IS_OURS: False}])
def test_a_clients_seed_draws_the_first_token_again(result: dict[str, Any]) -> None:
    taking = following(temperature=0.7, seed=3, result=result)
    taking.claims.then(GRANT)
    (sent,) = taking.engine.sent
    assert (sent.token_ids, sent.sampling_params.seed) == (PROMPT, 3)
    assert sent.sampling_params.extra_args[FIRST_TOKEN] == FIRST


def test_a_seed_that_is_not_the_clients_stays_where_tokens_are_counted_from_the_first() -> None:
    taking = following(temperature=0.7, seed=3, presence_penalty=0.5, result={SEED_IS_OURS: True})
    taking.claims.then(GRANT)
    (sent,) = taking.engine.sent
    assert (sent.token_ids, sent.sampling_params.seed) == (PROMPT, 3)


def test_the_engine_begins_behind_the_clients_token() -> None:
    taking = following()
    taking.claims.then(GRANT)
    (sent,) = taking.engine.sent
    assert sent.token_ids == [*PROMPT, FIRST]
    params = sent.sampling_params
    assert (params.max_tokens, params.min_tokens) == (9, 1)
    assert set(params.extra_args) == {"kv_transfer_params"}


def test_its_first_output_is_the_clients_second_token() -> None:
    taking = following()
    taking.claims.then(GRANT)
    output = taking.put(EngineOutput([8], engine_data={EXTERNAL_TOKENS: len(PROMPT)}))
    assert output is not None
    assert output.token_ids == [8]
    assert (output.engine_data or {})["kv_transfer"]["tokens"] == len(PROMPT)
    assert taking.claims.claim.calls == ["done"]


def test_usage_counts_the_clients_token_with_the_answer() -> None:
    taking = following()
    taking.claims.then(GRANT)
    usage = CompletionUsage(101, 9, 110, PromptTokensDetails(100))
    last = taking.put(EngineOutput([8], finish_reason="length", completion_usage=usage))
    assert last is not None
    assert last.completion_usage == CompletionUsage(100, 10, 110, PromptTokensDetails(32))


def test_lost_kv_is_computed_again_with_the_clients_token_behind_it() -> None:
    taking = following()
    taking.claims.then(Refusal("used", "the handle was used before"))
    (sent,) = taking.engine.sent
    assert (sent.token_ids, sent.sampling_params.extra_args) == ([*PROMPT, FIRST], None)
    assert taking.engine.prefill_tokens == [len(PROMPT) + 1]


def test_a_prompt_that_leaves_no_room_behind_its_first_token_repeats_it() -> None:
    taking = Taking(longest=len(PROMPT) - 1, params=PLAIN)
    taking.claims.then(GRANT)
    assert taking.engine.sent[0].token_ids == PROMPT
    assert taking.params.extra_args is not None
    assert taking.params.extra_args[FIRST_TOKEN] == FIRST


def test_an_engine_whose_connector_is_not_ours_repeats_the_first_token() -> None:
    taking = Taking(params=PLAIN)
    taking.claims.then(GRANT)
    assert taking.engine.sent[0].token_ids == PROMPT
