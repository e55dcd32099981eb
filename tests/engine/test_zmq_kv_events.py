"""Are vLLM's cache events read in all their forms, and is nothing missed? Without vLLM: its socket is played here."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.asyncio import Context

from dynamo.engine.zmq_kv_events import BlockSizeError, KvEventDecoder, KvEventRelay, TieredEvents, local_endpoint
from dynamo.llm.block_hash import compute_block_hash_for_seq
from dynamo.llm.kv_events import KvEventData

BLOCK = 4
TOKENS = list(range(100, 100 + 3 * BLOCK))
TOPIC = "kv-events"


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def stored(hashes: list[Any], parent: Any = None, tokens: list[int] | None = None, **more: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "block_size": BLOCK}
    return event | {"token_ids": tokens or TOKENS[: BLOCK * len(hashes)], "lora_id": None, "medium": "GPU"} | more


def decode(*events: Any) -> TieredEvents:
    return KvEventDecoder().decode(batch(*events))


def tokens_hashes(event: KvEventData) -> list[int]:
    assert event.stored is not None
    return [block.tokens_hash for block in event.stored.blocks]


def test_a_map_gives_block_and_content_hashes() -> None:
    ((tier, event),) = decode(stored([11, 12], kv_cache_spec_kind="full_attention", group_idx=0, unknown_key=5))
    assert tier == "device"
    assert event.stored is not None
    assert [block.block_hash for block in event.stored.blocks] == [11, 12]
    assert tokens_hashes(event) == compute_block_hash_for_seq(TOKENS[: 2 * BLOCK], BLOCK)
    assert (event.stored.parent_hash, event.stored.start_position) == (None, 0)


def test_an_array_of_an_older_vllm_reads_the_same() -> None:
    old = ["BlockStored", [11, 12], None, TOKENS[: 2 * BLOCK], BLOCK, None]
    assert decode(old) == decode(stored([11, 12]))
    assert decode(["BlockRemoved", [11]]) == decode({"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU"})
    assert decode(["AllBlocksCleared"]) == decode({"type": "AllBlocksCleared"})


def test_hashes_of_32_bytes_are_named_by_their_last_eight() -> None:
    long = bytes(range(32))
    ((_, event),) = decode(stored([long], parent=long))
    assert event.stored is not None
    expected = int.from_bytes(long[-8:], "big")
    assert (event.stored.blocks[0].block_hash, event.stored.parent_hash) == (expected, expected)


def test_signed_hashes_become_unsigned() -> None:
    ((_, event),) = decode({"type": "BlockRemoved", "block_hashes": [-1], "medium": "CPU"})
    assert event.removed is not None
    assert event.removed.block_hashes == [2**64 - 1]


@pytest.mark.parametrize(
    ("medium", "tier"),
    [("GPU", "device"), ("CPU", "host_pinned"), ("STORAGE", "disk"), ("TAPE", "external"), (None, "device")],
)
def test_the_medium_is_the_tier(medium: str | None, tier: str) -> None:
    ((found, _),) = decode(stored([11], medium=medium))
    assert found == tier


def test_the_salt_of_the_first_block_counts_for_the_whole_sequence() -> None:
    decoder = KvEventDecoder()
    ((_, first),) = decoder.decode(batch(stored([11], extra_keys=[["tenant"]])))
    ((_, second),) = decoder.decode(batch(stored([12], parent=11, tokens=TOKENS[BLOCK : 2 * BLOCK], extra_keys=[None])))
    assert [*tokens_hashes(first), *tokens_hashes(second)] == compute_block_hash_for_seq(
        TOKENS[: 2 * BLOCK], BLOCK, cache_namespace="tenant"
    )


def test_a_removed_block_takes_its_salt_along() -> None:
    decoder = KvEventDecoder()
    decoder.decode(batch(stored([11], extra_keys=[["tenant"]])))
    decoder.decode(batch({"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU"}))
    ((_, second),) = decoder.decode(batch(stored([12], parent=11)))
    assert tokens_hashes(second) == compute_block_hash_for_seq(TOKENS[:BLOCK], BLOCK)


def test_the_adapter_and_the_salt_both_count() -> None:
    ((_, event),) = decode(stored([11], lora_name="adapter", extra_keys=[["adapter", "tenant"]]))
    assert tokens_hashes(event) == compute_block_hash_for_seq(
        TOKENS[:BLOCK], BLOCK, lora_name="adapter", cache_namespace="tenant"
    )


def test_of_a_hybrid_models_groups_only_the_one_that_keeps_prefixes_is_told() -> None:
    events = decode(
        stored([11], kv_cache_spec_kind="sliding_window", group_idx=0),
        stored([12], kv_cache_spec_kind="full_attention", group_idx=1),
        stored([13], kv_cache_spec_kind="full_attention", group_idx=2),
        {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU", "group_idx": 0},
        {"type": "BlockRemoved", "block_hashes": [12], "medium": "GPU", "group_idx": 1},
    )
    assert [(e.stored and e.stored.blocks[0].block_hash, e.removed and e.removed.block_hashes) for _, e in events] == [
        (12, None),
        (None, [12]),
    ]


def test_events_of_an_unknown_kind_are_left_out() -> None:
    assert decode({"type": "BlockPolished"}, stored([11]))[0][1].stored is not None


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", msgspec.msgpack.encode(5), msgspec.msgpack.encode([1.0]), batch({"type": "BlockStored"}), batch([])],
)
def test_garbage_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="KV events"):
        KvEventDecoder().decode(payload)


def test_blocks_of_another_size_than_told_are_refused_and_named() -> None:
    with pytest.raises(BlockSizeError, match="4-token blocks, expected 16"):
        KvEventDecoder(16).decode(batch(stored([11])))


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://*:5557", 0, "tcp://127.0.0.1:5557"),
        ("tcp://*:5557", 2, "tcp://127.0.0.1:5559"),
        ("tcp://10.0.0.7:5557", 1, "tcp://10.0.0.7:5558"),
        ("ipc:///run/events", 0, "ipc:///run/events"),
    ],
)
def test_where_a_ranks_events_are_heard(endpoint: str, rank: int, expected: str) -> None:
    assert local_endpoint(endpoint, rank) == expected


class Publisher:
    """vLLM's side: publishes, forgets to publish, and replays what it still has."""

    def __init__(self, directory: Path) -> None:
        self.endpoint, self.replay_endpoint = f"ipc://{directory}/events", f"ipc://{directory}/replay"
        self._context = Context()
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.bind(self.endpoint)
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.bind(self.replay_endpoint)
        self.kept: list[tuple[int, bytes]] = []
        self._next = 0
        self.replays = 0
        self._task = asyncio.create_task(self._answer())

    async def subscribed(self) -> None:
        """Once the relay's subscription has arrived."""
        assert await asyncio.wait_for(self._pub.recv(), 5) == b"\x01" + TOPIC.encode()

    async def publish(self, block_hash: int, lost: bool = False) -> None:
        payload = batch(stored([block_hash]))
        self.kept.append((self._next, payload))
        if not lost:
            await self._pub.send_multipart([TOPIC.encode(), self._next.to_bytes(8, "big"), payload])
        self._next += 1

    async def _answer(self) -> None:
        while True:
            client, _, start = await self._replay.recv_multipart()
            self.replays += 1
            for seq, payload in self.kept:
                if seq >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([client, b"", TOPIC.encode(), seq.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    async def close(self) -> None:
        self._task.cancel()
        self._context.destroy(linger=0)


class Heard:
    """What a relay reports, as block hashes; `None` for a cleared cache."""

    def __init__(self) -> None:
        self.hashes: asyncio.Queue[int | None] = asyncio.Queue()

    def __call__(self, events: TieredEvents) -> None:
        for _, event in events:
            self.hashes.put_nowait(None if event.stored is None else event.stored.blocks[0].block_hash)

    async def next(self, count: int) -> list[int | None]:
        async with asyncio.timeout(8):
            return [await self.hashes.get() for _ in range(count)]


@pytest.fixture
async def publisher(tmp_path: Path) -> AsyncIterator[Publisher]:
    one = Publisher(tmp_path)
    yield one
    await one.close()


@pytest.fixture
async def heard(publisher: Publisher) -> AsyncIterator[Heard]:
    """What a relay of the publisher's events heard, once it is subscribed."""
    heard = Heard()
    relay = KvEventRelay(publisher.endpoint, publisher.replay_endpoint, TOPIC, heard)
    await publisher.subscribed()
    yield heard
    await relay.close()


async def test_batches_arrive_in_order(publisher: Publisher, heard: Heard) -> None:
    for block_hash in (1, 2, 3):
        await publisher.publish(block_hash)
    assert await heard.next(3) == [1, 2, 3]
    assert publisher.replays == 0


async def test_a_gap_is_asked_for_and_nothing_comes_twice(publisher: Publisher, heard: Heard) -> None:
    await publisher.publish(1)
    await publisher.publish(2, lost=True)
    await publisher.publish(3, lost=True)
    await publisher.publish(4)
    await publisher.publish(5)
    assert await heard.next(5) == [1, 2, 3, 4, 5]
    assert publisher.replays == 1


async def test_what_came_before_the_subscription_is_asked_for(publisher: Publisher, heard: Heard) -> None:
    await publisher.publish(1, lost=True)
    await publisher.publish(2)
    assert await heard.next(2) == [1, 2]


async def test_a_gap_beyond_the_replay_buffer_clears_the_view(publisher: Publisher, heard: Heard) -> None:
    await publisher.publish(1)
    await publisher.publish(2, lost=True)
    publisher.kept.clear()
    await publisher.publish(3)
    assert await heard.next(3) == [1, None, 3]


async def test_a_batch_that_cannot_be_read_is_passed_over(publisher: Publisher, heard: Heard) -> None:
    await publisher._pub.send_multipart([TOPIC.encode(), (0).to_bytes(8, "big"), b"\xc1"])
    publisher._next = 1
    await publisher.publish(2)
    assert await heard.next(1) == [2]


async def test_a_silent_replay_does_not_stop_the_events(
    publisher: Publisher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.engine.zmq_kv_events.REPLAY_TIMEOUT_S", 0.2)
    publisher._task.cancel()
    await publisher.publish(1, lost=True)
    await publisher.publish(2)
    assert await heard.next(2) == [None, 2]


async def test_a_running_engine_is_asked_at_once_for_what_it_still_keeps(publisher: Publisher) -> None:
    for block_hash in (1, 2, 3):
        await publisher.publish(block_hash, lost=True)
    del publisher.kept[0]  # its buffer does not reach back to the beginning
    heard = Heard()
    relay = KvEventRelay(publisher.endpoint, publisher.replay_endpoint, TOPIC, heard, catch_up=True)
    try:
        assert await heard.next(2) == [2, 3]
        await publisher.subscribed()
        await publisher.publish(4)
        assert await heard.next(1) == [4]
        assert publisher.replays == 1
    finally:
        await relay.close()


async def test_a_restarted_engine_clears_the_view_and_is_heard_from_its_beginning(
    publisher: Publisher, heard: Heard
) -> None:
    for block_hash in (1, 2, 3):
        await publisher.publish(block_hash)
    publisher.kept.clear()
    publisher._next = 0
    await publisher.publish(4, lost=True)
    await publisher.publish(5)
    assert await heard.next(6) == [1, 2, 3, None, 4, 5]


async def test_what_was_before_a_late_view_is_no_loss_and_what_comes_later_is(publisher: Publisher) -> None:
    publisher.kept.clear()
    await publisher.publish(1, lost=True)
    publisher.kept.clear()
    heard = Heard()
    relay = KvEventRelay(publisher.endpoint, None, TOPIC, heard, catch_up=True)
    try:
        await publisher.subscribed()
        await publisher.publish(2)
        await publisher.publish(3, lost=True)
        await publisher.publish(4)
        assert await heard.next(3) == [2, None, 4]
    finally:
        await relay.close()


_HASH = st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=32)
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=4) | _HASH,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = {
    "block_hashes": st.lists(_HASH, max_size=3) | _ANY,
    "parent_block_hash": st.none() | _HASH | _ANY,
    "token_ids": st.lists(st.integers(0, 1 << 33), max_size=8) | _ANY,
    "block_size": st.integers(-1, 4) | _ANY,
    "medium": st.sampled_from(["GPU", "CPU", None, "x"]) | _ANY,
    "lora_name": st.none() | st.text(max_size=3) | _ANY,
    "extra_keys": st.none() | st.lists(st.none() | st.lists(st.text(max_size=2), max_size=2), max_size=2) | _ANY,
    "group_idx": st.none() | st.integers(0, 2) | _ANY,
}


@given(
    st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "New"]) | _ANY},
            optional=_FIELDS,
        )
        | _ANY,
        max_size=3,
    )
    | _ANY
)
def test_whatever_an_engine_says_is_a_batch_or_a_value_error(events: Any) -> None:
    decoder = KvEventDecoder()
    with contextlib.suppress(ValueError):
        decoder.decode(msgspec.msgpack.encode([1.0, events, 0]))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_batch_are_a_value_error(payload: bytes) -> None:
    with contextlib.suppress(ValueError):
        KvEventDecoder().decode(payload)


def test_a_batch_nested_without_end_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a batch"):
        KvEventDecoder().decode(b"\x92\x01" + b"\x91" * 300_000)
