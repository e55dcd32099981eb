"""Who talks to NIXL, and when is a transfer over?

One thread a connection owns one NIXL agent and makes every call to it: a transfer between two processes of a machine
is copied inside the call that begins it (80 ms for 512 MB), and no event loop must wait for that. The thread sleeps
while it has nothing in flight. While it has, it asks NIXL for news at intervals that grow with the time waited.
"""

import atexit
import contextlib
import hashlib
import logging
import queue
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from dynamo.nixl_connect import bindings
from dynamo.nixl_connect.device import DeviceKind
from dynamo.nixl_connect.errors import (
    InvalidState,
    InvalidValue,
    NixlMissing,
    PeerCancelled,
    PeerGone,
    TransferFailed,
    TransferTimeout,
)
from dynamo.nixl_connect.flight import Flight
from dynamo.nixl_connect.kinds import OperationKind, OperationStatus
from dynamo.nixl_connect.region import Region
from dynamo.nixl_connect.remotes import BusyError, Identity, Peer, Remotes

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_POLL_S = 0.0001  # a 1 MB transfer over TCP takes 1.4 ms
POLL_SHARE = 0.125  # of the time waited so far: asking adds at most that to any wait
LAST_POLL_S = 0.025  # 40 times a second, 0.4 % of a core
SWEEP_S = 0.1  # between two looks at the deadlines of all offers, of which there may be thousands
WITHDRAWN_S = 5.0  # an offer's memory outlives it, for a peer that is reading: over TCP, taking it away crashes us
DRAIN_S = 30.0  # a cancelled transfer that NIXL still holds after that is reported; its memory stays kept
STOP_S = 2.0  # for the thread to let go of the agent when the process ends
MAX_KEYS_KEPT = 16_384  # of transfers begun or offered and over: to refuse the second use, to name it in the log
CANCEL_MARK = b"cancelled:"


_alive: "weakref.WeakSet[Agent]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """NIXL's agents must end before the interpreter does, each in its thread."""
    agents = list(_alive)
    for agent in agents:
        agent.stop()
    for agent in agents:
        agent.join()


