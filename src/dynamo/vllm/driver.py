"""What do the two ways of driving vLLM have in common?

A driver owns the processes of one vLLM engine. `dynamo.vllm.engine` turns requests into `DriverRequest`s and a
driver answers through `DriverEvents`, one call an engine step. There are two: `dynamo.vllm.engine_core` talks to
vLLM's engine core directly, `dynamo.vllm.async_llm` uses the public `AsyncLLM`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from dynamo.llm.protocols.engine import EngineOutput

PARENT_ENV = "DYN_VLLM_PARENT_PID"  # tells vLLM's processes whom to watch; see `dynamo.vllm.guard`
SPIN_LESS_ENV = "DYN_VLLM_SPIN_LESS"  # set where vLLM's waits are known and to be changed; see `dynamo.vllm.spinning`
EXTERNAL_TOKENS = "external_tokens"  # in `EngineOutput.engine_data` of a first output, where a driver knows
FIRST_TOKEN = "dynamo_first_token"  # noqa: S105 - in SamplingParams.extra_args; see `dynamo.vllm.first_token`
SCRATCH_ENV = "DYN_VLLM_SCRATCH"  # a directory that is to go when that process is gone


@dataclass(frozen=True, slots=True)
class DriverRequest:
    """One request in vLLM's terms. `priority` is vLLM's: the smaller goes first."""

    request_id: str
    token_ids: list[int]
    sampling_params: Any
    lora_request: Any = None
    cache_salt: str | None = None
    priority: int = 0
    dp_rank: int | None = None
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What vLLM's scheduler says of one rank after a step. `kv_usage` is the used share of its blocks, 0 to 1;
    `transfers` is what its KV connector counted since it last said something."""

    dp_rank: int
    running: int
    waiting: int
    kv_usage: float
    transfers: dict[str, Any] | None = None


class DriverEvents(Protocol):
    """Where a driver reports to. All calls are made on the event loop's thread.

    The last output of a request whose KV vLLM keeps for others has vLLM's `kv_transfer_params` as its
    `disaggregated_params`.
    """

    def on_step(self, outputs: list[tuple[str, EngineOutput]]) -> None:
        """What one engine step made."""

    def on_kept(self, params: dict[str, Any]) -> None:
        """vLLM keeps the KV of a request that was aborted just before it ended: these are its parameters."""

    def on_failed(self, request_id: str, error: Exception) -> None:
        """One request failed inside the engine; the driver has forgotten it."""

    def on_engine_load(self, load: EngineLoad) -> None:
        """The scheduler's numbers after a step."""

    def on_engine_death(self, reason: str) -> None:
        """The engine's processes are gone or unusable. Called at most once."""


class Driver(Protocol):
    """One running vLLM engine."""

    name: str

    async def start(self, events: DriverEvents) -> None:
        """Start the engine's processes and wait until the model is loaded.

        Raises:
            RuntimeError: the engine did not come up; the reason is in vLLM's own log lines.
        """

    def submit(self, request: DriverRequest) -> None:
        """Check one request as vLLM does and send it.

        Raises:
            ValueError: vLLM refuses the request (its validation errors, on the direct driver).
        """

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests; nothing is reported for them any more. Unknown ids are ignored."""

    def dead(self) -> str | None:
        """Why the engine cannot serve any more, or None while it can."""

    async def control(self, verb: str, *args: Any) -> Any:
        """Ask the engine for something beside requests: `profile`, `sleep`, `wake_up`, `reset_prefix_cache`,
        `add_lora`, `remove_lora`, `collective_rpc`."""

    def flush_metrics(self) -> None:
        """Bring vLLM's own metrics up to date; somebody is about to read them."""

    async def stop(self) -> None:
        """End the engine's processes and free what they held. Safe to call twice, and while starting."""
