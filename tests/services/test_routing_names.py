"""Are the names of the routing interface there, with the arguments that its users know?

The data is written down here; a star ends the arguments that may be given by position. We may have further arguments
after those, by keyword and with a default.
"""

import inspect

import pytest

import dynamo.llm

NONE = object()  # an argument that must be given
KV_ROUTER_CONFIG = {
    "overlap_score_weight": None,
    "host_cache_hit_weight": 0.75,
    "disk_cache_hit_weight": 0.25,
    "router_temperature": 0.0,
    "use_kv_events": True,
    "*": NONE,
    "router_replica_sync": False,
    "router_track_active_blocks": True,
    "router_track_output_blocks": False,
    "router_assume_kv_reuse": True,
    "router_track_prefill_tokens": True,
    "router_prefill_load_model": "none",
    "router_ttl_secs": 120.0,
    "router_approximate_cache_policy": "ttl",
    "router_queue_threshold": None,
    "router_event_threads": 4,
    "router_queue_policy": "fcfs",
    "use_remote_indexer": False,
    "serve_indexer": False,
    "enable_session_prefix_index": False,
    "shared_cache_multiplier": None,
    "shared_cache_type": "none",
    "router_predicted_ttl_secs": None,
    "conditional_disagg_enabled": False,
    "conditional_disagg_policy": "isl_bounding",
    "conditional_disagg_eff_isl_threshold": 2048,
    "conditional_disagg_eff_isl_ratio_threshold": 0.7,
    "conditional_disagg_prefill_busy_threshold": None,
    "conditional_disagg_decode_busy_threshold": None,
    "overlap_score_credit": 1.0,
    "overlap_score_credit_decay": 0.0,
    "prefill_load_scale": 1.0,
    "decode_active_request_weight": 0.0,
    "router_policy_config": None,
    "router_prefill_policy": None,
    "router_decode_policy": None,
    "router_tracking_hash": "public-xxh3-v1",
    "router_tracking_key_file": None,
    "router_tracking_key_id": None,
}
PROMPT = {"token_ids": NONE}
THRESHOLDS = {
    "active_decode_blocks_threshold": None,
    "active_prefill_tokens_threshold": None,
    "active_prefill_tokens_threshold_frac": None,
}
SIGNATURES = {
    "KvRouterConfig": KV_ROUTER_CONFIG,
    "KvRouterConfig.from_json": {"text": NONE},
    "KvRouterConfig.copy": {},
    "KvRouterConfig.with_overrides": {},
    "RouterConfig": {
        "mode": NONE,
        "config": None,
        **THRESHOLDS,
        "enforce_disagg": False,
        "session_affinity_ttl_secs": None,
        "session_affinity_mode": "hard",
    },
    "LoadThresholdConfig": THRESHOLDS,
    "RoutingConstraints": {"required_taints": None, "preferred_taints": None},
    "KvRouter": {
        "endpoint": NONE,
        "block_size": NONE,
        "kv_router_config": NONE,
        "ais_perf_config": None,
        "session_affinity_ttl_secs": None,
        "*": NONE,
        "load_threshold_config": None,
        "session_affinity_mode": "hard",
    },
    "async KvRouter.generate": {
        **PROMPT,
        "model": NONE,
        "stop_conditions": None,
        "sampling_options": None,
        "output_options": None,
        "router_config_override": None,
        "worker_id": None,
        "dp_rank": None,
        "extra_args": None,
        "block_mm_infos": None,
        "multi_modal_data": None,
        "mm_routing_info": None,
        "routing_constraints": None,
        "response_buffer_size": 100,
    },
    "async KvRouter.generate_from_request": {"request": NONE, "response_buffer_size": 100},
    "async KvRouter.best_worker": {
        **PROMPT,
        "router_config_override": None,
        "request_id": None,
        "update_indexer": False,
        "block_mm_infos": None,
        "lora_name": None,
        "routing_constraints": None,
        "strict_priority": 0,
        "policy_class": None,
        "cache_namespace": None,
    },
    "async KvRouter.get_potential_loads": {
        **PROMPT,
        "block_mm_infos": None,
        "lora_name": None,
        "cache_namespace": None,
    },
    "async KvRouter.get_overlap_scores": {
        **PROMPT,
        "router_config_override": None,
        "block_mm_infos": None,
        "lora_name": None,
        "include_shared": True,
        "cache_namespace": None,
    },
    "async KvRouter.dump_events": {},
    "async KvRouter.mark_prefill_complete": {"request_id": NONE},
    "async KvRouter.free": {"request_id": NONE},
    "RadixTree": {},
    "RadixTree.find_matches": {"sequence": NONE, "early_exit": False},
    "RadixTree.apply_event": {"worker_id": NONE, "kv_cache_event_bytes": NONE},
    "RadixTree.remove_worker": {"worker_id": NONE},
    "RadixTree.clear_all_blocks": {"worker_id": NONE},
    "RadixTree.dump_tree_as_events": {},
    "compute_block_hash_for_seq": {
        "tokens": NONE,
        "kv_block_size": NONE,
        "block_mm_infos": None,
        "lora_name": None,
        "is_eagle": None,
        "cache_namespace": None,
    },
    "KvEventPublisher": {
        "endpoint": NONE,
        "worker_id": None,
        "kv_block_size": 0,
        "dp_rank": 0,
        "enable_local_indexer": False,
        "zmq_endpoint": None,
        "zmq_topic": None,
        "batching_timeout_ms": None,
        "image_token_id": None,
        "kv_state_endpoint": None,
        "video_token_id": None,
    },
    "KvEventPublisher.publish_stored": {
        "token_ids": NONE,
        "num_block_tokens": NONE,
        "block_hashes": NONE,
        "parent_hash": None,
        "block_mm_infos": None,
        "lora_name": None,
        "is_eagle": None,
        "cache_salt": None,
    },
    "KvEventPublisher.publish_removed": {"block_hashes": NONE},
    "KvEventPublisher.publish_batch": {"events": NONE},
    "KvEventPublisher.shutdown": {},
    "WorkerMetricsPublisher": {},
    "async WorkerMetricsPublisher.create_endpoint": {"endpoint": NONE},
    "WorkerMetricsPublisher.publish": {"dp_rank": None, "active_decode_blocks": None, "kv_used_blocks": None},
    "SelectionCacheConfig": {"*": NONE, "ttl_secs": None, "max_entries": None, "max_bytes": None},
    "SelectionService": {
        "*": NONE,
        "indexer_threads": 4,
        "indexer_peers": None,
        "replica_sync_port": None,
        "replica_sync_peers": None,
        "selection_cache": None,
        "session_affinity_ttl_secs": None,
    },
    "SelectionService.shutdown": {},
    "async SelectionService.upsert_worker": {"worker": NONE},
    "async SelectionService.delete_worker": {"worker_id": NONE},
    "SelectionService.list_workers": {"*": NONE, "model_name": None, "routing_group": None},
    "SelectionService.ready": {},
    "async SelectionService.overlap_scores": {"request": NONE},
    "async SelectionService.select": {"request": NONE},
    "async SelectionService.select_and_reserve": {"request": NONE},
    "async SelectionService.create_reservation": {"request": NONE},
    "async SelectionService.prefill_complete": {"selection_id": NONE},
    "SelectionService.add_output_block": {"selection_id": NONE, "*": NONE, "decay_fraction": None},
    "async SelectionService.free_reservation": {"selection_id": NONE},
    "SelectionService.loads": {"*": NONE, "model_name": None, "routing_group": None},
    "async SelectionService.potential_loads": {"request": NONE},
    "run_kv_indexer": {"args": NONE},
    "run_slot_tracker": {"args": NONE},
    "run_select_service": {"args": NONE},
}
ROUTER_MODES = [
    "RoundRobin",
    "Random",
    "PowerOfTwoChoices",
    "KV",
    "Direct",
    "LeastLoaded",
    "DeviceAwareWeighted",
]
LATER = [
    "AisPerfConfig",
    "KvDcRelay",
    "KvStateAgentHost",
    "KvStateAttachmentOwner",
    "MultimodalEmbeddingCachePublisher",
]


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_name_takes_the_arguments_that_are_known(name):
    path = name.removeprefix("async ").split(".")
    found = getattr(dynamo.llm, path[0])
    for part in path[1:]:
        found = getattr(found, part)
    assert inspect.iscoroutinefunction(found) == name.startswith("async ")
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name != "self"]
    by_name = {p.name: p for p in parameters}
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    expected = SIGNATURES[name]
    before_star = list(expected)[: list(expected).index("*")] if "*" in expected else list(expected)
    assert positional[: len(before_star)] == before_star
    for argument, default in expected.items():
        if argument == "*":
            continue
        assert argument in by_name
        given = by_name[argument].default
        if default is not NONE:
            assert given == default, argument
    for argument in by_name.keys() - expected.keys():
        extra = by_name[argument]
        assert extra.default is not extra.empty or extra.kind is extra.VAR_KEYWORD, argument


