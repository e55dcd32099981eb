"""Flags and variables of a router, and what they set."""

import pytest

from dynamo.router.config import KvRouterConfig, RouterConfig
from dynamo.router.options import add_router_options, options_without_effect, router_config
from dynamo.runtime.options import OptionParser
from dynamo.runtime.selection import RouterMode


def parsed(*words: str, mode: RouterMode = RouterMode.KV, splits: bool = False) -> RouterConfig:
    parser = OptionParser("x", "y")
    add_router_options(parser, splits=splits)
    given = vars(parser.parse(words))
    config = router_config(given, mode, splits=splits)
    assert given == {}
    return config


def test_without_flags_all_is_as_the_configuration_has_it():
    assert parsed() == RouterConfig(mode=RouterMode.KV, config=KvRouterConfig())


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--no-router-kv-events"], "use_kv_events", False),
        (["--no-kv-events"], "use_kv_events", False),
        (["--router-ttl-secs", "5"], "router_ttl_secs", 5.0),
        (["--router-approximate-cache-policy", "lru"], "router_approximate_cache_policy", "lru"),
        (["--router-predicted-ttl-secs", "3"], "router_predicted_ttl_secs", 3.0),
        (["--router-predicted-ttl-secs", "None"], "router_predicted_ttl_secs", None),
        (["--router-temperature", "0.5"], "router_temperature", 0.5),
        (["--kv-overlap-score-weight", "2"], "overlap_score_credit", 2.0),
        (["--router-host-cache-hit-weight", "0.5"], "host_cache_hit_weight", 0.5),
        (["--no-track-active-blocks"], "router_track_active_blocks", False),
        (["--router-track-output-blocks"], "router_track_output_blocks", True),
        (["--no-router-track-prefill-tokens"], "router_track_prefill_tokens", False),
        (["--no-assume-kv-reuse"], "router_assume_kv_reuse", False),
        (["--router-replica-sync"], "router_replica_sync", True),
        (["--router-queue-threshold", "2"], "router_queue_threshold", 2.0),
        (["--router-queue-policy", "wspt"], "router_queue_policy", "wspt"),
        (["--router-event-threads", "9"], "router_event_threads", 9),
        (["--router-policy", "lmetric"], "router_policy", "lmetric"),
    ],
)
def test_a_flag_sets_its_field(words, field, value):
    assert getattr(parsed(*words).config, field) == value


def test_thresholds_and_sessions_are_around_it():
    words = ["--active-decode-blocks-threshold", "0.9", "--active-prefill-tokens-threshold", "100"]
    words += ["--active-prefill-tokens-threshold-frac", "none", "--router-session-affinity-ttl-secs", "60"]
    config = parsed(*words, "--router-session-affinity-mode", "soft")
    assert (config.active_decode_blocks_threshold, config.active_prefill_tokens_threshold) == (0.9, 100)
    assert config.active_prefill_tokens_threshold_frac is None
    assert (config.session_affinity_ttl_secs, config.session_affinity_mode) == (60, "soft")


def test_a_variable_sets_it_too_and_the_flag_wins(monkeypatch):
    monkeypatch.setenv("DYN_ROUTER_TEMPERATURE", "0.5")
    monkeypatch.setenv("DYN_ROUTER_USE_KV_EVENTS", "false")
    config = parsed("--router-temperature", "0.25").config
    assert (config.router_temperature, config.use_kv_events) == (0.25, False)


def test_a_weight_of_the_linear_cost_chooses_it():
    assert parsed("--router-prefill-load-scale", "2").config.router_policy == "linear"
    with pytest.raises(ValueError, match="--router-prefill-load-scale: the policy sticky has no such weight"):
        parsed("--router-prefill-load-scale", "2", "--router-policy", "sticky")


