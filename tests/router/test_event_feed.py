"""A feed and real publishers: late, lossy, contradictory, replaced and gone."""

import asyncio
import json
import logging

import msgspec
import pytest

from dynamo.llm.block_hash import sequence_hashes
from dynamo.llm.kv_events import KvEventData
from dynamo.router import event_feed as module
from dynamo.router.recovery import query_endpoint
from dynamo.router.types import Overlap, WorkerKey
from dynamo.runtime.events import create_publisher
from tests.router.feeding import ENDPOINT, eventually, feeding, holds, line, publishing, removed, stored

PATH = [11, 12, 13, 14, 15, 16]


async def test_the_index_follows_what_workers_say(runtime):
    async with feeding(runtime) as feed, publishing(runtime, 1) as one, publishing(runtime, 2) as two:
        one.publish([stored(PATH)])
        two.publish([stored(PATH[:3])])
        await eventually(lambda: holds(feed, PATH, w1=6, w2=3))
        one.publish([removed(PATH, 4)])
        await eventually(lambda: holds(feed, PATH, w1=4, w2=3))
        two.publish([KvEventData(cleared=True)])
        await eventually(lambda: holds(feed, PATH, w1=4))
        one.publish([stored(PATH)], "host_pinned")
        await eventually(lambda: feed.index.find(sequence_hashes(PATH)) == {WorkerKey(1): Overlap(4, 2)})
        assert await feed.settled(5)
        assert feed.unsynced() == []


async def test_ranks_of_one_worker_are_apart(runtime):
    async with feeding(runtime) as feed, publishing(runtime, 1, 0) as zero, publishing(runtime, 1, 1) as one:
        zero.publish([stored(PATH)])
        one.publish([stored(PATH[:2])])
        expected = {WorkerKey(1, 0): Overlap(6), WorkerKey(1, 1): Overlap(2)}
        await eventually(lambda: feed.index.find(sequence_hashes(PATH)) == expected)


async def test_a_router_that_starts_late_learns_all_and_then_follows(runtime):
    async with publishing(runtime) as publisher:
        publisher.publish([stored(PATH), removed(PATH, 5), stored([7, 8])])
        async with feeding(runtime) as feed:
            assert await feed.settled(10)
            assert holds(feed, PATH, w1=5)
            assert holds(feed, [7, 8], w1=2)
            publisher.publish([stored(PATH, 5)])
            await eventually(lambda: holds(feed, PATH, w1=6))
            assert line(feed)["recoveries"] == {"dump": 1}
            assert line(feed)["duplicates"] == 0 or line(feed)["gaps"] == 0


async def test_a_lost_message_is_told_again(runtime):
    async with feeding(runtime) as feed, publishing(runtime) as publisher:
        assert await feed.settled(10)
        publisher.publish([stored(PATH[:2])])
        await eventually(lambda: holds(feed, PATH, w1=2))
        feed.lose = lambda message: True
        publisher.publish([stored(PATH, 2)])
        await asyncio.sleep(0.2)
        feed.lose = lambda message: False
        publisher.publish([stored([7, 8])])
        await eventually(lambda: holds(feed, PATH, w1=6) and holds(feed, [7, 8], w1=2))
        assert line(feed)["gaps"] == 1
        assert line(feed)["missed_events"] == 1
        assert line(feed)["recoveries"] == {"dump": 1, "events": 1}
        assert line(feed)["state"] == "synced"
        text = runtime.metrics.render().decode()
        assert 'router_kv_zmq_ingress_lifecycle_total{action="gap"' in text
        assert "kv_cache_events_applied{" in text


async def test_a_last_message_that_was_lost_is_noticed_by_the_silence(runtime, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.3)
    async with feeding(runtime) as feed, publishing(runtime) as publisher:
        assert await feed.settled(10)
        publisher.publish([stored(PATH[:2])])
        await eventually(lambda: holds(feed, PATH, w1=2))
        feed.lose = lambda message: True
        publisher.publish([stored(PATH, 2)])
        await eventually(lambda: holds(feed, PATH, w1=6))


