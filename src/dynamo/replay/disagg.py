"""What happens when prompts are computed by some workers and answered by others?

The simulator with two pools, each with a router of its own. A prompt that is to travel goes to a prefill worker for
one token; then a decode worker is chosen, finds room for it, has the KV sent, and answers. The prefill worker's blocks
are free again when the KV has arrived. Others are computed where they are answered, if a split policy says so.
"""

from collections.abc import Iterable

from dynamo.llm.kv_events import KvEventData
from dynamo.mocker.batching import SchedulerConfig
from dynamo.mocker.timing import StepTiming
from dynamo.replay.measures import Distribution
from dynamo.replay.pools import DecodeWorker, Pools, PrefillWorker
from dynamo.replay.prompts import ReplayedSequence
from dynamo.replay.routing import Choice, KvRouting, Routing
from dynamo.replay.simulate import Arrivals, Recorder, Simulation
from dynamo.replay.traces import TraceError
from dynamo.replay.worker import SimulatedWorker
from dynamo.router.split import SplitPolicy
from dynamo.router.split_choice import SplitChoice
from dynamo.runtime.errors import InvalidArgument


class PooledSimulation(Simulation):
    """One run. `workers` are the decode workers, then the prefill workers; `routing` is of the former."""

    workers: list[SimulatedWorker]

    def __init__(
        self,
        arrivals: Arrivals,
        pools: Pools,
        limits: SchedulerConfig,
        routing: Routing,
        prefill_routing: Routing,
        *,
        prefill_limits: SchedulerConfig | None = None,
        split: SplitPolicy | None = None,
        timing: StepTiming | None = None,
        prefill_timing: StepTiming | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.pools = pools
        self.prefill_routing = prefill_routing
        self._prefill_limits = prefill_limits or limits
        self._prefill_timing = prefill_timing or timing or StepTiming()
        if self._prefill_limits.block_size != limits.block_size:
            raise ValueError("block_size: prefill and decode workers must have the same")
        self.prefill_workers: list[PrefillWorker] = []
        self.decode_workers: list[DecodeWorker] = []
        super().__init__(arrivals, pools.decode_workers, limits, routing, timing=timing, recorder=recorder)
        prefill_routing.connect(self._prefill_placed, self._prefill_refused)
        self._choice = self._make_choice(split)
        self._wholes: dict[str, ReplayedSequence] = {}
        """By id: requests whose prompt is with a prefill worker."""
        self.transfers = Distribution()
        self.hold_s = Distribution()
        """From a prompt's last token at the prefill worker until its blocks are free there."""
        self.moved_tokens = 0
        self.kept = 0
        """Requests whose prompt was computed where it was answered."""

    def _make_choice(self, split: SplitPolicy | None) -> SplitChoice | None:
        if split is None or split.name == "always":
            return None
        if not isinstance(self.routing, KvRouting) or not isinstance(self.prefill_routing, KvRouting):
            raise ValueError(  # noqa: TRY004 - it is the experiment's setting that is wrong
                f"policy {self.routing.name} knows nothing of caches and loads, so it cannot split prompts"
            )
        return SplitChoice(split, self.prefill_routing.queue, self.routing.queue, self.pools.transfer_s)

    def _make_workers(self, count: int) -> list[SimulatedWorker]:
        routing, prefill = self.routing, self.prefill_routing
        self.decode_workers = [
            DecodeWorker(
                i,
                self._limits,
                self._timing,
                self,
                self._begin_transfer,
                cache_events=routing.wants_cache_events,
                progress=routing.wants_progress,
            )
            for i in range(count)
        ]
        side = _PrefillSide(self)
        self.prefill_workers = [
            PrefillWorker(
                count + i, self._prefill_limits, self._prefill_timing, side, cache_events=prefill.wants_cache_events
            )
            for i in range(self.pools.prefill_workers)
        ]
        return [*self.decode_workers, *self.prefill_workers]

    # --- the way of a request

    def _next_deadline(self) -> float:
        return min(self.routing.next_deadline(), self.prefill_routing.next_deadline())

    def _tick(self, now: float) -> None:
        for routing in (self.routing, self.prefill_routing):
            if routing.next_deadline() <= now:
                routing.tick(now)

    def _route(self, sequence: ReplayedSequence, now: float) -> None:
        if self._stays(sequence, now):
            self.kept += 1
            self.routing.route(sequence, now)
            return
        self._wholes[sequence.id] = sequence
        self.prefill_routing.route(sequence.prefill_part(), now)

    def _stays(self, sequence: ReplayedSequence, now: float) -> bool:
        """Whether its prompt is to be computed by a decode worker."""
        if self._choice is None:
            return False
        assert isinstance(self.routing, KvRouting)
        assert isinstance(self.prefill_routing, KvRouting)
        self.prefill_routing.catch_up(now)
        return not self._choice.decide(self.routing.request(sequence, now), now).remote

    def _prefill_placed(self, part: ReplayedSequence, choice: Choice, now: float) -> None:
        whole = self._wholes[part.id]
        part.worker = whole.prefill_worker = choice.worker
        whole.routed_at = now
        whole.overlap_tokens, whole.best_overlap_tokens = choice.overlap_tokens, choice.best_overlap_tokens
        self._give(self.prefill_workers[choice.worker], part, now)

    def _prefill_refused(self, part: ReplayedSequence, now: float) -> None:
        self._refused(self._wholes.pop(part.id), now)

    def prompt_done(self, part: ReplayedSequence, now: float) -> None:
        """A prefill worker has computed the prompt, and holds its blocks."""
        self.prefill_routing.first_token(part, now)
        self.prefill_routing.finished(part, now)
        whole = self._wholes.pop(part.id)
        whole.hold, whole.held_at = part.hold, now
        whole.reused_tokens, whole.admitted_at = part.num_cached, part.admitted_at
        if not self.pools.first_from_decode:
            whole.first_token_at, whole.told_before = now, True
            if whole.max_tokens == 1:
                whole.num_tokens += 1
                self._release(whole, now)
                self._close(whole, now)
                return
        self.routing.route(whole, now)

    def first_token(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Listener`."""
        if sequence.prefill_worker is not None:
            sequence.resumed_at = now
        super().first_token(sequence, now)

    def _placed(self, sequence: ReplayedSequence, choice: Choice, now: float) -> None:
        if sequence.hold is None:
            super()._placed(sequence, choice, now)
            return
        sequence.worker = choice.worker
        worker = self.decode_workers[choice.worker]
        with self._noting(worker):
            try:
                worker.expect(sequence, now)
            except InvalidArgument as e:
                raise TraceError(f"request {sequence.id} of the trace: {e}") from None

    def _refused(self, sequence: ReplayedSequence, now: float) -> None:
        if sequence.hold is not None:
            self._release(sequence, now)
        super()._refused(sequence, now)

    def _begin_transfer(self, sequence: ReplayedSequence, hit: int, now: float) -> bool:
        """A decode worker has room, and `hit` blocks of it. Whether the rest is there at once."""
        tokens = sequence.request.input_tokens
        if self.pools.kv_transfer_timing_mode == "destination_missing":
            tokens -= hit * self._limits.block_size
        seconds = self.pools.transfer_s(tokens)
        sequence.transfer_s = seconds
        self.transfers.add(seconds)
        self.moved_tokens += tokens
        if seconds <= 0:
            self._release(sequence, now)
            return True
        worker = self.decode_workers[sequence.worker]

        def arrived(now: float) -> None:
            self._release(sequence, now)
            with self._noting(worker):
                worker.arrived(sequence, now)

        self._at(now + seconds, arrived)
        return False

    def _release(self, sequence: ReplayedSequence, now: float) -> None:
        """Nobody needs its blocks at the prefill worker any more."""
        assert sequence.hold is not None
        assert sequence.prefill_worker is not None
        self.hold_s.add(now - sequence.held_at)
        worker = self.prefill_workers[sequence.prefill_worker]
        with self._noting(worker):
            worker.release(sequence.hold, now)
        sequence.hold = None


class _PrefillSide:
    """Hears the prefill workers. See `Listener`."""

    def __init__(self, simulation: PooledSimulation) -> None:
        self._simulation = simulation

    def first_token(self, sequence: ReplayedSequence, now: float) -> None:
        """Its only one: `finished` follows."""

    def admitted(self, sequence: ReplayedSequence) -> None:
        """See `Listener`."""
        self._simulation.admitted(sequence)

    def finished(self, sequence: ReplayedSequence, now: float) -> None:
        """See `Listener`."""
        self._simulation.prompt_done(sequence, now)

    def tokens(self, count: int, latency_s: float) -> None:
        """A first token follows none."""

    def cache_changed(self, worker: int, changes: list[KvEventData], now: float) -> None:
        """See `Listener`."""
        simulation = self._simulation
        simulation.prefill_routing.cache_changed(worker - simulation.pools.decode_workers, changes, now)

    def progressed(self, sequences: Iterable[ReplayedSequence]) -> None:
        """Answers grow elsewhere."""