def test_load_aware_is_kv_mode_without_caches():
    config = parsed("--load-aware", mode=RouterMode.RoundRobin)
    assert config.mode is RouterMode.KV
    assert config.config == KvRouterConfig(
        overlap_score_credit=0.0,
        host_cache_hit_weight=0.0,
        disk_cache_hit_weight=0.0,
        use_kv_events=False,
        router_assume_kv_reuse=False,
        router_policy="linear",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--router-tracking-hash", "keyed-xxh3-v1"], "--router-tracking-hash: only 'public-xxh3-v1'"),
        (["--shared-cache-type", "hicache"], "--shared-cache-type: only 'none'"),
        (["--router-conditional-disagg"], "--router-conditional-disagg: this program routes to one pool"),
        (["--router-conditional-disagg-config", "{}"], "no effect without --router-conditional-disagg"),
        (["--router-prefill-load-model", "ais"], "--router-prefill-load-model: only 'none'"),
        (["--router-policy-config", "/nowhere.yaml"], r"--router-policy-config: /nowhere\.yaml cannot be read"),
        (["--router-session-affinity-ttl-secs", "0"], "--router-session-affinity-ttl-secs must be between 1"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_flag(words, message):
    with pytest.raises(ValueError, match=message):
        parsed(*words)


def test_flags_that_another_mode_does_not_look_at_are_listed():
    config = parsed("--router-temperature", "1", "--router-event-threads", "8", mode=RouterMode.Random)
    assert options_without_effect(config) == ["--router-temperature"]
    assert options_without_effect(parsed("--router-temperature", "1")) == []


# --- conditional disaggregation, of a program that has both pools

SPLIT = "--router-conditional-disagg"


def test_which_prompts_travel_is_set_by_a_flag_and_json():
    words = '{"policy": "isl_or_load", "eff_isl_threshold": 512, "prefill_busy_threshold": 2}'
    config = parsed(SPLIT, f"{SPLIT}-config", words, splits=True).config
    assert config == KvRouterConfig(
        conditional_disagg_enabled=True,
        conditional_disagg_policy="isl_or_load",
        conditional_disagg_eff_isl_threshold=512,
        conditional_disagg_prefill_busy_threshold=2,
    )
    assert parsed(SPLIT, splits=True).config == KvRouterConfig(conditional_disagg_enabled=True)


def test_variables_set_it_too(monkeypatch):
    monkeypatch.setenv("DYN_ROUTER_CONDITIONAL_DISAGG", "true")
    monkeypatch.setenv("DYN_ROUTER_CONDITIONAL_DISAGG_CONFIG", '{"policy": "predicted"}')
    config = parsed(splits=True).config
    assert (config.conditional_disagg_enabled, config.conditional_disagg_policy) == (True, "predicted")


def test_splitting_needs_a_router_that_knows_caches_and_loads():
    with pytest.raises(ValueError, match=r"^--router-conditional-disagg: needs --router-mode kv.*not round-robin$"):
        parsed(SPLIT, mode=RouterMode.RoundRobin, splits=True)
    assert parsed(SPLIT, "--load-aware", mode=RouterMode.RoundRobin, splits=True).mode is RouterMode.KV


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ('{"policy": "best"}', "policy must be one of always"),
        ('{"isl": 1}', "unknown field `isl`"),
        ('{"eff_isl_threshold": "many"}', r"\$\.eff_isl_threshold"),
        ('{"eff_isl_threshold": -1}', "eff_isl_threshold must be at least 0"),
        ('{"eff_isl_ratio_threshold": 1.5}', "eff_isl_ratio_threshold must be between 0 and 1"),
        ('{"decode_busy_threshold": 2}', "decode_busy_threshold must be between 0 and 1"),
        ('{"policy": "prefill_load"}', "prefill_busy_threshold: the policy prefill_load has nothing else"),
        ("policy", "malformed"),
    ],
)
def test_a_split_that_cannot_be_meant_names_flag_and_field(words, message):
    with pytest.raises(ValueError, match=f"^{SPLIT}-config: .*{message}"):
        parsed(SPLIT, f"{SPLIT}-config", words, splits=True)


@pytest.mark.parametrize(
    ("busy", "untracked"),
    [
        ("prefill_busy_threshold", "--no-router-track-prefill-tokens"),
        ("decode_busy_threshold", "--no-track-active-blocks"),
    ],
)
def test_a_threshold_of_what_is_not_counted_is_refused(busy, untracked):
    with pytest.raises(ValueError, match=f"^{SPLIT}-config: {busy}: without router_track"):
        parsed(SPLIT, f"{SPLIT}-config", f'{{"{busy}": 0.5}}', untracked, splits=True)