@pytest.mark.parametrize("mode", ROUTER_MODES)
def test_router_modes_have_the_names_that_are_known(mode):
    assert getattr(dynamo.llm.RouterMode, mode).name == mode


def test_errors_have_the_attributes_that_are_known():
    queue = dynamo.llm.RouterQueueLimitExceeded("full", policy_class="a", limit_kind="requests", current=3, limit=2)
    assert (queue.policy_class, queue.limit_kind, queue.current, queue.limit) == ("a", "requests", 3, 2)
    refusal = dynamo.llm.SelectionServiceError("nobody", kind="not_ready", status_code=503)
    assert (refusal.kind, refusal.status_code) == ("not_ready", 503)
    assert issubclass(type(refusal), dynamo.llm.DynamoException)


def test_scores_have_the_attributes_that_are_known():
    scores = dynamo.llm.RadixTree().find_matches([1, 2])
    assert isinstance(scores, dynamo.llm.OverlapScores)
    assert (scores.scores, scores.frequencies) == ({}, [])


@pytest.mark.parametrize("name", LATER)
def test_what_is_not_here_says_so(name):
    with pytest.raises(AttributeError, match="is not in this version"):
        getattr(dynamo.llm, name)


def test_a_service_that_cannot_serve_raises(capfd):
    with pytest.raises(SystemExit):
        dynamo.llm.run_kv_indexer(["--help"])
    assert "usage: python -m dynamo.indexer" in capfd.readouterr().out
    with pytest.raises(RuntimeError, match="the slot tracker could not serve"):
        dynamo.llm.run_slot_tracker(["--host", "203.0.113.1", "--port", "1"])  # not an address of this machine
    assert "cannot listen on 203.0.113.1:1" in capfd.readouterr().err