class Agent:
    """A NIXL agent and the thread that owns it. `call` and `post` may come from any thread; the rest is the thread's.

    `patience_s`: after so many seconds a call or an operation fails with TransferTimeout.
    """

    def __init__(self, name: str, patience_s: float) -> None:
        self.name = name
        self.patience_s = patience_s
        self._bindings = bindings.load()
        self._failures = bindings.failures(self._bindings)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._nixl: Any = None
        self._remotes: Remotes
        self._transfers: list[Flight] = []  # begun here
        self._offers: dict[bytes, Flight] = {}  # awaited from elsewhere, by what the peer will say: done, or cancelled
        self._used: OrderedDict[str, None] = OrderedDict()
        self._finished: OrderedDict[bytes, None] = OrderedDict()
        self._withdrawn: list[tuple[float, list[Region]]] = []  # until when which memory stays registered
        self._later: list[Callable[[], None]] = []
        self._waiting_since = self._last_look = self._last_sweep = 0.0
        self._closed: TransferFailed | None = None
        self._thread = threading.Thread(target=self._run, name=f"nixl-{name}", daemon=True)
        self._thread.start()
        _alive.add(self)

    # from any thread

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Do `work` in the thread. The future fails with TransferTimeout if its turn does not come in time."""
        promise: Future[T] = Future()
        promise.set_running_or_notify_cancel()
        deadline = time.monotonic() + self.patience_s

        def attempt() -> None:
            try:
                if self._closed is not None:
                    raise self._closed
                result = work()
            except BusyError:
                if time.monotonic() < deadline:
                    self._later.append(attempt)
                else:
                    promise.set_exception(TransferTimeout(f"{self.name}: the peer's other transfers are not over"))
            except BaseException as e:  # noqa: BLE001 - whoever waits gets it
                promise.set_exception(e)
            else:
                promise.set_result(result)

        self._inbox.put(attempt)
        if self._closed is not None and not promise.done():
            self._close()  # it came after the thread had looked for the last time
        return promise

    def post(self, work: Callable[[], None]) -> None:
        """Do `work` in the thread some time; what fails is logged. Nothing is left to do once the agent is closed."""
        if self._closed is None:
            self.call(work).add_done_callback(self._log_failure)

    def cancel(self, flight: Flight) -> None:
        """Give a flight up. Does nothing if it is over. `flight.over` tells when its memory is free."""
        if flight.advance(OperationStatus.CANCELLED):
            self.post(lambda: self._give_up(flight))

    def stop(self) -> None:
        """Let the thread end, and the agent with it. Does not wait."""
        self._inbox.put(None)

    def join(self) -> None:
        """Wait for the end, for at most two seconds."""
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_S)

    # in the thread

    def start(self) -> None:
        """Make the NIXL agent, once. Raises NixlMissing, or TransferFailed if UCX finds nothing to work with."""
        if self._nixl is not None:
            return
        try:
            self._nixl = bindings.new_agent(self._bindings, self.name)
        except self._failures.any as e:
            if isinstance(e, NixlMissing):
                raise
            raise TransferFailed(f"NIXL cannot start its UCX backend (UCX_TLS, UCX_NET_DEVICES?): {e}") from e
        self._remotes = Remotes(self._nixl, self.name, self._failures)

    def metadata(self, regions: Iterable[Region] | None = None) -> bytes:
        """NIXL's description of this agent: with these regions, or with all that are registered."""
        self.start()
        if regions is None:
            return bytes(self._nixl.getLocalMD())
        return bytes(self._nixl.getLocalPartialMD(self._registration(list(regions)), True, []))

    def hold(self, region: Region) -> None:
        """Register memory, or count one more that needs it registered."""
        self.start()
        if region.holds and region.agent is not self:
            raise InvalidState("this memory is registered with another connection; use one Connector for it")
        if not region.holds:
            if region.device.kind is not DeviceKind.HOST:
                _enter_gpu(region.device.id)
            registration = self._registration([region])
            try:
                self._nixl.registerMem(registration, [])
            except self._failures.any as e:
                raise TransferFailed(f"NIXL cannot register {region.size} bytes on {region.device}: {e}") from e
            region.agent, region.registration = self, registration
        region.holds += 1

    def let_go(self, region: Region) -> None:
        """Count one less; the last one deregisters."""
        region.holds -= 1
        if region.holds == 0:
            registration, region.registration = region.registration, None
            region.agent = None
            try:
                self._nixl.deregisterMem(registration, [])
            except self._failures.any as e:
                log.warning("NIXL could not deregister %d bytes on %s: %s", region.size, region.device, e)

    def load_peer(self, agent_metadata: bytes, regions: Iterable[Identity]) -> Peer:
        """A peer that can be transferred with; give it back with `release_peer`."""
        self.start()
        return self._remotes.load(agent_metadata, regions)

    def release_peer(self, peer: Peer) -> None:
        """One user of the peer less."""
        with contextlib.suppress(BusyError):  # others use it: it is forgotten when they are done
            self._remotes.release(peer)

    def fail(self, flight: Flight, error: BaseException) -> None:
        """The flight could not begin."""
        self._end(flight, OperationStatus.ERRORED, error)

    def offer(self, flight: Flight) -> bytes:
        """Register the flight's memory and await the peer's word. Returns what a peer must know to reach it."""
        try:
            self._hold_all(flight)
            agent_metadata = self.metadata(flight.regions)
        except BaseException as e:
            self._end(flight, OperationStatus.ERRORED, e)
            raise
        if flight.advance(OperationStatus.INITIALIZED):
            self._offers[flight.key.encode()] = self._offers[_cancel_word(flight.key)] = flight
            self._waiting_since = time.monotonic()
            flight.begun.set_result(None)
        else:
            self._end(flight, OperationStatus.CANCELLED)
        return agent_metadata

    def begin(self, flight: Flight, peer: Peer, remote: Sequence[Region]) -> None:
        """Begin a transfer; a short one, or one within this machine, is over when this returns."""
        flight.remote = peer
        try:
            if flight.status.is_final:
                self._say_cancelled(flight)
                self._end(flight, flight.status)
                return
            if flight.key in self._used:
                raise InvalidState("this metadata was used before: it is good for one operation, ask for another")
            self._hold_all(flight)
            self._launch(flight, peer, remote)
        except BaseException as e:  # noqa: BLE001 - who waits for the flight gets it
            self._end(flight, OperationStatus.ERRORED, self._meaning(e, peer))

    def _launch(self, flight: Flight, peer: Peer, remote: Sequence[Region]) -> None:
        b = self._bindings
        local_list, remote_list = (
            b.nixlXferDList(self._segment(side[0].device.kind), [region.triple for region in side])
            for side in (flight.regions, remote)
        )
        way = b.NIXL_READ if flight.kind is OperationKind.READ else b.NIXL_WRITE
        flight.handle = self._nixl.createXferReq(way, local_list, remote_list, peer.name, flight.key.encode(), [])
        flight.advance(OperationStatus.IN_PROGRESS)
        _remember(self._used, flight.key)
        if self._nixl.postXferReq(flight.handle, b"") == b.NIXL_SUCCESS:
            self._end(flight, OperationStatus.COMPLETE)
            return
        self._transfers.append(flight)
        self._waiting_since = time.monotonic()
        flight.begun.set_result(None)

    def _hold_all(self, flight: Flight) -> None:
        for region in flight.regions:
            self.hold(region)
            flight.holding.append(region)

    def _end(self, flight: Flight, status: OperationStatus, error: BaseException | None = None) -> None:
        """NIXL is done with the flight, or never began: let go of all it held and wake who waits."""
        if flight.handle is not None:
            handle, flight.handle = flight.handle, None
            try:
                self._nixl.releaseXferReq(handle)
            except self._failures.any as e:
                log.warning("NIXL keeps a transfer with %s that is over: %s", flight.remote.name, e)
            if error is not None and not isinstance(error, PeerGone):
                self._say_cancelled(flight)
        while flight.holding:
            self.let_go(flight.holding.pop())
        if flight.remote is not None:
            flight.remote.is_broken = flight.remote.is_broken or isinstance(error, PeerGone)
            self.release_peer(flight.remote)
            flight.remote = None
        flight.advance(status, error)
        flight.conclude()

    def _withdraw(self, flight: Flight, status: OperationStatus, error: BaseException | None = None) -> None:
        key = flight.key.encode()
        self._offers.pop(key, None)
        self._offers.pop(_cancel_word(flight.key), None)
        _remember(self._finished, key)
        if flight.is_known and status is not OperationStatus.COMPLETE:
            self._withdrawn.append((time.monotonic() + WITHDRAWN_S, flight.holding))
            flight.holding = []
        self._end(flight, status, error)

    def _give_up(self, flight: Flight) -> None:
        """A cancelled flight: an offer is withdrawn; a transfer that NIXL has runs on, watched, until it is over.

        NIXL's own cancel frees its handle, but bytes on their way still arrive, in memory that would be somebody's.
        Nor is the peer told before the end: it would take away memory that is being read.
        """
        if flight.key.encode() in self._offers and self._offers[flight.key.encode()] is flight:
            self._withdraw(flight, OperationStatus.CANCELLED)
        elif flight in self._transfers:
            flight.deadline = time.monotonic() + DRAIN_S

    def _say_cancelled(self, flight: Flight) -> None:
        try:
            self._nixl.genNotif(flight.remote.name, _cancel_word(flight.key), [])
        except self._failures.any as e:
            log.debug("could not tell %s that a transfer is cancelled: %s", flight.remote.name, e)

    # the thread's loop

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            log.exception("the thread of %s ends by a defect of its own", self.name)
        finally:
            self._close()

    def _close(self) -> None:
        """Whatever happened, nobody waits for this agent any more."""
        self._closed = TransferFailed(f"{self.name} is closed")
        for flight in {*self._transfers, *self._offers.values()}:
            flight.advance(OperationStatus.ERRORED, self._closed)
            flight.conclude()
        while not self._inbox.empty():
            work = self._inbox.get_nowait()
            if work is not None:
                work()
        later, self._later = self._later, []
        for attempt in later:
            attempt()
        self._nixl = None  # ends NIXL's own thread

    def _serve(self) -> None:
        while True:
            try:
                work = self._inbox.get(timeout=self._pause())
            except queue.Empty:
                self._look()
                continue
            if work is None:
                return
            work()
            work = None  # or its memory would live until the next call
            if self._inbox.empty() or time.monotonic() - self._last_look > LAST_POLL_S:
                self._look()

    def _pause(self) -> float | None:
        if not (self._transfers or self._offers or self._later):
            return max(0.0, self._withdrawn[0][0] - time.monotonic()) if self._withdrawn else None
        waited = time.monotonic() - self._waiting_since
        return min(max(waited * POLL_SHARE, FIRST_POLL_S), LAST_POLL_S)

    def _look(self) -> None:
        """Ask NIXL for news of what is in flight."""
        now = self._last_look = time.monotonic()
        for flight in [f for f in self._transfers if self._is_over(f, now)]:
            self._transfers.remove(flight)
        if self._offers:
            self._hear()
            if now > self._last_sweep + SWEEP_S:
                self._last_sweep = now
                self._withdraw_late(now)
        while self._withdrawn and now > self._withdrawn[0][0]:
            for region in self._withdrawn.pop(0)[1]:
                self.let_go(region)
        later, self._later = self._later, []
        for attempt in later:
            attempt()

    def _withdraw_late(self, now: float) -> None:
        for flight in {f for f in self._offers.values() if now > f.deadline}:
            what = f"nobody came for this {flight.kind} within {self.patience_s:g} s; the offer is withdrawn"
            self._withdraw(flight, OperationStatus.ERRORED, TransferTimeout(what))

    def _is_over(self, flight: Flight, now: float) -> bool:
        try:
            state = self._nixl.getXferStatus(flight.handle)
        except self._failures.any as e:
            self._end(flight, OperationStatus.ERRORED, self._meaning(e, flight.remote))
            return True
        if state == self._bindings.NIXL_SUCCESS:
            self._end(flight, OperationStatus.COMPLETE)
            return True
        if now > flight.deadline and not flight.over.done():
            what = f"not over in time with {flight.remote.name}; bytes may still arrive, so do not use the memory again"
            flight.advance(OperationStatus.ERRORED, TransferTimeout(what))
            flight.over.set_exception(flight.error or TransferTimeout(f"cancelled, but {what}"))
        return False  # kept with its memory until NIXL says that it has ended

    def _hear(self) -> None:
        try:
            heard = self._nixl.getNotifs({}, [])
        except self._failures.any as e:  # the offers' deadlines hold all the same
            log.warning("%s cannot hear its peers: %s", self.name, e)
            return
        for sender, words in heard.items():
            for word in words:
                flight = self._offers.get(word)
                if flight is None:
                    if word in self._finished:
                        log.warning("%s used metadata a second time, or withdrawn: what it got may be garbage", sender)
                elif word == flight.key.encode():
                    self._withdraw(flight, OperationStatus.COMPLETE)
                else:
                    error = PeerCancelled(f"{sender} gave this {flight.kind} up; the memory may hold part of it")
                    self._withdraw(flight, OperationStatus.ERRORED, error)

    def _registration(self, regions: Sequence[Region]) -> Any:
        segment = self._segment(regions[0].device.kind)
        return self._bindings.nixlRegDList(segment, [(*region.triple, "") for region in regions])

    def _segment(self, kind: DeviceKind) -> Any:
        return self._bindings.DRAM_SEG if kind is DeviceKind.HOST else self._bindings.VRAM_SEG

    def _meaning(self, error: BaseException, peer: Peer) -> BaseException:
        """NIXL's error as one of ours."""
        if isinstance(error, self._failures.disconnected):
            return PeerGone(f"{peer.name} is gone, or the way to it broke: {error}")
        if isinstance(error, self._failures.unknown_memory):
            return InvalidValue(f"{peer.name} did not offer the memory in `descriptors`: {error}", "descriptors")
        if isinstance(error, self._failures.any) and not isinstance(error, InvalidState | TransferFailed):
            return TransferFailed(f"NIXL could not transfer with {peer.name}: {error}")
        return error

    def _log_failure(self, done: "Future[None]") -> None:
        error = done.exception()
        if error is not None:
            log.warning("%s: %s", self.name, error)


def _remember(keys: "OrderedDict[Any, None]", key: Any) -> None:
    keys[key] = None
    if len(keys) > MAX_KEYS_KEPT:
        keys.popitem(last=False)


def _cancel_word(key: str) -> bytes:
    """What the peer of `key` is told on a cancel. It must not contain the key: the peer's library looks for that."""
    return CANCEL_MARK + hashlib.blake2b(key.encode(), digest_size=16).hexdigest().encode()


def _enter_gpu(device_id: int) -> None:
    """Make the GPU's context current in this thread; UCX asks for it when it registers. Untested: no GPU was here."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.set_device(device_id)
