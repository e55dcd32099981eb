"""What happens when these requests meet those workers?

Discrete events on a virtual clock: requests come in, steps of engines end. The simulator owns the clock and tells
everyone the time; nothing in here waits. Equal inputs and seeds give equal results, to the last digit.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import msgspec

from dynamo.llm.block_hash import sequence_hashes
from dynamo.llm.kv_events import KvEventData
from dynamo.mocker.batching import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.replay.measures import Distribution, Sample, Timeline
from dynamo.replay.prompts import PromptNames, ReplayedSequence
from dynamo.replay.routing import Choice, Routing
from dynamo.replay.traces import TraceError, TraceRequest
from dynamo.replay.worker import NEVER, SimulatedWorker
from dynamo.runtime.errors import InvalidArgument


class Goal(msgspec.Struct, frozen=True):
    """What a request must hold to count as good, milliseconds; None does not matter."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def set(self) -> bool:
        """Whether anything matters."""
        return (self.ttft_ms, self.itl_ms, self.e2e_ms) != (None, None, None)

    def met(self, ttft_s: float, itl_s: float | None, e2e_s: float) -> bool:
        """Whether a request with these latencies is good. One token has no time between tokens."""
        return (
            (self.ttft_ms is None or ttft_s * 1000 <= self.ttft_ms)
            and (self.itl_ms is None or itl_s is None or itl_s * 1000 <= self.itl_ms)
            and (self.e2e_ms is None or e2e_s * 1000 <= self.e2e_ms)
        )


class Record(msgspec.Struct, frozen=True):
    """One finished request. Times in seconds from the start of the run."""

    request_id: str
    session_id: str | None
    turn: int
    arrived_s: float
    routed_s: float
    admitted_s: float
    first_token_s: float
    second_token_s: float | None
    last_token_s: float
    input_tokens: int
    requested_tokens: int
    output_tokens: int
    cached_tokens: int
    overlap_tokens: int
    best_overlap_tokens: int
    worker: int
    """Where it was answered."""
    prefill_worker: int | None = None
    """Where its prompt was computed, if that is another."""
    transfer_s: float | None = None
    """How long the KV took from there, if it had to travel."""
    resumed_s: float | None = None
    """When the worker that answered repeated the first token, if another had made it."""

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens; None for one token."""
        if self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """From arrival to the last token."""
        return self.last_token_s - self.arrived_s


class Totals:
    """What a run adds up to. Grows with nothing."""

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self.ttft_s = Distribution()
        self.ttst_s = Distribution()
        self.tpot_s = Distribution()
        self.itl_s = Distribution()
        self.e2e_s = Distribution()
        self.speed = Distribution()
        self.requests = 0
        self.refused = 0
        self.completed = 0
        self.good = 0
        self.good_tokens = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.admitted_tokens = 0
        self.per_worker: list[int] = []

    def add(self, record: Record) -> None:
        """A request has finished."""
        self.completed += 1
        self.input_tokens += record.input_tokens
        self.output_tokens += record.output_tokens
        self.cached_tokens += record.cached_tokens
        self.per_worker[record.worker] += 1
        ttft, e2e = record.ttft_s, record.e2e_s
        tpot = record.tpot_s
        self.ttft_s.add(ttft)
        self.e2e_s.add(e2e)
        if tpot is not None:
            self.tpot_s.add(tpot)
            if tpot > 0:
                self.speed.add(1 / tpot)
        if record.second_token_s is not None:
            self.ttst_s.add(record.second_token_s - record.first_token_s)
        if self.goal.met(ttft, tpot, e2e):
            self.good += 1
            self.good_tokens += record.output_tokens


class Arrivals:
    """Which request comes next, and when: by their times (`speedup` times as fast), or as soon as fewer than
    `concurrency` are under way. A later turn comes when the one before has ended and its delay has passed."""

    def __init__(self, requests: Iterable[TraceRequest], *, speedup: float = 1.0, concurrency: int | None = None):
        if not 0 < speedup < math.inf:
            raise ValueError(f"speedup must be above 0, got {speedup!r}")
        if concurrency is not None and concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency!r}")
        self._source = iter(requests)
        self._speedup = speedup
        self._concurrency = concurrency
        self._under_way = 0
        self._first_ms: float | None = None
        self._ready: list[tuple[float, int, TraceRequest]] = []
        self._later: dict[str, list[TraceRequest]] = {}
        """By session: turns that have been read and wait for the one before."""
        self._open: set[str] = set()
        """Sessions with a turn that has been handed out or is ready."""
        self._count = 0
        self._free_at = 0.0
        self.read = 0
        self._next = self._read()

    def _read(self) -> tuple[float, TraceRequest] | None:
        """The next request of the trace that need not wait for another, and its time."""
        for request in self._source:
            self.read += 1
            session = request.session_id
            if session is not None and session in self._open:
                self._later.setdefault(session, []).append(request)
                continue
            arrival_ms = request.arrival_ms
            if session is not None:
                self._open.add(session)
            if arrival_ms is None:
                # The turn before has ended already; its end is not known any more, so the delay counts from now.
                return self._free_at + request.delay_ms / 1000 / self._speedup, request
            if self._first_ms is None:
                self._first_ms = arrival_ms
            return (arrival_ms - self._first_ms) / 1000 / self._speedup, request
        return None

    @property
    def next_at(self) -> float:
        """When the next request comes; never, if none will or none may before another ends."""
        ready = self._ready[0][0] if self._ready else NEVER
        if self._next is None:
            return ready
        if self._concurrency is None:
            return min(ready, self._next[0])
        if self._under_way < self._concurrency:
            return min(ready, self._free_at)
        return ready

    def pop(self) -> TraceRequest:
        """The request that comes at `next_at`."""
        if self._ready and self._ready[0][0] <= self.next_at:
            return heapq.heappop(self._ready)[2]  # its session has held the place since its first turn
        assert self._next is not None
        self._under_way += 1
        request = self._next[1]
        self._next = self._read()
        return request

    def finished(self, request: TraceRequest, now: float) -> None:
        """A request has ended: its place is free, or its session's next turn gets ready."""
        session = request.session_id
        waiting = self._later.get(session) if session is not None else None
        if session is not None and waiting:
            following = waiting.pop(0)
            if not waiting:
                del self._later[session]
            due = now + following.delay_ms / 1000 / self._speedup
            if following.arrival_ms is not None and self._concurrency is None:
                due = max(due, (following.arrival_ms - (self._first_ms or 0.0)) / 1000 / self._speedup)
            self._count += 1
            heapq.heappush(self._ready, (due, self._count, following))
            return
        if session is not None:
            self._open.discard(session)
        self._under_way -= 1
        self._free_at = now


