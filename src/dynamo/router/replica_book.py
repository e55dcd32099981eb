"""How do several routers of the same workers come to the same load, though messages get lost?

Each router tells the others of what it books, of first tokens and of ends (facts row E6), and the others book it
beside their own. From time to time it also tells what it has open altogether, as hashes of the request ids: whoever
has more than that drops it, whoever has less asks for it again. So two routers agree again within three digests of
the loss of any messages; what a router had open that left goes with it.

There is no I/O here: messages are handed in, and those to send are handed out.
"""

from collections.abc import Iterable

import msgspec
from xxhash import xxh3_64_intdigest

from dynamo.router.active_load import Booking
from dynamo.router.scheduler import KvScheduler
from dynamo.router.types import WorkerKey

MAX_HOMELESS = 10_000  # requests of other routers at workers that are not in discovery here (yet)
PREFILL_DONE = "MarkPrefillCompleted"
FREE = "Free"


class Place(msgspec.Struct, frozen=True):
    """A worker's rank."""

    worker_id: int
    dp_rank: int = 0


class AddRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a router booked. `token_sequence` are the sequence hashes it counts as shared."""

    token_sequence: list[int] | None = None
    isl: int = 0
    new_tokens: int = 0
    private_blocks: int = 0
    prefilling: bool = True


class SequenceEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event. `data` is `{"AddRequest": {...}}`, `"MarkPrefillCompleted"` or `"Free"`."""

    request_id: str
    worker: Place
    data: dict[str, AddRequest] | str
    router_id: int
    lora_name: str | None = None


class SequenceEvents(msgspec.Struct, frozen=True):
    """A message of the topic `active_sequences_events`."""

    events: list[SequenceEvent]


class Digest(msgspec.Struct, frozen=True):
    """All that a router has open, as hashes of request ids, when it had sent `sequence` messages of events."""

    router_id: int
    sequence: int
    prefilling: list[int]
    decoding: list[int]
    wanted: dict[str, list[int]] = {}
    """By router (as text): hashes of requests of that router which this one lacks."""


class _Theirs(msgspec.Struct):
    """What another router has told us."""

    bookings: dict[int, str] = {}
    """Hash of the request id -> what it is booked as here."""
    added_at: dict[int, int] = {}
    """... -> the message that told us."""
    sequence: int = -1
    """The last message heard."""
    missing: set[int] = set()
    """Requests that its last digest had and we had not."""


def name_hash(request_id: str) -> int:
    """A request's name in digests."""
    return xxh3_64_intdigest(request_id.encode())


