"""Which blocks of the engine does a prompt fill, when only the trace's block ids are known?

The content of an engine block is told by the ids it lies in and where: a number instead of a hash of tokens. Sequence
hashes are then chained as everywhere (`dynamo.llm.block_hash`), so the real cache and the real index do the rest.
"""

from collections.abc import Sequence

import msgspec
from xxhash import xxh3_64_intdigest

from dynamo.llm.block_hash import sequence_hashes
from dynamo.mocker.sequence import Sequence as EngineSequence
from dynamo.replay.traces import TraceRequest

_MASK = 2**64 - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: multiplying by it mod 2^64 gives no two numbers the same product


class PromptNames:
    """Content hashes for engine blocks of `block_size` tokens, from the ids of trace blocks."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._made = 0

    def contents(self, request: TraceRequest, tokens: int) -> list[int]:
        """Content hashes of the full blocks of the first `tokens` tokens.

        Raises:
            ValueError: neither block size divides the other.
        """
        size, trace_size = self.block_size, request.block_tokens
        full = tokens // size
        if trace_size % size == 0:
            per_id = trace_size // size
            parts = range(0, 2 * per_id, 2)  # even, so that `made_up` can be odd
            ids = request.ids[: -(-full // per_id)]
            return [((id_ * 2 * per_id + part) * _ODD) & _MASK for id_ in ids for part in parts][:full]
        if size % trace_size == 0:
            per_block = size // trace_size
            ids = request.ids
            return [_combined(ids[i * per_block : (i + 1) * per_block]) for i in range(full)]
        raise ValueError(
            f"block_size {size} and the trace's block size {trace_size}: one must be a multiple of the other"
        )

    def made_up(self, count: int) -> list[int]:
        """Content hashes that nothing else has."""
        first = self._made
        self._made += count
        return [((2 * number + 1) * _ODD) & _MASK for number in range(first, self._made)]


def _combined(ids: Sequence[int]) -> int:
    return xxh3_64_intdigest(b"".join(id_.to_bytes(16, "little", signed=True) for id_ in ids))


class Hold(msgspec.Struct):
    """Blocks of a prefill worker that wait to be read: named ones, and how many others."""

    names: list[int]
    blanks: int


class ReplayedSequence(EngineSequence):
    """A request under way, without tokens."""

    __slots__ = (
        "_names",
        "admitted_at",
        "begun",
        "best_overlap_tokens",
        "first_token_at",
        "held_at",
        "hold",
        "output_blocks",
        "overlap_tokens",
        "prefill_worker",
        "request",
        "resumed_at",
        "reused_tokens",
        "routed_at",
        "second_token_at",
        "told_before",
        "transfer_s",
        "worker",
    )

    def __init__(
        self, id_: str, request: TraceRequest, names: PromptNames, contents: list[int], hashes: list[int], now: float
    ) -> None:
        super().__init__(id_, request.input_tokens, request.output_tokens, names.block_size, now)
        self.request = request
        self.contents = contents
        self.names = hashes
        self.worker = -1
        self.overlap_tokens = 0
        self.best_overlap_tokens = 0
        self.routed_at = now
        self.output_blocks = 0  # of its answer, as far as the router was told
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.second_token_at: float | None = None
        self.begun = False
        """Whether its engine has made a token of it."""
        self.told_before = False
        """Whether its first token was told by another engine, which computed the prompt."""
        self.reused_tokens: int | None = None
        """Of its prompt, what the engine that computed it had cached, if that is another."""
        self.prefill_worker: int | None = None
        self.resumed_at: float | None = None
        """When the engine that answers made its first token."""
        self.transfer_s: float | None = None
        self.hold: Hold | None = None
        self.held_at = now
        self._names = names

    def prefill_part(self) -> "ReplayedSequence":
        """The request for one token that another engine gets, so that this one need not compute the prompt."""
        part = ReplayedSequence(self.id, self.request, self._names, self.contents[:], self.names[:], self.arrived_at)
        part.max_tokens = 1
        return part

    def loaded(self) -> None:
        """Its prompt's KV comes from elsewhere, but for the last position, which is computed as a token's is.

        To the scheduler the prompt's last token is therefore one that was put out, and one more may be.
        """
        self.num_prompt -= 1
        self.max_tokens += 1

    @property
    def answer_tokens(self) -> int:
        """Tokens put out so far, however the scheduler counts them."""
        return self.num_tokens - self.request.input_tokens

    def hash_blocks(self) -> None:
        """See `Sequence.hash_blocks`. What is generated is like nothing else, unless the trace names it."""
        done, full = len(self.names), self.num_tokens // self.block_size
        if full <= done:
            return
        fresh: list[int] = []
        if self.request.answer_ids:
            fresh = self._names.contents(self.request, full * self.block_size)[done:]
        fresh += self._names.made_up(full - done - len(fresh))
        self.contents += fresh
        self.names += sequence_hashes(fresh, self.names[-1] if done else None)
