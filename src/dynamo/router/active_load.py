"""How busy is each worker with the requests that this router sent there?

A book of active requests. Every booking is closed exactly once, whatever ended the request, and all numbers are
sums over open bookings: they cannot drift. Blocks that several requests of one worker share count once.

What others than this router sent to a worker is known only from its own reports; it is kept apart (`set_foreign`)
and added to the same columns, so that a choice sees all of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynamo.router.active_paths import ActivePaths, Node
from dynamo.router.types import WorkerKey, WorkerLimits


class Foreign(msgspec.Struct, frozen=True):
    """Load at a worker that is not of requests in this book."""

    prefill_tokens: int = 0
    decode_blocks: int = 0
    requests: int = 0


NO_FOREIGN = Foreign()


class Booking(msgspec.Struct):
    """One active request at one worker."""

    request_id: str
    worker: WorkerKey
    new_tokens: int
    """Prompt tokens that count as queued there until the first token comes."""
    booked_at: float
    end: Node
    """Where its prompt's path ends."""
    prefilling: bool = True
    private_blocks: int = 0
    """Blocks nobody else can share: the prompt's partial tail, and what was generated."""
    generated_blocks: int = 0
    expected_blocks: float = 0.0
    """Blocks the output is expected to fill; 0 if unknown."""
    counted_blocks: int = 0
    """Of the private blocks, how many are counted: fewer as the expected end comes near [K30]."""
    prompt_blocks: int = 0
    """Of its prompt, the blocks that others can share."""


