"""What must hold for any requests, in any order, with aborts at any moment."""

from collections import Counter

import hypothesis.strategies as st
from hypothesis import event, given, settings

from dynamo.mocker.scheduler import Scheduler, Step
from dynamo.mocker.sequence import Status
from dynamo.mocker.timing import StepTiming
from tests.mocker.simulated import request, run, small_scheduler, tokens

limits = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(5, 20),
        "block_size": st.integers(1, 5),
        "max_num_seqs": st.integers(2, 6),
        "max_num_batched_tokens": st.integers(4, 40),
        "enable_prefix_caching": st.booleans(),
        "enable_chunked_prefill": st.booleans(),
        "preemption_mode": st.sampled_from(["lifo", "fifo"]),
        "schedule_policy": st.sampled_from(["fifo", "lpm"]),
        "mix_prefill_and_decode": st.booleans(),
    }
)
prompts = st.builds(
    lambda family, shared, own: [*range(family, family + shared), *own],  # prompts that share prefixes
    st.sampled_from([0, 500]),
    st.integers(0, 12),
    st.lists(st.integers(1000, 1003), min_size=1, max_size=8),
)
submits = st.tuples(st.just("submit"), prompts, st.integers(1, 30))
actions = st.one_of(
    submits,
    submits,
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("plan")),
    st.tuples(st.just("abort"), st.integers(0, 30)),
)


class Naive:
    """A subscriber that only sees events."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def apply(self, scheduler: Scheduler) -> None:
        for change in scheduler.take_kv_events():
            if change.stored:
                assert change.stored.parent_hash is None or change.stored.parent_hash in self.held
                names = [block.block_hash for block in change.stored.blocks]
                assert self.held.isdisjoint(names)
                self.held.update(names)
            if change.removed:
                assert self.held.issuperset(change.removed.block_hashes)
                self.held.difference_update(change.removed.block_hashes)


def check(scheduler: Scheduler, naive: Naive) -> None:
    pool = scheduler.pool
    live = [*scheduler.running, *scheduler.waiting]
    assert len(live) == len({seq.id for seq in live}) == len(scheduler)
    assert pool.references() == sum(seq.num_blocks for seq in live)
    assert all(seq.num_blocks == 0 for seq in scheduler.waiting)
    assert all(seq.status is Status.RUNNING for seq in scheduler.running)
    assert all(seq.room == seq.num_blocks * seq.block_size >= seq.num_computed for seq in live)
    assert len(scheduler.running) <= scheduler.config.max_num_seqs
    assert 0 <= pool.in_use <= pool.capacity
    assert pool.in_use <= len(pool.named()) + pool.references()
    assert len(pool.named()) <= pool.capacity
    naive.apply(scheduler)
    assert naive.held == pool.named()
    for seq in live:  # a held block's parents are held
        assert pool.match(seq.names, len(seq.names)) == sum(map(pool.holds, seq.names))


class Run:
    """A scheduler, what was asked of it, and what came out."""

    def __init__(self, **limits: object) -> None:
        self.scheduler = small_scheduler(**limits)
        self.naive = Naive()
        self.step: Step | None = None
        self.asked: dict[str, int] = {}
        self.made: Counter[str] = Counter()
        self.submitted = 0

    def submit(self, prompt: list[int], max_tokens: int) -> None:
        room = self.scheduler.config.context_length - len(prompt)
        if room > 0:
            self.asked[str(self.submitted)] = min(max_tokens, room)
            self.scheduler.add(str(self.submitted), request(prompt, max_tokens), now=0.0)
            self.submitted += 1

    def abort(self, which: int) -> None:
        if self.scheduler.abort(str(which)):
            del self.asked[str(which)]

    def plan(self) -> None:
        if self.step is not None:
            return
        self.step = self.scheduler.schedule(0.0)
        if self.step is not None:
            assert self.step.scheduled, "a step that computes nothing would be repeated for ever"
            limit = self.scheduler.config.max_num_batched_tokens
            batch = sum(self.step.scheduled.values())
            assert self.step.budget == limit - batch >= 0
            assert 0 <= self.step.prefill_tokens <= batch

    def complete(self) -> None:
        if self.step is not None:
            for name, output in self.scheduler.complete(self.step, 0.0):
                self.made[name] += len(output.token_ids)
            self.step = None

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.plan()
            self.check()
            self.complete()
            self.check()

    def check(self) -> None:
        check(self.scheduler, self.naive)


@settings(max_examples=300, deadline=None)
@given(limits, st.lists(actions, min_size=8, max_size=40))
def test_blocks_and_sequences_are_accounted_for_under_any_interleaving(limits, actions):
    it = Run(**limits)
    for action, *arguments in actions:
        getattr(it, action)(*arguments)
        it.check()
    event(f"preemptions: {min(3, it.scheduler.stats.preemptions.value):g}")
    it.complete()
    for name, outputs in run(it.scheduler).items():
        it.made[name] += len(tokens(outputs))
    it.check()
    assert it.scheduler.pool.in_use == it.scheduler.pool.references() == 0
    assert {name: it.made[name] for name in it.asked} == it.asked


@settings(max_examples=50, deadline=None)
@given(limits, st.lists(st.tuples(prompts, st.integers(1, 24)), max_size=10), st.floats(0.1, 100))
def test_output_does_not_depend_on_speed_or_company(limits, asked, speedup):
    def outputs(scheduler: Scheduler, chosen: list[int]) -> dict[str, list[int]]:
        for i in chosen:
            prompt, max_tokens = asked[i]
            if len(prompt) < scheduler.config.context_length:
                scheduler.add(str(i), request(prompt, max_tokens), now=0.0)
        return {name: tokens(out) for name, out in run(scheduler).items()}

    everyone = list(range(len(asked)))
    together = outputs(small_scheduler(**limits), everyone)
    assert outputs(small_scheduler(StepTiming(speedup), **limits), everyone) == together
    for i in everyone:
        assert outputs(small_scheduler(**limits), [i]).items() <= together.items()
