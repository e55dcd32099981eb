"""What passes between the parts of the router: who could take a request, what it asks for, what was decided.

Columns, not objects: a fleet of a thousand workers is a few lists of numbers that the book of active requests
keeps up to date, so that a decision costs a few list comprehensions and no object for a worker.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import msgspec

from dynamo.runtime.errors import InvalidArgument

if TYPE_CHECKING:
    from dynamo.router.journey import Journey

Number = TypeVar("Number", int, float)

DEFAULT_BATCH_TOKENS = 8192  # where a worker does not say max_num_batched_tokens: vLLM's default


class WorkerKey(NamedTuple):
    """What a request is routed to: one data-parallel rank of one worker."""

    worker_id: int
    dp_rank: int = 0


class Overlap(NamedTuple):
    """How much of a prompt a worker holds, in blocks from the prompt's start.

    `device` blocks come first; `host` is how many more follow if host memory is looked at too, `disk` how many more
    after those.
    """

    device: int = 0
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        """Blocks that need not be computed."""
        return self.device + self.host + self.disk


NO_OVERLAP = Overlap()


class WorkerLimits(msgspec.Struct, frozen=True):
    """What a worker said of itself when it registered; None where it did not."""

    total_blocks: int | None = None
    max_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    taints: frozenset[str] = frozenset()


class RouterOverride(msgspec.Struct, frozen=True):
    """What one request changes of the router's configuration [K37]; None leaves it."""

    overlap_score_credit: float | None = None
    overlap_score_credit_decay: float | None = None
    prefill_load_scale: float | None = None
    decode_active_request_weight: float | None = None
    router_temperature: float | None = None
    assume_kv_reuse: bool | None = None
    track_prefill_tokens: bool | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidArgument(
                    f"router_config_override.{name} must be a number of at least 0, not {value!r}",
                    f"router_config_override.{name}",
                )

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "RouterOverride":
        """From a request's own words; `overlap_score_weight` is the old name of `overlap_score_credit`.

        Raises InvalidArgument for an unknown name or a value that cannot be meant.
        """
        given = {_OLD_NAMES.get(name, name): value for name, value in settings.items()}
        unknown = given.keys() - set(cls.__struct_fields__)
        if unknown:
            raise InvalidArgument(
                f"router_config_override.{min(unknown)} is not one of {', '.join(cls.__struct_fields__)}",
                "router_config_override",
            )
        try:
            return msgspec.convert(given, cls)
        except msgspec.ValidationError as e:
            raise InvalidArgument(f"router_config_override: {e}", "router_config_override") from None


_OLD_NAMES = {"overlap_score_weight": "overlap_score_credit", "temperature": "router_temperature"}


class RouteRequest(msgspec.Struct):
    """One prompt that wants a worker. `sequence_hashes` are of its full blocks, in order."""

    request_id: str
    token_count: int
    sequence_hashes: Sequence[int]
    priority_jump: float = 0.0
    strict_priority: int = 0
    policy_class: str | None = None
    expected_output_tokens: int | None = None
    session_id: str | None = None
    session_final: bool = False
    """The client says that this is the session's last request."""
    allowed: frozenset[WorkerKey] | None = None
    required_taints: frozenset[str] = frozenset()
    preferred_taints: Mapping[str, float] = {}
    override: RouterOverride | None = None
    computed: bool = False
    """Another worker has computed the prompt, and the client perhaps seen a token (`computed_elsewhere`)."""
    journey: "Journey | None" = None
    """The way that the KV of a computed prompt has to whoever gets it, where that is to count."""
    arrived_at: float = 0.0

    @property
    def ignores_caches(self) -> bool:
        """Whether no policy is to see what workers hold of the prompt: nobody need compute what is missing."""
        return self.computed and self.override is not None and self.override.overlap_score_credit == 0


class Fleet(Protocol):
    """The workers by position, in columns. Read only; a position means the same worker until one joins or leaves."""

    workers: list[WorkerKey]
    limits: list[WorkerLimits]
    prefill_tokens: list[int]
    """Prompt tokens that were sent to the worker and are not computed yet."""
    prefill_requests: list[int]
    """Requests that have made no token yet."""
    decode_blocks: list[int]
    """Distinct KV blocks that active requests hold."""
    context_blocks: list[int]
    """The same with shared blocks counted for each request: what an engine reads for a token of each."""
    requests: list[int]
    """Active requests."""
    oldest_prefill: list[int]
    """Of the queued tokens, those of the prompt that the worker has had longest: engines compute it first."""
    progress_at: list[float]
    """When the worker last made a first token, or began with the prompt that it has had longest, if that is later."""
    version: int
    """Another number whenever positions or limits have changed."""
    touched: set[int]
    """Positions whose numbers have changed since the policy, which may keep columns of its own, emptied this."""


