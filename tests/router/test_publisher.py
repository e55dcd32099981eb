"""What workers publish, heard by a real subscriber."""

import asyncio
from contextlib import asynccontextmanager

import msgspec
import pytest

from dynamo.llm.block_hash import compute_block_hash_for_seq
from dynamo.llm.kv_events import KvEventData, LoadMetrics, Removed, RouterEvent
from dynamo.router import publisher as module
from dynamo.router.publisher import KvEventPublisher, WorkerMetricsPublisher, common_time
from dynamo.runtime.events import create_subscriber

DEADLINE_S = 10.0
SUBSCRIBED_S = 0.05  # from a connection to its subscription, of which ZeroMQ tells nobody
ENDPOINT = "dynamo.backend.generate"


@asynccontextmanager
async def heard(runtime, topic, **options):
    """A publisher on ENDPOINT and what a subscriber hears of it."""
    endpoint = runtime.endpoint(ENDPOINT)
    publisher = KvEventPublisher(endpoint, kv_block_size=2, **options)
    await publisher.ready()
    subscriber = await create_subscriber(runtime, ENDPOINT, topic)
    await subscriber.wait_connected()
    await asyncio.sleep(SUBSCRIBED_S)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield publisher, subscriber
    finally:
        await subscriber.close()
        await publisher.close()


def decode(event) -> list[RouterEvent]:
    return msgspec.msgpack.decode(event.payload, type=list[RouterEvent])


async def test_events_of_one_turn_share_a_message_and_count_up_from_zero(runtime):
    async with heard(runtime, "kv-events", worker_id=5, dp_rank=3) as (publisher, subscriber):
        publisher.publish_stored([1, 2, 3, 4], [2, 2], [-1, 12], parent_hash=10)
        publisher.publish_removed([12])
        publisher.publish_cleared()
        stored, removed, cleared = decode(await anext(subscriber))
        assert [e.event.event_id for e in (stored, removed, cleared)] == [0, 1, 2]
        assert {(e.worker_id, e.event.dp_rank, e.storage_tier) for e in (stored, removed, cleared)} == {
            (5, 3, "device")
        }
        contents = compute_block_hash_for_seq([1, 2, 3, 4], 2)
        blocks = stored.event.data.stored.blocks
        assert [(b.block_hash, b.tokens_hash) for b in blocks] == [(2**64 - 1, contents[0]), (12, contents[1])]
        assert stored.event.data.stored.parent_hash == 10
        assert removed.event.data.removed.block_hashes == [12]
        assert cleared.event.data == "cleared"
        assert cleared.event.change.cleared


async def test_the_wire_has_the_shape_that_subscribers_know(runtime):
    async with heard(runtime, "kv-events", worker_id=5) as (publisher, subscriber):
        publisher.publish_stored([1, 2], [2], [7])
        (event,) = (await anext(subscriber)).decode()
        (tokens_hash,) = compute_block_hash_for_seq([1, 2], 2)
        block = {"block_hash": 7, "tokens_hash": tokens_hash}
        assert event == {"worker_id": 5, "event": {"event_id": 0, "data": {"stored": {"blocks": [block]}}}}


async def test_a_batching_time_gathers_events_of_several_turns(runtime):
    async with heard(runtime, "kv-events", batching_timeout_ms=50) as (publisher, subscriber):
        for i in range(3):
            publisher.publish_removed([i])
            await asyncio.sleep(0)
        assert len(decode(await anext(subscriber))) == 3


async def test_spaced_messages_carry_what_came_since_the_last_and_the_first_does_not_wait(runtime):
    async with heard(runtime, "kv-events") as (publisher, subscriber):
        publisher.spacing_s, now = 0.5, asyncio.get_running_loop().time()
        await asyncio.sleep(common_time(now, 0.5) - now)  # so that there is time until the next
        publisher.publish_removed([0])
        assert len(decode(await anext(subscriber))) == 1
        for i in range(3):
            publisher.publish_removed([i])
            await asyncio.sleep(0)
        assert len(decode(await anext(subscriber))) == 3


async def test_spaced_events_leave_with_their_publisher(runtime):
    async with heard(runtime, "kv-events") as (publisher, subscriber):
        publisher.spacing_s = 60
        publisher.publish_removed([0])
        await anext(subscriber)
        publisher.publish_removed([1])
        sent = publisher._channel._publisher.sequence
        publisher.shutdown()
        # Not what a subscriber hears: it hangs up as soon as the publisher has left discovery.
        assert publisher._channel._publisher.sequence == sent + 1


