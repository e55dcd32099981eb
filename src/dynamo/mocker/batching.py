"""Which tokens does the engine compute in the next step?

Continuous batching over paged KV, as engines of the field do it. A step first goes on with the running sequences
in order of arrival, then admits waiting ones while token budget, sequence limit and free blocks allow. A sequence
that finds no block pushes another one out, which is computed again later (preemption by recompute).

There is no clock and no waiting here, and no token either: the caller says what time it is, learns how long the step
takes, and comes back when that time has passed, on whatever clock it has. Steps in a row that only decode the same
sequences can be taken at once (`steady_steps`, `run_steady`), so that a virtual clock need not look at every token.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from dynamo.llm.kv_events import KvEventData, LoadMetrics
from dynamo.mocker.kv_cache import BlockPool
from dynamo.mocker.sequence import Sequence, Status
from dynamo.mocker.stats import SchedulerStats
from dynamo.mocker.timing import StepTiming
from dynamo.runtime.errors import InvalidArgument

_LPM_QUEUE = 128  # longer queues are served in order of arrival: matching each against the cache would cost too much

S = TypeVar("S", bound=Sequence)


def _known_tokens(seq: Sequence) -> int:
    return seq.num_tokens


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one rank. `reserve` says how many tokens' room a sequence must find to be admitted; `watermark` is
    the share of blocks kept free then, so that the running can grow before anyone is pushed out."""

    num_blocks: int = 16384
    block_size: int = 64
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32768
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    preemption_mode: Literal["lifo", "fifo"] = "lifo"
    watermark: float = 0.01
    schedule_policy: Literal["fifo", "lpm"] = "fifo"
    mix_prefill_and_decode: bool = True
    reserve: Callable[[Sequence], int] = field(default=_known_tokens)

    @property
    def context_length(self) -> int:
        """The longest sequence that can be served: it must fit the cache alone, and one step if not chunked."""
        longest = min(self.max_model_len, self.num_blocks * self.block_size)
        return longest if self.enable_chunked_prefill else min(longest, self.max_num_batched_tokens)


@dataclass(slots=True)
class Step(Generic[S]):
    """One forward pass: how many tokens of which sequence. `budget` is what is left of the batch's tokens,
    `context` the tokens that decoding sequences look back on, their newest included."""

    budget: int
    scheduled: dict[S, int] = field(default_factory=dict)
    prefills: int = 0
    prefill_tokens: int = 0
    context: int = 0
    duration_s: float = 0.0

    @property
    def decodes(self) -> int:
        """Sequences that compute one token, the one they put out last."""
        return len(self.scheduled) - self.prefills