class ActiveLoad:
    """The fleet's columns and the bookings behind them. See `dynamo.router.types.Fleet` for the columns."""

    def __init__(self) -> None:
        self.workers: list[WorkerKey] = []
        self.limits: list[WorkerLimits] = []
        self.prefill_tokens: list[int] = []
        self.prefill_requests: list[int] = []
        self.decode_blocks: list[int] = []
        self.context_blocks: list[int] = []
        self.requests: list[int] = []
        self.oldest_prefill: list[int] = []
        self.progress_at: list[float] = []
        self.position: dict[WorkerKey, int] = {}
        self.version = 0
        self.touched: set[int] = set()
        self.bookings: dict[str, Booking] = {}
        self._at: list[dict[str, Booking]] = []
        """By position: the bookings there, oldest first."""
        self._prefilling: list[dict[str, Booking]] = []
        self._foreign: list[Foreign] = []
        self._paths = ActivePaths()

    def _columns(self) -> tuple[list[Any], ...]:
        return (
            self.workers,
            self.limits,
            self.prefill_tokens,
            self.prefill_requests,
            self.decode_blocks,
            self.context_blocks,
            self.requests,
            self.oldest_prefill,
            self.progress_at,
            self._at,
            self._prefilling,
            self._foreign,
        )

    # --- workers

    def add_worker(self, worker: WorkerKey, limits: WorkerLimits | None = None) -> None:
        """Know a worker, or its new limits."""
        position = self.position.get(worker)
        if position is not None:
            if limits is not None and limits != self.limits[position]:
                self.limits[position] = limits
                self.version += 1
            return
        self.version += 1
        self.position[worker] = len(self.workers)
        row: tuple[Any, ...] = (worker, limits or WorkerLimits(), 0, 0, 0, 0, 0, 0, 0.0, {}, {}, NO_FOREIGN)
        for column, value in zip(self._columns(), row, strict=True):
            column.append(value)

    def remove_worker(self, worker: WorkerKey) -> list[str]:
        """Forget a worker and close its bookings. Returns their request ids."""
        position = self.position.get(worker)
        if position is None:
            return []
        ids = list(self._at[position])
        for request_id in ids:
            self.free(request_id)
        self._move_last_to(position)
        return ids

    def _move_last_to(self, position: int) -> None:
        """Close the gap at `position`, whose worker holds nothing, with the last worker."""
        self.version += 1
        last = len(self.workers) - 1
        del self.position[self.workers[position]]
        if position != last:
            self.position[self.workers[last]] = position
            for booking in self._at[last].values():
                self._paths.move(booking.end, last, position)
        for column in self._columns():
            tail = column.pop()
            if position < len(column):
                column[position] = tail

    def set_foreign(self, worker: WorkerKey, foreign: Foreign) -> None:
        """Load at a worker from requests that are not in this book. Unknown workers are ignored."""
        position = self.position.get(worker)
        if position is None:
            return
        self.touched.add(position)
        before = self._foreign[position]
        self._foreign[position] = foreign
        self.prefill_tokens[position] += foreign.prefill_tokens - before.prefill_tokens
        self.decode_blocks[position] += foreign.decode_blocks - before.decode_blocks
        self.context_blocks[position] += foreign.decode_blocks - before.decode_blocks
        self.requests[position] += foreign.requests - before.requests

    def foreign(self, worker: WorkerKey) -> Foreign:
        """What `set_foreign` said last."""
        position = self.position.get(worker)
        return NO_FOREIGN if position is None else self._foreign[position]

    # --- asking

    def shared_blocks(self, sequence_hashes: Sequence[int]) -> Sequence[tuple[int, dict[int, int]]]:
        """(blocks, positions): active requests hold at least so many leading blocks at these positions already.

        Of several entries that a position is in, the last one counts. For reading now, not for keeping.
        """
        return self._paths.shared(sequence_hashes)

    @property
    def idle(self) -> bool:
        """Whether nothing at all is booked: then every number is zero but for what others sent."""
        return not self.bookings and self._paths.empty

    # --- requests

    def book(
        self,
        request_id: str,
        worker: WorkerKey,
        sequence_hashes: Sequence[int],
        new_tokens: int,
        now: float,
        private_blocks: int = 0,
        expected_blocks: float = 0.0,
    ) -> Booking:
        """Open a booking. `private_blocks` are those of the prompt without a hash, such as a last one in part.

        Raises:
            KeyError: the worker is unknown, or the id is booked already.
        """
        if request_id in self.bookings:
            raise KeyError(f"request {request_id!r} is booked already")
        position = self.position[worker]
        self.touched.add(position)
        blocks, prefilling = len(sequence_hashes), self._prefilling[position]
        end, fresh = self._paths.add(sequence_hashes, position)
        booking = Booking(
            request_id,
            worker,
            new_tokens,
            now,
            end,
            True,
            private_blocks,
            0,
            expected_blocks,
            private_blocks,
            blocks,
        )  # by place: fast
        self.bookings[request_id] = self._at[position][request_id] = booking
        if not prefilling:
            self.oldest_prefill[position] = new_tokens
            self.progress_at[position] = now
        prefilling[request_id] = booking
        self.decode_blocks[position] += fresh + private_blocks
        self.context_blocks[position] += blocks + private_blocks
        self.prefill_tokens[position] += new_tokens
        self.prefill_requests[position] += 1
        self.requests[position] += 1
        return booking

    def prefill_done(self, request_id: str, now: float | None = None) -> None:
        """The request made its first token. Unknown ids and later calls are ignored."""
        booking = self.bookings.get(request_id)
        if booking is not None and booking.prefilling:
            position = self.position[booking.worker]
            self.touched.add(position)
            self._end_prefill(booking, position, now)

    def _end_prefill(self, booking: Booking, position: int, now: float | None) -> None:
        booking.prefilling = False
        waiting = self._prefilling[position]
        del waiting[booking.request_id]
        self.oldest_prefill[position] = next(iter(waiting.values())).new_tokens if waiting else 0
        self.prefill_tokens[position] -= booking.new_tokens
        self.prefill_requests[position] -= 1
        if now is not None:
            self.progress_at[position] = now

    def output_block(self, request_id: str, decay_fraction: float | None = None) -> None:
        """The request filled one more block with what it generated [K30]. Unknown ids are ignored.

        If its length is expected, its own blocks count for less as its end comes near: by the share of the output
        that is still to come, or by `decay_fraction` where somebody knows better.
        """
        booking = self.bookings.get(request_id)
        if booking is None:
            return
        booking.private_blocks += 1
        booking.generated_blocks += 1
        counted = booking.private_blocks
        if decay_fraction is not None:
            counted = round(counted * decay_fraction)
        elif booking.expected_blocks > 0:
            counted = round(counted * max(0.0, 1 - booking.generated_blocks / booking.expected_blocks))
        position = self.position[booking.worker]
        self.touched.add(position)
        self.decode_blocks[position] += counted - booking.counted_blocks
        self.context_blocks[position] += counted - booking.counted_blocks
        booking.counted_blocks = counted

    def free(self, request_id: str, first_token_at: float | None = None) -> Booking | None:
        """Close a booking, and say what it was. Unknown ids are ignored, so that every path may call this.

        `first_token_at`: it made its first token only now, as far as `prefill_done` was not called.
        """
        booking = self.bookings.pop(request_id, None)
        if booking is None:
            return None
        position = self.position[booking.worker]
        self.touched.add(position)
        del self._at[position][request_id]
        if booking.prefilling:
            self._end_prefill(booking, position, first_token_at)
        gone = self._paths.drop(booking.end, position)
        self.decode_blocks[position] -= gone + booking.counted_blocks
        self.context_blocks[position] -= booking.prompt_blocks + booking.counted_blocks
        self.requests[position] -= 1
        return booking

    def expire(self, older_than: float, now: float, alive: Callable[[str], bool] | None = None) -> list[str]:
        """Close bookings made before `older_than`: they were leaked by somebody. Returns their request ids.

        Those that are `alive` count from `now` on. Bookings are in the order of their time, so this looks only at
        those that are old.
        """
        stale: list[str] = []
        for request_id, booking in self.bookings.items():
            if booking.booked_at >= older_than:
                break
            stale.append(request_id)
        gone: list[str] = []
        for request_id in stale:
            if alive is not None and alive(request_id):
                booking = self.bookings.pop(request_id)
                booking.booked_at = now
                self.bookings[request_id] = booking
            else:
                self.free(request_id)
                gone.append(request_id)
        return gone