async def test_more_lost_than_is_kept_is_told_as_a_whole(runtime):
    async with feeding(runtime) as feed, publishing(runtime) as publisher:
        publisher._log._max_events = 4
        assert await feed.settled(10)
        feed.lose = lambda message: True
        publisher.publish([stored(PATH)])
        publisher.publish([stored([100 + i]) for i in range(20)])
        await asyncio.sleep(0.2)
        feed.lose = lambda message: False
        publisher.publish([removed(PATH, 3)])
        await eventually(lambda: holds(feed, PATH, w1=3) and holds(feed, [119], w1=1))
        assert line(feed)["recoveries"] == {"dump": 2}


async def test_any_share_of_lost_messages_ends_at_the_same_index(runtime, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.3)
    async with feeding(runtime) as feed, publishing(runtime) as publisher:
        feed.lose = lambda message: message.sequence % 3 != 0
        for i in range(60):
            path = [i, *range(i % 7)]
            publisher.publish([stored(path)])
            if i % 5 == 4:
                publisher.publish([removed([i, *range(i % 7)], i % 7)])
            await asyncio.sleep(0.005)

        def same() -> bool:
            held = publisher._source._held
            paths = [[i, *range(i % 7)] for i in range(60)]
            return all(
                {k: v.device for k, v in feed.index.find(sequence_hashes(path)).items()}
                == {k: v.device for k, v in held.find(sequence_hashes(path)).items()}
                for path in paths
            )

        await eventually(same)
        assert line(feed)["gaps"] > 0


async def test_a_worker_that_leaves_takes_its_blocks(runtime):
    async with feeding(runtime) as feed, publishing(runtime, 2) as stays:
        stays.publish([stored(PATH[:2])])
        async with publishing(runtime, 1) as leaves:
            leaves.publish([stored(PATH)])
            await eventually(lambda: holds(feed, PATH, w1=6, w2=2))
        await eventually(lambda: holds(feed, PATH, w2=2))
        assert [x["worker_id"] for x in feed.status()] == [2]


async def test_a_worker_that_restarts_under_its_id_begins_with_an_empty_cache(runtime):
    async with feeding(runtime) as feed, publishing(runtime) as first:
        first.publish([stored(PATH)])
        await eventually(lambda: holds(feed, PATH, w1=6))
        async with publishing(runtime) as second:  # the first one's record is still there, as after a kill
            await eventually(lambda: holds(feed, PATH))
            second.publish([stored(PATH[:2])])
            await eventually(lambda: holds(feed, PATH, w1=2))
            first.publish([stored([1])])  # a last word from the old life
            second.publish([stored([2])])
            await eventually(lambda: holds(feed, [2], w1=1))
            assert holds(feed, [1])
            await first.close()
            await asyncio.sleep(0.1)
            assert holds(feed, PATH, w1=2)


async def test_another_block_size_is_refused_with_both_named(runtime, caplog):
    async with feeding(runtime) as feed, publishing(runtime, block_size=8) as publisher:
        publisher.publish([stored(PATH)])
        await eventually(lambda: feed.status())
        assert line(feed)["state"] == "refused"
        assert line(feed)["reason"] == "its KV blocks have 8 tokens, this router's 4"
        assert feed.unsynced() == [WorkerKey(1)]
        await asyncio.sleep(0.2)
        assert holds(feed, PATH)
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert "have 8 tokens, this router's 4" in record.getMessage()


async def test_what_is_no_event_is_counted_and_hurts_nobody(runtime):
    async with feeding(runtime) as feed, publishing(runtime) as good:
        stranger = await create_publisher(runtime, ENDPOINT, "kv-events")
        await eventually(lambda: sum(feed._subscriber.publishers.values()) == 2)
        for payload in (
            b"garbage",
            {"a": 1},
            [{"worker_id": 1}],
            [{"worker_id": 9, "event": {"event_id": 0, "data": {}}}],
        ):
            stranger.publish(payload)
        good.publish([stored(PATH)])
        await eventually(lambda: holds(feed, PATH, w1=6))
        text = runtime.metrics.render().decode()
        (count,) = [x for x in text.splitlines() if 'kv_cache_event_warnings{warning_kind="undecodable"' in x]
        assert count.endswith(" 3.0")
        await stranger.close()


