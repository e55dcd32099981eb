"""How busy is each worker with the requests that this router sent there?

A book of active requests. Every booking is closed exactly once, whatever ended the request, and all numbers are
sums over open bookings: they cannot drift. Blocks that several requests of one worker share count once.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from dynamo.router.types import Overlap, WorkerKey, WorkerLimits

T = TypeVar("T")


class Booking(msgspec.Struct):
    """One active request at one worker."""

    request_id: str
    worker: WorkerKey
    sequence_hashes: Sequence[int]
    new_tokens: int
    overlap: Overlap
    booked_at: float
    prefilling: bool = True
    private_blocks: int = 0
    """Blocks nobody else can share: the prompt's partial tail, and what was generated."""


class ActiveLoad:
    """The fleet's columns and the bookings behind them. See `dynamo.router.types.Fleet` for the columns."""

    def __init__(self) -> None:
        self.workers: list[WorkerKey] = []
        self.limits: list[WorkerLimits] = []
        self.prefill_tokens: list[int] = []
        self.prefill_requests: list[int] = []
        self.decode_blocks: list[int] = []
        self.requests: list[int] = []
        self.position: dict[WorkerKey, int] = {}
        self.bookings: dict[str, Booking] = {}
        self._counts: list[Counter[int]] = []
        """By position: sequence hash -> how many active requests hold it."""
        self._holders: dict[int, int] = {}
        """Sequence hash -> the positions where an active request holds it, a bit for each."""

    # --- workers

    def add_worker(self, worker: WorkerKey, limits: WorkerLimits | None = None) -> None:
        """Know a worker, or its new limits."""
        position = self.position.get(worker)
        if position is not None:
            if limits is not None:
                self.limits[position] = limits
            return
        self.position[worker] = len(self.workers)
        self.workers.append(worker)
        self.limits.append(limits or WorkerLimits())
        for column in (self.prefill_tokens, self.prefill_requests, self.decode_blocks, self.requests):
            column.append(0)
        self._counts.append(Counter())

    def remove_worker(self, worker: WorkerKey) -> list[str]:
        """Forget a worker and close its bookings. Returns their request ids."""
        position = self.position.get(worker)
        if position is None:
            return []
        ids = [booking.request_id for booking in self.bookings.values() if booking.worker == worker]
        for request_id in ids:
            self.free(request_id)
        self._move_last_to(position)
        return ids

    def _move_last_to(self, position: int) -> None:
        """Close the gap at `position`, whose worker holds nothing, with the last worker."""
        last = len(self.workers) - 1
        del self.position[self.workers[position]]
        if position != last:
            self.position[self.workers[last]] = position
            old, new = 1 << last, 1 << position
            for block in self._counts[last]:
                self._holders[block] = self._holders[block] & ~old | new
        _move_last(self.workers, position)
        _move_last(self.limits, position)
        _move_last(self._counts, position)
        for column in (self.prefill_tokens, self.prefill_requests, self.decode_blocks, self.requests):
            _move_last(column, position)

    # --- requests

    def shared_blocks(self, sequence_hashes: Sequence[int]) -> dict[int, int]:
        """By position: how many leading blocks active requests hold there already; only where there are any.

        Every request holds all blocks before one that it holds, so the sets of holders only shrink along a prompt
        and their ends are found by bisection.
        """
        holders = self._holders.get
        shared: dict[int, int] = {}
        if not sequence_hashes:
            return shared
        low, mask = 0, holders(sequence_hashes[0], 0)
        ahead = [(len(sequence_hashes), 0)]
        while mask:
            high, further = ahead[-1]
            if further == mask:
                low = high
                ahead.pop()
            elif high - low == 1:
                gone = mask & ~further
                while gone:
                    bit = gone & -gone
                    shared[bit.bit_length() - 1] = high
                    gone ^= bit
                low, mask = high, further
                ahead.pop()
            else:
                middle = (low + high) >> 1
                ahead.append((middle, holders(sequence_hashes[middle], 0)))
        return shared

    def book(
        self,
        request_id: str,
        worker: WorkerKey,
        sequence_hashes: Sequence[int],
        new_tokens: int,
        overlap: Overlap,
        now: float,
        *,
        private_blocks: int = 0,
        track_prefill: bool = True,
    ) -> None:
        """Open a booking. `private_blocks` are those of the prompt without a hash, such as a last one in part.

        Raises:
            KeyError: the worker is unknown, or the id is booked already.
        """
        if request_id in self.bookings:
            raise KeyError(f"request {request_id!r} is booked already")
        position = self.position[worker]
        booking = Booking(request_id, worker, sequence_hashes, new_tokens if track_prefill else 0, overlap, now)
        self.bookings[request_id] = booking
        counts, holders, bit = self._counts[position], self._holders, 1 << position
        before = len(counts)
        fresh = [block for block in sequence_hashes if block not in counts]
        counts.update(sequence_hashes)
        for block in fresh:
            holders[block] = holders.get(block, 0) | bit
        booking.private_blocks = private_blocks
        self.decode_blocks[position] += len(counts) - before + booking.private_blocks
        self.prefill_tokens[position] += booking.new_tokens
        self.prefill_requests[position] += 1
        self.requests[position] += 1

    def prefill_done(self, request_id: str) -> None:
        """The request made its first token. Unknown ids and later calls are ignored."""
        booking = self.bookings.get(request_id)
        if booking is not None and booking.prefilling:
            booking.prefilling = False
            position = self.position[booking.worker]
            self.prefill_tokens[position] -= booking.new_tokens
            self.prefill_requests[position] -= 1

    def output_block(self, request_id: str) -> None:
        """The request filled one more block with what it generated [K30]. Unknown ids are ignored."""
        booking = self.bookings.get(request_id)
        if booking is not None:
            booking.private_blocks += 1
            self.decode_blocks[self.position[booking.worker]] += 1

    def free(self, request_id: str) -> Booking | None:
        """Close a booking, and say what it was. Unknown ids are ignored, so that every path may call this."""
        booking = self.bookings.get(request_id)
        if booking is None:
            return None
        self.prefill_done(request_id)
        del self.bookings[request_id]
        position = self.position[booking.worker]
        counts, holders, bit = self._counts[position], self._holders, 1 << position
        before = len(counts)
        for block in booking.sequence_hashes:
            left = counts[block] - 1
            if left:
                counts[block] = left
                continue
            del counts[block]
            mask = holders[block] ^ bit
            if mask:
                holders[block] = mask
            else:
                del holders[block]
        self.decode_blocks[position] -= before - len(counts) + booking.private_blocks
        self.requests[position] -= 1
        return booking

    def expire(self, older_than: float) -> list[str]:
        """Close bookings made before `older_than`; they were leaked by somebody. Returns their request ids.

        Bookings are in the order they were made, so this looks only at those that go.
        """
        stale: list[str] = []
        for booking in self.bookings.values():
            if booking.booked_at >= older_than:
                break
            stale.append(booking.request_id)
        for request_id in stale:
            self.free(request_id)
        return stale


def _move_last(column: list[T], position: int) -> None:
    last = column.pop()
    if position < len(column):
        column[position] = last
