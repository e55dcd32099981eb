"""Who keeps memory alive and registered, and until when?"""

import asyncio
import gc
import weakref

import numpy as np
import pytest

from dynamo.nixl_connect import Connector, Descriptor, InvalidState, OperationStatus, TransferTimeout

SIZE = 100_000


@pytest.fixture(scope="module")
def connector() -> Connector:
    """One for all tests here: making the agent takes half a second."""
    return Connector("memory", timeout_s=20)


def watched(fill: int = 1) -> tuple[Descriptor, "weakref.ref[np.ndarray]"]:
    """A descriptor that alone keeps its memory alive."""
    array = np.full(SIZE, fill, dtype=np.uint8)
    return Descriptor((array, "cpu")), weakref.ref(array)


async def test_a_process_reads_its_own_offer(connector: Connector) -> None:
    target = bytearray(SIZE)
    source, _ = watched(7)
    offer = await connector.create_readable(source)
    read = await connector.begin_read(offer.metadata(), Descriptor(target))
    await asyncio.gather(read.wait_for_completion(), offer.wait_for_completion())
    assert target == bytes([7]) * SIZE
    assert [d.size for d in read.results()] == [SIZE]


async def test_an_offered_memory_lives_although_only_the_operation_is_held(connector: Connector) -> None:
    descriptor, memory = watched()
    with await connector.create_readable(descriptor) as offer:
        del descriptor
        gc.collect()
        assert memory() is not None
        assert offer.status is OperationStatus.INITIALIZED


async def test_leaving_the_block_releases_memory_that_no_peer_was_told_of(connector: Connector) -> None:
    descriptor, memory = watched()
    with await connector.create_readable(descriptor) as offer:
        assert descriptor.is_registered
    await offer.wait_for_completion()
    assert offer.status is OperationStatus.CANCELLED
    assert not descriptor.is_registered
    del offer, descriptor
    await released(memory)


async def test_memory_that_was_moved_is_released_with_its_operations(connector: Connector) -> None:
    source, sent = watched()
    target, received = watched(0)
    with await connector.create_readable(source) as offer:
        with await connector.begin_read(offer.metadata(), target) as read:
            await read.wait_for_completion()
        await offer.wait_for_completion()
    assert not source.is_registered
    assert not target.is_registered
    del offer, read, source, target
    await released(sent)
    await released(received)


async def test_an_offer_that_is_dropped_is_withdrawn(connector: Connector) -> None:
    descriptor, memory = watched()
    offer = await connector.create_readable(descriptor)
    del offer, descriptor
    await released(memory)


async def test_memory_of_a_withdrawn_offer_outlives_it_if_a_peer_was_told(connector: Connector) -> None:
    descriptor, memory = watched()
    with await connector.create_readable(descriptor) as offer:
        offer.metadata()
    await offer.wait_for_completion()
    assert descriptor.is_registered
    del offer, descriptor
    gc.collect()
    assert memory() is not None


async def test_what_the_user_registered_stays_registered_between_operations(connector: Connector) -> None:
    descriptor, _ = watched()
    with await connector.create_readable(descriptor) as first:
        descriptor.register_with_connector(first.connection)
        descriptor.register_with_connector(first.connection)
    await first.wait_for_completion()
    assert descriptor.is_registered
    descriptor.deregister_with_connector(first.connection)
    assert not descriptor.is_registered


async def test_a_descriptor_is_registered_with_one_connection(connector: Connector) -> None:
    descriptor, _ = watched()
    other = Connector("other")
    mine = (await connector.create_readable(Descriptor(bytearray(10)))).connection
    theirs = (await other.create_readable(Descriptor(bytearray(10)))).connection
    descriptor.register_with_connector(mine)
    with pytest.raises(InvalidState, match="so not with other-1"):
        descriptor.register_with_connector(theirs)
    with pytest.raises(InvalidState, match="not with other-1"):
        descriptor.deregister_with_connector(theirs)
    with pytest.raises(InvalidState, match="another connection"):
        await other.create_readable(descriptor)


async def test_an_offer_that_nobody_takes_ends_at_its_deadline() -> None:
    descriptor, _ = watched()
    offer = await Connector(timeout_s=5).create_readable(descriptor)
    with pytest.raises(TransferTimeout, match="nobody came for this READ within 5 s"):
        await offer.wait_for_completion()
    assert offer.status is OperationStatus.ERRORED


async def test_the_event_loop_turns_while_bytes_are_copied(connector: Connector) -> None:
    source, target = Descriptor(bytearray(1 << 28)), Descriptor(bytearray(1 << 28))
    offer = await connector.create_readable(source)
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    turning = asyncio.create_task(turn())
    read = await connector.begin_read(offer.metadata(), target)
    await read.wait_for_completion()
    turning.cancel()
    assert turns >= 5


async def released(memory: "weakref.ref[np.ndarray]") -> None:
    """Wait until nothing keeps the memory alive: the agent's thread lets go of it a moment after us."""
    async with asyncio.timeout(5):
        while memory() is not None:
            gc.collect()
            await asyncio.sleep(0.01)


async def test_a_second_reader_of_the_same_offer_is_noticed(
    connector: Connector, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = watched()
    offer = await connector.create_readable(source)
    for reader in (Connector("first"), Connector("second")):
        read = await reader.begin_read(offer.metadata(), Descriptor(bytearray(SIZE)))
        await read.wait_for_completion()
        await offer.wait_for_completion()
    with await connector.create_readable(source):
        async with asyncio.timeout(5):
            while "second-1" not in caplog.text:  # noqa: ASYNC110 - the log has no event
                await asyncio.sleep(0.01)
    assert "used metadata a second time" in caplog.text
