"""Is a prompt computed where that costs least?"""

import msgspec
import pytest

from dynamo.router.config import SPLIT_POLICIES, KvRouterConfig
from dynamo.router.split import POLICIES, SplitView, split_policy
from dynamo.router.split_settings import split_warnings

VIEW = SplitView(prompt_tokens=8000, decode_new_tokens=8000, prefill_new_tokens=8000, prefill_load=0.1, decode_load=0.1)


def decide(config: KvRouterConfig, policy: str, **seen):
    return POLICIES[policy](config).decide(msgspec.structs.replace(VIEW, **seen))


def test_every_prompt_travels_unless_asked_otherwise():
    assert split_policy(KvRouterConfig()).decide(msgspec.structs.replace(VIEW, decode_new_tokens=1)).remote


@pytest.mark.parametrize(
    ("prompt", "new", "remote"),
    [
        (8000, 8000, True),
        (2048, 2048, False),  # at the threshold: short
        (2049, 2049, True),
        (10000, 7000, False),  # at the ratio: most of it is cached here
        (10000, 7001, True),
    ],
)
def test_short_prompts_and_the_next_turns_of_conversations_stay(prompt: int, new: int, remote: bool):
    found = decide(KvRouterConfig(), "isl_bounding", prompt_tokens=prompt, decode_new_tokens=new)
    assert found.remote is remote
    assert found.terms == {"effective_tokens": new, "effective_ratio": new / prompt}


@pytest.mark.parametrize(
    ("prefill_load", "decode_load", "remote"), [(0.5, 0.1, True), (2.0, 0.1, False), (2.0, 0.95, True)]
)
def test_a_busy_prefill_pool_sheds_to_decode_unless_that_is_busy_too(
    prefill_load: float, decode_load: float, remote: bool
):
    config = KvRouterConfig(conditional_disagg_prefill_busy_threshold=1.5, conditional_disagg_decode_busy_threshold=0.9)
    found = decide(config, "prefill_load", prefill_load=prefill_load, decode_load=decode_load)
    assert found.remote is remote
    assert "busy" in found.reason or remote


def test_without_a_threshold_no_pool_is_ever_busy():
    assert decide(KvRouterConfig(), "prefill_load", prefill_load=99.0).remote


def test_either_rule_keeps_a_prompt_here_but_not_at_a_busy_worker():
    config = KvRouterConfig(conditional_disagg_prefill_busy_threshold=1.5, conditional_disagg_decode_busy_threshold=0.9)
    assert decide(config, "isl_or_load").remote
    assert not decide(config, "isl_or_load", decode_new_tokens=100).remote
    assert not decide(config, "isl_or_load", prefill_load=2.0).remote
    assert decide(config, "isl_or_load", decode_new_tokens=100, decode_load=0.95).remote


def test_the_prediction_weighs_the_queue_and_the_transfer_against_those_that_would_stand_still():
    def remote(**seen) -> bool:
        return decide(KvRouterConfig(), "predicted", **seen).remote

    assert remote(decoding=16)  # a long prompt would hold up sixteen others
    assert not remote(decoding=0, transfer_s=0.01)  # nobody to hold up: why travel?
    assert not remote(decoding=16, decode_new_tokens=200)  # a conversation's next turn
    assert not remote(decoding=2, prefill_queued_tokens=50_000)  # prefill has a queue
    assert remote(decoding=2, prefill_queued_tokens=50_000, decode_queued_tokens=80_000)


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"isl_bounding.*got 'best'"):
        KvRouterConfig(conditional_disagg_policy="best")
    assert tuple(POLICIES) == SPLIT_POLICIES


@pytest.mark.parametrize(
    ("policy", "seen", "cause"),
    [
        ("always", {}, "always"),
        ("isl_bounding", {"decode_new_tokens": 100}, "short"),
        ("isl_bounding", {"decode_new_tokens": 5000}, "cached"),
        ("isl_bounding", {}, "long"),
        ("prefill_load", {}, "prefill_free"),
        ("prefill_load", {"prefill_load": 2.0}, "prefill_busy"),
        ("prefill_load", {"prefill_load": 2.0, "decode_load": 1.0}, "both_busy"),
        ("isl_or_load", {"decode_load": 1.0}, "decode_busy"),
        ("predicted", {"decoding": 16}, "cheaper_remote"),
        ("predicted", {"decode_new_tokens": 10}, "cheaper_local"),
    ],
)
def test_the_cause_is_a_word_that_can_be_counted(policy: str, seen: dict[str, float], cause: str):
    config = KvRouterConfig(conditional_disagg_prefill_busy_threshold=1.5, conditional_disagg_decode_busy_threshold=0.9)
    assert decide(config, policy, **seen).cause == cause


def test_settings_that_work_otherwise_than_meant_are_told():
    def told(**settings) -> list[str]:
        fields = {f"conditional_disagg_{name}": value for name, value in settings.items() if name != "router_policy"}
        more = {name: value for name, value in settings.items() if name == "router_policy"}
        return split_warnings(KvRouterConfig(conditional_disagg_enabled=True, **fields, **more))

    assert told() == []
    assert "goes by length alone" in told(policy="isl_or_load")[0]
    assert told(policy="isl_or_load", prefill_busy_threshold=1.0) == []
    assert "marginal and predicted do" in told(policy="predicted", router_policy="linear")[0]
    assert told(policy="predicted") == []
    assert "nothing were conditional" in told(policy="always")[0]
    assert split_warnings(KvRouterConfig(conditional_disagg_policy="always")) == []
