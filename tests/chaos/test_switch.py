"""Does the network of a run lose, delay and reorder what it is told to, and nothing else?"""

import os
import time
from collections.abc import Iterator

import pytest
from chaos.switch import Order, Shape, Switch


class Hosts:
    """Two hosts whose devices are sockets that the test holds the other ends of."""

    def __init__(self) -> None:
        import socket

        self.pairs = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for name in "ab"}
        places = {name: (f"10.0.0.{i}", pair[0].fileno()) for i, (name, pair) in enumerate(self.pairs.items(), 1)}
        self.switch = Switch(1, places)
        for pair in self.pairs.values():
            pair[1].setblocking(False)

    def send(self, source: int, target: int, content: bytes) -> None:
        head = bytearray(20)
        head[0], head[12:16], head[16:20] = 0x45, bytes([10, 0, 0, source]), bytes([10, 0, 0, target])
        self.switch.forward(bytes(head) + content)

    def came(self, name: str) -> list[bytes]:
        found = []
        while True:
            try:
                found.append(os.read(self.pairs[name][1].fileno(), 1500)[20:])
            except BlockingIOError:
                return found

    def close(self) -> None:
        for pair in self.pairs.values():
            pair[0].close()
            pair[1].close()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    yield made
    made.close()


def test_a_packet_comes_to_the_host_that_it_is_for(hosts: Hosts) -> None:
    hosts.send(1, 2, b"x")
    assert (hosts.came("a"), hosts.came("b")) == ([], [b"x"])


def test_a_way_is_cut_in_one_direction_alone_until_it_is_healed(hosts: Hosts) -> None:
    hosts.switch.obey(Order(["a"], ["b"], Shape(loss=1.0)))
    hosts.send(1, 2, b"lost")
    hosts.send(2, 1, b"heard")
    assert (hosts.came("a"), hosts.came("b")) == ([b"heard"], [])
    hosts.switch.obey(Order(["a"], ["b"]))
    hosts.send(1, 2, b"healed")
    assert hosts.came("b") == [b"healed"]


def test_about_the_share_asked_for_is_lost(hosts: Hosts) -> None:
    hosts.switch.obey(Order(["a"], ["b"], Shape(loss=0.3)))
    for _ in range(100):
        hosts.send(1, 2, b"x")
    hosts.switch.send_due()
    assert 55 <= len(hosts.came("b")) <= 85


def test_what_is_delayed_comes_late_and_in_order(hosts: Hosts) -> None:
    hosts.switch.obey(Order(["a"], ["b"], Shape(delay_s=0.02, jitter_s=0.02)))
    began = time.monotonic()
    for i in range(50):
        hosts.send(1, 2, bytes([i]))
    wait_s = hosts.switch.send_due()
    assert wait_s is not None
    assert hosts.came("b") == []
    while (wait_s := hosts.switch.send_due()) is not None:
        time.sleep(wait_s)
    assert time.monotonic() - began >= 0.02
    assert hosts.came("b") == [bytes([i]) for i in range(50)]


def test_some_packets_overtake_others_where_that_is_asked_for(hosts: Hosts) -> None:
    hosts.switch.obey(Order(["a"], ["b"], Shape(delay_s=0.005, reorder=0.3)))
    for i in range(50):
        hosts.send(1, 2, bytes([i]))
    while (wait_s := hosts.switch.send_due()) is not None:
        time.sleep(wait_s)
    came = hosts.came("b")
    assert sorted(came) == [bytes([i]) for i in range(50)]
    assert came != sorted(came)


def test_what_comes_after_a_delay_is_lifted_does_not_overtake(hosts: Hosts) -> None:
    hosts.switch.obey(Order(["a"], ["b"], Shape(delay_s=0.01)))
    hosts.send(1, 2, b"first")
    hosts.switch.obey(Order(["a"], ["b"]))
    hosts.send(1, 2, b"second")
    while (wait_s := hosts.switch.send_due()) is not None:
        time.sleep(wait_s)
    assert hosts.came("b") == [b"first", b"second"]
