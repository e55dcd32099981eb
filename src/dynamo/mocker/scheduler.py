"""Which tokens does the engine compute in the next step?

Continuous batching over paged KV, as engines of the field do it. A step first goes on with the running sequences
in order of arrival, then admits waiting ones while token budget, sequence limit and free blocks allow. A sequence
that finds no block pushes another one out, which is computed again later (preemption by recompute).

There is no clock and no waiting here: the caller says what time it is, learns how long the step takes, and comes
back with `complete` when that time has passed, on whatever clock it has.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dynamo.llm.kv_events import KvEventData, LoadMetrics
from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PreprocessedRequest, PromptTokensDetails
from dynamo.mocker.kv_cache import BlockPool
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.sequence import Sequence, Status
from dynamo.mocker.stats import SchedulerStats
from dynamo.mocker.timing import StepTiming
from dynamo.runtime.errors import InvalidArgument

_LPM_QUEUE = 128  # longer queues are served in order of arrival: matching each against the cache would cost too much


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
    reserve: Callable[[Sequence], int] = field(default=lambda seq: len(seq.tokens))

    @property
    def context_length(self) -> int:
        """The longest sequence that can be served: it must fit the cache alone, and one step if not chunked."""
        longest = min(self.max_model_len, self.num_blocks * self.block_size)
        return longest if self.enable_chunked_prefill else min(longest, self.max_num_batched_tokens)


@dataclass(slots=True)
class Step:
    """One forward pass: how many tokens of which sequence. `budget` is what is left of the batch's tokens."""

    budget: int
    scheduled: dict[Sequence, int] = field(default_factory=dict)
    prefills: int = 0
    prefill_tokens: int = 0
    duration_s: float = 0.0

    @property
    def decodes(self) -> int:
        """Sequences that compute one token, the one they put out last."""
        return len(self.scheduled) - self.prefills