class BatchScheduler(Generic[S]):
    """All sequences of one rank, and its blocks."""

    def __init__(self, config: SchedulerConfig, timing: StepTiming) -> None:
        self.config = config
        self.timing = timing
        self.pool = BlockPool(config.num_blocks, record_events=config.enable_prefix_caching)
        self.waiting: deque[S] = deque()
        self.running: list[S] = []
        self.stats = SchedulerStats()
        self._by_id: dict[str, S] = {}
        self._watermark = int(config.watermark * config.num_blocks)
        self._capacity_tokens = config.num_blocks * config.block_size

    def __len__(self) -> int:
        return len(self._by_id)

    def check(self, request_id: str, prompt: int) -> int:
        """How many tokens a new request with a prompt of `prompt` tokens could put out at most.

        Raises:
            InvalidArgument: it can never be served; names the field.
        """
        longest = self.config.context_length
        if request_id in self._by_id:
            raise InvalidArgument(f"request id {request_id!r} is in flight already", "request_id")
        if not prompt:
            raise InvalidArgument("token_ids: the prompt is empty", "token_ids")
        if prompt >= longest:
            raise InvalidArgument(
                f"token_ids: the prompt has {prompt} tokens and needs at least one more, "
                f"but the context length is {longest}",
                "token_ids",
            )
        return longest - prompt

    def enqueue(self, sequence: S) -> None:
        """Let a sequence that passed `check` wait for its turn."""
        if self.config.enable_prefix_caching:
            sequence.hash_blocks()
        self._by_id[sequence.id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks, even in the middle of a step. False if it is not here."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)
        return True

    # --- planning a step ---

    def schedule(self, now: float) -> Step[S] | None:
        """Plan the next step, or None when there is nothing to do until a request comes or blocks are given back.
        Blocks are taken now."""
        if not self._by_id:
            return None
        step: Step[S] = Step(self.config.max_num_batched_tokens)
        preempted = self.stats.preemptions.value
        if self.config.mix_prefill_and_decode:
            self._continue(step, self.running)
        else:
            self._continue(step, [seq for seq in self.running if seq.num_computed < seq.num_tokens - 1])
        if self.waiting and preempted == self.stats.preemptions.value:
            self._admit(step)
        if not self.config.mix_prefill_and_decode and not step.scheduled:
            self._continue(step, self.running)
        if not step.scheduled and preempted == self.stats.preemptions.value:
            return None
        share = step.context / self._capacity_tokens
        step.duration_s = self.timing.step_s(step.prefill_tokens, step.decodes, share)
        return step

    def _continue(self, step: Step[S], sequences: list[S]) -> None:
        """Give each running sequence the tokens it lacks, oldest first."""
        block_size, chunked = self.config.block_size, self.config.enable_chunked_prefill
        scheduled = step.scheduled
        filled: list[S] = []
        context = 0
        for seq in sequences.copy():
            if seq.status is not Status.RUNNING:
                continue  # pushed out a moment ago
            computed = seq.num_computed
            count = seq.num_tokens - computed
            if count > step.budget:
                if not chunked or not step.budget:
                    continue
                count = step.budget
            target = computed + count
            if target > seq.room and not self._grow(seq, target, step):
                continue
            scheduled[seq] = count
            step.budget -= count
            if count > 1 or computed < seq.num_prompt:
                step.prefills += 1
                step.prefill_tokens += count
            else:
                context += target
            if target // block_size > seq.num_named:
                filled.append(seq)
        step.context += context
        for seq in filled:
            if seq in scheduled:  # not pushed out since
                self._name_full_blocks(seq, seq.num_computed + scheduled[seq])

    def _grow(self, seq: S, target: int, step: Step[S]) -> bool:
        """Make room for `target` tokens, pushing others out if need be. False if `seq` itself was pushed out."""
        missing = -(-target // self.config.block_size) - seq.num_blocks
        while self.pool.available < missing:
            victim = self.running[-1] if self.config.preemption_mode == "lifo" else self.running[0]
            self._preempt(victim, step)
            if victim is seq:
                return False
        self._take_blanks(seq, missing)
        return True

    def _preempt(self, seq: S, step: Step[S]) -> None:
        count = step.scheduled.pop(seq, 0)
        if count:
            step.budget += count
            if count > 1 or (seq.num_computed < seq.num_prompt and not seq.transferred):
                step.prefills -= 1
                step.prefill_tokens -= count
            else:
                step.context -= seq.num_tokens
        self.pool.release(seq.held_names, seq.num_blanks)
        seq.forget_blocks()
        seq.status = Status.WAITING
        self.running.remove(seq)
        self.waiting.appendleft(seq)
        self.stats.preemptions.value += 1

    def _admit(self, step: Step[S]) -> None:
        """Start waiting sequences, first come first served, while the head of the queue fits."""
        config = self.config
        promised = self._promised()
        if config.schedule_policy == "lpm" and len(self.waiting) <= _LPM_QUEUE:
            self.waiting = deque(sorted(self.waiting, key=lambda seq: -self._cached_blocks(seq)))
        while self.waiting:
            seq = self.waiting[0]
            fit = self._fit(seq, step.budget, promised)
            if fit is None:
                return
            self.waiting.popleft()
            self._start(seq, *fit, step)
            promised += self._reserved(seq) - seq.num_blocks

    def _promised(self) -> int:
        """Blocks that running sequences have reserved and not taken yet."""
        return sum(self._reserved(seq) - seq.num_blocks for seq in self.running)

    def _fit(self, seq: S, budget: int, promised: int) -> tuple[int, int] | None:
        """Whether a sequence can start in a step with `budget` tokens left: its cached blocks, and tokens to compute.

        It fits when there is room for all that it reserves beside what the running ones reserved, and the watermark
        stays free. Without the second condition two long prompts could push each other out for ever.
        """
        config, pool = self.config, self.pool
        if not budget or len(self.running) >= config.max_num_seqs:
            return None
        hit = self._cached_blocks(seq)
        count = 1 if seq.transferred else seq.num_tokens - hit * config.block_size
        if count > budget:
            if not config.enable_chunked_prefill:
                return None
            count = budget
        newly_used = self._reserved(seq) - hit + pool.count_idle(seq.names[:hit])
        if self.running:
            if pool.available - promised - newly_used < self._watermark:
                return None
        elif self._blocks_to_start(seq, hit, count) > pool.available:
            return None  # blocks are kept for others to read
        return hit, count

    def _blocks_to_start(self, seq: S, hit: int, count: int) -> int:
        """Blocks that are not in use now and would be, with `hit` cached blocks and `count` tokens computed."""
        before = seq.num_tokens - 1 if seq.transferred else hit * self.config.block_size
        return -(-(before + count) // self.config.block_size) - hit + self.pool.count_idle(seq.names[:hit])

    def _start(self, seq: S, hit: int, count: int, step: Step[S]) -> None:
        seq.status = Status.RUNNING
        self.running.append(seq)
        self.pool.acquire(seq.names[:hit])
        seq.num_named = hit
        seq.room = hit * self.config.block_size
        seq.num_computed = seq.num_tokens - 1 if seq.transferred else seq.room
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
        target = seq.num_computed + count
        self._take_blanks(seq, -(-target // self.config.block_size) - hit)
        self._name_full_blocks(seq, target)
        step.scheduled[seq] = count
        step.budget -= count
        if seq.transferred:  # its one position costs what a decoding sequence's does
            step.context += target
        else:
            step.prefills += 1
            step.prefill_tokens += count

    def _reserved(self, seq: S) -> int:
        """Blocks that `seq` is promised while it runs."""
        return max(-(-self.config.reserve(seq) // self.config.block_size), seq.num_blocks)

    def _cached_blocks(self, seq: S) -> int:
        """Leading blocks that need not be computed. The last token always is: its output is the next token."""
        return self.pool.match(seq.names, (seq.num_tokens - 1) // self.config.block_size)

    def _take_blanks(self, seq: S, count: int) -> None:
        self.pool.allocate(count)
        seq.num_blanks += count
        seq.room += count * self.config.block_size

    def _name_full_blocks(self, seq: S, computed: int) -> None:
        """Share the blocks that are full once `computed` tokens are."""
        if not self.config.enable_prefix_caching:
            return
        first, last = seq.num_named, computed // self.config.block_size
        if first == last:
            return
        seq.hash_blocks()
        parent = seq.names[first - 1] if first else None
        self.pool.name(parent, seq.names[first:last], seq.contents[first:last])
        seq.num_named = last
        seq.num_blanks -= last - first

    # --- finishing a step ---

    def advance(self, step: Step[S]) -> list[S]:
        """The step's time has passed. Returns the sequences that got a token by it: those computed to their end."""
        made: list[S] = []
        running = Status.RUNNING
        for seq, count in step.scheduled.items():
            if seq.status is running:  # else aborted while the step was under way
                seq.num_computed += count
                if seq.num_computed == seq.num_tokens:
                    seq.num_tokens += 1
                    made.append(seq)
        return made

    def finish(self, finished: Iterable[S]) -> None:
        """These running sequences have got all their tokens."""
        for seq in finished:
            del self._by_id[seq.id]
            self._retire(seq)
        self.running = [seq for seq in self.running if seq.status is Status.RUNNING]

    def _retire(self, seq: S) -> None:
        """A sequence has all its tokens: what becomes of its blocks?"""
        self._free(seq)

    def _free(self, seq: S) -> None:
        seq.status = Status.FINISHED
        self.pool.release(seq.held_names, seq.num_blanks)
        seq.forget_blocks()

    # --- many steps at once ---

    def steady_steps(self) -> int:
        """How many steps from now on only give every running sequence one token, up to the end of the first one.

        0 if the next step does anything else: computes a prompt, starts a sequence or pushes one out. Holds until a
        request is added or aborted.
        """
        running = self.running
        if not running or len(running) > self.config.max_num_batched_tokens:
            return 0
        steps = self.config.max_model_len
        for seq in running:
            if seq.num_tokens - seq.num_computed != 1 or seq.num_computed < seq.num_prompt:
                return 0
            left = seq.max_tokens - seq.num_tokens + seq.num_prompt
            if left < steps:
                steps = left
        if self.waiting and not self._blocked():
            return 0
        while steps and self._blocks_for(steps) > self.pool.available:
            steps //= 2
        return steps

    def _blocked(self) -> bool:
        """Whether the head of the queue has to wait for a running sequence to end, if all only decode until then.

        What it lacks, it lacks until then: running sequences only take more blocks, and no prompt is computed.
        """
        config = self.config
        if config.schedule_policy == "lpm":
            return len(self.running) >= config.max_num_seqs
        budget = config.max_num_batched_tokens
        if config.mix_prefill_and_decode:
            budget -= len(self.running)
        return self._fit(self.waiting[0], budget, self._promised()) is None

    def _blocks_for(self, steps: int) -> int:
        """Blocks that must be allocated for so many steady steps."""
        size = self.config.block_size
        return sum(
            (seq.num_computed + steps - seq.room + size - 1) // size
            for seq in self.running
            if seq.num_computed + steps > seq.room
        )

    def steps_to_next_block(self) -> int:
        """How many steady steps it takes until a block is allocated or becomes full, the one that does it included."""
        size = self.config.block_size
        return min(
            size - seq.num_computed % size if seq.num_computed < seq.room else 1  # a fresh block is for one token first
            for seq in self.running
        )

    def context(self) -> int:
        """Tokens that the running sequences will look back on in the next steady step."""
        return sum(seq.num_tokens for seq in self.running)

    def steady_time_s(self, steps: int, context: int) -> float:
        """Seconds for so many steady steps, the first of them over `context` tokens."""
        capacity = self._capacity_tokens
        return self.timing.decode_run_s(steps, context / capacity, len(self.running) / capacity)

    def steady_steps_within(self, seconds: float, most: int, context: int) -> int:
        """How many of `most` steady steps have ended after `seconds`."""
        capacity = self._capacity_tokens
        return self.timing.decode_steps_within(seconds, most, context / capacity, len(self.running) / capacity)

    def run_steady(self, steps: int) -> None:
        """Take so many steady steps, at most `steady_steps`. Whoever has all tokens then is for the caller to find."""
        size = self.config.block_size
        for seq in self.running:
            target = seq.num_computed + steps
            seq.num_tokens += steps
            if target > seq.room:
                self._take_blanks(seq, (target - seq.room + size - 1) // size)
            if target // size > seq.num_named:
                self._name_full_blocks(seq, target)
            seq.num_computed = target

    # --- telling ---

    def take_kv_events(self) -> list[KvEventData]:
        """Blocks that came and went since the last call."""
        return self.pool.take_events()

    def load(self, dp_rank: int) -> LoadMetrics:
        """How busy this rank is now."""
        prefill = sum(
            max(0, seq.num_prompt - seq.num_computed) for seq in (*self.running, *self.waiting) if not seq.transferred
        )
        return LoadMetrics(
            worker_id=0,
            dp_rank=dp_rank,
            active_decode_blocks=self.pool.in_use,
            active_prefill_tokens=prefill,
            kv_used_blocks=self.pool.in_use,
            running_requests=len(self.running),
            waiting_requests=len(self.waiting),
        )
