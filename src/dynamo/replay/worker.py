"""How does a simulated engine run on a virtual clock?

The mocker's scheduler, with the waiting left out: what is under way is one step, or a run of steps that only decode
and are taken at once. A run is cut short when a request comes in, as the step under way then is its last.
"""

import math
from typing import Protocol

from dynamo.llm.kv_events import KvEventData
from dynamo.mocker.batching import BatchScheduler, SchedulerConfig, Step
from dynamo.mocker.timing import StepTiming
from dynamo.replay.prompts import ReplayedSequence

NEVER = math.inf


class Listener(Protocol):
    """Who wants to know what a worker does. Times are in seconds."""

    def first_token(self, sequence: ReplayedSequence, now: float) -> None:
        """The prompt is computed."""
        ...

    def admitted(self, sequence: ReplayedSequence) -> None:
        """It has started, and what of its prompt is cached is known."""
        ...

    def finished(self, sequence: ReplayedSequence, now: float) -> None:
        """The last token is made."""
        ...

    def tokens(self, count: int, latency_s: float) -> None:
        """`count` tokens were made, each `latency_s` after the one before it of its sequence."""
        ...

    def cache_changed(self, worker: int, changes: list[KvEventData], now: float) -> None:
        """Blocks came and went."""
        ...

    def progressed(self, sequences: list[ReplayedSequence]) -> None:
        """These made tokens. Only told where progress is watched."""
        ...


