"""Which tokens does the simulated engine put out in a step?

The batching is `dynamo.mocker.batching`'s; this adds requests with tokens, and the sampler's answers.
"""

from dynamo.llm.protocols.engine import CompletionUsage, EngineOutput, PreprocessedRequest, PromptTokensDetails
from dynamo.mocker.batching import BatchScheduler, SchedulerConfig
from dynamo.mocker.batching import Step as BatchStep
from dynamo.mocker.sampler import Sampler
from dynamo.mocker.sequence import Status, TokenSequence
from dynamo.mocker.timing import StepTiming

__all__ = ["Scheduler", "SchedulerConfig", "Step"]

Step = BatchStep[TokenSequence]


class Scheduler(BatchScheduler[TokenSequence]):
    """A batch scheduler whose sequences have tokens."""

    def __init__(self, config: SchedulerConfig, timing: StepTiming, sampler: Sampler) -> None:
        super().__init__(config, timing)
        self._sampler = sampler
        self._keep: set[str] = set()
        self._kept: dict[str, TokenSequence] = {}

    def add(self, request_id: str, request: PreprocessedRequest, now: float, *, transferred: int | None = None) -> None:
        """Queue a request.

        Args:
            transferred: the prompt's KV comes from elsewhere; so many of its tokens were found in a cache there.

        Raises:
            InvalidArgument: it can never be served, or says something impossible; names the field.
        """
        room = self.check(request_id, len(request.token_ids))
        script = self._sampler.script(request, room)
        sequence = TokenSequence(request_id, request, script, self.config.block_size, now)
        if transferred is not None:
            sequence.transferred, sequence.num_cached = True, transferred
        self.enqueue(sequence)

    def held_tokens(self, request: PreprocessedRequest) -> int:
        """How many of the prompt's tokens are in the cache: of its full blocks, but for the last token."""
        if not self.config.enable_prefix_caching:
            return 0
        prompt = TokenSequence("", request, self._sampler.script(request, 1), self.config.block_size, 0.0)
        prompt.hash_blocks()
        return self._cached_blocks(prompt) * self.config.block_size

    def keep(self, request_id: str) -> None:
        """Hold this request's blocks once it has ended, until `free_kept`."""
        self._keep.add(request_id)

    def take_kept(self, request_id: str) -> TokenSequence | None:
        """The sequence of a request that has ended and still has its blocks."""
        return self._kept.pop(request_id, None)

    def free_kept(self, sequence: TokenSequence) -> None:
        """Give its blocks back."""
        self._free(sequence)

    def abort(self, request_id: str) -> bool:
        """See `BatchScheduler.abort`."""
        self._keep.discard(request_id)
        return super().abort(request_id)

    def _retire(self, seq: TokenSequence) -> None:
        if seq.id in self._keep:
            self._keep.discard(seq.id)
            seq.status = Status.FINISHED
            self._kept[seq.id] = seq
        else:
            self._free(seq)

    def complete(self, step: Step, now: float) -> list[tuple[str, EngineOutput]]:
        """The step's time has passed: every sequence that is computed to its end puts out its next token."""
        outputs: list[tuple[str, EngineOutput]] = []
        sampler = self._sampler
        vocabulary, size, stride = sampler.vocabulary, sampler.size, sampler.stride
        finished: list[TokenSequence] = []
        for seq in self.advance(step):
            script = seq.script
            index = seq.num_tokens - seq.num_prompt - 1
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
            seq.tokens.append(token)
            outputs.append((seq.id, output))
        if finished:
            self.finish(finished)
            for seq in finished:
                self.stats.e2e_s.observe(now - seq.arrived_at)
        self.stats.step(step.prefill_tokens, step.decodes, len(outputs), now)
        return outputs

    def _first_output(self, seq: TokenSequence, output: EngineOutput, now: float) -> None:
        self.stats.ttft_s.observe(now - seq.arrived_at)
        if seq.prompt_logprobs is not None:
            output.prompt_logprobs = self._sampler.prompt_logprobs(seq.tokens, seq.prompt_logprobs)


def _usage(seq: TokenSequence) -> CompletionUsage:
    """Counts of a sequence whose last token has been made."""
    details = PromptTokensDetails(seq.num_cached)
    return CompletionUsage(seq.num_prompt, seq.num_output, seq.num_tokens, details)
