"""No body, however wrong, makes a service fail: it is taken or refused, and the service goes on."""

import json
import random

import pytest

from tests.services.processes import running

VALUES = [
    None, True, 0, -1, 1, 4, 1 << 31, 1 << 63, (1 << 64) - 1, 1 << 64, 0.5, -0.0, 1e308, "",
    "m", "\x00", "tcp://h:1", "é" * 600,
    [], [1], [-1], ["x"], [None], [[1]], [1 << 64], {}, {"a": 1}, {"0": "tcp://h:1"}, {"worker_id": 1, "dp_rank": -1},
    {"required_taints": ["x"]}, {"preferred_taints": {"x": 1e400}}, [{"mm_objects": [{"mm_hash": 1}]}], list(range(9)),
]  # fmt: skip
PROMPT = [
    "token_ids",
    "block_hashes",
    "sequence_hashes",
    "isl_tokens",
    "lora_name",
    "cache_salt",
    "block_mm_infos",
    "is_eagle",
]
SELECT = [
    *PROMPT, "model_name", "routing_group", "selection_id", "router_config_override", "routing_constraints",
    "pinned_worker", "allowed_worker_ids", "priority_jump", "strict_priority", "policy_class", "expected_output_tokens",
    "session_id", "explain",
]  # fmt: skip
WORKER = [
    "worker_id", "model_name", "endpoint", "kv_events_endpoint", "kv_events_endpoints", "replay_endpoint", "block_size",
    "data_parallel_start_rank", "data_parallel_size", "max_num_batched_tokens", "total_kv_blocks", "taints", "is_eagle",
]  # fmt: skip
INDEX = [
    "instance_id",
    "endpoint",
    "model_name",
    "block_size",
    "dp_rank",
    "routing_group",
    "replay_endpoint",
    "token_ids",
]
SLOT = [
    "worker_id",
    "model_name",
    "block_size",
    "dp_start",
    "dp_size",
    "request_id",
    "dp_rank",
    "sequence_hashes",
    "new_isl_tokens",
]
ROUTES = {
    "dynamo.indexer": {
        path: [*INDEX, "block_hashes", "url"]
        for path in ("/register", "/unregister", "/query", "/query_by_hash", "/register_peer", "/deregister_peer")
    },
    "dynamo.select_service": {
        "/workers": WORKER,
        **dict.fromkeys(("/select", "/select_and_reserve", "/overlap_scores", "/potential_loads"), SELECT),
        "/reservations": [*SELECT, "worker_id", "dp_rank", "effective_prefill_tokens", "track_prefill_tokens"],
        "/reservations/a/output_block": ["decay_fraction"],
        "/replica_sync/register_peer": ["endpoint"],
    },
    "dynamo.slot_tracker": dict.fromkeys(
        ("/register", "/unregister", "/add", "/prefill_complete", "/free", "/potential_loads"), SLOT
    ),
}
GOOD = {
    "worker_id": 1, "instance_id": 1, "model_name": "m", "endpoint": "tcp://127.0.0.1:1", "block_size": 4,
    "token_ids": [1, 2, 3, 4, 5], "kv_events_endpoint": "tcp://127.0.0.1:1", "selection_id": "a", "dp_start": 0,
    "dp_size": 1, "dp_rank": 0, "request_id": "r",
    "sequence_hashes": [1], "block_hashes": [1], "url": "http://127.0.0.1:1",
}  # fmt: skip


@pytest.mark.parametrize("module", ROUTES)
def test_a_service_takes_or_refuses_any_body(tmp_path, module):
    draw = random.Random(module)
    with running(tmp_path, module) as service:
        for _ in range(600):
            path, fields = draw.choice(list(ROUTES[module].items()))
            body = {name: GOOD[name] for name in fields if name in GOOD and draw.random() < 0.9}
            for name in draw.sample(fields, draw.randrange(min(3, len(fields)) + 1)):
                body[name] = draw.choice(VALUES)
            raw = json.dumps(body).encode()
            if draw.random() < 0.05:
                raw = raw[: draw.randrange(len(raw))] + draw.randbytes(3)
            reply = service.ask("POST", path, raw)
            assert reply.status < 500 or reply.status in (503, 507, 529), (path, raw, reply)
            assert reply.status < 400 or reply.body["error"], (path, raw, reply)
        assert service.ask("GET", "/metrics").status == 200
        assert "Traceback" not in service.log(), service.log()[-3000:]
        assert service.end() == 0