async def test_a_full_batch_does_not_wait(runtime, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH", 2)
    async with heard(runtime, "kv-events", batching_timeout_ms=60_000) as (publisher, subscriber):
        publisher.publish_removed([1])
        publisher.publish_removed([2])
        assert len(decode(await anext(subscriber))) == 2


async def test_a_batch_of_dicts_is_published_in_order(runtime):
    async with heard(runtime, "kv-events") as (publisher, subscriber):
        publisher.publish_batch(
            [
                {"type": "stored", "token_ids": [1, 2], "num_block_tokens": [2], "block_hashes": [7]},
                {"type": "removed", "block_hashes": [7]},
            ]
        )
        stored, removed = decode(await anext(subscriber))
        assert stored.event.data.stored
        assert removed.event.data.removed


async def test_what_is_held_is_told_anew_at_another_endpoint(runtime):
    async with heard(runtime, "kv-events", worker_id=5, enable_local_indexer=True) as (before, _):
        before.publish_stored([1, 2, 3, 4, 5, 6], [2, 2, 2], [11, 12, 13])
        before.publish_removed([13])
        after = KvEventPublisher(runtime.endpoint("dynamo.prefill.generate"), 5, 2, enable_local_indexer=True)
        after.publish_held(before)
        assert [event.worker_id for event in after.events_from(0)] == [5]
        (told,) = [event.event.change.stored for event in after.events_from(0)]
        assert [block.block_hash for block in told.blocks] == [11, 12]
        assert [block.tokens_hash for block in told.blocks] == compute_block_hash_for_seq([1, 2, 3, 4], 2)
        await after.close()


async def test_adapters_and_salts_change_the_content_hash(runtime):
    async with heard(runtime, "kv-events") as (publisher, subscriber):
        publisher.publish_stored([1, 2], [2], [7], lora_name="a", cache_salt="b")
        (event,) = decode(await anext(subscriber))
        expected = compute_block_hash_for_seq([1, 2], 2, lora_name="a", cache_namespace="b")
        assert [b.tokens_hash for b in event.event.data.stored.blocks] == expected


async def test_what_was_published_is_kept_for_a_while(runtime):
    async with heard(runtime, "kv-events") as (publisher, _):
        publisher.publish([KvEventData(removed=Removed([i])) for i in range(5)])
        assert [e.event.event_id for e in publisher.events_from(3)] == [3, 4]
        assert publisher.events_from(5) == []
        assert publisher.events_from(6) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1, 2, 3], [2, 1], [7, 8]), "a block has 1 tokens, not 2"),
        (([1, 2], [2], [7, 8]), "2 hashes for 1 blocks"),
        (([1, 2, 3, 4], [2], [7]), "do not fit together"),
    ],
)
async def test_numbers_that_do_not_fit_are_refused(runtime, arguments, words):
    async with heard(runtime, "kv-events") as (publisher, _):
        with pytest.raises(ValueError, match=words):
            publisher.publish_stored(*arguments)
        with pytest.raises(ValueError, match="'moved' is not one of"):
            publisher.publish_batch([{"type": "moved"}])


async def test_what_this_version_does_not_do_is_refused(runtime):
    endpoint = runtime.endpoint(ENDPOINT)
    with pytest.raises(ValueError, match="zmq_endpoint: is not in this version"):
        KvEventPublisher(endpoint, kv_block_size=2, zmq_endpoint="tcp://127.0.0.1:1")
    with pytest.raises(ValueError, match="kv_block_size"):
        KvEventPublisher(endpoint)


async def test_load_is_published_with_the_workers_id(runtime):
    publisher = WorkerMetricsPublisher()
    with pytest.raises(RuntimeError, match="create_endpoint"):
        publisher.publish(0, 1, 2)
    await publisher.create_endpoint(runtime.endpoint(ENDPOINT))
    subscriber = await create_subscriber(runtime, ENDPOINT, "kv_metrics")
    await subscriber.wait_connected()
    hearing = asyncio.ensure_future(anext(subscriber))
    async with asyncio.timeout(DEADLINE_S):
        while not hearing.done():  # ZeroMQ may still be taking note of the subscription
            publisher.publish(dp_rank=1, active_decode_blocks=3, kv_used_blocks=4)
            await asyncio.sleep(0.01)
    load = msgspec.msgpack.decode((await hearing).payload, type=LoadMetrics)
    assert load == LoadMetrics(runtime.instance_id, 1, 3, kv_used_blocks=4)
    await subscriber.close()
    await publisher.close()


async def test_what_is_published_before_the_socket_is_open_counts_too(runtime):
    publisher = KvEventPublisher(runtime.endpoint(ENDPOINT), kv_block_size=2)
    publisher.publish_removed([1])
    await publisher.ready()
    subscriber = await create_subscriber(runtime, ENDPOINT, "kv-events")
    await subscriber.wait_connected()
    hearing = asyncio.ensure_future(anext(subscriber))
    async with asyncio.timeout(DEADLINE_S):
        while not hearing.done():  # ZeroMQ may still be taking note of the subscription
            publisher.publish_removed([2])
            await asyncio.sleep(0.01)
    event = await hearing
    assert event.sequence == decode(event)[0].event.event_id >= 1
    await subscriber.close()
    await publisher.close()
