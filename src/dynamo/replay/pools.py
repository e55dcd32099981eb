"""How do simulated prefill and decode workers differ from those that do both?

A *prefill worker* makes one token of each prompt and then holds the prompt's blocks until they have been read. A
*decode worker* reserves blocks between two steps, lets the KV come, and has the sequence in its next step after that.
What the mocker's scheduler does is left as it is: here is only what comes before and after.
"""

from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from dynamo.mocker.batching import BatchScheduler, SchedulerConfig, Step
from dynamo.mocker.sequence import Status
from dynamo.mocker.timing import StepTiming
from dynamo.replay.prompts import Hold, ReplayedSequence
from dynamo.replay.worker import NEVER, Listener, SimulatedWorker

GB = 1e9  # bytes: bandwidths are decimal
TimingMode = Literal["full_prompt", "destination_missing"]


class Pools(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Workers of each kind, and the way between them.

    A transfer takes `kv_transfer_latency_ms` and then the prompt's bytes over the bandwidth (GB/s; 0 is no limit),
    whatever else travels. `kv_transfer_timing_mode` says whether all of the prompt travels or only what the decode
    worker lacks. The client sees the prefill worker's first token as soon as there is one, or, with
    `first_from_decode`, only the decode worker's.
    """

    prefill_workers: int
    decode_workers: int
    kv_transfer_bandwidth: float = 64.0
    kv_bytes_per_token: int | None = None
    kv_transfer_latency_ms: float = 0.0
    kv_transfer_timing_mode: TimingMode = "full_prompt"
    first_from_decode: bool = False

    def __post_init__(self) -> None:
        for name in ("prefill_workers", "decode_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("kv_transfer_bandwidth", "kv_bytes_per_token", "kv_transfer_latency_ms"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < NEVER:
                raise ValueError(f"{name} must not be negative, got {value!r}")

    def transfer_s(self, tokens: int) -> float:
        """Seconds for the KV of so many tokens."""
        seconds = self.kv_transfer_latency_ms / 1000
        if self.kv_transfer_bandwidth and self.kv_bytes_per_token:
            seconds += tokens * self.kv_bytes_per_token / (self.kv_transfer_bandwidth * GB)
        return seconds


class PoolScheduler(BatchScheduler[ReplayedSequence]):
    """The mocker's scheduler, with blocks that belong to no sequence that runs: held for others, or on their way."""

    def __init__(self, config: SchedulerConfig, timing: StepTiming) -> None:
        super().__init__(config, timing)
        self.held_blocks = 0
        self._coming: dict[str, ReplayedSequence] = {}

    def __len__(self) -> int:
        return super().__len__() + len(self._coming)

    def _fit(self, seq: ReplayedSequence, budget: int, promised: int) -> tuple[int, int] | None:
        fit = super()._fit(seq, budget, promised)
        if fit is None or self.running or not self.waits_for_others:
            return fit
        # Alone it would be let in whatever is free, as it could have all; here it may have to wait for others' blocks.
        hit, _ = fit
        needed = self._reserved(seq) - hit + self.pool.count_idle(seq.names[:hit])
        return fit if needed <= self.pool.available else None

    @property
    def waits_for_others(self) -> bool:
        """Whether blocks are held by what is not for this scheduler to end."""
        return bool(self.held_blocks or self._coming)

    # --- prefill: blocks held until they have been read

    def finish_and_hold(self, finished: list[ReplayedSequence]) -> None:
        """As `finish`, but their blocks stay."""
        for seq in finished:
            seq.hold = Hold(seq.held_names, seq.num_blanks)
            self.pool.acquire(seq.hold.names)
        self.finish(finished)
        for seq in finished:
            assert seq.hold is not None
            self.pool.allocate(seq.hold.blanks)
            self.held_blocks += len(seq.hold.names) + seq.hold.blanks

    def release(self, hold: Hold) -> None:
        """They have been read."""
        self.pool.release(hold.names, hold.blanks)
        self.held_blocks -= len(hold.names) + hold.blanks

    # --- decode: blocks reserved until the KV is there

    def reserve(self, seq: ReplayedSequence) -> int | None:
        """Take blocks for a prompt whose KV is to come. Returns how many are here already; None if there is no room."""
        config, pool = self.config, self.pool
        if len(self.running) + len(self._coming) >= config.max_num_seqs:
            return None
        blocks = -(-seq.num_tokens // config.block_size)
        hit = self._cached_blocks(seq) if config.enable_prefix_caching else 0
        needed = blocks - hit + pool.count_idle(seq.names[:hit])
        spare = self._watermark if self.running or self._coming else 0
        if pool.available - self._promised() - needed < spare:
            return None
        pool.acquire(seq.names[:hit])
        pool.allocate(blocks - hit)
        seq.status = Status.RUNNING
        seq.num_named, seq.num_blanks = hit, blocks - hit
        seq.num_computed = hit * config.block_size
        seq.room = blocks * config.block_size
        self._coming[seq.id] = seq
        return hit

    def join(self, seq: ReplayedSequence) -> None:
        """The KV is there: the sequence runs, and computes its prompt's last position in the next step."""
        del self._coming[seq.id]
        self._by_id[seq.id] = seq
        self.running.append(seq)
        seq.loaded()
        seq.num_computed = seq.num_prompt
        self._name_full_blocks(seq, seq.num_computed)


class _PoolWorker(SimulatedWorker):
    """One with a `PoolScheduler`."""

    scheduler: PoolScheduler

    def make_scheduler(self, config: SchedulerConfig, timing: StepTiming) -> PoolScheduler:
        """See `SimulatedWorker`."""
        return PoolScheduler(config, timing)

    def _go_on(self, now: float) -> None:
        super()._go_on(now)
        if self._step is not None and self._is_stuck(self._step):
            self._step, self.wakes_at = None, NEVER

    def _is_stuck(self, step: Step[ReplayedSequence]) -> bool:
        """Whether nothing can be done before someone else gives blocks back."""
        scheduler = self.scheduler
        return not step.scheduled and not scheduler.running and scheduler.waits_for_others


class PrefillWorker(_PoolWorker):
    """Computes prompts, and keeps what it computed until `release`."""

    def _finish(self, candidates: list[ReplayedSequence], now: float) -> None:
        done = [sequence for sequence in candidates if sequence.num_output >= sequence.max_tokens]
        self.scheduler.finish_and_hold(done)
        for sequence in done:
            self._fresh.remove(sequence)
            self._listener.finished(sequence, now)

    def release(self, hold: Hold, now: float) -> None:
        """The blocks have been read."""
        self.scheduler.release(hold)
        if self.wakes_at == NEVER and self.scheduler.waiting:
            self.wakes_at = now


class DecodeWorker(_PoolWorker):
    """Has prompts computed elsewhere too.

    `begin` is told when one has room, with the blocks that are here already; it says whether the rest takes no time.
    """

    def __init__(
        self,
        index: int,
        config: SchedulerConfig,
        timing: StepTiming,
        listener: Listener,
        begin: Callable[[ReplayedSequence, int, float], bool],
        *,
        cache_events: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__(index, config, timing, listener, cache_events=cache_events, progress=progress)
        self._begin = begin
        self._unreserved: deque[ReplayedSequence] = deque()
        self._arrived: list[ReplayedSequence] = []

    @property
    def waiting_for_room(self) -> int:
        """Prompts that are computed elsewhere and find no blocks here yet."""
        return len(self._unreserved)

    def expect(self, sequence: ReplayedSequence, now: float) -> None:
        """A prompt computed elsewhere is to be answered here. Raises InvalidArgument if it can never be."""
        room = self.scheduler.check(sequence.id, sequence.num_prompt)
        sequence.max_tokens = min(sequence.max_tokens, room)
        self.interrupt(now)
        self._unreserved.append(sequence)

    def arrived(self, sequence: ReplayedSequence, now: float) -> None:
        """Its KV is here."""
        self.interrupt(now)
        self._arrived.append(sequence)

    def _prepare(self, now: float) -> None:
        while self._unreserved:
            hit = self.scheduler.reserve(self._unreserved[0])
            if hit is None:
                break
            sequence = self._unreserved.popleft()
            if self._begin(sequence, hit, now):
                self._arrived.append(sequence)
        for sequence in self._arrived:
            self.scheduler.join(sequence)
        self._joined += self._arrived
        self._arrived.clear()
        if self._joined:
            self._tell_changes(now)
