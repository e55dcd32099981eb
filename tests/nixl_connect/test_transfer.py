"""Bytes move between two processes, in every form of memory, both ways, many at once."""

import hashlib
import time

import pytest

from .conftest import Pair, Start

SIZES = [1_000_000, 7, 65_536]


def ramp(sizes: list[int]) -> str:
    """The digest of memory made with fill="ramp"."""
    return hashlib.sha256(b"".join((bytes(range(251)) * (size // 251 + 1))[:size] for size in sizes)).hexdigest()


@pytest.mark.parametrize("form", ["tensor", "ndarray", "buffer", "pointer", "bytes"])
def test_reads_what_the_peer_offers(pair: Pair, form: str) -> None:
    theirs, ours = pair
    theirs.ask("make", name="source", sizes=SIZES, fill="ramp", form=form)
    ours.ask("make", name="target", sizes=SIZES, form="tensor" if form == "bytes" else form)
    offer = theirs.ask("readable", name="source")
    ours.ask("read", name="target", metadata=offer["metadata"])
    assert ours.ask("wait") == {"status": "COMPLETE"}
    assert theirs.ask("wait") == {"status": "COMPLETE"}
    assert (ours.ask("digest", name="target"))["digest"] == ramp(SIZES)


@pytest.mark.parametrize("transport", ["pair", "tcp_pair"])
def test_writes_into_what_the_peer_offers(request: pytest.FixtureRequest, transport: str) -> None:
    theirs, ours = request.getfixturevalue(transport)
    theirs.ask("make", name="target", sizes=SIZES)
    ours.ask("make", name="source", sizes=SIZES, fill="ramp")
    offer = theirs.ask("writable", name="target")
    ours.ask("write", name="source", metadata=offer["metadata"])
    assert theirs.ask("wait") == {"status": "COMPLETE"}
    assert ours.ask("wait") == {"status": "COMPLETE"}
    assert theirs.ask("digest", name="target")["digest"] == ramp(SIZES)


@pytest.mark.parametrize("as_hex", [False, True])
def test_metadata_is_taken_in_base64_and_in_hex(pair: Pair, as_hex: bool) -> None:
    theirs, ours = pair
    for process in (theirs, ours):
        process.ask("make", name="memory", sizes=[1000], fill="ramp" if process is theirs else 0)
    metadata = (theirs.ask("readable", name="memory", hex=as_hex))["metadata"]
    assert metadata["nixl_metadata"].startswith("b64:") is not as_hex
    ours.ask("read", name="memory", metadata=metadata)
    ours.ask("wait")
    assert (ours.ask("digest", name="memory"))["digest"] == ramp([1000])


def test_the_same_memory_is_offered_and_read_again_and_again(pair: Pair) -> None:
    theirs, ours = pair
    theirs.ask("make", name="memory", sizes=[100_000], fill="ramp")
    for _ in range(20):
        ours.ask("make", name="memory", sizes=[100_000])
        metadata = (theirs.ask("readable", name="memory"))["metadata"]
        ours.ask("read", name="memory", metadata=metadata)
        ours.ask("wait")
        theirs.ask("wait")
        assert (ours.ask("digest", name="memory"))["digest"] == ramp([100_000])


@pytest.mark.parametrize("transport", ["pair", "tcp_pair"])
def test_three_hundred_transfers_side_by_side_each_get_their_own_bytes(
    request: pytest.FixtureRequest, transport: str
) -> None:
    theirs, ours = request.getfixturevalue(transport)
    offers = theirs.ask("offer_many", count=300, size=20_000)
    assert ours.ask("read_many", metadata=offers["metadata"], size=20_000) == {"right": 300}
    assert theirs.ask("wait_many") == {"complete": 300}


def test_descriptors_of_another_size_are_refused_by_name(pair: Pair) -> None:
    theirs, ours = pair
    theirs.ask("make", name="memory", sizes=[1000, 1000])
    metadata = (theirs.ask("readable", name="memory"))["metadata"]
    ours.ask("make", name="short", sizes=[1000, 999])
    ours.ask("make", name="one", sizes=[1000])
    kind, message = ours.refused("read", name="short", metadata=metadata)
    assert kind == "InvalidValue"
    assert "`local_descriptors`[1] is 999 bytes, the peer's is 1000" in message
    kind, message = ours.refused("read", name="one", metadata=metadata)
    assert kind == "InvalidValue"
    assert "are 1, the peer's are 2" in message


def test_what_is_offered_for_reading_is_not_written(pair: Pair) -> None:
    theirs, ours = pair
    for process in (theirs, ours):
        process.ask("make", name="memory", sizes=[1000], fill=1 if process is theirs else 2)
    before = theirs.ask("digest", name="memory")
    metadata = (theirs.ask("readable", name="memory"))["metadata"]
    kind, message = ours.refused("write", name="memory", metadata=metadata)
    assert kind == "InvalidState"
    assert "operation_kind=1" in message
    assert theirs.ask("digest", name="memory") == before


def test_the_second_use_of_metadata_is_refused(pair: Pair) -> None:
    theirs, ours = pair
    for process in (theirs, ours):
        process.ask("make", name="memory", sizes=[1000], fill=1)
    metadata = (theirs.ask("readable", name="memory"))["metadata"]
    ours.ask("read", name="memory", metadata=metadata)
    ours.ask("wait")
    kind, message = ours.refused("read", name="memory", metadata=metadata)
    assert kind == "InvalidState"
    assert "used before" in message


def test_metadata_refused_for_its_sizes_can_still_be_used(pair: Pair) -> None:
    theirs, ours = pair
    theirs.ask("make", name="memory", sizes=[1000], fill="ramp")
    ours.ask("make", name="short", sizes=[10])
    ours.ask("make", name="right", sizes=[1000])
    metadata = (theirs.ask("readable", name="memory"))["metadata"]
    ours.refused("read", name="short", metadata=metadata)
    ours.ask("read", name="right", metadata=metadata)
    ours.ask("wait")
    assert (ours.ask("digest", name="right"))["digest"] == ramp([1000])


def test_memory_that_was_not_offered_is_refused(start: Start) -> None:
    theirs, ours = start(), start()  # NIXL would know memory that was offered before
    for process in (theirs, ours):
        process.ask("make", name="memory", sizes=[1000])
    metadata = (theirs.ask("readable", name="memory"))["metadata"]
    metadata["descriptors"][0]["ptr"] += 4096 * 1000
    kind, message = ours.refused("read", name="memory", metadata=metadata)
    assert kind == "InvalidValue"
    assert "did not offer" in message


@pytest.mark.parametrize("damage", ["cut", "changed", "not NIXL's", "empty", "no text"])
def test_damaged_metadata_is_refused_and_the_peer_still_served(pair: Pair, damage: str) -> None:
    theirs, ours = pair
    for process in (theirs, ours):
        process.ask("make", name="memory", sizes=[1000], fill="ramp" if process is theirs else 0)
    metadata = (theirs.ask("readable", name="memory"))["metadata"]
    whole = metadata["nixl_metadata"]
    damaged = {
        "cut": whole[: len(whole) // 2],
        "changed": whole[:50] + ("A" if whole[50] != "A" else "B") + whole[51:],
        "not NIXL's": "b64:eJzLSM3JyVcozy/KSQEAGgsEXQ==",  # "hello world", deflated
        "empty": "",
        "no text": "zz",
    }[damage]
    kind, message = ours.refused("read", name="memory", metadata=metadata | {"nixl_metadata": damaged})
    assert kind == "InvalidValue", message
    assert "nixl_metadata" in message
    ours.ask("read", name="memory", metadata=metadata)
    ours.ask("wait")
    assert (ours.ask("digest", name="memory"))["digest"] == ramp([1000])


def test_an_idle_agent_burns_no_core(pair: Pair) -> None:
    theirs, ours = pair
    for process in (theirs, ours):
        process.ask("make", name="memory", sizes=[1000])
    metadata = (theirs.ask("readable", name="memory"))["metadata"]
    ours.ask("read", name="memory", metadata=metadata)
    ours.ask("wait")
    theirs.ask("readable", name="memory")  # nobody comes for this one
    before = [cpu_s(process.pid) for process in (theirs, ours)]
    time.sleep(2)  # what is measured is the time in which nothing happens
    spent = [cpu_s(process.pid) - b for process, b in zip((theirs, ours), before, strict=True)]
    assert max(spent) <= 0.1, spent  # 5 % of a core: two ticks of the clock are 1 %


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
