"""What must hold for any requests, in any order, with aborts at any moment."""

import hypothesis.strategies as st
from hypothesis import given, settings
from simulated import request, run, small_scheduler, tokens

from dynamo.mocker.scheduler import Scheduler
from dynamo.mocker.sequence import Status
from dynamo.mocker.timing import StepTiming

limits = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(4, 40),
        "block_size": st.integers(1, 6),
        "max_num_seqs": st.integers(1, 6),
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
actions = st.one_of(
    st.tuples(st.just("submit"), prompts, st.integers(1, 24)),
    st.tuples(st.just("plan")),
    st.tuples(st.just("complete")),
    st.tuples(st.just("abort"), st.integers(0, 30)),
)


class Naive:
    """A subscriber that only sees events."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def apply(self, scheduler: Scheduler) -> None:
        for event in scheduler.take_kv_events():
            if event.stored:
                assert event.stored.parent_hash is None or event.stored.parent_hash in self.held
                names = [block.block_hash for block in event.stored.blocks]
                assert self.held.isdisjoint(names)
                self.held.update(names)
            if event.removed:
                assert self.held.issuperset(event.removed.block_hashes)
                self.held.difference_update(event.removed.block_hashes)


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


@settings(max_examples=300, deadline=None)
@given(limits, st.lists(actions, max_size=60))
def test_blocks_and_sequences_are_accounted_for_under_any_interleaving(limits, actions):
    scheduler, naive, step, submitted = small_scheduler(**limits), Naive(), None, 0
    ended: dict[str, int] = {}
    asked: dict[str, int] = {}
    for action in actions:
        match action:
            case ("submit", prompt, max_tokens) if len(prompt) < scheduler.config.context_length:
                asked[str(submitted)] = min(max_tokens, scheduler.config.context_length - len(prompt))
                scheduler.add(str(submitted), request(prompt, max_tokens), now=0.0)
                submitted += 1
            case ("plan",) if step is None:
                step = scheduler.schedule(0.0)
                if step:
                    assert step.scheduled, "a step that computes nothing would be repeated for ever"
                    batch = sum(step.scheduled.values())
                    assert batch <= scheduler.config.max_num_batched_tokens
                    assert step.budget == scheduler.config.max_num_batched_tokens - batch
            case ("complete",) if step is not None:
                for name, output in scheduler.complete(step, 0.0):
                    ended[name] = ended.get(name, 0) + len(output.token_ids)
                step = None
            case ("abort", which):
                if scheduler.abort(str(which)):
                    asked.pop(str(which))
        check(scheduler, naive)
    if step:
        for name, output in scheduler.complete(step, 0.0):
            ended[name] = ended.get(name, 0) + len(output.token_ids)
    for name, outputs in run(scheduler).items():
        ended[name] = ended.get(name, 0) + len(tokens(outputs))
    check(scheduler, naive)
    assert scheduler.pool.in_use == scheduler.pool.references() == 0
    assert {name: ended[name] for name in asked} == asked


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
