"""Which peers does NIXL know here, and is what it knows still true?

Connecting costs 20 to 60 ms, so a peer stays known between operations. But NIXL keeps the first key of a region for
ever and forgets the whole peer, under transfers in flight, when it hears of another; and if it hears of a region of a
peer that has died, it never again accepts one of that name. So a peer is forgotten and loaded anew, while nothing is in
flight with it, whenever a region that is known may have been registered again, or it does not answer a call.
"""

import hashlib
import logging
import re
import time
from collections.abc import Iterable
from typing import Any

from dynamo.nixl_connect.bindings import Failures
from dynamo.nixl_connect.errors import InvalidValue, PeerGone
from dynamo.nixl_connect.metadata import agent_name_in

log = logging.getLogger(__name__)

OURS = re.compile(r"-\d+-[0-9a-f]{8}$")  # an agent's name as `Connection` makes it
CALL = b"are you there"  # our agents pass over it; another library might keep it, so others are not called
MAX_REGIONS = 4096  # of one peer; NIXL keeps them sorted and searches them for every transfer
MAX_IDLE = 64  # peers kept without a transfer; each holds sockets

Identity = tuple[int, int, str]


class BusyError(Exception):
    """The peer must be loaded anew, and transfers with it are in flight: try again when they are over."""


class Peer:
    """A remote agent that NIXL knows."""

    __slots__ = ("blobs", "is_broken", "last_used", "name", "regions", "users")

    def __init__(self, name: str) -> None:
        self.name = name
        self.users = 0
        self.is_broken = False
        self.last_used = 0.0
        self.blobs: set[bytes] = set()  # digests of what was loaded
        self.regions: set[Identity] = set()


class Remotes:
    """The peers that one NIXL agent knows. Called by the thread of an `Agent` alone."""

    def __init__(self, nixl: Any, own_name: str, failures: Failures) -> None:
        self._nixl = nixl
        self._own_name = own_name
        self._failures = failures
        self._peers: dict[str, Peer] = {}

    def load(self, agent_metadata: bytes, regions: Iterable[Identity]) -> Peer:
        """The peer described, as one more user of it.

        Raises BusyError, PeerGone if it cannot be reached, InvalidValue if NIXL does not understand the description.
        """
        digest = hashlib.blake2b(agent_metadata, digest_size=16).digest()
        wanted = set(regions)
        name = agent_name_in(agent_metadata)
        if name == self._own_name:
            return self._use(self._peers.setdefault(name, Peer(name)))  # this process itself: NIXL knows
        peer = self._peers.get(name or "")
        if peer is not None and not peer.is_broken and digest in peer.blobs:
            peer.regions |= wanted
            return self._use(peer)
        if peer is not None and self._is_stale(peer, wanted):
            self._forget(peer)
            peer = None
        peer = self._loaded(agent_metadata, peer)
        peer.blobs.add(digest)
        peer.regions |= wanted
        return self._use(peer)

    def release(self, peer: Peer) -> None:
        """One user less."""
        peer.users -= 1
        peer.last_used = time.monotonic()
        if peer.users == 0 and peer.is_broken:
            self._forget(peer)
        idle = [p for p in self._peers.values() if p.users == 0 and p.name != self._own_name]
        if len(idle) > MAX_IDLE:
            self._forget(min(idle, key=lambda p: p.last_used))

    def _use(self, peer: Peer) -> Peer:
        peer.users += 1
        return peer

    def _is_stale(self, peer: Peer, wanted: set[Identity]) -> bool:
        if peer.is_broken or wanted & peer.regions or len(peer.regions) + len(wanted) > MAX_REGIONS:
            return True
        if not OURS.search(peer.name):
            return peer.users == 0  # as the peer's own library does
        try:
            self._nixl.genNotif(peer.name, CALL, [])
        except self._failures.any:
            return True
        return False

    def _loaded(self, agent_metadata: bytes, known: Peer | None) -> Peer:
        try:
            name = self._nixl.loadRemoteMD(agent_metadata)
        except self._failures.any as e:
            if known is not None:  # NIXL has dropped what it knew of this peer; begin again from nothing
                known.is_broken = True
                self._forget(known)
                return self._loaded(agent_metadata, None)
            if isinstance(e, self._failures.unreachable):
                raise PeerGone(f"no connection to the peer that sent this metadata: {e}") from e
            raise InvalidValue(f"NIXL does not accept `nixl_metadata`: {e}", "nixl_metadata") from e
        name = name.decode() if isinstance(name, bytes) else str(name)
        return self._peers.setdefault(name, Peer(name))

    def _forget(self, peer: Peer) -> None:
        if peer.users:
            peer.is_broken = True
            raise BusyError
        self._peers.pop(peer.name, None)
        if peer.name == self._own_name:
            return
        try:
            self._nixl.invalidateRemoteMD(peer.name)
        except self._failures.any as e:
            log.debug("NIXL had already forgotten %s: %s", peer.name, e)