class Prefilled(msgspec.Struct, frozen=True):
    """A request made its first token, and how the worker stood when it was sent there. What policies learn from."""

    worker: WorkerKey
    new_tokens: int
    """Prompt tokens the worker had to compute for it."""
    queued_tokens: int
    """Prompt tokens of others that were before it."""
    decodes: int
    """Requests that were past their first token."""
    decode_blocks: int
    ttft_s: float


class Decoded(msgspec.Struct, frozen=True):
    """A request ended in order, `output_tokens` and `decode_s` after its first token."""

    worker: WorkerKey
    output_tokens: int
    decode_s: float
    requests: int
    """Active requests of the worker when this one ended, itself among them."""
    decode_blocks: int


class View(msgspec.Struct):
    """One request against the fleet, as a policy sees it.

    What workers hold comes in groups, so that a thousand workers that hold the same system prompt cost as much as one;
    `..._column` methods give it by position.
    """

    fleet: Fleet
    request: RouteRequest
    block_size: int
    blocks: int
    """Blocks the prompt fills, the last one perhaps in part."""
    held: Sequence[tuple[Overlap, Collection[int]]]
    """What the caches at these positions hold of the prompt; of several groups a position is in, the last counts."""
    shared: Sequence[tuple[int, Collection[int]]]
    """Of the prompt's blocks, how many active requests at these positions hold already; the last counts."""
    most_overlap: int
    """The most blocks that any worker holds."""
    now: float

    def overlap(self, position: int) -> Overlap:
        """What this worker's cache holds of the prompt."""
        for overlap, positions in reversed(self.held):
            if position in positions:
                return overlap
        return NO_OVERLAP

    def overlap_column(self, value: Callable[[Overlap], Number], none: Number) -> list[Number]:
        """By position, the value of what it holds; `none` where that is nothing."""
        return _column(len(self.fleet.workers), [(value(held), at) for held, at in self.held], none)

    def new_tokens(self, position: int) -> int:
        """Prompt tokens this worker would have to compute: all but its cached blocks, and at least one."""
        return self.new_tokens_after(self.overlap(position))

    def new_token_column(self, weight: Number) -> list[Number]:
        """`new_tokens` by position, times `weight`."""
        count, size, length = self.request.token_count, self.block_size, len(self.fleet.workers)
        column = [weight * count] * length
        for (device, host, disk), positions in self.held:
            held = (device + host + disk) * size
            new = weight * (count - held if held < count else 1) if held else weight * count
            if len(positions) == length:
                column = [new] * length
            else:
                for position in positions:
                    column[position] = new
        return column

    def new_tokens_after(self, overlap: Overlap) -> int:
        """`new_tokens` of a worker that holds so much."""
        held = overlap.device + overlap.host + overlap.disk
        return max(1, self.request.token_count - held * self.block_size) if held else self.request.token_count

    def shared_blocks(self, position: int) -> int:
        """How many of the prompt's blocks active requests hold there already."""
        for blocks, positions in reversed(self.shared):
            if position in positions:
                return blocks
        return 0

    def shared_block_column(self) -> list[int]:
        """`shared_blocks` by position."""
        return _column(len(self.fleet.workers), self.shared, 0)

    def potential_decode_blocks(self, position: int) -> int:
        """Distinct blocks that active requests would hold there if this one were added."""
        return self.fleet.decode_blocks[position] + self.blocks - self.shared_blocks(position)


def _column(length: int, groups: Iterable[tuple[Number, Collection[int]]], none: Number) -> list[Number]:
    column = [none] * length
    for value, positions in groups:
        if len(positions) == length:
            column = [value] * length
        else:
            for position in positions:
                column[position] = value
    return column


class Decision(msgspec.Struct):
    """Where a request goes, and what spoke for it. `hit_rate` is cached tokens over prompt tokens, 0 to 1."""

    worker: WorkerKey
    overlap: Overlap
    new_tokens: int
    cost: float
    hit_rate: float
    policy: str
    reason: str
    candidates: int
    best_overlap_blocks: int = 0
    queued_ms: float = 0.0
    explanation: dict[str, Any] | None = None


class OverlapSource(Protocol):
    """Who holds what. The block index is one, the approximate index another."""

    def find(self, sequence_hashes: Sequence[int], now: float) -> dict[WorkerKey, Overlap]:
        """The workers that hold at least the first block. Those that hold equally much may share one `Overlap`."""
        ...


class PredictingOverlapSource(OverlapSource, Protocol):
    """One that guesses what a worker will hold from what is sent there [K34][K35]."""

    def routed(self, worker: WorkerKey, sequence_hashes: Sequence[int], now: float) -> None:
        """A prompt was sent to a worker."""
        ...


class GroupedOverlapSource(OverlapSource, Protocol):
    """One that can name those who hold equally much at once: at a thousand workers that saves a tenth of a millisecond.

    A worker in several groups holds what the last of them says. The sequences of workers may be kept and compared by
    identity: they never change.
    """

    def groups(self, sequence_hashes: Sequence[int], now: float) -> Sequence[tuple[Overlap, Sequence[WorkerKey]]]:
        """As `find`."""
        ...
