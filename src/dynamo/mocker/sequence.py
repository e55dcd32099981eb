"""What does the scheduler know about one request?"""

import enum
from collections.abc import Sequence as Tokens

from dynamo.llm.block_hash import compute_block_hash_for_seq, sequence_hashes
from dynamo.llm.protocols.engine import PreprocessedRequest
from dynamo.mocker.sampler import Script


class Status(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """How many tokens there are, how many of them have their KV computed, and the blocks that hold it.

    The first `num_named` blocks are full and shared under `names` (sequence hashes), the other `num_blanks` are
    its own. `room` is the number of tokens that all of them hold. `transferred` says that the KV of all but the last
    token comes from elsewhere and only needs room. What the tokens are is a subclass's affair.
    """

    __slots__ = (
        "arrived_at",
        "block_size",
        "contents",
        "id",
        "max_tokens",
        "names",
        "num_blanks",
        "num_cached",
        "num_computed",
        "num_named",
        "num_prompt",
        "num_tokens",
        "room",
        "status",
        "transferred",
    )

    def __init__(self, id_: str, num_prompt: int, max_tokens: int, block_size: int, now: float) -> None:
        self.id = id_
        self.num_prompt = num_prompt
        self.num_tokens = num_prompt
        self.max_tokens = max_tokens
        self.block_size = block_size
        self.status = Status.WAITING
        self.arrived_at = now
        self.num_cached: int | None = None
        self.num_computed = 0
        self.num_named = 0
        self.num_blanks = 0
        self.room = 0
        self.transferred = False
        self.names: list[int] = []
        self.contents: list[int] = []

    @property
    def num_output(self) -> int:
        """Tokens put out so far."""
        return self.num_tokens - self.num_prompt

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return self.num_named + self.num_blanks

    @property
    def held_names(self) -> list[int]:
        """The named blocks held, from the first on."""
        return self.names[: self.num_named]

    def hash_blocks(self) -> None:
        """Bring `contents` and `names` up to all full blocks of the tokens known."""
        raise NotImplementedError

    def forget_blocks(self) -> None:
        """The blocks are given back: everything must be computed again."""
        self.num_computed = self.num_named = self.num_blanks = self.room = 0
        self.transferred = False


class TokenSequence(Sequence):
    """A sequence of real tokens, with the script of its answer."""

    __slots__ = ("prompt_logprobs", "salts", "script", "tokens")

    def __init__(self, id_: str, request: PreprocessedRequest, script: Script, block_size: int, now: float) -> None:
        super().__init__(id_, len(request.token_ids), script.max_tokens, block_size, now)
        self.tokens = list(request.token_ids)
        self.script = script
        self.prompt_logprobs = request.output_options.prompt_logprobs
        routing = request.routing
        self.salts = (routing.lora_name, routing.cache_salt) if routing else (None, None)

    def hash_blocks(self) -> None:
        """See `Sequence.hash_blocks`."""
        size, done = self.block_size, len(self.contents)
        if len(self.tokens) // size == done:
            return
        fresh = self._local_hashes(self.tokens[done * size :])
        self.contents += fresh
        self.names += sequence_hashes(fresh, self.names[-1] if done else None)

    def _local_hashes(self, tokens: Tokens[int]) -> list[int]:
        lora_name, cache_salt = self.salts
        return compute_block_hash_for_seq(tokens, self.block_size, lora_name=lora_name, cache_namespace=cache_salt)
