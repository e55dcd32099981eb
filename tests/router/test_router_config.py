"""Which settings there are, and which values cannot be meant."""

import pytest

from dynamo.router.config import KvRouterConfig, LoadThresholdConfig, RouterConfig


def test_the_first_settings_may_be_given_by_position():
    config = KvRouterConfig(None, 0.5, 0.1, 0.2, False)
    assert (config.host_cache_hit_weight, config.router_temperature, config.use_kv_events) == (0.5, 0.2, False)
    with pytest.raises(TypeError):
        KvRouterConfig(None, 0.5, 0.1, 0.2, False, True)


def test_the_defaults_are_those_that_users_know():
    config = KvRouterConfig()
    assert (config.overlap_score_credit, config.host_cache_hit_weight, config.disk_cache_hit_weight) == (
        1.0,
        0.75,
        0.25,
    )
    assert (config.router_queue_threshold, config.router_queue_policy, config.router_ttl_secs) == (None, "fcfs", 120.0)
    assert (config.router_event_threads, config.conditional_disagg_eff_isl_threshold) == (4, 2048)


def test_settings_are_read_from_json_and_changed_one_by_one():
    config = KvRouterConfig.from_json('{"router_temperature": 0.5, "router_replica_sync": true}')
    assert (config.router_temperature, config.router_replica_sync) == (0.5, True)
    assert config.copy() == config
    assert config.with_overrides(router_temperature=1.0).router_temperature == 1.0
    with pytest.raises(TypeError):
        config.with_overrides(temperature=1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"router_temperature": "hot"}', "KvRouterConfig: Expected `float`"),
        ('{"router_temprature": 1}', "unknown field `router_temprature`"),
        ("[1]", "KvRouterConfig: Expected `object`"),
        ("{", "KvRouterConfig: "),
        ('{"router_temperature": -1}', "router_temperature must be at least 0"),
    ],
)
def test_json_that_is_no_configuration_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        KvRouterConfig.from_json(text)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("overlap_score_credit", -1),
        ("overlap_score_weight", float("nan")),
        ("prefill_load_scale", float("inf")),
        ("router_ttl_secs", 0),
        ("router_predicted_ttl_secs", -5),
        ("active_request_expiry_secs", 0),
        ("router_queue_threshold", -1),
        ("router_queue_policy", "best"),
        ("router_approximate_cache_policy", "random"),
        ("use_remote_indexer", True),
        ("shared_cache_type", "hicache"),
        ("conditional_disagg_eff_isl_threshold", -1),
        ("conditional_disagg_decode_busy_threshold", float("nan")),
        ("router_tracking_hash", "keyed-xxh3-v1"),
        ("router_prefill_load_model", "ais"),
        ("router_decode_policy", "gentle"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=setting):
        KvRouterConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("active_decode_blocks_threshold", 1.5),
        ("active_decode_blocks_threshold", -0.1),
        ("active_prefill_tokens_threshold", -1),
        ("active_prefill_tokens_threshold_frac", float("nan")),
    ],
)
def test_thresholds_are_checked(setting, value):
    with pytest.raises(ValueError, match=setting):
        LoadThresholdConfig(**{setting: value})
    with pytest.raises(ValueError, match=setting):
        RouterConfig(**{setting: value})


def test_thresholds_are_off_until_one_is_set():
    assert LoadThresholdConfig().off
    assert not LoadThresholdConfig(active_prefill_tokens_threshold=0).off
    assert RouterConfig(active_decode_blocks_threshold=0.5).thresholds == LoadThresholdConfig(
        active_decode_blocks_threshold=0.5
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("session_affinity_ttl_secs", 0), ("session_affinity_ttl_secs", 31_536_001), ("session_affinity_mode", "firm")],
)
def test_affinity_settings_are_checked(setting, value):
    with pytest.raises(ValueError, match=setting):
        RouterConfig(**{setting: value})