async def test_nobody_speaks_for_another_worker(runtime):
    async with feeding(runtime) as feed, publishing(runtime, 1) as one, publishing(runtime, 2) as two:
        one.publish([stored(PATH[:1])])
        two.publish([stored(PATH[:1])])
        await eventually(lambda: holds(feed, PATH, w1=1, w2=1))
        stranger = await create_publisher(runtime, ENDPOINT, "kv-events")
        await eventually(lambda: sum(feed._subscriber.publishers.values()) == 3)
        two.worker_id = 1
        two.publish([KvEventData(cleared=True)])  # a known publisher about another's worker
        cleared = {"worker_id": 1, "event": {"event_id": 0, "data": "cleared"}}
        stranger.publish([cleared])  # and one without a source
        one.publish([stored(PATH, 1)])
        await eventually(lambda: holds(feed, PATH, w1=6, w2=1))
        await asyncio.sleep(0.2)
        assert holds(feed, PATH, w1=6, w2=1)
        await stranger.close()


async def test_a_worker_that_no_one_knows_is_heard_and_marked_as_one_that_cannot_be_asked(runtime, monkeypatch):
    monkeypatch.setattr(module, "SOURCE_GRACE_S", 0.2)
    async with feeding(runtime) as feed, publishing(runtime, 77, local_indexer=False) as publisher:
        await eventually(lambda: any(feed._subscriber.publishers.values()))
        await asyncio.sleep(0.1)
        publisher.publish([stored(PATH[:2])])
        await eventually(lambda: holds(feed, PATH, w77=2))
        feed.lose = lambda message: True
        publisher.publish([stored(PATH, 2)])
        await asyncio.sleep(0.1)
        feed.lose = lambda message: False
        publisher.publish([stored([5])])
        await eventually(lambda: line(feed, 77)["state"] == "partial")
        assert "cannot tell them again" in line(feed, 77)["reason"]
        assert holds(feed, PATH)  # what was known may be gone: nothing is claimed of it
        assert holds(feed, [5], w77=1)


async def test_a_worker_that_cannot_be_asked_now_is_asked_until_it_can(runtime):
    async with publishing(runtime) as publisher:
        publisher.publish([stored(PATH)])
        served = publisher._source._served
        failures = 0
        tell = publisher._source.tell

        def failing(from_event_id):
            nonlocal failures
            failures += 1
            if failures < 4:
                raise RuntimeError("not now")
            return tell(from_event_id)

        publisher._source.tell = failing
        async with feeding(runtime) as feed:
            await eventually(lambda: failures >= 2)
            assert line(feed)["state"] == "recovering"
            assert "not now" in line(feed)["last_error"]
            assert feed.unsynced() == [WorkerKey(1)]
            await eventually(lambda: holds(feed, PATH, w1=6))
            assert line(feed)["recoveries"] == {"failed": 3, "dump": 1}
            assert line(feed)["last_error"] == ""
        assert served is publisher._source._served


async def test_events_that_contradict_what_is_known_let_everything_be_told_anew(runtime):
    async with feeding(runtime) as feed, publishing(runtime) as publisher:
        publisher.publish([stored(PATH[:3])])
        await eventually(lambda: holds(feed, PATH, w1=3) and feed.unsynced() == [])
        feed.index.clear(WorkerKey(1))  # as if the index had gone wrong
        publisher.publish([stored(PATH, 3)])
        await eventually(lambda: holds(feed, PATH, w1=6))


