"""A peer that dies, freezes or changes its mind: every wait ends, with an error that says what happened."""

import signal
import time

import pytest

from .conftest import Pair, Process, Start

LARGE = 64 << 20  # bytes; more than what sockets hold when the other side does not read


def offered(theirs: Process, ours: Process, size: int = 1000) -> dict[str, object]:
    """Metadata of memory that `theirs` offers for reading, while `ours` has memory of that size."""
    theirs.ask("make", name="memory", sizes=[size], fill=1)
    ours.ask("make", name="memory", sizes=[size])
    metadata: dict[str, object] = theirs.ask("readable", name="memory")["metadata"]
    return metadata


def connected(theirs: Process, ours: Process) -> None:
    """One transfer, so that the two know each other."""
    ours.ask("read", name="memory", metadata=offered(theirs, ours))
    ours.ask("wait")
    theirs.ask("wait")


def is_in_progress(ours: Process) -> None:
    assert ours.ask("status") == {"status": "IN_PROGRESS"}


def test_a_peer_killed_before_the_first_read_is_gone(start: Start) -> None:
    theirs, ours = start(), start()
    metadata = offered(theirs, ours)
    theirs.kill()
    kind, message = ours.refused("read", name="memory", metadata=metadata)
    assert kind == "PeerGone", message


def test_a_peer_killed_between_two_reads_is_gone_and_others_are_not(start: Start) -> None:
    theirs, other, ours = start(), start(), start()
    connected(theirs, ours)
    metadata = offered(theirs, ours)
    theirs.kill()
    kind, message = ours.refused("read", name="memory", metadata=metadata)
    assert kind == "PeerGone", message
    connected(other, ours)


def test_a_peer_killed_in_the_middle_of_a_read_is_gone(start: Start) -> None:
    theirs, ours = start(UCX_TLS="tcp"), start(UCX_TLS="tcp")
    connected(theirs, ours)
    metadata = offered(theirs, ours, LARGE)
    theirs.signal(signal.SIGSTOP)
    ours.ask("read", name="memory", metadata=metadata)
    is_in_progress(ours)
    theirs.kill()
    began = time.monotonic()
    kind, message = ours.refused("wait")
    assert kind == "PeerGone", message
    assert time.monotonic() - began < 10
    assert ours.ask("status") == {"status": "ERRORED"}


def test_a_frozen_peer_ends_in_a_timeout_and_serves_again_when_it_thaws(start: Start) -> None:
    theirs, ours = start(UCX_TLS="tcp"), start(timeout_s=5, UCX_TLS="tcp")
    connected(theirs, ours)
    metadata = offered(theirs, ours, LARGE)
    theirs.signal(signal.SIGSTOP)
    ours.ask("read", name="memory", metadata=metadata)
    kind, message = ours.refused("wait")
    assert kind == "TransferTimeout"
    assert "bytes may still arrive" in message
    theirs.signal(signal.SIGCONT)
    connected(theirs, ours)


def test_a_cancelled_read_is_over_only_when_no_byte_can_arrive_any_more(start: Start) -> None:
    theirs, ours = start(UCX_TLS="tcp"), start(UCX_TLS="tcp")
    connected(theirs, ours)
    metadata = offered(theirs, ours, LARGE)
    theirs.signal(signal.SIGSTOP)
    ours.ask("read", name="memory", metadata=metadata)
    assert ours.ask("cancel") == {"status": "CANCELLED"}
    assert ours.refused("wait", seconds=0.3)[0] == "TimeoutError"  # the peer may still send
    theirs.signal(signal.SIGCONT)
    assert ours.ask("wait") == {"status": "CANCELLED"}
    first = ours.ask("digest", name="memory")
    connected(theirs, ours_with_other_memory(ours))
    assert ours.ask("digest", name="memory-before") == first


def ours_with_other_memory(ours: Process) -> Process:
    ours.ask("rename", name="memory", to="memory-before")
    return ours


def test_a_peer_whose_memory_is_read_to_the_end_hears_so_even_if_the_read_was_cancelled(tcp_pair: Pair) -> None:
    theirs, ours = tcp_pair
    connected(theirs, ours)
    metadata = offered(theirs, ours, LARGE)
    ours.ask("begin_and_cancel", name="memory", metadata=metadata)
    assert theirs.ask("wait") == {"status": "COMPLETE"}
    assert ours.ask("wait") == {"status": "CANCELLED"}


def test_a_peer_hears_that_a_read_of_its_memory_was_given_up_before_it_began(start: Start) -> None:
    theirs, ours = start(), start()
    ours.ask("make_and_cancel", name="memory", metadata=offered(theirs, ours))
    kind, message = theirs.refused("wait")
    assert kind == "PeerCancelled", message
    assert ours.ask("wait") == {"status": "CANCELLED"}


def test_an_offer_whose_reader_is_killed_ends_at_its_deadline(start: Start) -> None:
    theirs, ours = start(timeout_s=1.5), start()
    offered(theirs, ours)
    ours.kill()
    began = time.monotonic()
    kind, message = theirs.refused("wait")
    assert kind == "TransferTimeout"
    assert "nobody came" in message
    assert time.monotonic() - began < 10


def test_an_offer_that_is_left_is_withdrawn(pair: Pair) -> None:
    theirs, ours = pair
    offered(theirs, ours)
    theirs.ask("leave")
    assert theirs.ask("wait") == {"status": "CANCELLED"}


@pytest.mark.parametrize("action", ["cancel", "leave"])
def test_a_complete_read_stays_complete(pair: Pair, action: str) -> None:
    theirs, ours = pair
    connected(theirs, ours)
    ours.ask(action)
    assert ours.ask("status") == {"status": "COMPLETE"}