class ReplicaBook:
    """One router's side of the exchange. Books what others have into the scheduler's load."""

    def __init__(self, scheduler: KvScheduler, router_id: int) -> None:
        self.router_id = router_id
        self.applied = 0
        self.repaired = 0
        """Bookings that a digest showed to be missing, finished or too many."""
        self.invalid = 0
        self.keys: set[str] = set()
        """What requests of others are booked as here."""
        self._scheduler = scheduler
        self._load = scheduler.load
        self._ours: dict[int, tuple[str, list[int]]] = {}
        self._theirs: dict[int, _Theirs] = {}
        self._by_request: dict[str, str] = {}
        self._homeless: dict[str, SequenceEvent] = {}
        self._wanted: dict[int, set[int]] = {}
        self._outbox: list[SequenceEvent] = []

    # --- ours

    def booked(self, booking: Booking, sequence_hashes: Iterable[int]) -> None:
        """We booked a request."""
        hashes = list(sequence_hashes)
        self._ours[name_hash(booking.request_id)] = booking.request_id, hashes
        self._outbox.append(self._add_event(booking, hashes))

    def _add_event(self, booking: Booking, hashes: list[int]) -> SequenceEvent:
        add = AddRequest(
            token_sequence=hashes,
            new_tokens=booking.new_tokens,
            private_blocks=booking.private_blocks,
            prefilling=booking.prefilling,
        )
        return SequenceEvent(booking.request_id, Place(*booking.worker), {"AddRequest": add}, self.router_id)

    def prefill_done(self, booking: Booking) -> None:
        """One of ours made its first token."""
        if name_hash(booking.request_id) in self._ours:
            self._outbox.append(SequenceEvent(booking.request_id, Place(*booking.worker), PREFILL_DONE, self.router_id))

    def freed(self, booking: Booking) -> None:
        """One of ours ended."""
        if self._ours.pop(name_hash(booking.request_id), None) is not None:
            self._outbox.append(SequenceEvent(booking.request_id, Place(*booking.worker), FREE, self.router_id))

    def take_events(self) -> SequenceEvents | None:
        """What is to be sent."""
        if not self._outbox:
            return None
        events, self._outbox = self._outbox, []
        return SequenceEvents(events)

    def digest(self, sequence: int) -> Digest:
        """All that we have open, and all that we lack of others. `sequence` is our last message of events."""
        prefilling: list[int] = []
        decoding: list[int] = []
        for hashed, (request_id, _) in list(self._ours.items()):
            booking = self._load.bookings.get(request_id)
            if booking is None:  # it went with its worker, or expired
                del self._ours[hashed]
            else:
                (prefilling if booking.prefilling else decoding).append(hashed)
        wanted = {str(router): sorted(hashes) for router, hashes in self._wanted.items() if hashes}
        self._wanted = {}
        return Digest(self.router_id, sequence, prefilling, decoding, wanted)

    # --- theirs

    def hear(self, message: SequenceEvents, sequence: int, now: float) -> None:
        """Another router, or a worker, told of events in its message number `sequence`."""
        for event in message.events:
            if event.router_id == self.router_id:
                continue
            self.applied += 1
            if isinstance(event.data, dict):
                self._add(event, sequence, now)
            elif event.data == PREFILL_DONE:
                self._prefill_done(event, now)
            elif event.data == FREE:
                self._free(event)
            else:
                self.invalid += 1
            theirs = self._theirs.get(event.router_id)
            if theirs is not None:
                theirs.sequence = max(theirs.sequence, sequence)

    def _add(self, event: SequenceEvent, sequence: int, now: float) -> None:
        add = event.data.get("AddRequest") if isinstance(event.data, dict) else None
        if add is None:
            self.invalid += 1
            return
        key, hashed = self._key(event), name_hash(event.request_id)
        worker = WorkerKey(event.worker.worker_id, event.worker.dp_rank)
        if key in self._load.bookings:
            return
        if worker not in self._load.position:
            if len(self._homeless) < MAX_HOMELESS:
                self._homeless[key] = event
            return
        theirs = self._theirs.setdefault(event.router_id, _Theirs())
        self._load.book(
            key,
            worker,
            add.token_sequence or (),
            max(0, add.new_tokens or add.isl),
            now,
            private_blocks=max(0, add.private_blocks),
        )
        if not add.prefilling:
            self._load.prefill_done(key)
        self.keys.add(key)
        theirs.bookings[hashed] = key
        theirs.added_at[hashed] = sequence
        self._by_request[event.request_id] = key

    def _key(self, event: SequenceEvent) -> str:
        return f"{event.router_id:x}/{event.request_id}"

    def _prefill_done(self, event: SequenceEvent, now: float) -> None:
        # Workers tell of first tokens too, under their own id: then the request may be ours.
        key = self._key(event)
        if key not in self._load.bookings:
            key = self._by_request.get(event.request_id, event.request_id)
        self._scheduler.prefill_done(key, now)
        waiting = self._homeless.get(self._key(event))
        if waiting is not None and isinstance(waiting.data, dict):
            data = {name: msgspec.structs.replace(add, prefilling=False) for name, add in waiting.data.items()}
            self._homeless[self._key(event)] = msgspec.structs.replace(waiting, data=data)

    def _free(self, event: SequenceEvent) -> None:
        self._homeless.pop(self._key(event), None)
        theirs = self._theirs.get(event.router_id)
        if theirs is not None:
            self._drop(theirs, name_hash(event.request_id))

    def _drop(self, theirs: _Theirs, hashed: int) -> None:
        key = theirs.bookings.pop(hashed, None)
        theirs.added_at.pop(hashed, None)
        if key is not None:
            self.keys.discard(key)
            self._load.free(key)
            self._by_request.pop(key.partition("/")[2], None)

    def hear_digest(self, digest: Digest, now: float) -> None:
        """Another router told what it has open: become equal to it, and tell it again what it lacks of ours."""
        if digest.router_id == self.router_id:
            return
        for hashed in digest.wanted.get(str(self.router_id), ()):
            self._tell_again(hashed)
        theirs = self._theirs.setdefault(digest.router_id, _Theirs())
        decoding = set(digest.decoding)
        open_there = decoding.union(digest.prefilling)
        for hashed, key in list(theirs.bookings.items()):
            if key not in self._load.bookings:  # it went with its worker, or expired
                self._drop(theirs, hashed)
            elif hashed not in open_there:
                if theirs.added_at[hashed] <= digest.sequence:  # else it is newer than the digest
                    self._drop(theirs, hashed)
                    self.repaired += 1
            elif hashed in decoding and self._load.bookings[key].prefilling:
                self._load.prefill_done(key)
                self.repaired += 1
        self._drop_homeless(digest.router_id, open_there)
        known = {name_hash(each.request_id) for each in self._homeless.values()}
        missing = open_there - theirs.bookings.keys() - known
        # What is on its way is not lost: then ask only for what was missing at the last digest already.
        on_their_way = 0 <= theirs.sequence < digest.sequence
        lost = missing & theirs.missing if on_their_way else missing
        theirs.missing = missing
        if lost:
            self.repaired += len(lost)
            self._wanted[digest.router_id] = lost

    def _tell_again(self, hashed: int) -> None:
        ours = self._ours.get(hashed)
        booking = self._load.bookings.get(ours[0]) if ours is not None else None
        if ours is not None and booking is not None:
            self._outbox.append(self._add_event(booking, ours[1]))

    def _drop_homeless(self, router_id: int, open_there: set[int]) -> None:
        for key, event in list(self._homeless.items()):
            if event.router_id == router_id and name_hash(event.request_id) not in open_there:
                del self._homeless[key]

    def worker_joined(self, worker: WorkerKey, now: float) -> None:
        """A worker is known from now on: others may have told us of requests there already."""
        place = Place(*worker)  # mostly there is nobody to look for
        for key, event in list(self._homeless.items()):
            if event.worker == place:
                del self._homeless[key]
                theirs = self._theirs.get(event.router_id)
                self._add(event, theirs.sequence if theirs is not None else 0, now)

    def router_left(self, router_id: int) -> None:
        """A router is gone, with all that it had open."""
        theirs = self._theirs.pop(router_id, None)
        if theirs is not None:
            for hashed in list(theirs.bookings):
                self._drop(theirs, hashed)
        self._drop_homeless(router_id, set())

    def open_elsewhere(self) -> dict[int, int]:
        """By router: how many requests we know it to have open."""
        return {router: len(theirs.bookings) for router, theirs in self._theirs.items()}
