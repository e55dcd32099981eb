"""Many steps at once must be what as many single steps are."""

import hypothesis.strategies as st
import pytest
from hypothesis import event, given, settings

from dynamo.llm.block_hash import sequence_hashes
from dynamo.mocker.batching import BatchScheduler, SchedulerConfig
from dynamo.mocker.sequence import Sequence
from dynamo.mocker.timing import StepTiming
from tests.mocker.test_invariants import limits


class Numbered(Sequence):
    """A sequence whose tokens are its own, but for those of a family's prompt."""

    def __init__(self, number, family, num_prompt, max_tokens, block_size):
        super().__init__(str(number), num_prompt, max_tokens, block_size, 0.0)
        self.number, self.family = number, family

    def hash_blocks(self):
        for block in range(len(self.names), self.num_tokens // self.block_size):
            shared = (block + 1) * self.block_size <= self.num_prompt
            self.contents.append(hash((self.family if shared else 1000 + self.number, block)) % 2**64)
        self.names = sequence_hashes(self.contents)


class Trial:
    """A scheduler run to the end on its own clock, by single steps or by as many at once as there are."""

    def __init__(self, config, at_once, asked):
        self.scheduler = BatchScheduler(config, StepTiming())
        self.at_once, self.now, self.steps, self.ends, self.changes = at_once, 0.0, 0, {}, []
        self.leaps = 0
        for number, (family, prompt, output) in enumerate(asked):
            self.scheduler.enqueue(Numbered(number, family, prompt, output, config.block_size))

    def run(self):
        while len(self.scheduler):
            assert self.steps < 10_000
            steady = self.scheduler.steady_steps() if self.at_once else 0
            if steady:
                self.now += self.scheduler.steady_time_s(steady, self.scheduler.context())
                self.scheduler.run_steady(steady)
                self.steps += steady
                self.leaps += steady > 1
            else:
                step = self.scheduler.schedule(self.now)
                self.now += step.duration_s
                self.scheduler.advance(step)
                self.steps += 1
            done = [seq for seq in self.scheduler.running if seq.num_output == seq.max_tokens]
            self.scheduler.finish(done)
            for seq in done:
                self.ends[seq.id] = (self.steps, pytest.approx(self.now))
            self.changes += self.scheduler.take_kv_events()
        return self

    def kept(self):
        held = set()
        for change in self.changes:
            if change.stored:
                held.update(block.block_hash for block in change.stored.blocks)
            if change.removed:
                held.difference_update(change.removed.block_hashes)
        return held


requests = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 18), st.integers(1, 30)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(limits, requests, st.booleans())
def test_steps_at_once_end_where_single_steps_end(limits, asked, whole_answers_reserved):
    if whole_answers_reserved:
        limits = limits | {"reserve": lambda seq: seq.num_prompt + seq.max_tokens}
    config = SchedulerConfig(**limits)
    asked = [
        (family, min(prompt, config.context_length - 1), output)
        for family, prompt, output in asked
        if config.context_length > 1
    ]
    asked = [(family, prompt, min(output, config.context_length - prompt)) for family, prompt, output in asked]
    single, leaping = Trial(config, False, asked).run(), Trial(config, True, asked).run()
    event(f"leaps: {min(3, leaping.leaps)}, preemptions: {min(2, leaping.scheduler.stats.preemptions.value):g}")
    assert leaping.ends == single.ends
    assert leaping.scheduler.stats.preemptions.value == single.scheduler.stats.preemptions.value
    assert leaping.scheduler.pool.in_use == single.scheduler.pool.in_use == 0
    assert leaping.scheduler.pool.named() == single.scheduler.pool.named()
    if config.enable_prefix_caching:
        assert leaping.kept() == leaping.scheduler.pool.named()


def test_a_lone_answer_is_one_leap():
    trial = Trial(SchedulerConfig(), True, [(0, 1000, 500)]).run()
    assert (trial.steps, trial.leaps) == (500, 1)


def test_the_next_block_is_foreseen():
    scheduler = BatchScheduler(SchedulerConfig(block_size=64), StepTiming())
    scheduler.enqueue(Numbered(0, 0, 100, 500, 64))
    scheduler.advance(scheduler.schedule(0.0))
    scheduler.take_kv_events()
    assert scheduler.steps_to_next_block() == 28
    scheduler.run_steady(27)
    assert not scheduler.take_kv_events()
    assert scheduler.steps_to_next_block() == 1
    scheduler.run_steady(1)
    assert len(scheduler.take_kv_events()) == 1


@given(
    st.integers(1, 400),
    st.floats(0, 1.5),
    st.floats(0, 0.02),
    st.sampled_from([StepTiming(), StepTiming(2.0, 3.0), StepTiming(0), StepTiming(1.0, 0)]),
)
def test_the_time_of_many_steps_is_the_sum_of_their_times(steps, share, growth, timing):
    each = [timing.step_s(0, 1, share + i * growth) for i in range(steps)]
    assert timing.decode_run_s(steps, share, growth) == pytest.approx(sum(each))


@given(st.integers(1, 400), st.floats(0, 1.5), st.floats(0, 0.02), st.floats(0, 1.1))
def test_steps_that_have_ended_are_counted_by_their_times(steps, share, growth, part):
    timing = StepTiming()
    seconds = part * timing.decode_run_s(steps, share, growth)
    ended = timing.decode_steps_within(seconds, steps, share, growth)
    assert 0 <= ended <= steps
    assert timing.decode_run_s(ended, share, growth) <= seconds
    assert ended == steps or timing.decode_run_s(ended + 1, share, growth) > seconds
