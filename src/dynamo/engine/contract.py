"""What an engine must do to be served.

An engine is driven by plain calls and answers by plain calls: `submit` and `abort` in, one batch of outputs
an engine step out. `dynamo.engine.serving` does the rest (registration, the request plane, drain, metrics).
An engine written as an async generator is adapted by `dynamo.engine.generator`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from dynamo.engine.handoff import Ledger
from dynamo.engine.takeover import Claims
from dynamo.llm.kv_events import KvEventData, LoadMetrics, StorageTier
from dynamo.llm.protocols.engine import EngineOutput, PreprocessedRequest


class EngineConfig(msgspec.Struct, kw_only=True):
    """What an engine says of itself once it has started. Sizes in tokens unless the name says blocks.

    `publishes_kv_events` is False where there is no prefix cache to tell of. Without a block size there are none.
    `bootstrap_*` is where decode workers meet a prefill worker whose requests start at the same time as theirs.
    """

    model: str
    served_model_name: str | None = None
    model_aliases: list[str] = []
    context_length: int | None = None
    kv_cache_block_size: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    data_parallel_start_rank: int = 0
    data_parallel_size: int = 1
    publishes_kv_events: bool = True
    runtime_data: dict[str, Any] = {}
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None


class EngineCallbacks(Protocol):
    """How an engine answers. All calls are made on the event loop's thread."""

    def on_outputs(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        """Everything one engine step made: (request id, output) pairs. The last output of a request has a
        `finish_reason`; after it the engine forgets the id."""

    def on_error(self, request_id: str, error: Exception) -> None:
        """One request failed; the engine forgets the id."""

    def on_kv_events(self, events: list[KvEventData], dp_rank: int = 0, tier: StorageTier = "device") -> None:
        """Blocks came or went, in this order."""

    def on_load(self, load: LoadMetrics) -> None:
        """The load changed (about once a step; `worker_id` may be 0, the server fills it in)."""

    def on_death(self, reason: str) -> None:
        """The engine is dead and will not answer what is in flight. Called at most once."""


class LLMEngine(Protocol):
    """A token-in, token-out engine."""

    async def start(self, callbacks: EngineCallbacks) -> EngineConfig:
        """Load the model and be ready for `submit`."""

    def submit(self, request_id: str, request: PreprocessedRequest) -> None:
        """Accept one request with one choice (`n` is split above). Ids are unique among those in flight.

        Raises:
            InvalidArgument: the engine cannot do what the request asks; names the field.
        """

    def abort(self, request_id: str) -> None:
        """Stop a request within one step. An id that is unknown or finished is ignored; no output follows."""

    async def check_health(self) -> None:
        """Raises EngineShutdown if the engine cannot serve any more."""

    async def stop(self) -> None:
        """Free everything: processes, sockets, shared memory. Safe to call twice."""


class SplitEngine(LLMEngine, Protocol):
    """An engine that can be half of a pair: compute prompts for others, or go on from what others computed.

    With a `Ledger` it answers a request with one token and a handle for the prompt's KV (`disaggregated_params`).
    With `Claims` it takes such a handle (`prefill_result`), fetches the KV, and leaves out the token that the client
    has already. See `dynamo.engine.handoff`.
    """

    def bind_handoff(self, handoff: Ledger | Claims) -> None:
        """Called once, before `start`."""


Submit = Callable[[str, PreprocessedRequest], None]
"""As `LLMEngine.submit`."""


class ChangingEngine(SplitEngine, Protocol):
    """An engine that can be given another role while it serves."""

    def take_role(self, handoff: Ledger | Claims | None) -> Submit:
        """The way in for requests of another role; None: for whole requests. Those that came by another way go on as
        they began, and more may come there.

        Raises:
            InvalidArgument: it cannot, as it was started; says what would let it.
        """