class Recorder(msgspec.Struct, frozen=True, kw_only=True):
    """What is noted of a run. `on_record` gets each request as it finishes, `on_progress` counts every so often."""

    goal: Goal = Goal()
    sample_interval_s: float = 1.0
    on_record: Callable[[Record], None] | None = None
    on_sample: Callable[[Sample], None] | None = None
    on_progress: Callable[[int, float], None] | None = None


class Simulation:
    """One run."""

    def __init__(
        self,
        arrivals: Arrivals,
        workers: int,
        limits: SchedulerConfig,
        routing: Routing,
        *,
        timing: StepTiming | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {workers}")
        self.arrivals = arrivals
        self.routing = routing
        recorder = recorder or Recorder()
        self.totals = Totals(recorder.goal)
        self.totals.per_worker = [0] * workers
        self.timeline = Timeline(recorder.sample_interval_s)
        self.now = 0.0
        routing.connect(self._placed, self._refused)
        self._limits = limits
        self._names = PromptNames(limits.block_size)
        self._timing = timing or StepTiming()
        self.workers = self._make_workers(workers)
        self._wakes: list[tuple[float, int]] = []
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._timer_count = 0
        self._on_record, self._on_sample = recorder.on_record, recorder.on_sample
        self._on_progress = recorder.on_progress
        self._started_tokens = self._started_cached = 0

    def _make_workers(self, count: int) -> list[SimulatedWorker]:
        routing = self.routing
        return [
            SimulatedWorker(
                i,
                self._limits,
                self._timing,
                self,
                cache_events=routing.wants_cache_events,
                progress=routing.wants_progress,
            )
            for i in range(count)
        ]

    # --- the clock

    def run(self, until_s: float = NEVER) -> Totals:
        """Let it all happen, up to `until_s` on the virtual clock; what is unfinished then does not count.

        Raises:
            TraceError: a request can never be served; says why.
        """
        arrivals, wakes, timers, timeline = self.arrivals, self._wakes, self._timers, self.timeline
        progress = 0
        while True:
            wake_at = wakes[0][0] if wakes else NEVER
            timer_at = timers[0][0] if timers else NEVER
            arrive_at, deadline = arrivals.next_at, self._next_deadline()
            now = min(wake_at, timer_at, arrive_at, deadline)
            if now > until_s or now == NEVER:
                break
            if timeline.due_at <= now:
                for sample in timeline.catch_up(now, self._sample):
                    if self._on_sample:
                        self._on_sample(sample)
            self.now = now
            if arrive_at == now:
                self._arrive(arrivals.pop(), now)
            elif deadline == now:
                self._tick(now)
            elif timer_at == now:
                heapq.heappop(timers)[2](now)
            else:
                worker = self.workers[heapq.heappop(wakes)[1]]
                if worker.wakes_at == now:  # else it was put off or sooner, and has another entry
                    worker.wake(now)
                    self._note(worker)
            progress += 1
            if self._on_progress and not progress % 256:
                self._on_progress(self.totals.completed, now)
        return self.totals

    def _next_deadline(self) -> float:
        """When whoever routes wants to know the time."""
        return self.routing.next_deadline()

    def _tick(self, now: float) -> None:
        self.routing.tick(now)

    def _at(self, when: float, then: Callable[[float], None]) -> None:
        """Do it at that time."""
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, then))

    def _note(self, worker: SimulatedWorker) -> None:
        if worker.wakes_at != NEVER:
            heapq.heappush(self._wakes, (worker.wakes_at, worker.index))

    def _arrive(self, request: TraceRequest, now: float) -> None:
        sequence = self._sequence(request, now)
        if self.routing.wants_cache_events:
            for worker in self.workers:
                worker.sync(now)
        self._route(sequence, now)

    def _sequence(self, request: TraceRequest, now: float) -> ReplayedSequence:
        totals = self.totals
        contents = self._names.contents(request, request.input_tokens)
        sequence = ReplayedSequence(
            str(totals.requests), request, self._names, contents, sequence_hashes(contents), now
        )
        totals.requests += 1
        return sequence

    def _route(self, sequence: ReplayedSequence, now: float) -> None:
        self.routing.route(sequence, now)

    def _placed(self, sequence: ReplayedSequence, choice: Choice, now: float) -> None:
        sequence.worker = choice.worker
        sequence.routed_at = now
        sequence.overlap_tokens, sequence.best_overlap_tokens = choice.overlap_tokens, choice.best_overlap_tokens
        self._give(self.workers[choice.worker], sequence, now)

    def _give(self, worker: SimulatedWorker, sequence: ReplayedSequence, now: float) -> None:
        with self._noting(worker):
            try:
                worker.submit(sequence, now)
            except InvalidArgument as e:
                raise TraceError(f"request {sequence.id} of the trace: {e}") from None

    @contextmanager
    def _noting(self, worker: SimulatedWorker) -> Iterator[None]:
        """Something is done that may wake the worker at another time."""
        before = worker.wakes_at
        yield
        if worker.wakes_at != before:
            self._note(worker)

    def _refused(self, sequence: ReplayedSequence, now: float) -> None:
        self.totals.refused += 1
        self.arrivals.finished(sequence.request, now)

    # --- what workers tell

    def first_token(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Listener`."""
        self.routing.first_token(sequence, now)

    def admitted(self, sequence: ReplayedSequence) -> None:
        """See `Listener`."""
        self._started_tokens += sequence.request.input_tokens
        self._started_cached += sequence.num_cached or 0

    def tokens(self, count: int, latency_s: float) -> None:
        """See `Listener`."""
        self.totals.itl_s.add(latency_s, count)

    def cache_changed(self, worker: int, changes: list[KvEventData], now: float) -> None:
        """See `Listener`."""
        self.routing.cache_changed(worker, changes, now)

    def progressed(self, sequences: list[ReplayedSequence]) -> None:
        """See `Listener`."""
        size = self._limits.block_size
        for sequence in sequences:
            for _ in range(sequence.num_output // size - sequence.output_blocks):
                sequence.output_blocks += 1
                self.routing.output_block(sequence)

    def finished(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Listener`."""
        self.routing.finished(sequence, now)
        self._close(sequence, now)

    def _close(self, sequence: ReplayedSequence, now: float) -> None:
        record = self._record(sequence, now)
        self.totals.add(record)
        if self._on_record:
            self._on_record(record)
        self.arrivals.finished(sequence.request, now)

    def _record(self, sequence: ReplayedSequence, now: float) -> Record:
        assert sequence.admitted_at is not None
        assert sequence.first_token_at is not None
        return Record(
            request_id=sequence.id,
            session_id=sequence.request.session_id,
            turn=sequence.request.turn,
            arrived_s=sequence.arrived_at,
            routed_s=sequence.routed_at,
            admitted_s=sequence.admitted_at,
            first_token_s=sequence.first_token_at,
            second_token_s=sequence.second_token_at,
            last_token_s=now,
            input_tokens=sequence.request.input_tokens,
            requested_tokens=sequence.request.output_tokens,
            output_tokens=sequence.answer_tokens,
            cached_tokens=(sequence.num_cached if sequence.reused_tokens is None else sequence.reused_tokens) or 0,
            overlap_tokens=sequence.overlap_tokens,
            best_overlap_tokens=sequence.best_overlap_tokens,
            worker=sequence.worker,
            prefill_worker=sequence.prefill_worker,
            transfer_s=sequence.transfer_s,
            resumed_s=sequence.resumed_at,
        )

    def _sample(self, at_s: float) -> Sample:
        schedulers = [worker.scheduler for worker in self.workers]
        sample = Sample(
            at_s,
            [len(scheduler.running) for scheduler in schedulers],
            [len(scheduler.waiting) for scheduler in schedulers],
            [round(scheduler.pool.in_use / scheduler.pool.capacity, 4) for scheduler in schedulers],
            self._started_tokens,
            self._started_cached,
        )
        self._started_tokens = self._started_cached = 0
        return sample


def numbered(requests: Iterable[TraceRequest], most: int | None) -> Iterator[TraceRequest]:
    """The first `most` of the requests, or all."""
    for count, request in enumerate(requests):
        if most is not None and count >= most:
            return
        yield request
