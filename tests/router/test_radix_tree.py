"""The index as users hold it in their hands, against the reference implementation's answers."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dynamo.llm
from dynamo.llm import RadixTree

STREAMS = json.loads((Path(__file__).parent / "data" / "radix_tree_vectors.json").read_text())["streams"]


def stored(blocks, parent=None, **fields) -> bytes:
    named = [{"block_hash": name, "tokens_hash": local} for name, local in blocks]
    return event({"stored": {"parent_hash": parent, "blocks": named}}, **fields)


def event(data, **fields) -> bytes:
    return json.dumps({"event_id": 0, "data": data, **fields}).encode()


@pytest.mark.parametrize("number", range(len(STREAMS)))
def test_scores_and_errors_are_the_references(number):
    tree = RadixTree()
    for step in STREAMS[number]:
        match step:
            case ["event", worker, body, None]:
                tree.apply_event(worker, json.dumps(body).encode())
            case ["event", worker, body, raised]:
                with pytest.raises((RuntimeError, ValueError)) as caught:
                    tree.apply_event(worker, json.dumps(body).encode())
                assert f"{type(caught.value).__name__}: {caught.value}" == raised
            case ["ask", path, scores]:
                found = tree.find_matches(path)
                assert sorted([*key, score] for key, score in found.scores.items()) == scores
                assert tree.find_matches(path, early_exit=True).scores == found.scores
                assert found.frequencies == []
            case [call, worker]:
                getattr(tree, call)(worker)


def test_a_dump_makes_another_tree_the_same():
    for steps in STREAMS[:5]:
        tree, copy = RadixTree(), RadixTree()
        for step in steps:
            if step[0] == "event" and step[3] is None:
                tree.apply_event(step[1], json.dumps(step[2]).encode())
        for line in tree.dump_tree_as_events():
            told = json.loads(line)
            assert set(told) == {"worker_id", "storage_tier", "residency_domain", "event"}
            copy.apply_event(told["worker_id"], json.dumps(told["event"]).encode())
        for step in steps:
            if step[0] == "ask":
                assert copy.find_matches(step[1]).scores == tree.find_matches(step[1]).scores


def test_a_dump_has_every_field():
    tree = RadixTree()
    tree.apply_event(7, stored([(101, 1), (102, 2)]))
    tree.apply_event(7, stored([(103, 3)], 102))
    tree.apply_event(7, event({"removed": {"block_hashes": [102]}}))
    one, two = map(json.loads, tree.dump_tree_as_events())
    assert one == {
        "worker_id": 7,
        "storage_tier": "device",
        "residency_domain": "worker",
        "event": {
            "event_id": 0,
            "data": {
                "stored": {
                    "parent_hash": None,
                    "start_position": None,
                    "blocks": [
                        {"block_hash": name, "tokens_hash": local, "mm_extra_info": None}
                        for name, local in ((101, 1), (two["event"]["data"]["removed"]["block_hashes"][0], 2), (103, 3))
                    ],
                }
            },
            "dp_rank": 0,
        },
    }
    assert two["event"]["event_id"] == 1


def test_what_is_behind_a_hole_counts_again_once_it_is_filled():
    tree = RadixTree()
    tree.apply_event(7, stored([(101, 1), (102, 2), (103, 3)]))
    tree.apply_event(7, event({"removed": {"block_hashes": [102]}}))
    assert tree.find_matches([1, 2, 3]).scores == {(7, 0): 1}
    tree.apply_event(7, stored([(102, 2)], 101))
    assert tree.find_matches([1, 2, 3]).scores == {(7, 0): 3}


@pytest.mark.parametrize(
    "body",
    [
        b"garbage",
        b"{}",
        event({}),
        event("moved"),
        event({"stored": {"parent_hash": None, "blocks": [{"block_hash": -1, "tokens_hash": 1}]}}),
        event({"stored": {"parent_hash": None, "blocks": [{"block_hash": 1, "tokens_hash": 2**64}]}}),
        event({"removed": {"block_hashes": "x"}}),
    ],
)
def test_what_is_no_event_is_refused(body):
    with pytest.raises(ValueError, match="Failed to deserialize KvCacheEvent"):
        RadixTree().apply_event(1, body)


def test_wrong_arguments_are_refused():
    tree = RadixTree()
    with pytest.raises(OverflowError, match="worker_id"):
        tree.apply_event(-1, event("cleared"))
    with pytest.raises(TypeError, match="kv_cache_event_bytes"):
        tree.apply_event(1, "cleared")
    with pytest.raises(ValueError, match="sequence: -1"):
        tree.find_matches([-1])


def test_several_threads_may_use_it():
    tree = RadixTree()

    def use(worker: int) -> None:
        for i in range(200):
            tree.apply_event(worker, stored([(1000 * worker + i, i), (10**9 + 1000 * worker + i, i + 1)]))
            assert tree.find_matches([i, i + 1]).scores[worker, 0] == 2

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    tree.clear_all_blocks(0)
    assert set(tree.find_matches([5, 6]).scores) == {(1, 0), (2, 0), (3, 0)}


def test_its_answer_is_public_too():
    assert isinstance(RadixTree().find_matches([]), dynamo.llm.OverlapScores)