class Scheduler:
    """All sequences of one rank, and its blocks."""

    def __init__(self, config: SchedulerConfig, timing: StepTiming, sampler: Sampler) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, record_events=config.enable_prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._timing = timing
        self._sampler = sampler
        self._by_id: dict[str, Sequence] = {}
        self._watermark = int(config.watermark * config.num_blocks)

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request_id: str, request: PreprocessedRequest, now: float) -> None:
        """Queue a request.

        Raises:
            InvalidArgument: it can never be served, or says something impossible; names the field.
        """
        prompt, longest = len(request.token_ids), self.config.context_length
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
        script = self._sampler.script(request, longest - prompt)
        sequence = Sequence(request_id, request, script, self.config.block_size, now)
        if self.config.enable_prefix_caching:
            sequence.hash_blocks()
        self._by_id[request_id] = sequence
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

    def schedule(self, now: float) -> Step | None:
        """Plan the next step, or None when there is nothing to do. Blocks are taken now."""
        if not self._by_id:
            return None
        step = Step(self.config.max_num_batched_tokens)
        preempted = self.stats.preemptions.value
        if self.config.mix_prefill_and_decode:
            self._continue(step, self.running)
        else:
            self._continue(step, [seq for seq in self.running if seq.num_computed < len(seq.tokens) - 1])
        if self.waiting and preempted == self.stats.preemptions.value:
            self._admit(step)
        if not self.config.mix_prefill_and_decode and not step.scheduled:
            self._continue(step, self.running)
        share = self.pool.in_use / self.pool.capacity
        step.duration_s = self._timing.step_s(step.prefill_tokens, step.decodes, share)
        return step

    def _continue(self, step: Step, sequences: list[Sequence]) -> None:
        """Give each running sequence the tokens it lacks, oldest first."""
        block_size, chunked = self.config.block_size, self.config.enable_chunked_prefill
        scheduled = step.scheduled
        filled: list[Sequence] = []
        for seq in sequences.copy():
            if seq.status is not Status.RUNNING:
                continue  # pushed out a moment ago
            computed = seq.num_computed
            count = len(seq.tokens) - computed
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
            if target // block_size > seq.num_named:
                filled.append(seq)
        for seq in filled:
            if seq in scheduled:  # not pushed out since
                self._name_full_blocks(seq, seq.num_computed + scheduled[seq])

    def _grow(self, seq: Sequence, target: int, step: Step) -> bool:
        """Make room for `target` tokens, pushing others out if need be. False if `seq` itself was pushed out."""
        missing = -(-target // self.config.block_size) - seq.num_blocks
        while self.pool.available < missing:
            victim = self.running[-1] if self.config.preemption_mode == "lifo" else self.running[0]
            self._preempt(victim, step)
            if victim is seq:
                return False
        self._take_blanks(seq, missing)
        return True

    def _preempt(self, seq: Sequence, step: Step) -> None:
        count = step.scheduled.pop(seq, 0)
        if count:
            step.budget += count
            if count > 1 or seq.num_computed < seq.num_prompt:
                step.prefills -= 1
                step.prefill_tokens -= count
        self.pool.release(seq.held_names, seq.num_blanks)
        seq.forget_blocks()
        seq.status = Status.WAITING
        self.running.remove(seq)
        self.waiting.appendleft(seq)
        self.stats.preemptions.value += 1

    def _admit(self, step: Step) -> None:
        """Start waiting sequences, first come first served, while the head of the queue fits.

        A sequence fits when there is room for all that it reserves beside what the running ones reserved, and the
        watermark stays free. Without the second condition two long prompts could push each other out for ever.
        """
        config, pool = self.config, self.pool
        promised = sum(self._reserved(seq) - seq.num_blocks for seq in self.running)
        if config.schedule_policy == "lpm" and len(self.waiting) <= _LPM_QUEUE:
            self.waiting = deque(sorted(self.waiting, key=lambda seq: -self._cached_blocks(seq)))
        while self.waiting and step.budget and len(self.running) < config.max_num_seqs:
            seq = self.waiting[0]
            hit = self._cached_blocks(seq)
            count = len(seq.tokens) - hit * config.block_size
            if count > step.budget:
                if not config.enable_chunked_prefill:
                    return
                count = step.budget
            reserved = self._reserved(seq)
            newly_used = reserved - hit + pool.count_idle(seq.names[:hit])
            if self.running and pool.available - promised - newly_used < self._watermark:
                return
            self.waiting.popleft()
            self._start(seq, hit, count, step)
            promised += reserved - seq.num_blocks

    def _start(self, seq: Sequence, hit: int, count: int, step: Step) -> None:
        seq.status = Status.RUNNING
        self.running.append(seq)
        self.pool.acquire(seq.names[:hit])
        seq.num_named = hit
        seq.num_computed = hit * self.config.block_size
        seq.room = seq.num_computed
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
        target = seq.num_computed + count
        self._take_blanks(seq, -(-target // self.config.block_size) - hit)
        self._name_full_blocks(seq, target)
        step.scheduled[seq] = count
        step.budget -= count
        step.prefills += 1
        step.prefill_tokens += count

    def _reserved(self, seq: Sequence) -> int:
        """Blocks that `seq` is promised while it runs."""
        return max(-(-self.config.reserve(seq) // self.config.block_size), seq.num_blocks)

    def _cached_blocks(self, seq: Sequence) -> int:
        """Leading blocks that need not be computed. The last token always is: its output is the next token."""
        return self.pool.match(seq.names, (len(seq.tokens) - 1) // self.config.block_size)

    def _take_blanks(self, seq: Sequence, count: int) -> None:
        self.pool.allocate(count)
        seq.num_blanks += count
        seq.room += count * self.config.block_size

    def _name_full_blocks(self, seq: Sequence, computed: int) -> None:
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

    def complete(self, step: Step, now: float) -> list[tuple[str, EngineOutput]]:
        """The step's time has passed: every sequence that is computed to its end puts out its next token."""
        outputs: list[tuple[str, EngineOutput]] = []
        sampler = self._sampler
        vocabulary, size, stride = sampler.vocabulary, sampler.size, sampler.stride
        finished: list[Sequence] = []
        for seq, count in step.scheduled.items():
            if seq.status is not Status.RUNNING:
                continue  # aborted while the step was under way
            seq.num_computed += count
            tokens, script = seq.tokens, seq.script
            if seq.num_computed < len(tokens):
                continue
            index = len(tokens) - seq.num_prompt
            if script.plain and 0 < index < script.max_tokens - 1:
                token = vocabulary[(script.start + index * stride) % size]
                output = EngineOutput([token])
            else:
                output = sampler.sample(script, index)
                token = output.token_ids[0]
                if index == 0:
                    self._first_output(seq, output, now)
                if output.finish_reason:
                    output.completion_usage = _usage(seq)
                    finished.append(seq)
            tokens.append(token)
            outputs.append((seq.id, output))
        if finished:
            for seq in finished:
                del self._by_id[seq.id]
                self._free(seq)
                self.stats.e2e_s.observe(now - seq.arrived_at)
            self.running = [seq for seq in self.running if seq.status is Status.RUNNING]
        self.stats.step(step, len(outputs), now)
        return outputs

    def _first_output(self, seq: Sequence, output: EngineOutput, now: float) -> None:
        self.stats.ttft_s.observe(now - seq.arrived_at)
        if seq.prompt_logprobs is not None:
            output.prompt_logprobs = self._sampler.prompt_logprobs(seq.tokens, seq.prompt_logprobs)

    def _free(self, seq: Sequence) -> None:
        seq.status = Status.FINISHED
        self.pool.release(seq.held_names, seq.num_blanks)
        seq.forget_blocks()

    def take_kv_events(self) -> list[KvEventData]:
        """Blocks that came and went since the last call."""
        return self.pool.take_events()

    def load(self, dp_rank: int) -> LoadMetrics:
        """How busy this rank is now."""
        prefill = sum(max(0, seq.num_prompt - seq.num_computed) for seq in (*self.running, *self.waiting))
        return LoadMetrics(
            worker_id=0,
            dp_rank=dp_rank,
            active_decode_blocks=self.pool.in_use,
            active_prefill_tokens=prefill,
            kv_used_blocks=self.pool.in_use,
            running_requests=len(self.running),
            waiting_requests=len(self.waiting),
        )


def _usage(seq: Sequence) -> CompletionUsage:
    """Counts of a sequence whose last token is about to be appended."""
    completion = seq.num_output + 1
    details = PromptTokensDetails(seq.num_cached)
    return CompletionUsage(seq.num_prompt, completion, seq.num_prompt + completion, details)