async def test_a_large_cache_is_told_in_parts_while_other_work_goes_on(runtime):
    async with publishing(runtime) as publisher:
        paths = [[1000 * i + j for j in range(900)] for i in range(60)]
        publisher.publish([stored(path) for path in paths])
        async with feeding(runtime) as feed:
            assert await feed.settled(10)
            assert len(feed.index) == 54_000
            assert all(holds(feed, path, w1=900) for path in paths)


async def test_the_source_stands_in_discovery_as_peers_write_it(runtime):
    async with publishing(runtime, worker_id=0x1A2B, dp_rank=3) as publisher:
        ((key, value),) = (await runtime.discovery.get_prefix("v1/event_sources/")).items()
        publisher_id = publisher._source.publisher_id
        scope = "namespace/dynamo/component/backend/endpoint/generate"
        assert key == f"v1/event_sources/{scope}/topic/kv-events/{publisher_id:x}"
        record = json.loads(value)
        place = {"namespace": "dynamo", "component": "backend", "name": "generate"}
        assert {k: v for k, v in record.items() if k != "metadata"} == {
            "type": "EventSource",
            "scope": {"kind": "endpoint", "endpoint": place},
            "topic": "kv-events",
            "publisher_id": publisher_id,
        }
        metadata = record["metadata"]
        assert metadata["kv_state_endpoint"] == place
        assert metadata["worker"] == {"worker_id": 0x1A2B, "dp_rank": 3}
        target = metadata["recovery_target"]
        assert target["endpoint"] == query_endpoint(publisher_id) == f"worker_kv_query_source_{publisher_id:x}"
        assert target["instance_id"] == 0x1A2B
        assert target["transport"]["tcp"].endswith(f"/1a2b/dynamo/backend/worker_kv_query_source_{publisher_id:x}")
        assert await runtime.discovery.get_prefix(f"v1/instances/dynamo/backend/{target['endpoint']}/")
    assert await runtime.discovery.get_prefix("v1/event_sources/") == {}


@pytest.mark.parametrize("value", [b"{", b"{}", b'{"type":"EventSource"}'])
async def test_a_source_record_that_is_none_is_ignored(runtime, value):
    key = "v1/event_sources/namespace/dynamo/component/backend/endpoint/generate/topic/kv-events/5"
    await runtime.discovery.put(key, value)
    await runtime.discovery.put(key.replace("/5", "/xyz"), value)
    async with feeding(runtime) as feed, publishing(runtime) as publisher:
        publisher.publish([stored(PATH)])
        await eventually(lambda: holds(feed, PATH, w1=6))


async def test_a_component_hears_all_its_endpoints(runtime):
    async with feeding(runtime, "dynamo.backend") as feed, publishing(runtime) as publisher:
        publisher.publish([stored(PATH)])
        await eventually(lambda: holds(feed, PATH, w1=6))
        assert await feed.settled(10)


async def test_two_routers_that_lost_different_messages_agree_in_the_end(runtime, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.3)
    async with feeding(runtime) as one, feeding(runtime) as two, publishing(runtime) as publisher:
        one.lose = lambda message: message.sequence % 2 == 0
        two.lose = lambda message: message.sequence % 2 == 1
        for i in range(20):
            publisher.publish([stored([i, i + 1])])
            await asyncio.sleep(0.002)
        for feed in (one, two):
            await eventually(lambda feed=feed: all(holds(feed, [i, i + 1], w1=2) for i in range(20)))


def test_the_decoder_takes_what_peers_write():
    peer = {
        "worker_id": 7,
        "storage_tier": "device",
        "residency_domain": "worker",
        "event": {
            "event_id": 1,
            "data": {
                "stored": {
                    "parent_hash": None,
                    "start_position": None,
                    "blocks": [{"block_hash": 2**64 - 1, "tokens_hash": 5, "mm_extra_info": None}],
                }
            },
            "dp_rank": 0,
        },
    }
    (event,) = msgspec.msgpack.decode(msgspec.msgpack.encode([peer]), type=list[module.RouterEvent])
    assert event.event.change.stored.blocks[0].block_hash == 2**64 - 1