class SimulatedWorker:
    """One engine. Its owner calls `wake` when the time `wakes_at` has come."""

    def __init__(
        self,
        index: int,
        config: SchedulerConfig,
        timing: StepTiming,
        listener: Listener,
        *,
        cache_events: bool = False,
        progress: bool = False,
    ) -> None:
        self.index = index
        self.scheduler = self.make_scheduler(config, timing)
        self.scheduler.pool.record_events = cache_events and config.enable_prefix_caching
        self.wakes_at = NEVER
        self.steps = 0
        self.busy_s = 0.0
        self._listener = listener
        self._progress = progress
        self._step: Step[ReplayedSequence] | None = None
        self._began = 0.0
        # A run: steps in it, the context of its first, and when it first changes the cache.
        self._run = 0
        self._context = 0
        self._changes_at = NEVER
        self._fresh: list[ReplayedSequence] = []
        """Those whose next token is their second."""
        self._joined: list[ReplayedSequence] = []
        """Those that came with their prompt's KV and repeat their first token in the step under way."""

    def make_scheduler(self, config: SchedulerConfig, timing: StepTiming) -> BatchScheduler[ReplayedSequence]:
        """The engine's scheduler."""
        return BatchScheduler(config, timing)

    @property
    def requests(self) -> int:
        """Requests that are here, waiting or running."""
        return len(self.scheduler)

    def submit(self, sequence: ReplayedSequence, now: float) -> None:
        """A request has come in. Raises InvalidArgument if it can never be served."""
        scheduler = self.scheduler
        room = scheduler.check(sequence.id, sequence.num_prompt)
        sequence.max_tokens = min(sequence.max_tokens, room)
        self.interrupt(now)
        scheduler.enqueue(sequence)

    def interrupt(self, now: float) -> None:
        """Something has come in: what is under way ends with the step that is, and then there is something new."""
        if self._run:
            self._take(now)
            self._cut(now)
        if self.wakes_at == NEVER:
            self.wakes_at = now  # not at once: others that come at the same moment share the step

    def _cut(self, now: float) -> None:
        """End the run with the step under way. If none is, as one has ended just now, the run is over now."""
        scheduler, elapsed = self.scheduler, now - self._began
        self._run = 1 if elapsed > 0 else 0
        self.wakes_at = self._began + scheduler.steady_time_s(self._run, self._context)

    def sync(self, now: float) -> None:
        """Bring the cache and the counts up to `now`: take the steps of a run that have ended."""
        if now < self._changes_at or not self._run:
            return
        self._take(now)

    def _take(self, now: float) -> None:
        scheduler = self.scheduler
        ended = scheduler.steady_steps_within(now - self._began, self._run - 1, self._context)
        if ended:
            self._pass(ended, self._began + scheduler.steady_time_s(ended, self._context))
            self._expect_change()

    def _pass(self, steps: int, now: float) -> None:
        """So many steps of the run have ended by `now`."""
        scheduler, running = self.scheduler, len(self.scheduler.running)
        late = self._second_token(self._began + scheduler.steady_time_s(1, self._context))
        scheduler.run_steady(steps)
        self._listener.tokens(steps * running - late, (now - self._began) / steps)
        self._account(steps, now)
        self._context += steps * running
        self._run -= steps
        self._tell_changes(now)
        if self._progress:
            self._listener.progressed(scheduler.running)

    def _expect_change(self) -> None:
        self._changes_at = NEVER
        if self._progress:
            self._changes_at = self._began
        elif self.scheduler.pool.record_events:
            first = self.scheduler.steps_to_next_block()
            if first < self._run:
                self._changes_at = self._began + self.scheduler.steady_time_s(first, self._context)

    def wake(self, now: float) -> None:
        """What was under way has ended: see what came of it, and go on."""
        if self._run:
            self._pass(self._run, now)
            self._finish(self.scheduler.running, now)
        elif self._step is not None:
            self._complete(self._step, now)
        self._go_on(now)

    def _complete(self, step: Step[ReplayedSequence], now: float) -> None:
        made = self.scheduler.advance(step)
        tokens = step.decodes - len(self._joined) - self._second_token(now)
        if tokens > 0:
            self._listener.tokens(tokens, now - self._began)
        for sequence in made:
            if not sequence.begun:
                sequence.begun = True
                if sequence.first_token_at is None:
                    sequence.first_token_at = now
                self._fresh.append(sequence)
                self._listener.first_token(sequence, now)
        self._joined.clear()
        self._account(1, now)
        self._tell_changes(now)
        if self._progress:
            self._listener.progressed(made)
        self._finish(made, now)

    def _second_token(self, now: float) -> int:
        """Tell those that get their second token now. Returns how many of these had their first somewhere else."""
        late = 0
        for sequence in self._fresh:
            sequence.second_token_at = now  # a step that would skip a running one is none of this scheduler's
            if sequence.told_before:
                assert sequence.first_token_at is not None
                self._listener.tokens(1, now - sequence.first_token_at)
                late += 1
        self._fresh.clear()
        return late

    def _account(self, steps: int, now: float) -> None:
        self.steps += steps
        self.busy_s += now - self._began
        self._began = now

    def _finish(self, candidates: list[ReplayedSequence], now: float) -> None:
        done = [sequence for sequence in candidates if sequence.num_output >= sequence.max_tokens]
        if done:
            self.scheduler.finish(done)
            for sequence in done:
                self._listener.finished(sequence, now)

    def _go_on(self, now: float) -> None:
        scheduler = self.scheduler
        self._began, self._step, self._changes_at = now, None, NEVER
        self._prepare(now)
        self._run = 0 if self._joined else scheduler.steady_steps()
        if self._run:
            self._context = scheduler.context()
            self.wakes_at = now + scheduler.steady_time_s(self._run, self._context)
            self._expect_change()
            return
        self._step = scheduler.schedule(now)
        for sequence in reversed(scheduler.running):
            if sequence.admitted_at is not None:
                break
            sequence.admitted_at = now
            self._listener.admitted(sequence)
        self.wakes_at = NEVER if self._step is None else now + self._step.duration_s

    def _prepare(self, now: float) -> None:
        """Between two steps, before the next is planned."""

    def _tell_changes(self, now: float) -> None:
        changes = self.scheduler.take_kv_events()
        if changes:
            self._listener.cache_changed(self.index, changes, now)
