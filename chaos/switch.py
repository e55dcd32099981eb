"""How do packets get from host to host, and how are they kept from it?

usage: python -m chaos.switch SEED name=address,namespace ...
Every host is a network namespace whose only way out is a TUN device, and this program holds the other ends: it reads
each packet and writes it to the host it is for. So it can lose, delay and reorder them in one direction and not in the
other, by itself: kernels often come without `tc netem`, or without packet filters.

A line of JSON on stdin is an order (`Order`), answered by a line on stdout when it is in force.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import subprocess
import sys
import time

import msgspec

DEVICE = "eth0"
QUEUE_PACKETS = 10_000  # what a device or a delayed link holds before it drops, like a real one
READ_AT_ONCE = 64  # packets of one host before the others get their turn
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


class Shape(msgspec.Struct, frozen=True, omit_defaults=True):
    """What befalls packets from one host to another."""

    loss: float = 0.0
    """Share that is lost; 1 cuts the way."""
    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Up to so much more."""
    reorder: float = 0.0
    """Share that overtakes what is delayed."""


class Order(msgspec.Struct, frozen=True):
    """From now on this befalls all packets from these hosts to those; no shape: none of it any more."""

    sources: list[str]
    targets: list[str]
    shape: Shape | None = None


def enter_namespace(name: str) -> None:
    """Let this thread, and what it starts, have the network of a named namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    finally:
        os.close(fd)


def open_device(namespace: str, address: str) -> int:
    """A host's device, up and with its address; returns our end of it. Raises OSError, CalledProcessError."""
    enter_namespace(namespace)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for words in (
        f"addr add {address}/24 dev {DEVICE}",
        f"link set {DEVICE} up txqueuelen {QUEUE_PACKETS}",
        "link set lo up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    return fd


class Switch:
    """All hosts' devices, and the shapes in force between them."""

    def __init__(self, seed: int, hosts: dict[str, tuple[str, int]]) -> None:
        """`hosts`: address and device by name."""
        self._random = random.Random(seed)
        self._numbers = {name: bytes(map(int, address.split("."))) for name, (address, _) in hosts.items()}
        self._devices = {self._numbers[name]: device for name, (_, device) in hosts.items()}
        self._shapes: dict[tuple[bytes, bytes], Shape] = {}
        self._delayed: list[tuple[float, int, int, bytes]] = []
        self._last_due: dict[tuple[bytes, bytes], float] = {}
        self._count = itertools.count()

    def obey(self, order: Order) -> None:
        """Put an order in force. Packets that are under way arrive as they would have."""
        for source in order.sources:
            for target in order.targets:
                way = self._numbers[source], self._numbers[target]
                if order.shape is None:
                    self._shapes.pop(way, None)
                elif source != target:
                    self._shapes[way] = order.shape

    def forward(self, packet: bytes) -> None:
        """One packet came from a host."""
        if packet[0] >> 4 != 4:
            return  # the kernel's own words about IPv6
        target = packet[16:20]
        device = self._devices.get(target)
        if device is None:
            return
        way = packet[12:16], target
        shape = self._shapes.get(way) if self._shapes else None
        if shape is None and not self._delayed:
            _write(device, packet)
        elif shape is None:
            self._send_at(max(time.monotonic(), self._last_due.get(way, 0.0)), device, packet)
        elif self._random.random() >= shape.loss:
            now = time.monotonic()
            if self._random.random() < shape.reorder:
                self._send_at(now, device, packet)
                return
            due = max(now + shape.delay_s + self._random.random() * shape.jitter_s, self._last_due.get(way, 0.0))
            self._last_due[way] = due
            self._send_at(due, device, packet)

    def _send_at(self, due: float, device: int, packet: bytes) -> None:
        if len(self._delayed) < QUEUE_PACKETS:
            heapq.heappush(self._delayed, (due, next(self._count), device, packet))

    def send_due(self) -> float | None:
        """Send what is due; seconds until the next is, None if nothing waits."""
        delayed = self._delayed
        while delayed:
            wait_s = delayed[0][0] - time.monotonic()
            if wait_s > 0:
                return wait_s
            _, _, device, packet = heapq.heappop(delayed)
            _write(device, packet)
        return None


def _write(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError:  # the host is going, or its queue is full: networks lose packets
        return


def main() -> None:
    """Forward until stdin ends."""
    places = {name: place.split(",") for name, place in (word.split("=") for word in sys.argv[2:])}
    hosts = {name: (address, open_device(namespace, address)) for name, (address, namespace) in places.items()}
    switch = Switch(int(sys.argv[1]), hosts)
    selector = selectors.EpollSelector()
    for _, device in hosts.values():
        selector.register(device, selectors.EVENT_READ)
    orders = sys.stdin.fileno()
    os.set_blocking(orders, False)
    selector.register(orders, selectors.EVENT_READ)
    decode, rest = msgspec.json.Decoder(Order).decode, b""
    print("ready", flush=True)
    while True:
        for key, _ in selector.select(switch.send_due()):
            if key.fd == orders:
                data = os.read(orders, 65536)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    switch.obey(decode(line))
                    print("done", flush=True)
                continue
            try:
                for _ in range(READ_AT_ONCE):
                    switch.forward(os.read(key.fd, 65536))
            except BlockingIOError:
                pass
            except OSError:
                selector.unregister(key.fd)  # the host is gone


if __name__ == "__main__":
    main()
