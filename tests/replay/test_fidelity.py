"""The simulator beside what ai-dynamo 1.6.1 printed for the same trace (`benchmarks/replay_fidelity.py` asks it)."""

import json
from pathlib import Path

import pytest

from dynamo.replay import run_trace_replay
from tests.replay.workloads import TRACES

RECORDED = Path(__file__).parents[2] / "benchmarks" / "data" / "replay_peer.json"


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("speedup", [1.0, 1.5])
def test_round_robin_on_four_workers_is_what_the_peer_says(speedup):
    trace = TRACES / "conversation_trace.jsonl"
    if not trace.exists():
        pytest.skip("../shared is not there")
    theirs = json.loads(RECORDED.read_text())[f"conversation 4 round_robin {speedup:g}"]
    ours = run_trace_replay(trace, num_workers=4, arrival_speedup_ratio=speedup, trace_block_size=512).summary
    for name in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2e_latency_ms"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.001)
    assert ours["p99_ttft_ms"] == pytest.approx(theirs["p99_ttft_ms"], rel=0.002)
    assert ours["prefix_cache_reused_ratio"] == pytest.approx(theirs["prefix_cache_reused_ratio"], abs=1e-6)


@pytest.mark.shared
@pytest.mark.slow
def test_four_prefill_and_four_decode_workers_are_what_the_peer_says():
    trace = TRACES / "synthetic_trace.jsonl"
    if not trace.exists():
        pytest.skip("../shared is not there")
    theirs = json.loads(RECORDED.read_text())["synthetic 4+4 round_robin 2"]
    engine = {"kv_transfer_bandwidth": 64.0, "kv_transfer_bytes_per_token": 131072}
    ours = run_trace_replay(
        trace,
        prefill_engine_args=engine,
        decode_engine_args=engine,
        num_prefill_workers=4,
        num_decode_workers=4,
        first_from_decode=True,
        arrival_speedup_ratio=2.0,
        trace_block_size=512,
    ).summary
    for name in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2e_latency_ms", "prefix_cache_reused_ratio"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.002)
